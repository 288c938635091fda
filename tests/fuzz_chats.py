"""Chats and boundaries against an oracle that works on bytes: the ids of the whole text, and which are trained.

`python -m tests.fuzz_chats [--records N] [--seed N]`, or the budget by `FUZZ_CHATS`; writes `bench_results/fuzz.json`.
The oracle writes each template's text itself, encodes it in one call of tiktoken or `tokenizers`, and trains a token
if a byte of it lies in a response (`boundary="exact"`), or takes the length of the prompt encoded by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken

from benchmarks.harness import save_part
from fastcollate.ingest.job import prepare
from fastcollate.store.store import TokenStore
from fastcollate.text.tokenizer import load_encoding

ENCODINGS = ("gpt2",)
KINDS = ("byte level", "metaspace", "byte fallback")  # tokenizer.json files that are trained here
WORDS = [
    "the", "Add", "1", "and", "22", "333", "don't", "I'll", "x", "_", "word", "Straße", "日本語", "😀", "👩‍💻",
    "é", "e\u0301", "\u0915\u094d\u0937",
    "٣", "²", "ʰ", "ǅ", "\u200b", "\xa0", "\x85", "\u2028", "\x1c", "\x00", "/api", "//",
    "'s", "'S", "...", "?", ")", "```", "{}", "<|im_end|", "|>", "im_start", "#", "—", "¿",
]  # fmt: skip
SPACES = ["", "", " ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\t", " \n ", "\n  "]
ROLES = {"system": ["system"], "user": ["user", "human"], "assistant": ["assistant", "gpt"], "tool": ["tool"]}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n",
    "\n\n### Input:\n",
    "\n\n### Response:\n",
)
SINGLE = {"alpaca": ALPACA, "phi3": ("<|user|>\n", "\n", "\n<|assistant|>:\n"), "completion": ("", "\n", "")}
# Templates of one's own, and what they write: pieces of text, each with whether it is a response.
JINJA = {
    "bare": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "marked": "{% for m in messages %}[{{ m.role }}] {% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\\n\\n' }}{% endfor %}",
    "heading": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}A: {{ m.content }}"
    "{% endgeneration %}{% else %}Q: {{ m.content }} {% endif %}{% endfor %}",
}


class Piece(NamedTuple):
    text: str
    is_trained: bool


def pieces_of(template: str, record: dict[str, Any]) -> list[Piece]:
    """The text that a template gives, by the documentation."""
    if template in SINGLE:
        head, before_input, before_output = SINGLE[template]
        extra = before_input + record["input"] if record["input"] else ""
        return [Piece(head + record["instruction"] + extra, False), Piece(before_output + record["output"], True)]
    found = []
    for number, turn in enumerate(record["messages"]):
        role, content = turn["role"], turn["content"]
        is_answer = role == "assistant"
        if template == "chat":
            found.append(Piece("\n" * (number > 0) + f"<|im_start|>{role}\n", False))
            found.append(Piece(content + "<|im_end|>", is_answer))
        elif template == "bare":
            found.append(Piece(content, is_answer))
        elif template == "marked":
            found += [Piece(f"[{role}] ", False), Piece(content + "</s>" * is_answer, is_answer), Piece("\n\n", False)]
        else:
            found.append(Piece(f"A: {content}" if is_answer else f"Q: {content} ", is_answer))
    return found


class Oracle:
    """The ids of texts, and the bytes that each covers."""

    def __init__(self, tokenizer: str) -> None:
        self._encode: Callable[[str], tuple[list[int], list[tuple[int, int]]]]
        if tokenizer in ENCODINGS:
            self._encoding = load_encoding(tokenizer)
            self._encode = self._by_tiktoken
        else:
            import tokenizers

            self._tokenizer = tokenizers.Tokenizer.from_file(tokenizer)
            self._is_byte_level = Path(tokenizer).stem == "byte level"
            self._encode = self._by_tokenizers

    def _by_tiktoken(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding: tiktoken.Encoding = self._encoding
        ids, end, covered = encoding.encode_ordinary(text), 0, []
        for token in ids:
            covered.append((end, end := end + len(encoding.decode_single_token_bytes(token))))
        return ids, covered

    def _by_tokenizers(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        ends = list(accumulate(map(self._num_bytes, found.tokens)))
        if "<unk>" not in found.tokens:  # whose bytes are not in its name
            assert ends[-1:] == [len(text.encode())] * bool(ends)
            return found.ids, list(zip([0, *ends], ends, strict=False))
        at = [0, *accumulate(len(character.encode()) for character in text)]
        return found.ids, [(at[start], at[stop]) for start, stop in found.offsets]

    def _num_bytes(self, token: str) -> int:
        """Bytes of text that a token of a small tokenizer stands for."""
        if token.startswith("<0x"):
            return 1
        return len(token) if self._is_byte_level else len(token.replace("▁", " ").encode())

    def row(self, pieces: list[Piece], *, by_reference: bool) -> tuple[list[int], list[bool]]:
        """Ids, and for each whether it is trained."""
        text = "".join(piece.text for piece in pieces)
        ids, covered = self._encode(text)
        if by_reference:
            prompt = len(self._encode(pieces[0].text)[0])
            return ids, [number >= prompt for number in range(len(ids))]
        is_trained = bytearray()
        for piece in pieces:
            is_trained += bytes([piece.is_trained]) * len(piece.text.encode())
        return ids, [any(is_trained[start:stop]) for start, stop in covered]


def trained_of(spans: list[int], length: int) -> list[bool]:
    """What a row's spans say of its tokens."""
    found: list[bool] = []
    for number, span in enumerate(spans):
        found += [bool(number % 2)] * span
    return found[:length]


