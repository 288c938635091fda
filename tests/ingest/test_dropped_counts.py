"""Fields whose text is in no row are counted: under each template, from each kind of source, in each kind of job."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_prepare import store_hash, write_lines
from test_resume import StopHere, stopped_after

from fastcollate import prepare
from fastcollate.errors import InputError
from fastcollate.sources import blocks, records
from tests.helpers import run_cli

WANTED = {
    "alpaca": {"instruction": "do it {}", "input": "", "output": "done {}"},
    "phi3": {"question": "do it {}", "answer": "done {}"},
    "completion": {"prompt": "do it {}", "completion": "done {}"},
    "text": {"text": "all of {}"},
    "chat": {"messages": [{"role": "user", "content": "ask {}"}, {"role": "assistant", "content": "say {}"}]},
    "t.jinja": {"a": "ask {}", "b": "say {}"},
    "in_row.jinja": {"messages": [{"role": "user", "content": "ask {}"}, {"role": "assistant", "content": "say {}"}]},
}
OTHERS = {  # what a record may hold beside, and whether it carries text
    "system": ("S", True), "explanation": ("because it is so", True), "id": ("a-1", False), "n": (5, False),
    "tools": ([{"name": "f", "description": "D"}], True), "images": (["i.png"], True), "empty": ("", False),
    "solution": ("an other answer", True), "note": ({"by": "one word", "at": 1}, True), "label": (1, False),
}  # fmt: skip
SOURCES: dict[str, Callable[[Path, list[Any]], Any]] = {
    "lines": lambda folder, made: write_lines(folder / "a.jsonl", made),
    "array": lambda folder, made: _written(folder / "a.json", json.dumps(made)),
    "no UTF-8 in one": lambda folder, made: _written(folder / "a.jsonl", _with_other_bytes(made)),
    "table": lambda folder, made: _parquet(folder / "a.parquet", made),
    "memory": lambda folder, made: made,
}


def _written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _with_other_bytes(made: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in made).encode() + b'{"x": "\xff"}\n'


def _parquet(path: Path, made: list[Any]) -> Path:
    names = dict.fromkeys(name for record in made for name in record)
    pq.write_table(pa.table({name: [record.get(name) for record in made] for name in names}), path)
    return path


def filled(value: Any, number: int) -> Any:
    if isinstance(value, str):
        return value.format(number)
    if isinstance(value, list):
        return [filled(item, number) for item in value]
    return {key: filled(item, number) for key, item in value.items()}


def made_records(template: str, count: int = 200) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Records, each with some of the other fields; how many have each that carries text and is not taken."""
    draw = random.Random(template)
    found, counts = [], dict[str, int]()
    for number in range(count):
        record = filled(WANTED[template], number)
        for name, (value, is_text) in OTHERS.items():
            if draw.random() < 0.3 and not (template == "chat" and name in ("system", "images")):
                record[name] = value
                if is_text and not (name == "system" and "messages" in record):  # which is its first turn then
                    counts[name] = counts.get(name, 0) + 1
        found.append(record)
    return found, counts


