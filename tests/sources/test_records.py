"""Records and columns of blocks: what Python's `json` reads, whatever reads it; a small run of the fuzz."""

from __future__ import annotations

import json
import os
from typing import Any

import pyarrow as pa
import pytest

from fastcollate.ingest import encode
from fastcollate.ingest.spans import BadRecord
from fastcollate.ingest.spec import Counts
from fastcollate.sources import records as module
from fastcollate.sources.blocks import Block
from fastcollate.sources.json_blocks import NOT_UTF8
from fastcollate.sources.records import lines_of, parse_record, read_records
from fastcollate.text.templates import load_template
from tests.fuzz_json import compare_documents, compare_lines

SEED = int(os.environ.get("FUZZ_SEED", "5"))
BUDGET = int(os.environ.get("FUZZ_DOCUMENTS", "6000"))


def lines(*documents: bytes) -> tuple[Block, bytes]:
    data = b"\n".join(documents)
    return Block(0, 0, "x", "lines", 10, len(documents), 1, len(data), 0), data


def texts_of(*documents: bytes, template: str = "alpaca") -> tuple[list[str], list[int], list[BadRecord]]:
    bad: list[BadRecord] = []
    block, data = lines(*documents)
    parts = encode._texts(
        block, data, load_template(template, {}), encode._SpecialTexts(["<|endoftext|>"]), bad, Counts()
    )
    return parts.texts.strings(), parts.rows.tolist(), bad


@pytest.mark.slow
def test_documents_are_what_json_reads() -> None:
    counts = compare_documents(SEED, BUDGET)
    assert counts["documents"] == BUDGET
    assert BUDGET / 3 < counts["accepted"] < BUDGET
    assert counts["texts"] > BUDGET / 5


def test_lines_are_cut_into_the_same_records() -> None:
    assert compare_lines(SEED, BUDGET // 2)["lines"] == BUDGET // 2


@pytest.mark.parametrize(
    "extra",
    [
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 30,
        b"9" * 4300,
        b'"\\ud83d"',
        b'{"a": 1, "a": [NaN]}',
        b"[" * 800 + b"]" * 800,
    ],
)
def test_a_field_that_is_not_read_may_hold_whatever_json_takes(extra: bytes) -> None:
    good = b'{"instruction": "a", "output": "b", "extra": 1}'
    texts, rows, bad = texts_of(good, good.replace(b"1", extra), good, template="completion")
    assert (texts, rows, bad) == (["a", "b"] * 3, [10, 11, 12], [])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"NaN", "field 'output' is NaN or infinite, not text"),
        (b"-Infinity", "field 'output' is NaN or infinite, not text"),
        (b"1e999", "field 'output' is NaN or infinite, not text"),
        (b"5", "field 'output' is a number, not text"),
        (b"9" * 4301, "not valid JSON: a number of more than 4300 digits"),
        (b"[" * 5000 + b"]" * 5000, "not valid JSON: nested too deeply"),
        (b'"\xff"', f"{NOT_UTF8} (byte 34 of the record)"),
        (b'"\x01"', "not valid JSON: Invalid control character at (column 35)"),
        (b'"a" "b"', "not valid JSON: Expecting ',' delimiter (column 38)"),
        (b'"a"}{"output": "b"', "not valid JSON: Extra data (column 38)"),
    ],
)
def test_a_bad_record_says_why_and_spoils_no_other(value: bytes, reason: str) -> None:
    good = b'{"instruction": "a", "output": "b"}'
    bad = b'{"instruction": "abc", "output": %b}' % value
    assert texts_of(good, bad, good, template="completion") == (["a", "b"] * 2, [10, 12], [BadRecord(11, 0, reason)])


