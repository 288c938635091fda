"""gigatoken and tiktoken on every code point there is: what only one of them knows is tiktoken's work."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from fastcollate.text.engines import agreement
from fastcollate.text.engines.agreement import AgreeingBackend
from fastcollate.text.engines.backends import RaggedIds, Texts, TiktokenBackend

pytest.importorskip("gigatoken")
CODES = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
RUN = 256
WORDS = ["'s", "'ll", "12", "123", "  ", "\n\n", "the", " the", "The", "..", " a", "é"]


def ranks() -> dict[bytes, int]:
    """The bytes, and each word with what leads to it: merges that show where texts are parted."""
    found = {bytes([byte]): byte for byte in range(256)}
    for word in WORDS:
        for stop in range(2, len(word.encode()) + 1):
            found.setdefault(word.encode()[:stop], len(found))
    return found


def backend_of(scheme: str) -> AgreeingBackend:
    from fastcollate.text.engines.gigatoken import GigatokenBackend

    with pytest.MonkeyPatch.context() as patch:  # the vocabularies are not needed for the patterns
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
        patch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **_: {})
        constructor: Callable[[], dict[str, Any]] = getattr(openai_public, scheme)
        pattern = constructor()["pat_str"]
    encoding = tiktoken.Encoding(f"test_{scheme}", pat_str=pattern, mergeable_ranks=ranks(), special_tokens={})
    return AgreeingBackend(
        GigatokenBackend.of_ranks(encoding, scheme.removesuffix("_base")), TiktokenBackend(encoding), f"test {scheme}"
    )


@pytest.fixture(scope="module", params=["gpt2", "cl100k_base", "o200k_base"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgreeingBackend]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield backend_of(request.param)


def rows(encoded: RaggedIds) -> list[list[int]]:
    return [part.tolist() for part in np.split(encoded.ids, encoded.offsets[1:-1])]


def exact(backend: AgreeingBackend, texts: list[str]) -> list[list[int]]:
    return [backend._exact.encode(text) for text in texts]


def in_contexts(code: int) -> str:
    return f"{chr(code)}'s  {chr(code)}1234 a{chr(code)}The\n\n"


def differences(encode: Callable[[Texts], RaggedIds], texts: list[str], right: list[list[int]]) -> list[int]:
    return [i for i, ids in enumerate(rows(encode(Texts(texts)))) if ids != right[i]]


@pytest.mark.slow
def test_every_code_point(backend: AgreeingBackend) -> None:
    found = []
    for first in range(0, len(CODES), 64 * RUN):
        runs = [CODES[start : start + RUN] for start in range(first, min(first + 64 * RUN, len(CODES)), RUN)]
        texts = ["".join(map(in_contexts, run)) for run in runs]
        right = exact(backend, texts)
        assert not differences(backend.encode_batch, texts, right), hex(first)
        for number in differences(backend.fast.encode_batch, texts, right):
            alone = list(map(in_contexts, runs[number]))
            found += [runs[number][i] for i in differences(backend.fast.encode_batch, alone, exact(backend, alone))]
    assert backend.differing_codes() == found


@pytest.mark.slow
def test_only_texts_that_hold_one_are_tiktokens(backend: AgreeingBackend) -> None:
    codes = backend.differing_codes()
    if not codes:
        pytest.skip("these two releases know the same code points")
    ends = [codes[0], codes[-1], codes[len(codes) // 2]]
    texts = ["plain", "é 日本", "", *(f"{'é' * place}{chr(code)}'s" for place, code in enumerate(ends)), "नमस्ते", "🙂"]
    assert backend.differing_texts(Texts(texts)) == [3, 4, 5]
    assert backend.differing_texts(Texts([])) == []
    neighbours = [chr(code) for code in {code + step for code in codes for step in (-1, 1)} - {*codes} if code < 0xD800]
    assert backend.differing_texts(Texts(neighbours)) == []
    assert backend.differing_texts(Texts([chr(code) for code in codes])) == list(range(len(codes)))


@lru_cache
def the_backend() -> AgreeingBackend:
    return backend_of("o200k_base")


@pytest.mark.slow
@given(data=st.data())
def test_batches_of_both_kinds(data: st.DataObject) -> None:
    backend = the_backend()
    odd = list(map(chr, backend.differing_codes() or [0x88F]))
    pieces = st.sampled_from([*WORDS, "日", "😀", "\u0301", odd[0], odd[-1], odd[len(odd) // 3]])
    texts = data.draw(st.lists(st.lists(pieces, max_size=6).map("".join), max_size=6))
    assert rows(backend.encode_batch(Texts(texts)))[: len(texts)] == exact(backend, texts)


def test_what_was_found_is_kept_for_these_releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(AgreeingBackend, "_ask_both", lambda _: asked.append(1) or [0x88F, 0x323B0])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backend = backend_of("gpt2")
    assert backend.differing_codes() == backend.differing_codes() == [0x88F, 0x323B0]
    assert len(asked) == 1
    (path,) = (tmp_path / "fastcollate").iterdir()
    whole = path.read_bytes()
    deep = b"[" * 200_000 + b"]" * 200_000
    deep = hashlib.sha256(deep).hexdigest().encode() + b" " + deep  # as if this process had written it
    for damaged in (b"", b"[1", b"null", deep, whole[: len(whole) // 2], whole.replace(b"2191", b"2190")):
        path.write_bytes(damaged)
        assert backend.differing_codes() == [0x88F, 0x323B0]
        assert path.read_bytes() == whole
    assert len(asked) == 7
    monkeypatch.setattr(agreement, "version", lambda _: "another")
    backend.differing_codes()
    assert len(asked) == 8


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(AgreeingBackend, "_ask_both", lambda _: [0x88F])
    for place in (tmp_path / "file", Path("/proc/none")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        assert backend_of("gpt2").differing_codes() == [0x88F]
