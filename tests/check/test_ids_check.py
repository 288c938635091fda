"""`verify --source` of a store made from ready ids: it agrees, and tells a source that is another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastcollate.check import verify
from fastcollate.errors import InputError
from fastcollate.ingest import prepare
from fastcollate.store import TokenStore
from fastcollate.train import MaskOptions

RECORDS: list[dict[str, Any]] = [
    {
        "input_ids": [9, *range(i % 8 + 2), 50256],
        "labels": [-100, -100, *range(1, i % 8 + 2), 50256],
        "attention_mask": [0, *[1] * (i % 8 + 3)],
        "seq_lengths": [2, i % 8 + 2],
    }
    for i in range(40)
]  # fmt: skip


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"max_length": 1, "long_prompt": "cut"}, {"max_length": 1, "on_error": "skip"}]
)
@pytest.mark.parametrize("end", ["auto", "append"])
def test_it_agrees(tmp_path: Path, options: dict[str, Any], end: str) -> None:
    records = [{**record, "labels": [*record["labels"][:2], -100, *record["labels"][3:]]} for record in RECORDS]
    source = write(tmp_path / "a.jsonl", records)
    prepare(source, tmp_path / "s", tokenizer="gpt2", end=end, **options)
    assert TokenStore(tmp_path / "s").end == ("append" if end == "append" else "in_row")
    found = verify(TokenStore(tmp_path / "s"), MaskOptions(mask_prompt=True), sources=[source], progress=False)
    assert found.ok, found.problems
    assert found.records == 40


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": [-100] * 4}, "row 1: other ids are trained than record 0 of the sources says"),
        ({"input_ids": [9, 5, 1, 50256]}, "row 0: other ids than record 0"),
        ({"seq_lengths": [1, 3]}, "row 0: other ids than record 0"),
        ({"seq_lengths": [2, 1, 1]}, "row 2: record 0 of the sources gives one more row"),
        ({"labels": None}, "row 0: record 0 of the sources holds no such ids"),
    ],
)
def test_another_source_is_told(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    source = write(tmp_path / "a.jsonl", RECORDS)
    prepare(source, tmp_path / "s", tokenizer="gpt2")
    write(tmp_path / "a.jsonl", [{**RECORDS[0], **change}, *RECORDS[1:]])
    found = verify(TokenStore(tmp_path / "s"), sources=[source], progress=False)
    assert any(problem.startswith(says) for problem in found.problems), found.problems
    write(tmp_path / "a.jsonl", RECORDS[:-1])
    found = verify(TokenStore(tmp_path / "s"), sources=[source], progress=False)
    assert found.problems == ["row 78: there is no record 39 in the sources; name them in the order they were prepared"]
    with pytest.raises(InputError, match="no such file"):
        verify(TokenStore(tmp_path / "s"), sources=[source + "x"], progress=False)
