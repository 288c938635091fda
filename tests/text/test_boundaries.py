"""What is said to tokenize apart does, by every pattern: a search for counter-examples over classes of characters."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import regex
from tiktoken_ext import openai_public

from fastcollate.text.boundaries import pairs_that_join, parts_at
from fastcollate.text.engines.backends import Texts
from fastcollate.text.vocabulary import SCHEMES

# One of each class that a pattern tells from others, and of each that Python's `isspace` and `isalnum` see otherwise.
CLASSES = "asA1 \t\n\r/'.:_é日٣²\u0301\u01c5\u02b0\xa0\x1c\x85\u2028\u200b😀\x00"
FEW = "aA1 \n\r/'.日\u0301\xa0\x1c😀"


@pytest.fixture(params=sorted(SCHEMES))
def scheme_and_pattern(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Any]:
    """An encoding's scheme and its pattern, without its vocabulary."""
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **_: {})
    pattern = getattr(openai_public, request.param)()["pat_str"]
    return SCHEMES[request.param], regex.compile(pattern)


def texts(characters: str, most: int) -> Iterator[str]:
    for size in range(1, most + 1):
        yield from map("".join, product(characters, repeat=size))


def counter_examples(scheme: str, pattern: Any, lefts: list[str], rights: list[str]) -> Iterator[tuple[str, str]]:
    alone = {text: pattern.findall(text) for text in {*lefts, *rights}}
    for left, right in product(lefts, rights):
        if parts_at(scheme, left, right) and pattern.findall(left + right) != alone[left] + alone[right]:
            yield left, right


@pytest.mark.slow
@pytest.mark.parametrize(("left", "right"), [((CLASSES, 2), (CLASSES, 2)), ((FEW, 3), (FEW, 1)), ((FEW, 1), (FEW, 3))])
def test_no_counter_example(scheme_and_pattern: tuple[str, Any], left: tuple[str, int], right: tuple[str, int]) -> None:
    assert not list(counter_examples(*scheme_and_pattern, list(texts(*left)), list(texts(*right))))


@pytest.mark.parametrize("right", ["/api", "//", "/\n", "/ x"])
@pytest.mark.parametrize("left", ["Route:\n", "?\n\n", "a.\r\n"])
def test_slashes_behind_punctuation(scheme_and_pattern: tuple[str, Any], left: str, right: str) -> None:
    scheme, pattern = scheme_and_pattern
    joined = pattern.findall(left + right) != pattern.findall(left) + pattern.findall(right)
    assert joined or scheme != "o200k"
    assert not (joined and parts_at(scheme, left, right))


def test_it_is_proved_where_templates_need_it() -> None:
    for scheme in ("gpt2", "cl100k", "o200k"):
        assert parts_at(scheme, "Add 1 and 2", "\n\n### Response:\n3")
        assert parts_at(scheme, "<|im_start|>assistant\n", "Hello")
        assert not parts_at(scheme, "Add", "ition")
    assert not parts_at("unknown", "Add", " x")


def test_pairs_are_looked_at_alike() -> None:
    pairs = list(product(texts(FEW, 2), texts(FEW, 1)))
    flat = Texts([text for pair in pairs for text in pair])
    for scheme in ("gpt2", "cl100k", "o200k", "unknown"):
        expected = [i for i, pair in enumerate(pairs) if not parts_at(scheme, *pair)]
        assert pairs_that_join(scheme, flat) == expected