def template_file(folder: Path, name: str) -> dict[str, Any]:
    """The options of a template by a name of `WANTED`."""
    if name == "t.jinja":
        (folder / name).write_text("{{ a }}{% generation %}{{ b }}{% endgeneration %}")
        return {"template": str(folder / name)}
    return {"template": name}


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("template", [name for name in WANTED if name != "in_row.jinja"])
@pytest.mark.parametrize("chunk_bytes", [300, 1 << 19])
def test_fields_that_no_row_holds_are_counted(
    tmp_path: Path, template: str, source: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_CHUNK_BYTES", chunk_bytes)
    made, counts = made_records(template)
    options = {**template_file(tmp_path, template), "on_error": "skip", "workers": 1}
    report = prepare(SOURCES[source](tmp_path, made), tmp_path / "store", **options)
    assert report.summary["dropped_fields"] == counts
    assert report.summary["num_skipped"] == (source == "no UTF-8 in one")
    bare = [filled(WANTED[template], number) for number in range(len(made))]
    if template != "chat":  # where a record's system is a turn
        prepare(bare, tmp_path / "bare", **options)
        assert rows_of(tmp_path / "bare") == rows_of(tmp_path / "store")


def rows_of(store: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(store.glob("*.arrow"))]


def test_where_nothing_is_dropped_nothing_is_said(tmp_path: Path) -> None:
    made = [{"instruction": f"Add {n}.", "output": "x", "id": str(n), "prompt": f"Add {n}."} for n in range(9)]
    report = prepare(made, tmp_path / "store")
    assert "dropped_fields" not in report.summary
    assert "no row" not in str(report)


@pytest.mark.slow
def test_the_number_of_workers_and_stops_change_no_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SIZES", blocks.Sizes(3000, 9000))
    made, counts = made_records("alpaca", 900)
    source = write_lines(tmp_path / "a.jsonl", made)
    stores = [tmp_path / name for name in ("one", "two", "stopped")]
    for workers, store in zip((1, 2), stores, strict=False):
        assert prepare(source, store, workers=workers).summary["dropped_fields"] == counts
    for count in (3, 5, 0, 9):
        with stopped_after(count, StopHere()):
            prepare(source, stores[2], workers=1)
    assert prepare(source, stores[2], workers=1).summary["dropped_fields"] == counts
    assert len({store_hash(store) for store in stores}) == 1


def test_the_summary_tells_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    made = [{"instruction": "a", "output": "b", "system": f"Be {n} kind."} for n in range(1200)]
    source = write_lines(tmp_path / "a.jsonl", [*made, {**made[0], "history": [["x y", "z w"]]}])
    assert run_cli(monkeypatch, "prepare", source, tmp_path / "store") == 0
    told = "system (1,201 records), history (1 record)"
    shown = capsys.readouterr().out
    assert "fields whose text is in no row" in shown
    assert told in shown
    assert told in str(prepare(source, tmp_path / "store"))
    assert run_cli(monkeypatch, "inspect", tmp_path / "store") == 0
    assert told in capsys.readouterr().out
    assert run_cli(monkeypatch, "prepare", source, tmp_path / "store", "--json") == 0
    assert json.loads(capsys.readouterr().out)["summary"]["dropped_fields"] == {"system": 1201, "history": 1}


@pytest.mark.parametrize("wide", ["in each record", "by record"])
def test_very_many_fields_are_counted_together(tmp_path: Path, wide: str) -> None:
    fields = [{f"f{n}": "two words" for n in range(100)}] * 3
    if wide == "by record":
        fields = [{f"f{n}": "two words"} for n in range(300)]
    made = [{**more, "instruction": "a", "output": "b"} for more in fields]
    report = prepare(write_lines(tmp_path / "a.jsonl", made), tmp_path / "store")
    found = report.summary["dropped_fields"]
    assert report.num_rows == len(made)
    assert len(found) <= 65
    assert [*found][:64] == [f"f{n}" for n in range(64)]
    assert sum(found.values()) == 300


LABELLED = {
    "pair": {"chosen": "a", "rejected": "b"}, "chosen": {"chosen": "a"}, "turns": {"rejected": [{"role": "user"}]},
    "good": {"label": True, "completion": "c"}, "bad": {"label": False, "completion": "c"},
}  # fmt: skip


@pytest.mark.parametrize("label", LABELLED)
@pytest.mark.parametrize("template", [name for name in WANTED if name not in ("t.jinja", "in_row.jinja")])
@pytest.mark.parametrize("source", ["lines", "table", "no UTF-8 in one"])
def test_what_is_labelled_is_refused(tmp_path: Path, template: str, label: str, source: str) -> None:
    good = [filled(WANTED[template], number) for number in range(5)]
    made = SOURCES[source](tmp_path, [*good, {**good[0], **LABELLED[label]}])
    with pytest.raises(InputError, match=r"record 5: .*(chosen and rejected|labelled (true|false)).*; (to learn|keep)"):
        prepare(made, tmp_path / "store", template=template)


def test_the_chosen_ones_are_learnt_where_that_is_asked_for(tmp_path: Path) -> None:
    texts = [{"prompt": "p", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(3)]
    turns = [{k: [{"role": "user", "content": "p"}, {"role": "assistant", "content": v}]
              for k, v in record.items() if k != "prompt"} for record in texts]  # fmt: skip
    for name, made in (("output", texts), ("messages", turns)):
        report = prepare(made, tmp_path / name, fields={name: "chosen"})
        assert report.num_rows == 3
        assert [*report.summary["dropped_fields"]] == ["rejected" + "[].content" * (name == "messages")]
