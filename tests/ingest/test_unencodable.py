"""Texts on which a tokenizer fails are bad records with their places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastcollate.errors import InputError
from fastcollate.ingest.job import prepare
from fastcollate.store.store import TokenStore
from fastcollate.text.vocabulary import load_encoding

BLANKS = " " * 1_000_000
GOOD = {"instruction": "Add.", "output": "ok"}
CASES = [
    {"instruction": "x", "output": "a" + BLANKS + "b"},
    {"instruction": "x" + "\n" * 1_000_000 + "y", "output": "b"},
    {"instruction": "x", "input": " \n" * 500_000 + "z", "output": "b"},
    {"instruction": "x" + BLANKS[:550_000], "output": BLANKS[550_000:] + "y"},  # where the parts do not part
]


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("number", "template"), [(0, "alpaca"), (1, "alpaca"), (2, "alpaca"), (0, "completion"), (3, "completion")]
)
def test_a_panic_is_a_bad_record(tmp_path: Path, number: int, template: str) -> None:
    source = write(tmp_path / "a.jsonl", [GOOD, CASES[number], GOOD])
    with pytest.raises(InputError, match=r"a\.jsonl, line 2, record 1: .* fails on the text .*StackOver") as caught:
        prepare(source, tmp_path / "s", backend="tiktoken", template=template)
    assert "\n" not in str(caught.value)
    report = prepare(source, tmp_path / "s", backend="tiktoken", template=template, on_error="skip")
    store = TokenStore(tmp_path / "s")
    assert [row.source_row for row in store] == [0, 2]
    assert load_encoding("gpt2").decode(store[1].input_ids.tolist()).endswith("ok")
    assert Path(str(report.skipped_report)).read_text().splitlines()[1].split("\t")[1:3] == ["2", "1"]


def test_nothing_else_is_lost_where_all_fail(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", CASES[:2])
    with pytest.raises(InputError, match=r"no usable record \(2 of 2 records skipped, all .*: tiktoken fails"):
        prepare(source, tmp_path / "s", backend="tiktoken", on_error="skip")