@pytest.mark.parametrize(
    ("record", "texts"),
    [
        (b'{"instruction": null, "question": "q", "output": "o"}', ["q", "o"]),
        (b'{"instruction": "", "question": "q", "output": "o"}', ["", "o"]),
        (b'{"prompt": null, "problem": "q", "output": null, "answer": null, "solution": "s"}', ["q", "s"]),
        (b'{"question": 5, "instruction": "i", "answer": [1], "output": "o"}', ["i", "o"]),
        (b'{"question": "q", "context": "c", "input": null, "answer": "o"}', ["q\nc", "o"]),
        (b'{"question": "q", "answer": "<|endof", "x": "text|>"}', ["q", "<|endof"]),
        (b'{"instruction": "\\u0000", "output": "a\\u0000"}', ["\0", "a\0"]),
        (b'{"instruction": "\\ud83d", "output": "\\ude00"}', ["\ufffd", "\ufffd"]),
    ],
)
def test_a_null_hides_no_other_name(record: bytes, texts: list[str]) -> None:
    plain = b'{"instruction": "a", "input": "", "output": "b"}'
    for documents, wanted in (((record,), texts), ((plain, record, plain), ["a", "b", *texts, "a", "b"])):
        assert texts_of(*documents, template="completion") == (wanted, list(range(10, 10 + len(documents))), [])


@pytest.mark.parametrize("chunk_bytes", [1, 20, 1 << 18])
@pytest.mark.parametrize("kind", ["lines", "array"])
def test_chunks_of_any_size_hold_the_same_records(kind: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
    records = [{"n": number, "text": "x" * (number % 7)} for number in range(30)]
    separator = b"\n \n" if kind == "lines" else b",\n\n"
    data = separator.join(json.dumps(record).encode() for record in records)
    block = Block(0, 0, "x", kind, 3, len(records), 5, len(data), 0)
    found = [part[i] for part in read_records(block, data) for i in range(len(part))]
    assert found == records
    columns = [part.columns([("none", "text"), ("none",)]).fields for part in read_records(block, data)]
    assert [text for texts, _ in columns for text in texts] == [record["text"] for record in records]
    assert {text for _, texts in columns for text in texts} == {None}
    assert lines_of(block, data, {3, 17, 32}) == {3: 5, 17: 5 + 2 * 14, 32: 5 + 2 * 29}


@pytest.mark.parametrize("name", ['"', "\\", "\n", "", "é", "a b", "field0"])
def test_a_field_may_have_any_name(name: str) -> None:
    block, data = lines(json.dumps({name: "x", "b": "y"}).encode(), b"{", b"[]")
    (part,) = read_records(block, data)
    assert part.columns([(name,), ("c", "b")]).fields == [["x", None, None], ["y", None, None]]


def test_lone_surrogates_are_mended_at_every_depth() -> None:
    value: Any = parse_record(b'[["\\ud83d", {"\\udc00": ["\\ude00\\ud83d", "\\ud83d\\ude00"]}], "\\udfff", 5, null]')
    assert value == [["\ufffd", {"\ufffd": ["\ufffd\ufffd", "😀"]}], "\ufffd", 5, None]
    assert parse_record(b'"\\ud83d"') == "\ufffd"
    deep: Any = parse_record(b"[" * 800 + b'"\\ud83d"' + b"]" * 800)
    for _ in range(800):
        (deep,) = deep
    assert deep == "\ufffd"


def test_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = pa.BufferOutputStream()
    table = pa.table({"a": ["x", None, "z"], "n": [1, 2, None]})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    monkeypatch.setattr(module, "_CHUNK_BYTES", len(data) * 2 // 3 + 1)
    parts = list(read_records(Block(0, 0, "x", "arrow", 0, 3, 0, 1, 0), data))
    assert [part.columns([("b", "a"), ("b",)]).fields for part in parts] == [
        [["x", None], [None, None]],
        [["z"], [None]],
    ]
    assert parts[1].columns([("n", "a"), ("a",)]).fields == [["z"], ["z"]]
    assert parts[0].columns([("n", "a"), ("a",)]).fields == [[None, None], [None, None]]
    assert parts[1][0] == {"a": "z", "n": None}
