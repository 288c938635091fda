"""Records scanned by compiled code against records parsed: the same texts, the same faults, the same order."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastcollate.ingest import encode
from fastcollate.sources.blocks import Block
from fastcollate.sources.fields import FlatRecords
from fastcollate.sources.records import BadRecord
from fastcollate.sources.scanner import scan_array
from fastcollate.text.templates import load_template

SPECIAL = ("<|endoftext|>",)
TEMPLATES = {name: load_template(name, {}) for name in ("alpaca", "phi3", "completion")}
KEYS = st.sampled_from(
    ["instruction", "input", "output", "question", "answer", "context", "prompt", "id", "\\u0069d", "é"]
)
RAW = st.text('ab\\"/nu0d83{}[]:,<| \t\x00\x1f\x7fé日😀', max_size=12)
STRINGS = st.one_of(
    RAW.map(json.dumps),
    RAW.map(lambda text: json.dumps(text, ensure_ascii=False)),
    RAW.map(lambda text: f'"{text}"'),
    st.sampled_from(
        ['""', '"\\ud83d"', '"\\ude00\\ud83d"', '"\\ud83d\\ude00"', '"<|endoftext|>"', '"\\u003c|endoftext|>"']
    ),
)
VALUES = st.one_of(
    STRINGS,
    STRINGS,
    st.sampled_from(
        ["null", "true", "false", "nul", "NaN", "0", "-0", "01", "-", "1.", ".5", "1.5", "1e5", "1e999", "9" * 30, "{}",
         "[]", '[1, {"a": "]"}]', '{"b": {"c": null}}', "", "[" * 1100 + "]" * 1100]
    ),
)  # fmt: skip
MEMBERS = st.tuples(KEYS, VALUES).map(lambda pair: f'"{pair[0]}":{pair[1]}')
SPACE = st.sampled_from(["", "", "", " ", "\t", "\r"])
OBJECTS = st.tuples(SPACE, st.lists(MEMBERS, max_size=4), SPACE).map(
    lambda p: p[0] + "{" + ", ".join(p[1]) + "}" + p[2]
)
GOOD = st.fixed_dictionaries({"instruction": RAW, "output": RAW}, optional={"input": RAW, "id": st.integers()}).map(
    lambda record: json.dumps(record)
)
PIECES = st.lists(
    st.one_of(GOOD, GOOD, OBJECTS, st.sampled_from(["", " ", "[1]", "{", "}", '"', "{}", "x", "\ufeff{}"])), max_size=6
)


def both(data: bytes, *, in_array: bool, num_rows: int, name: str) -> tuple[Any, Any]:
    """Texts, places and faults of a block, scanned and parsed."""
    block = Block(0, 0, "x", "array" if in_array else "lines", 5, num_rows, 1, len(data), 0)
    results = []
    for scan in (True, False):
        bad: list[BadRecord] = []
        parts = encode._texts(block, data, TEMPLATES[name], SPECIAL, bad, scan=scan)
        results.append((parts.texts.strings(), parts.starts.tolist(), parts.rows.tolist(), sorted(bad)))
    return results[0], results[1]


@given(pieces=PIECES, name=st.sampled_from(list(TEMPLATES)), ending=st.sampled_from(["", "\n"]))
@example(pieces=['{"instruction":"<|endof","output":"text|>"}'] * 2, name="completion", ending="")
def test_lines(pieces: list[str], name: str, ending: str) -> None:
    data = ("\n".join(pieces) + ending).encode()
    num_rows = sum(1 for line in data.split(b"\n") if line.strip(b" \t\r"))
    scanned, parsed = both(data, in_array=False, num_rows=num_rows, name=name)
    assert scanned == parsed


@given(pieces=PIECES, name=st.sampled_from(list(TEMPLATES)), space=st.sampled_from(["", " ", "\n  "]))
def test_arrays(pieces: list[str], name: str, space: str) -> None:
    data = ("," + space).join(pieces).encode()
    scan = scan_array(data)
    if scan.end is not None:
        data = data[: scan.end]
    scanned, parsed = both(data, in_array=True, num_rows=len(scan.commas) + 1, name=name)
    assert scanned == parsed


@given(data=st.lists(st.binary(max_size=30), max_size=3), at=st.integers(0, 200), byte=st.binary(max_size=2))
def test_damaged_bytes(data: list[bytes], at: int, byte: bytes) -> None:
    line = json.dumps({"instruction": "é日😀 a\\n", "input": "", "output": "😀"}, ensure_ascii=False).encode()
    line = line[: at % len(line)] + byte + line[at % len(line) + 1 :]
    block = b"\n".join([line, *data, line])
    num_rows = sum(1 for piece in block.split(b"\n") if piece.strip(b" \t\r"))
    scanned, parsed = both(block, in_array=False, num_rows=num_rows, name="alpaca")
    assert scanned == parsed


@pytest.mark.parametrize("escape", [b"", b"\\"])
def test_every_byte_at_every_place_of_a_word(escape: bytes) -> None:
    """Strings are read eight bytes at a time: whatever byte stands wherever, the parser sees the same."""
    for byte in range(256):
        strings = [b"x" * at + escape + bytes([byte]) + b"y" * (17 - at) for at in range(18)]
        block = b"\n".join(b'{"instruction": "%b", "output": "%b"}' % (text, text[::2]) for text in strings)
        num_rows = sum(1 for piece in block.split(b"\n") if piece.strip(b" \t\r"))
        scanned, parsed = both(block, in_array=False, num_rows=num_rows, name="alpaca")
        assert scanned == parsed, byte


@pytest.mark.parametrize(
    ("record", "regular"),
    [
        ('{"instruction": "a", "output": "b"}', True),
        ('{"question": "a", "answer": "b", "n": -1.5, "ok": true}', True),
        ('{"instruction": "a", "input": null, "output": "\\ud83d\\ude00"}', True),
        ('{"instruction": "a", "output": null}', False),
        ('{"instruction": "a", "output": "b", "output": "c"}', False),
        ('{"instruction": "a", "output": "b", "n": 1e5}', False),
        ('{"instruction": "a", "output": "b", "n": {}}', False),
        ('{"instruction": "a", "output": "\\ud83d"}', False),
        ('{"instruction": "", "input": "", "output": ""}', False),
    ],
)
def test_what_is_regular(record: str, regular: bool) -> None:
    recipe = TEMPLATES["alpaca"].recipe()
    assert recipe is not None
    flat = FlatRecords(record.encode(), in_array=False, num_rows=1, recipe=recipe)
    assert flat.agrees
    assert flat.regular.tolist() == [regular]
    assert flat.bounds.tolist() == [[0, len(record.encode())]]
    if regular:
        orjson.loads(record)
