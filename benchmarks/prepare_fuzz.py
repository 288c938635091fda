"""Malformed, truncated and hostile records: no crash, no hang, every bad one reported, every good one stored.

Run as `python -m benchmarks.prepare_fuzz [RECORDS]`; writes `bench_results/prepare_fuzz.json`. What is good is decided
beforehand, by how a record was made or by the standard library's parser; never by the code under test.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import save
from fastcollate.ingest.job import prepare
from fastcollate.store.manifest import verify_checksums
from fastcollate.store.store import TokenStore
from fastcollate.text.tokenizer import load_encoding

SEED = 11
HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n"
)
LARGE = 50 << 20  # bytes of a very long line


class Case(NamedTuple):
    """A line, and the text of its row where it is a good record."""

    kind: str
    line: bytes
    text: str | None


def row_text(record: Any) -> str | None:
    """The text that a record gives, or `None` where it is none; as the documentation says it."""
    if not isinstance(record, dict):
        return None
    instruction, output = record.get("instruction"), record.get("output")
    extra = record.get("input")
    extra = "" if extra is None else extra
    if not all(isinstance(value, str) for value in (instruction, output, extra)) or not (
        instruction or output or extra
    ):
        return None
    text = HEAD + instruction + (f"\n\n### Input:\n{extra}" if extra else "") + f"\n\n### Response:\n{output}"
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return None if "<|endoftext|>" in text else text


def judge(line: bytes) -> str | None:
    """A line's text by the standard library's parser."""
    try:
        return row_text(json.loads(line.decode()))
    except (ValueError, RecursionError):
        return None


def words(dice: random.Random, most: int = 20) -> str:
    choices = [
        "the",
        "a",
        "Q:",
        "3.14",
        "naïve",
        "日本",
        "👍🏽",
        "it's",
        "\n",
        "\t",
        "\\",
        '"',
        "\x00",
        "\x1f",
        "<|",
        "|>",
        "\u2028",
    ]
    return " ".join(dice.choices(choices, k=dice.randrange(1, most)))


def good(dice: random.Random) -> dict[str, Any]:
    record: dict[str, Any] = {"instruction": words(dice), "output": words(dice, 40)}
    if dice.random() < 0.5:
        record["input"] = dice.choice([words(dice), "", None])
    return record


def dumps(dice: random.Random, record: Any) -> bytes:
    return json.dumps(record, ensure_ascii=dice.random() < 0.5).encode()


def plain(dice: random.Random) -> bytes:
    return dumps(dice, good(dice))


def truncated(dice: random.Random) -> bytes:
    line = plain(dice)
    return line[: dice.randrange(1, len(line))]


def damaged(dice: random.Random) -> bytes:
    line = bytearray(plain(dice))
    for _ in range(dice.randrange(1, 4)):
        line[dice.randrange(len(line))] = dice.choice([b for b in range(256) if b != 10])
    return bytes(line)


def noise(dice: random.Random) -> bytes:
    return bytes(b for b in dice.randbytes(dice.randrange(1, 80)) if b != 10) or b"x"


def deep(dice: random.Random) -> bytes:
    depth = dice.choice([10, 900, 1100, 5000, 100_000])
    begin, end = dice.choice([("[", "]"), ('{"a":', "}")])
    inner = begin * depth + "1" + end * dice.choice([depth, depth, depth - 1])
    return b'{"instruction": "deep", "output": "x", "extra": %b}' % inner.encode()


def numbers(dice: random.Random) -> bytes:
    texts = [
        "1e999",
        "-1e999",
        "9" * 400,
        "1e-999",
        "-0",
        "01",
        "+1",
        ".5",
        "1.",
        "0x10",
        "NaN",
        "-Infinity",
        "1e5",
        "1_000",
    ]
    return b'{"instruction": "a number", "output": "x", "extra": %b}' % dice.choice(texts).encode()


def not_utf8(dice: random.Random) -> bytes:
    line = dumps(dice, good(dice))
    place = line.index(b'": "') + 4
    return (
        line[:place]
        + dice.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe6\x97", b"\x80"])
        + line[place:]
    )


def nul(dice: random.Random) -> bytes:
    line = plain(dice)
    place = dice.randrange(len(line))
    return line[:place] + b"\x00" + line[place:]


def duplicates(dice: random.Random) -> bytes:
    first, last = words(dice), dice.choice([json.dumps(words(dice)), "5", "null"])
    return b'{"instruction": %b, "instruction": %b, "output": "x"}' % (json.dumps(first).encode(), last.encode())


def surrogates(dice: random.Random) -> bytes:
    parts = ["\\ud83d", "\\ude00", "\\ud83d\\ude00", "a", "\\ud83d\\ud83d", "\\\\ud83d"]
    return b'{"instruction": "%b", "output": "%b"}' % tuple(
        "".join(dice.choices(parts, k=3)).encode() for _ in range(2)
    )


def special(dice: random.Random) -> bytes:
    text = dice.choice(["<|endoftext|>", "\\u003c|endoftext|>", "<|endoftext|", "<|endoftext |>", "a<|endoftext|>b"])
    return b'{"instruction": "x", "output": "%b"}' % text.encode()


SHAPES: list[Any] = [
    5, "text", [1], None, True, {}, {"instruction": "x"}, {"output": "x"}, {"instruction": [], "output": "x"},
    {"instruction": "", "output": ""}, {"instruction": "x", "output": {}},
    {"instruction": "x", "output": "y", "input": 5},
]  # fmt: skip


def shapes(dice: random.Random) -> bytes:
    return json.dumps(dice.choice(SHAPES)).encode()


MAKERS: dict[str, Callable[[random.Random], bytes]] = {
    "good": plain, "truncated": truncated, "damaged bytes": damaged, "noise": noise, "deep nesting": deep,
    "huge and odd numbers": numbers, "invalid UTF-8": not_utf8, "NUL": nul, "duplicate keys": duplicates,
    "surrogates": surrogates, "special-token text": special, "wrong shapes": shapes,
}  # fmt: skip
RARE = {"deep nesting": 0.05}


def make_cases(num_records: int, seed: int) -> list[Case]:
    """Records by turns of every kind; blank lines are no records and never made."""
    dice = random.Random(seed)
    names = list(MAKERS)
    weights = [RARE.get(name, 1.0) for name in names]
    cases = []
    for name in dice.choices(names, weights, k=num_records):
        line = MAKERS[name](dice)
        if not line.strip(b" \t\r"):
            line = b"x"
        cases.append(Case(name, line, judge(line)))
    return cases


def large_cases(size: int = LARGE) -> list[Case]:
    """Very long lines: a good one, one that is never closed, one of brackets, one of digits."""
    text = "word " * (size // 5)
    record = {"instruction": "long", "output": text}
    return [
        Case("very long line", json.dumps(record).encode(), row_text(record)),
        Case("very long line", b'{"instruction": "%b' % text.encode(), None),
        Case("very long line", b"[" * size, None),
        Case("very long line", b'{"instruction": "x", "output": %b}' % (b"7" * size), None),
    ]


def check(cases: list[Case], root: Path, *, in_array: bool = False, workers: int = 2) -> dict[str, Any]:
    """Prepare the cases as one file; every row, every report line and every checksum must be what it should.

    Raises:
        AssertionError: something is not.
    """
    source = root / ("fuzz.json" if in_array else "fuzz.jsonl")
    if in_array:
        source.write_bytes(b"[" + b",".join(case.line for case in cases) + b"]")
    else:
        source.write_bytes(b"\n".join(case.line for case in cases) + b"\n")
    started = time.perf_counter()
    report = prepare(source, root / "store", on_error="skip", workers=workers)
    seconds = time.perf_counter() - started
    store = TokenStore(root / "store")
    wanted = {index: case.text for index, case in enumerate(cases) if case.text is not None}
    found = [row.source_row for row in store]
    assert found == list(wanted), "rows that were stored"
    encode = load_encoding("gpt2").encode_ordinary
    for row in store:
        text = wanted[row.source_row]
        assert text is not None
        if len(text) < 1 << 20:
            assert row.input_ids.tolist() == encode(text), (row.source_row, text)
    listed = []
    if report.skipped_report:
        lines = Path(report.skipped_report).read_text(encoding="utf-8").splitlines()[1:]
        listed = [int(line.split("\t")[2]) for line in lines]
        assert all(line.split("\t")[3] for line in lines), "a reason for each"
    assert listed == [index for index in range(len(cases)) if index not in wanted], "records that were reported"
    assert verify_checksums(root / "store") == []
    kinds = Counter(case.kind for case in cases)
    stored = Counter(case.kind for case in cases if case.text is not None)
    return {
        "records": len(cases),
        "stored": len(wanted),
        "reported": len(listed),
        "seconds": round(seconds, 2),
        "by_kind": {kind: {"records": kinds[kind], "good": stored[kind]} for kind in kinds},
    }


def main() -> None:
    num_records = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "large").mkdir()
        results = {
            "records": check(make_cases(num_records, SEED), root),
            "large_lines": check([*large_cases(), *make_cases(10, SEED)], root / "large"),
        }
    print(json.dumps(results, indent=2))
    save(
        "prepare_fuzz",
        {"seed": SEED, "no_crash_no_hang": True, "every_bad_reported_every_good_stored": True, **results},
    )


if __name__ == "__main__":
    main()