class Maker:
    """Records of all kinds, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def text(self, empty: float = 0.05) -> str:
        if self.dice.random() < empty:
            return ""
        size = 1 + int(self.dice.random() ** 3 * 30)
        return "".join(self.dice.choice(SPACES) + self.dice.choice(WORDS) for _ in range(size)) + self.dice.choice(
            SPACES
        )

    def record(self, template: str) -> dict[str, Any]:
        if template in SINGLE:
            return {"instruction": self.text(), "input": self.text(0.5), "output": self.text() or "x"}
        roles = ["system"] * (self.dice.random() < 0.3)
        for _ in range(self.dice.randrange(1, 5)):
            roles += ["user"] + ["tool"] * (self.dice.random() < 0.1) + ["assistant"] * (self.dice.random() < 0.9)
        turns = [{"role": role, "content": self.text()} for role in roles]
        turns[0]["content"] = turns[0]["content"] or "x"
        return {"messages": turns}


def as_written(record: dict[str, Any], template: str, dice: random.Random) -> dict[str, Any]:
    """A record as files hold it: the `chat` template also reads ShareGPT's names."""
    if template != "chat" or dice.random() < 0.5:
        return record
    turns = [{"from": dice.choice(ROLES[turn["role"]]), "value": turn["content"]} for turn in record["messages"]]
    return {"conversations": turns}


def make_tokenizer(kind: str, path: Path) -> str:
    """A small tokenizer.json, trained on the words that the records are made of."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    fallback = kind == "byte fallback"
    tokenizer = Tokenizer(models.BPE(byte_fallback=fallback, unk_token=None if kind == "byte level" else "<unk>"))
    special = ["<|endoftext|>", *([] if kind == "byte level" else ["<unk>"])]
    alphabet = []
    if kind == "byte level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif fallback:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet)
    maker = Maker(1)
    plain = [maker.text().replace("😀", "").replace("語", "") for _ in range(500)]  # left to bytes, or unknown
    tokenizer.train_from_iterator(plain, trainer)
    tokenizer.save(str(path))
    content = json.loads(path.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    path.write_text(json.dumps(content))
    return str(path)


def compare(folder: Path, tokenizer: str, template: str, boundary: str, seed: int, count: int) -> Counter[str]:
    """So many records in one job; the store's rows against the oracle's.

    Raises:
        AssertionError: a row differs, or another record was left out; shows it.
    """
    maker, oracle = Maker(seed), Oracle(tokenizer)
    records = [maker.record(template) for _ in range(count)]
    source, store = folder / f"{seed}.jsonl", folder / f"{seed}"
    lines = [json.dumps(as_written(record, template, maker.dice), ensure_ascii=False) for record in records]
    source.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    name = template
    if template in JINJA:
        name = str(folder / f"{template}.jinja")
        Path(name).write_text(JINJA[template])
    prepare(source, store, template=name, tokenizer=tokenizer, boundary=boundary, workers=1)
    opened = TokenStore(store)
    assert [row.source_row for row in opened] == list(range(count))
    counts, by_reference = Counter(records=count), boundary == "reference" and template in SINGLE
    for record, row in zip(records, opened, strict=True):
        pieces = pieces_of(template, record)
        ids, is_trained = oracle.row(pieces, by_reference=by_reference)
        assert row.input_ids.tolist() == ids, (tokenizer, template, pieces)
        found = trained_of(row.spans.tolist(), len(ids))
        assert found == is_trained, (tokenizer, template, boundary, pieces, found, is_trained)
        counts["tokens"] += len(ids)
        counts["trained tokens"] += sum(is_trained)
        counts["boundaries"] += sum(a != b for a, b in pairwise(is_trained))
    return counts


def run(num_records: int, seed: int) -> Counter[str]:
    """All tokenizers, templates and boundaries by turns, so many records together."""
    counts = Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = [make_tokenizer(kind, root / f"{kind}.json") for kind in KINDS]
        cases = [
            (tokenizer, template, boundary)
            for tokenizer in (*ENCODINGS, *files)
            for template in (*SINGLE, "chat", *JINJA)
            for boundary in ("reference", "exact")
        ]
        share = -(-num_records // len(cases))
        for number, case in enumerate(cases):
            counts += compare(root, *case, seed=seed * 1000 + number, count=share)
            counts["jobs"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=int(os.environ.get("FUZZ_CHATS", "100000")))
    parser.add_argument("--seed", type=int, default=23)
    options = parser.parse_args()
    started = time.perf_counter()
    counts = run(options.records, options.seed)
    result = {"seed": options.seed, "differences": 0, **dict(sorted(counts.items()))}
    result["seconds"] = round(time.perf_counter() - started, 1)
    save_part("fuzz", "chats", result)


if __name__ == "__main__":
    main()
