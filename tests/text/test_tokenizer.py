"""Golden ids, the search for a vocabulary, and every backend against tiktoken."""

from __future__ import annotations

import importlib.util
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from fastcollate.errors import InputError, MissingExtraError
from fastcollate.text import tokenizer as module
from fastcollate.text import vocabulary
from fastcollate.text.engines import gigatoken
from fastcollate.text.engines.backends import RaggedIds, Texts, UnencodableError, without_surrogates
from fastcollate.text.tokenizer import Tokenizer, load_tokenizer
from fastcollate.text.vocabulary import load_encoding

HAS_GIGATOKEN = importlib.util.find_spec("gigatoken") is not None
NEEDS_GIGATOKEN = pytest.mark.skipif(not HAS_GIGATOKEN, reason="gigatoken is not installed")
BACKENDS = ["tiktoken", pytest.param("gigatoken", marks=NEEDS_GIGATOKEN)]
TEXTS = st.text(max_size=40) | st.text("ab \n\r\t'1,.é\u3000\x1c\ud83d", max_size=25)


def rows(encoded: RaggedIds) -> list[list[int]]:
    return [row.tolist() for row in np.split(encoded.ids, encoded.offsets[1:-1])] if len(encoded.offsets) > 1 else []


def test_golden_ids() -> None:
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.vocab_size == 50257
    assert tokenizer.pad_token_id == 50256
    assert tokenizer.encode("Hello, world!\n\n### Response:\nFine.") == [
        15496, 11, 995, 0, 198, 198, 21017, 18261, 25, 198, 34389, 13,
    ]  # fmt: skip
    assert tokenizer.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert tokenizer.encode("") == []
    assert tokenizer.decode([15496, 11, 995, 0]) == "Hello, world!"
    assert tokenizer.fingerprint[:16] == "20940fd36bff2b33"
    assert tokenizer.special_texts == ("<|endoftext|>",)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@given(texts=st.lists(TEXTS, max_size=6))
def test_backends_give_the_ids_of_tiktoken(backend: str, texts: list[str]) -> None:
    tokenizer = load_tokenizer("gpt2", backend)
    assert tokenizer.backend == backend
    encoded = tokenizer.encode_batch(texts)
    assert encoded.ids.dtype in (np.uint16, np.uint32)
    assert encoded.offsets.dtype == np.int64
    assert rows(encoded) == [load_encoding("gpt2").encode_ordinary(text) for text in texts]


@given(left=TEXTS, right=TEXTS)
def test_where_texts_part_the_ids_are_theirs(left: str, right: str) -> None:
    tokenizer = load_tokenizer("gpt2")
    left, right = without_surrogates(left), without_surrogates(right)
    if tokenizer.parts_at(left, right):
        assert tokenizer.encode(left + right) == tokenizer.encode(left) + tokenizer.encode(right)


def flat(texts: list[str]) -> Texts:
    encoded = [without_surrogates(text).encode() for text in texts]
    return Texts(data=b"".join(encoded), offsets=np.cumsum([0, *map(len, encoded)]))


@pytest.mark.parametrize("backend", BACKENDS)
@given(texts=st.lists(TEXTS, max_size=6))
def test_texts_that_lie_end_to_end_are_the_same_texts(backend: str, texts: list[str]) -> None:
    tokenizer = load_tokenizer("gpt2", backend)
    assert flat(texts).strings() == Texts(texts).strings() == [without_surrogates(text) for text in texts]
    assert rows(tokenizer.encode_batch(flat(texts))) == rows(tokenizer.encode_batch(Texts(texts)))


@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), max_size=6))
def test_pairs_that_join_are_those_that_are_not_proved_to_part(pairs: list[tuple[str, str]]) -> None:
    tokenizer = load_tokenizer("gpt2")
    texts = [without_surrogates(text) for pair in pairs for text in pair]
    expected = [i for i in range(len(pairs)) if not tokenizer.parts_at(texts[2 * i], texts[2 * i + 1])]
    assert tokenizer.pairs_that_join(flat(texts)) == tokenizer.pairs_that_join(Texts(texts)) == expected


def test_chapter_texts_part_before_the_response() -> None:
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.parts_at("Add.", "\n\n### Response:\n3")
    assert not tokenizer.parts_at("Add.\n", "\n\n### Response:\n3")
    assert not tokenizer.parts_at("Add", "ition")
    assert tokenizer.parts_at("assistant\n", "Hello")
    assert tokenizer.parts_at("", "x")


