"""JSON records against Python's `json`: the same are accepted, and they give the same values and texts.

`python -m tests.fuzz_json [--documents N] [--lines N] [--seed N]`, or the budget by `FUZZ_DOCUMENTS`; two processes;
writes `bench_results/fuzz.json`. What is right is decided by `json.loads` of a line's UTF-8 text, and by `row_text`.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from benchmarks.harness import save_part
from fastcollate.ingest import encode
from fastcollate.ingest.spec import Counts
from fastcollate.sources.blocks import Block
from fastcollate.sources.find import Source
from fastcollate.sources.json_blocks import Piece, json_pieces
from fastcollate.sources.records import lines_of, read_records
from fastcollate.text.templates import load_template

SPECIAL = "<|endoftext|>"
HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n"
)
TEXTS = {"alpaca": (HEAD, "\n\n### Input:\n", "\n\n### Response:\n"), "completion": ("", "\n", "")}
NAMES = (
    ("instruction", "question", "prompt", "query", "problem"),
    ("input", "context"),
    ("output", "answer", "response", "completion", "solution"),
)
TEMPLATES = {name: load_template(name, {}) for name in TEXTS}


# ---------------------------------------------------------------------------------------------------------- judging


def clean(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_shallow(document: bytes) -> bool:
    """Whether a value can be printed and mended, which is done by recursion."""
    return document.count(b"[") + document.count(b"{") < 150


def mended(value: Any) -> Any:
    """The rule for lone surrogates, on a value that is not nested deeply."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [mended(item) for item in value]
    if isinstance(value, dict):
        return {mended(key): mended(item) for key, item in value.items()}
    return value


def judge(line: bytes) -> tuple[bool, Any]:
    """Whether a line is accepted, and its value."""
    try:
        return True, json.loads(line.decode())
    except (ValueError, RecursionError):
        return False, None


def row_text(record: Any, template: str) -> tuple[str, str] | None:
    """The prompt and the response that a value gives, or `None`; as the documentation says it."""
    if not isinstance(record, dict):
        return None
    texts = []
    for field, names in enumerate(NAMES):
        value = next((record[name] for name in names if record.get(name) is not None), "" if field == 1 else None)
        if not isinstance(value, str):
            return None
        texts.append(clean(value))
    instruction, extra, output = texts
    head, before_input, before_output = TEXTS[template]
    prompt = head + instruction + (before_input + extra if extra else "")
    if not (instruction or extra or output) or SPECIAL in prompt + before_output + output:
        return None
    return prompt, before_output + output


# ----------------------------------------------------------------------------------------------------------- making

CHARACTERS = [
    *"abcdefgh xyz 0123456789 .,:;{}[]<|>/'", "é", "ß", "日", "本", "😀", "\u2028", "\ufeff", "\x7f", "\xa0", "\ufffd",
]  # fmt: skip
ESCAPES = [
    '\\"', "\\\\", "\\/", "\\b", "\\f", "\\n", "\\r", "\\t", "\\u0000", "\\u0041", "\\u00e9", "\\u65E5",
    "\\ud83d\\ude00", "\\uD83D\\uDE00", "\\u2028", "\\uffff",
]  # fmt: skip
ODD_ESCAPES = [
    "\\ud83d", "\\ude00", "\\ude00\\ud83d", "\\ud83d\\ud83d\\ude00", "\\ud83d\\u0041", "\\ud83dx", "\\x41", "\\u12",
    "\\u12g4", "\\U0041", "\\", "\\'", "\\u 041", "\\u+041", "\t", "\x00", "\x1f", "\\0",
]  # fmt: skip
NUMBERS = [
    "0", "-0", "7", "-12", "123456789012345678", "18446744073709551615", "18446744073709551616", "-9223372036854775809",
    "1.5", "-0.0", "1e5", "1E+2", "2.5e-3", "0.1", "4.9e-324", "2.5e-324", "1e-999", "1e308", "9" * 30, "9" * 400,
    "123456789012345678901234567890.5", "8.41e21", "9007199254740993", "0e0", "5e-1",
]  # fmt: skip
ODD_NUMBERS = [
    "01", "-", "-01", "1.", ".5", "1e", "1e+", "+1", "0x10", "1_000", "--1", "1e999", "-1e999", "NaN", "Infinity",
    "-Infinity", "-NaN", "nan", "inf", "1.5.5", "1e5e5", "9" * 4300, "9" * 4301, "-" + "8" * 4305, "1" * 2200,
    "0." + "3" * 5000, "1" * 4400 + ".5", "1" + "0" * 4400 + "e-4400", "١",
]  # fmt: skip
LITERALS = ["null", "true", "false"]
ODD_LITERALS = ["nul", "True", "None", "nulll", "undefined", "tru", ""]
PIECES = [
    b'"', b"\\", b"{", b"}", b"[", b"]", b":", b",", b"\\u", b"\\ud83d", b"\xff", b"\xed\xa0\x80", b"\xc0\x80",
    b"\xf4\x90\x80\x80", b"\xe6\x97", b"\x80", b"\x00", b"\x1f", b"\x0b", b"\x0c", b"\r", b"\t", b" ",
    b"\xef\xbb\xbf", b"\xc2\xa0", b"\xe2\x80\xa8", b"NaN", b"Infinity", b"1e999", b"null", b"0", b"-", b"e", b".",
    b'"instruction":', b'"output":null,', b"//", b"/**/", b"'", b"<|endoftext|>", b"9" * 4301, b"7" * 2150,
]  # fmt: skip
ARRAY = re.compile(rb"[ \t\r]*\[[ \t\r]*\{")
DEPTHS = [3, 30, 300, 800, 1100, 5000]


