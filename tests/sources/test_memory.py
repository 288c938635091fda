"""What lies in memory gives the store that its file gives: data sets, tables, frames, readers, iterables."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from fastcollate import TokenStore, prepare
from fastcollate.errors import InputError
from tests.helpers import run_cli

RECORDS = [
    {
        "instruction": f"task {i} ü",
        "input": "" if i % 3 else "x",
        "output": "o " * (i % 7 + 1),
        "more": [{"a": i, "b": None}],
    }
    for i in range(700)
]
TABLE = pa.Table.from_pylist(RECORDS)


class Stream:
    """Another library's table: it gives Arrow's stream, and each only once."""

    def __init__(self) -> None:
        self._batches = TABLE.to_reader(99)

    def __arrow_c_stream__(self, schema: object = None) -> object:
        return self._batches.__arrow_c_stream__(schema)


def pandas_frame() -> Any:
    pandas = pytest.importorskip("pandas")
    return pandas.concat([pandas.DataFrame(RECORDS[:3]), pandas.DataFrame(RECORDS)])[3:]  # its index is no column


def polars_frame() -> Any:
    return pytest.importorskip("polars").DataFrame(RECORDS)


def duckdb_relation() -> Any:
    rows = TABLE  # noqa: F841 (the query names it)
    return pytest.importorskip("duckdb").sql("select * from rows")


def dataset() -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(RECORDS)


TABLES: dict[str, Callable[[], Any]] = {
    "table": lambda: TABLE,
    "chunks": lambda: pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1, 400), TABLE.slice(401)]),
    "batch": lambda: TABLE.combine_chunks().to_batches()[0],
    "reader": lambda: TABLE.to_reader(50),
    "stream": Stream,
    "files": lambda: pads.dataset(TABLE),
    "polars": polars_frame,
    "lazy": lambda: polars_frame().lazy(),
    "duckdb": duckdb_relation,
    "dataset": dataset,
    "indices": lambda: dataset().select(range(699, -1, -1)).select(range(699, -1, -1)),
    "filtered": lambda: pytest.importorskip("datasets").concatenate_datasets([dataset().take(5), dataset()]).filter(
        lambda _, number: number >= 5, with_indices=True
    ),
}  # fmt: skip
ITERABLES: dict[str, Callable[[], Any]] = {
    "list": lambda: RECORDS,
    "generator": lambda: (dict(record) for record in RECORDS),
    "streaming": lambda: dataset().to_iterable_dataset(),
    "map-style": lambda: MapStyle(),
    "pandas": pandas_frame,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    pq.write_table(TABLE, folder / "a.parquet", row_group_size=123)
    (folder / "a.jsonl").write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS))
    for kind in ("parquet", "jsonl"):
        prepare(folder / f"a.{kind}", folder / kind)
    return folder


def bytes_of(store: Path) -> dict[str, bytes]:
    """Everything of a store but what names its sources."""
    return {path.name: path.read_bytes() for path in store.iterdir() if path.name != "sources.json"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TABLES)
def test_a_table_in_memory_is_its_file(kind: str, files: Path, tmp_path: Path) -> None:
    assert prepare(TABLES[kind](), files / "parquet").reused
    assert prepare(TABLES[kind](), tmp_path / "s", workers=2).num_rows == 700
    assert bytes_of(tmp_path / "s") == bytes_of(files / "parquet")


@pytest.mark.parametrize("kind", ITERABLES)
def test_an_iterable_is_its_file(kind: str, files: Path, tmp_path: Path) -> None:
    assert prepare(ITERABLES[kind](), files / "jsonl").reused
    prepare(ITERABLES[kind](), tmp_path / "s")
    assert bytes_of(tmp_path / "s") == bytes_of(files / "jsonl")


def test_tables_records_and_files_give_the_same_shards(files: Path) -> None:
    first, second = (bytes_of(files / kind) for kind in ("parquet", "jsonl"))
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} == {"manifest.json"}  # their content has two hashes


def test_several_sources_in_memory(tmp_path: Path) -> None:
    prepare([TABLE.slice(0, 300), dataset().select(range(300, 500)), TABLE.slice(500)], tmp_path / "s")
    assert [row.source_row for row in TokenStore(tmp_path / "s")] == list(range(700))
    with pytest.raises(InputError, match=r"differs in the content of pyarrow\.Table"):
        prepare([TABLE.slice(0, 300), dataset().select(range(300, 500)), TABLE.slice(501)], tmp_path / "s")


def test_a_split_is_named(tmp_path: Path, files: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict(test=dataset().take(9), train=dataset())
    splits.save_to_disk(tmp_path / "saved")
    streams = datasets.IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})
    for given in (splits, tmp_path / "saved", {"test": TABLE.slice(0, 9), "train": TABLE}):
        assert prepare(given, files / "parquet", split="train").reused
        assert prepare(given, tmp_path / "test", split="test").num_rows == 9
    assert prepare(streams, files / "jsonl", split="train").reused
    for given in (splits, tmp_path / "saved", streams, {"test": TABLE, "train": TABLE}):
        with pytest.raises(InputError, match=r"holds several splits; choose one of test, train, such as split='test'"):
            prepare(given, tmp_path / "s")
        with pytest.raises(InputError, match="has no split 'dev'; choose one of test, train"):
            prepare(given, tmp_path / "s", split="dev")
    for given in (TABLE, RECORDS, files / "a.jsonl", dataset(), [TABLE, splits]):
        with pytest.raises(InputError, match="is no dictionary of splits; leave out split='train'"):
            prepare(given, tmp_path / "s", split="train")
    with pytest.raises(InputError, match=r"datasets\.DatasetDict\['train'\], record 0: no field 'instruction'"):
        prepare(datasets.DatasetDict(train=dataset().select_columns("output")), tmp_path / "s", split="train")


def test_the_command_line_takes_a_split(tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict(test=dataset().take(9), train=dataset()).save_to_disk(tmp_path / "saved")
    assert run_cli(monkeypatch, "prepare", tmp_path / "saved", tmp_path / "s", "--split", "train") == 0
    assert bytes_of(tmp_path / "s") == bytes_of(files / "parquet")


def broken_reader() -> pa.RecordBatchReader:
    def batches() -> Any:
        yield TABLE.to_batches()[0]
        raise OSError("the line broke")

    return pa.RecordBatchReader.from_batches(TABLE.schema, batches())


def broken_generator() -> Any:
    yield from RECORDS[:3]
    raise LookupError("no more")


def test_what_an_iterable_raises_is_the_users_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(LookupError, match="no more"):
        prepare(broken_generator(), tmp_path / "s")
    with pytest.raises(OSError, match="the line broke"):
        prepare(broken_reader(), tmp_path / "s")
    with pytest.raises(
        InputError, match=r"the records given, record 1, field 'output': cannot be written as JSON \(.*type set\)"
    ):
        prepare([RECORDS[0], {"instruction": "a", "output": {1}}], tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_arrays_in_records_are_lists(tmp_path: Path) -> None:
    import torch

    day = datetime.date(2026, 1, 31)
    record = {
        "instruction": "a",
        "output": "b",
        "n": np.float32(0.5),
        "ids": np.arange(3),
        "x": torch.ones(2),
        "d": day,
    }
    prepare([record], tmp_path / "s")
    plain = {**record, "n": 0.5, "ids": [0, 1, 2], "x": [1.0, 1.0], "d": "2026-01-31"}
    assert prepare([plain], tmp_path / "s").reused


class MapStyle:
    """A data set as PyTorch has them."""

    def __len__(self) -> int:
        return len(RECORDS)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return RECORDS[number % len(RECORDS)]  # there is no end to it but its length


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (pa.table({"instruction": [1, 2], "output": ["a", "b"]}), r"Table, record 0: field 'instruction' is a number"),
        (pa.table({"instruction": ["a", None], "output": ["a", "b"]}), r"Table, record 1: field 'instruction' is null"),
        (pa.table([pa.array(["x"])] * 2, names=["a", "a"]), r"Table: cannot be read \(two columns are named 'a'"),
        (TABLE.slice(0, 0), "no usable record"),
        ({"instruction": ["a"], "output": ["b"]}, "sources: a single dict; name files"),
        ([[{"role": "user", "content": "a"}]], r"give turns as records: \{'messages': turns\}"),
        (5, "sources: a single int"),
        ([TABLE, 5], "source 5: neither a path, a URL, a data set, a table, nor a record"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_clear_line(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        prepare(given, tmp_path / "s")
    assert "\n" not in str(caught.value)


def test_what_a_frame_holds(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"instruction": ["a", "b"], "input": ["x", float("nan")], "output": ["c", None]})
    with pytest.raises(InputError, match=r"pandas.DataFrame, record 1: field 'output' is null, not text"):
        prepare(frame, tmp_path / "s")
    prepare(frame.assign(output="c", kind=frame["instruction"].astype("category")), tmp_path / "s")
    prepare([{"instruction": "a", "input": "x", "output": "c"}, {"instruction": "b", "output": "c"}], tmp_path / "t")
    assert [row.input_ids.tolist() for row in TokenStore(tmp_path / "s")] == [
        row.input_ids.tolist() for row in TokenStore(tmp_path / "t")
    ]
    with pytest.raises(InputError, match=r"pandas.DataFrame: two columns are named 'a'"):
        prepare(pandas.DataFrame([[1, 2]], columns=["a", "a"]), tmp_path / "s")


def test_a_frame_of_plain_columns_is_its_table(tmp_path: Path) -> None:
    prepare(TABLE.drop_columns(["more"]), tmp_path / "s")
    assert prepare(pandas_frame().drop(columns="more"), tmp_path / "s").reused


def test_a_frames_objects_keep_their_own_keys(tmp_path: Path) -> None:
    """As a table each would have the others' keys, null; and columns of mixed types could not be told."""
    pandas = pytest.importorskip("pandas")
    (tmp_path / "t.jinja").write_text("{{ q }}{% generation %}{{ o | tojson }}{{ x or 'none' }}{% endgeneration %}")
    rows = [
        {"q": "a", "o": {"city": "Rome", "at": [1, {"x": 1}]}, "x": None},
        {"q": "b", "o": {"unit": "C"}, "x": "five"},
        {"q": "c", "o": [{"z": None}], "x": "six"},
    ]
    asked: Any = {"template": str(tmp_path / "t.jinja"), "special_text": "encode"}
    for number, some in enumerate((rows[:2], rows)):
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        prepare(tmp_path / f"{number}.jsonl", tmp_path / f"file{number}", **asked)
        assert prepare(pandas.DataFrame(some), tmp_path / f"file{number}", **asked).reused
    times = pandas.DataFrame({"instruction": ["a"], "output": ["b"], "o": [{"t": pandas.Timestamp("2026-01-31")}]})
    assert prepare(times, tmp_path / "times").num_rows == 1
    with pytest.raises(InputError, match=r"pandas.DataFrame, record 0, field 'o': cannot be written as JSON"):
        prepare(times.assign(o=[{"t": {1}}]), tmp_path / "sets")


@pytest.mark.slow
def test_no_library_is_imported_but_the_objects_own(tmp_path: Path) -> None:
    with pa.ipc.new_stream(tmp_path / "rows.arrow", TABLE.schema) as writer:
        writer.write_table(TABLE)
    code = (
        "import sys, pyarrow as pa\n"
        "from fastcollate import prepare\n"
        "rows = [{'instruction': 'a', 'output': 'b'}]\n"
        f"prepare(rows, {str(tmp_path / 'a')!r})\n"
        f"table = pa.ipc.open_stream({str(tmp_path / 'rows.arrow')!r}).read_all()\n"  # `from_pylist` imports pandas
        f"prepare(table, {str(tmp_path / 'b')!r})\n"
        "print(sorted({'datasets', 'pandas', 'polars', 'duckdb'} & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