@given(before=TEXTS, response=TEXTS, after=TEXTS)
def test_a_response_has_the_tokens_that_hold_a_byte_of_it(before: str, response: str, after: str) -> None:
    tokenizer, encoding = load_tokenizer("gpt2"), load_encoding("gpt2")
    before, response, after = map(without_surrogates, (before, response, after))
    text = before + response + after
    ids = np.array(tokenizer.encode(text), np.uint16)
    begin, end = tokenizer.response_bounds(text, ids, [len(before), len(before) + len(response)])
    starts = np.cumsum([0, *(len(encoding.decode_single_token_bytes(token)) for token in ids.tolist())])
    first, last = len(before.encode()), len((before + response).encode())
    held = [i for i in range(len(ids)) if starts[i + 1] > first and starts[i] < last and response]
    assert list(range(begin, end)) == held


def test_the_installed_package_gives_the_vocabulary_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(_: str) -> tiktoken.Encoding:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    encoding = load_encoding.__wrapped__("gpt2")
    assert encoding.n_vocab == 50257
    assert encoding.encode("Hello, world!") == [15496, 11, 995, 0]
    with pytest.raises(InputError, match=r"cl100k_base.*no route to host.*TIKTOKEN_CACHE_DIR"):
        load_encoding.__wrapped__("cl100k")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"fastcollate\[vocab\].*connect once to the network"):
        load_encoding.__wrapped__("gpt2")


def test_a_download_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_DOWNLOAD_SECONDS", 0.05)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: time.sleep(5))
    assert load_encoding.__wrapped__("gpt2").n_vocab == 50257


def test_unknown_names() -> None:
    with pytest.raises(InputError, match=r"tokenizer 'gpt5': choose one of gpt2"):
        load_tokenizer("gpt5")
    with pytest.raises(InputError, match=r"backend='rust': choose one of 'auto'"):
        load_tokenizer("gpt2", "rust")


def test_a_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    load_encoding("gpt2")
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"fastcollate\[fast\]"):
        module._cached.__wrapped__("gpt2", "gigatoken")


class Wrong:
    """A backend that makes one mistake."""

    name = "gigatoken"

    def __init__(self, at: str) -> None:
        self.at = at

    def encode_batch(self, texts: list[str]) -> RaggedIds:
        ids = [load_encoding("gpt2").encode_ordinary(text) for text in texts]
        ids = [[*row, 1] if text == self.at else row for row, text in zip(ids, texts, strict=True)]
        return RaggedIds(np.array([i for row in ids for i in row], np.uint32), np.cumsum([0, *map(len, ids)]))

    def trim(self) -> None: ...


def broken(monkeypatch: pytest.MonkeyPatch, at: str) -> Tokenizer:
    monkeypatch.setattr(module, "_choose_backend", lambda *_: Wrong(at))
    return module._cached.__wrapped__("gpt2")


def test_one_wrong_id_stops_the_job_naming_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = broken(monkeypatch, "a  b   c\r\n\r\nd")
    with pytest.raises(RuntimeError, match=r"different ids for 'a  b   c.*--backend tiktoken"):
        tokenizer.check_before_start()
    texts = ["fine", "wrong"]
    tokenizer = broken(monkeypatch, "wrong")
    tokenizer.check_before_start()
    with pytest.raises(RuntimeError, match="different ids for 'wrong'"):
        tokenizer.check(texts, tokenizer.encode_batch(texts), seed=0)


@pytest.mark.slow
@NEEDS_GIGATOKEN
def test_caches_are_thrown_away_and_ids_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = module._cached.__wrapped__("gpt2", "gigatoken")
    strings = [f"{number} words about the number {number * number}, é {'x' * number}\n" for number in range(300)]
    expected = [tokenizer.encode(text) for text in strings]
    encoded = [text.encode() for text in strings]
    offsets = np.cumsum([3, *map(len, encoded)])  # the first text need not begin at 0
    monkeypatch.setattr(gigatoken, "_PIECE_BYTES", 20_000)
    for texts in (Texts(strings), Texts(data=b"..." + b"".join(encoded), offsets=offsets)):
        before = tokenizer._backend.fast._tokenizer
        assert rows(tokenizer.encode_batch(texts)) == expected
        assert tokenizer._backend.fast._tokenizer is before
        with monkeypatch.context() as patch:
            patch.setattr(gigatoken, "_MOST_GROWTH_AT_WORK", -(1 << 60))
            assert rows(tokenizer.encode_batch(texts)) == expected
        assert tokenizer._backend.fast._tokenizer is not before
    monkeypatch.setattr(gigatoken, "_MOST_GROWTH", -(1 << 60))
    before = tokenizer._backend.fast._tokenizer
    tokenizer.trim()
    assert tokenizer._backend.fast._tokenizer is not before
    assert rows(tokenizer.encode_batch([])) == []


@pytest.mark.slow
@NEEDS_GIGATOKEN
def test_threads_may_share_caches_that_are_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = module._cached.__wrapped__("gpt2", "gigatoken")
    monkeypatch.setattr(gigatoken, "_PIECE_BYTES", 20_000)
    monkeypatch.setattr(gigatoken, "_MOST_GROWTH_AT_WORK", -(1 << 60))
    texts = [f"{number} words {number * number} é" * 9 for number in range(100)]
    expected = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        for encoded in pool.map(lambda _: tokenizer.encode_batch(texts), range(8)):
            assert rows(encoded) == expected