class Maker:
    """Documents of all kinds, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.pick = self.dice.choice
        self.chance = self.dice.random

    def string(self, oddity: float) -> str:
        """A JSON string; an odd one may be no JSON."""
        letters = self.dice.choices(CHARACTERS, k=int(self.chance() ** 2 * 24))
        for _ in range(int(self.chance() * 3)):
            letters.insert(int(self.chance() * (len(letters) + 1)), self.pick(ESCAPES))
        if self.chance() < oddity:
            letters.insert(int(self.chance() * (len(letters) + 1)), self.pick(ODD_ESCAPES))
        if self.chance() < 0.01:
            letters.append(self.pick([SPECIAL, "\\u003c|endoftext|>", "<|endof"]))
        return '"' + "".join(letters) + '"'

    def space(self) -> str:
        return self.pick([" ", "\t", "\r", "  "]) if self.chance() < 0.15 else ""

    def number(self, oddity: float) -> str:
        if self.chance() < oddity:
            return str(self.pick(ODD_NUMBERS))
        if self.chance() < 0.5:
            return str(self.pick(NUMBERS))
        digits = "".join(self.dice.choices("0123456789", k=self.dice.randrange(1, 25))).lstrip("0") or "0"
        fraction = "." + "".join(self.dice.choices("0123456789", k=self.dice.randrange(1, 25)))
        exponent = f"{self.pick('eE')}{self.pick(['', '+', '-'])}{self.dice.randrange(320)}"
        return self.pick(["", "-"]) + digits + self.pick(["", fraction]) + self.pick(["", "", exponent])

    def value(self, oddity: float, depth: int = 0) -> str:
        kind = self.chance()
        if kind < 0.4:
            return self.string(oddity)
        if kind < 0.6:
            return self.number(oddity)
        if kind < 0.75 or depth > 4:
            return str(self.pick(ODD_LITERALS if self.chance() < oddity else LITERALS))
        if kind < 0.755:
            nested, begin, end = self.pick(DEPTHS), *self.pick([("[", "]"), ('{"a":', "}")])
            return begin * nested + self.value(oddity, 9) + end * (nested - (self.chance() < oddity))
        items = [self.value(oddity, depth + 1) for _ in range(self.dice.randrange(4))]
        if kind < 0.87:
            return "[" + self.space() + ("," + self.space()).join(items) + self.space() + "]"
        return self.members([(self.string(oddity), item) for item in items])

    def members(self, pairs: list[tuple[str, str]]) -> str:
        found = [f"{self.space()}{key}{self.space()}:{self.space()}{value}{self.space()}" for key, value in pairs]
        return "{" + ",".join(found) + "}"

    def record(self, oddity: float) -> str:
        """An object with fields that templates read, and others."""
        pairs = []
        for field, names in enumerate(NAMES):
            if self.chance() < (0.3 if field == 1 else 0.97):
                name = names[0] if self.chance() < 0.7 else self.pick(names)
                value = self.string(oddity) if self.chance() < 0.95 else self.value(oddity)
                pairs.append((f'"{name}"', value))
        for _ in range(self.pick([0, 0, 1, 2])):
            pairs.append((self.string(oddity), self.value(oddity)))
        if self.chance() < 0.08:
            name = self.pick(self.pick(NAMES))
            name = f"\\u{ord(name[0]):04x}{name[1:]}" if self.chance() < 0.3 else name
            pairs.append((f'"{name}"', self.value(oddity)))
        if self.chance() < 0.05 and pairs:
            pairs.append(self.pick(pairs))
        self.dice.shuffle(pairs)
        return self.members(pairs)

    def mutated(self, data: bytes, other: bytes) -> bytes:
        """Something cut out, put in, doubled, exchanged or spliced, a few times."""
        changed = bytearray(data)
        for _ in range(self.dice.randrange(1, 4)):
            size = len(changed) + 1
            start, kind = int(self.chance() * size), self.dice.randrange(7)
            stop = start + int(self.chance() ** 3 * (size - start))
            if kind == 0:
                del changed[start:stop]
            elif kind == 1:
                changed[start:start] = self.pick(PIECES)
            elif kind == 2:
                changed[start:stop] = self.pick(PIECES)
            elif kind == 3:
                changed[start:start] = changed[start:stop][:200]
            elif kind == 4 and start < len(changed):
                changed[start] = self.dice.randrange(256)
            elif kind == 5:
                del changed[start:]
            elif kind == 6:
                changed[start:] = other[int(self.chance() * len(other)) :]
        return bytes(changed)

    def documents(self, count: int) -> Iterator[tuple[str, bytes]]:
        """Kind and bytes, without line breaks, never blank."""
        other = b"{}"
        for _ in range(count):
            kind = self.pick(["plain", "plain", "odd", "any value", "mutated", "mutated"])
            if kind == "any value":
                made = self.value(0.1)
            else:
                made = self.space() + self.record(0.15 if kind == "odd" else 0.0) + self.space()
            data = made.encode("utf-8", "surrogatepass")
            if kind == "mutated":
                data, other = self.mutated(data, other), data
            data = data.replace(b"\n", b" ")
            yield kind, data if data.strip(b" \t\r") else b"x"


# --------------------------------------------------------------------------------------------------------- comparing


def block_of(documents: list[bytes], kind: str) -> tuple[Block, bytes]:
    data = (b"\n" if kind == "lines" else b",").join(documents)
    return Block(0, 0, "fuzz", kind, 1000, len(documents), 1, len(data), 0), data


def compare_block(documents: list[bytes], kind: str, template: str) -> Counter[str]:
    """Values and texts of documents that lie in one block.

    Raises:
        AssertionError: they are not what `json` gives; names the document.
    """
    counts: Counter[str] = Counter(documents=len(documents))
    block, data = block_of(documents, kind)
    records = [(part, number) for part in read_records(block, data) for number in range(len(part))]
    assert len(records) == len(documents), "records in the block"
    wanted: dict[int, tuple[str, str]] = {}
    for number, document in enumerate(documents):
        accepted, value = judge(document)
        try:
            part, index = records[number]
            found = part[index]
        except ValueError as error:
            found = error
        assert accepted != isinstance(found, ValueError), (document, found)
        if not accepted:
            assert str(found), document
            continue
        counts["accepted"] += 1
        if is_shallow(document):
            assert repr(found) == repr(mended(value)), document
        if (texts := row_text(value, template)) is not None:
            wanted[1000 + number] = texts
    bad: list[Any] = []
    parts = encode._texts(block, data, TEMPLATES[template], encode._SpecialTexts([SPECIAL]), bad, Counts())
    texts = list(zip(*[iter(parts.texts.strings())] * 2, strict=True))
    found_rows = dict(zip(parts.rows.tolist(), texts, strict=True))
    for row in sorted({*wanted, *found_rows}):
        assert found_rows.get(row) == wanted.get(row), documents[row - 1000]
    assert sorted(record.row for record in bad) == [
        row for row in range(1000, 1000 + len(documents)) if row not in wanted
    ]
    assert bytes(parts.texts.data) == "".join(parts.texts).encode()
    counts["texts"] += len(wanted)
    return counts


def compare_documents(seed: int, count: int) -> Counter[str]:
    """So many documents, as lines and, those that are JSON, as elements of an array."""
    maker, counts = Maker(seed), Counter[str]()
    while counts["documents"] < count:
        made = list(maker.documents(min(maker.pick([1, 7, 200, 1000]), count - counts["documents"])))
        counts.update(f"kind: {kind}" for kind, _ in made)
        documents, template = [data for _, data in made], maker.pick(list(TEMPLATES))
        counts += compare_block(documents, "lines", template)
        elements = [data for data in documents if judge(data)[0]]
        if elements:
            found = compare_block(elements, "array", template)
            counts["also as elements of an array"] += found["documents"]
    return counts


class Slow(io.BytesIO):
    """A file that gives fewer bytes than it is asked for."""

    def __init__(self, data: bytes, dice: random.Random) -> None:
        super().__init__(data)
        self._dice = dice

    def readinto(self, room: Any) -> int:
        data = self.read(min(len(room), self._dice.randrange(1, 4000)))
        room[: len(data)] = data
        return len(data)


def pieces_of(data: bytes, block_bytes: int, dice: random.Random, *, only_lines: bool) -> list[Piece]:
    source = Source("fuzz", "lines" if only_lines else "json")
    return list(json_pieces(source, Slow(data, dice), itertools.repeat(block_bytes)))


def compare_lines(seed: int, count: int) -> Counter[str]:
    """So many lines, blank ones between them, cut into pieces of many sizes: the same records on the same lines."""
    maker, counts = Maker(seed), Counter[str]()
    dice = maker.dice
    while counts["lines"] < count:
        documents = [data for _, data in maker.documents(min(dice.randrange(1, 400), count - counts["lines"]))]
        file, places = bytearray(maker.pick([b"", b"", b"\xef\xbb\xbf"])), []
        for document in documents:
            while dice.random() < 0.1:
                file += maker.pick([b"\n", b"\r\n", b" \t\n"])
            places.append(1 + file.count(b"\n"))
            file += document + maker.pick([b"\n", b"\n", b"\r\n", b" \n"])
        if dice.random() < 0.3:
            file = file[:-1]
        if documents[0].startswith(b"\xef\xbb\xbf") and file[:3] == documents[0][:3]:
            documents[0] = documents[0][3:]  # at the head of a file it is no part of the record
            if not documents[0].strip(b" \t\r"):
                continue
        if ARRAY.match(documents[0]) and (len(documents) == 1 or not judge(documents[0])[0]):
            counts["files that begin an array"] += 1  # one of records, not of lines: tests/sources has those
            continue
        found: list[Any] = []
        for piece in pieces_of(bytes(file), int(10 ** (1.5 + 3 * dice.random())), dice, only_lines=True):
            assert not piece.fault, piece
            found += _records_of(piece, len(found), places)
        wanted = [judge(document) for document in documents]
        assert len(found) == len(wanted), bytes(file)
        for document, (accepted, value), (is_good, record) in zip(documents, wanted, found, strict=True):
            assert accepted == is_good, document
            if accepted and is_shallow(document):
                assert repr(record) == repr(mended(value)), document
        counts["lines"] += len(documents)
        counts["files"] += 1
    return counts


def _records_of(piece: dict[str, Any], first: int, places: list[int]) -> list[tuple[bool, Any]]:
    block = Block(0, 0, "fuzz", piece.kind, first, *piece[1:])
    records, found = [(part, n) for part in read_records(block, piece.data) for n in range(len(part))], []
    assert len(records) == piece.num_rows
    lines = lines_of(block, piece.data, range(first, first + len(records)))
    for number, (part, index) in enumerate(records):
        assert lines[first + number] == places[first + number], "the line of a record"
        try:
            found.append((True, part[index]))
        except ValueError:
            found.append((False, None))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    budget = int(os.environ.get("FUZZ_DOCUMENTS", "1000000"))
    parser.add_argument("--documents", type=int, default=budget)
    parser.add_argument("--lines", type=int, default=None, help="half as many as documents by default")
    parser.add_argument("--seed", type=int, default=17)
    options = parser.parse_args()
    num_lines = options.documents // 2 if options.lines is None else options.lines
    started, size = time.perf_counter(), 10_000
    counts = Counter[str]()
    with ProcessPoolExecutor(2) as pool:
        jobs = []
        for name, compare, total in (("d", compare_documents, options.documents), ("l", compare_lines, num_lines)):
            for start in range(0, total, size):
                seed = options.seed * 1_000_003 + start + (name == "l")
                jobs.append(pool.submit(compare, seed, min(size, total - start)))
        for job in jobs:
            counts += job.result()
    result = {"seed": options.seed, "differences": 0, **dict(sorted(counts.items()))}
    result["seconds"] = round(time.perf_counter() - started, 1)
    save_part("fuzz", "json", result)


if __name__ == "__main__":
    main()