def with_a_gap() -> tiktoken.Encoding:
    """As p50k_base: the end-of-text's id lies among the others."""
    gpt2 = load_encoding("gpt2")
    ranks = gpt2._mergeable_ranks | {b" " * 12: 50257, b" " * 13: 50258}
    return tiktoken.Encoding(
        "gpt2", pat_str=gpt2._pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )


@NEEDS_GIGATOKEN
def test_a_vocabulary_that_gigatoken_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_encoding", lambda _: with_a_gap())
    tokenizer = module._cached.__wrapped__("gpt2")
    assert tokenizer.backend == "tiktoken"
    assert rows(tokenizer.encode_batch(["x" + " " * 13 + "y"])) == [with_a_gap().encode_ordinary("x" + " " * 13 + "y")]
    with pytest.raises(InputError, match=r"tokenizer 'gpt2': gigatoken does not take it .*dense.*; use tiktoken"):
        module._cached.__wrapped__("gpt2", "gigatoken")


@pytest.mark.parametrize("text", [" " * 1_000_000, "\n" * 1_000_000, "x" + " \n" * 500_000 + "y"])
def test_a_panic_of_tiktoken_names_the_text(text: str) -> None:
    tokenizer = load_tokenizer("gpt2", "tiktoken")
    with pytest.raises(UnencodableError, match=r"gpt2 fails on the text .*StackOverflow"):
        tokenizer.encode(text)
    with pytest.raises(UnencodableError) as caught:
        tokenizer.encode_batch(["fine", text, "fine", text])
    assert list(caught.value.reasons) == [1, 3]
    assert "tiktoken fails on the text" in caught.value.reasons[3]
    assert rows(tokenizer.encode_batch(["fine"])) == [tokenizer.encode("fine")]


class Raises:
    """A backend that cannot take some texts."""

    name = "tokenizers"

    def encode_batch(self, texts: Texts) -> RaggedIds:
        if any("bad" in text for text in texts):
            raise ValueError("no\nbad texts")
        return RaggedIds(np.zeros(0, np.uint32), np.zeros(len(texts) + 1, np.int64))


def test_what_a_backend_raises_names_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_choose_backend", lambda *_: Raises())
    tokenizer = module._cached.__wrapped__("gpt2")
    with pytest.raises(UnencodableError) as caught:
        tokenizer.encode_batch(["a", "bad", "b", "bad too"])
    assert caught.value.reasons == dict.fromkeys([1, 3], "tokenizers fails on the text (no)")


@pytest.fixture
def tokenizer_json(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["the cat sat on the mat and the hat"] * 5, trainer)
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


def test_a_tokenizer_json(tokenizer_json: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_json))
    assert tokenizer.backend == "tokenizers"
    assert tokenizer.pad_token_id == 0
    texts = ["the cat", "</s> is text", "", "\ud83d x"]
    encoded = rows(tokenizer.encode_batch(texts))
    assert encoded == [tokenizer.encode(text) for text in texts]
    assert 0 not in encoded[1]
    assert tokenizer.decode(encoded[0]) == "the cat"
    ids = np.array(encoded[0])
    assert tokenizer.response_bounds("the cat", ids, [0, 3, 4, 7]) == [0, 1, len(ids) - 1, len(ids)]
    assert tokenizer.response_bounds("the cat", ids, [1, 1, 4, 5]) == [0, 0, 1, 2]
    with pytest.raises(InputError, match="use auto"):
        load_tokenizer(str(tokenizer_json), "tiktoken")


def test_malformed_tokenizer_json(tokenizer_json: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(str(tokenizer_json.parent / "none.json"))
    content = json.loads(tokenizer_json.read_text())
    content["added_tokens"] = []
    content["model"]["vocab"]["<nothing>"] = content["model"]["vocab"].pop("</s>")
    nameless = tokenizer_json.parent / "nameless.json"
    nameless.write_text(json.dumps(content))
    with pytest.raises(InputError, match="no end-of-text token found"):
        load_tokenizer(str(nameless))
    (tokenizer_json.parent / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<nothing>"}}))
    assert load_tokenizer(str(nameless)).pad_token_id == 0
    for broken in ("{", "[]", '{"eos_token": {}}', "[" * 200_000, '{"a": ' * 5_000 + "1" + "}" * 5_000):
        (tokenizer_json.parent / "tokenizer_config.json").write_text(broken)
        with pytest.raises(InputError, match=r"tokenizer_config\.json: cannot be read .*; mend or remove it"):
            load_tokenizer(str(nameless))
    for broken in ("{", "[" * 200_000 + "]" * 200_000):
        nameless.write_text(broken)
        with pytest.raises(InputError, match=r"not a tokenizer\.json"):
            load_tokenizer(str(nameless))
