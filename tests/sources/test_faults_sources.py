"""Faults that public bug reports found in sources: the right rows, or one clear error, never fewer rows in silence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastcollate.errors import InputError, SourceReadError
from fastcollate.ingest.job import prepare
from fastcollate.sources.blocks import read_blocks
from fastcollate.sources.find import find_sources
from fastcollate.sources.records import Unreadable, lines_of, read_records
from fastcollate.store.store import TokenStore
from fastcollate.text.vocabulary import load_encoding

RECORDS = [{"instruction": f"Say {number}.", "output": f"{number}!"} for number in range(3000)]
LINES = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)


def records_of(source: Any) -> list[Any]:
    """All records, a bad one as its reason; with the line where there is one."""
    found: list[Any] = []
    for block in read_blocks(find_sources(source)):
        data = block.read()
        for part in read_records(block, data):
            for number in range(len(part)):
                try:
                    found.append(part[number])
                except ValueError as error:
                    found.append(str(error))
        if block.fault:
            found.append(block.fault)
    return found


def report_of(path: Path, store: Path, **options: Any) -> list[list[str]]:
    report = prepare(path, store, on_error="skip", **options)
    assert report.skipped_report is not None
    return [line.split("\t") for line in Path(report.skipped_report).read_text().splitlines()[1:]]


def first_text(store: Path) -> str:
    return load_encoding("gpt2").decode(TokenStore(store)[0].input_ids.tolist())


# -------------------------------------------------------------------------------------------------------- compression


def compressed(name: str) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    compress = {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress, "xz": lzma.compress}[name]
    return bytes(compress(LINES))


@pytest.mark.slow
@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("ending", ["gz", "zst", "bz2", "xz"])
def test_a_compressed_file_that_was_cut_off(tmp_path: Path, ending: str, on_error: str) -> None:
    source, data = tmp_path / f"a.jsonl.{ending}", compressed(ending)
    source.write_bytes(data)
    assert records_of(source) == RECORDS
    for cut in (len(data) // 2, len(data) - 3, 11):
        source.write_bytes(data[:cut])
        with pytest.raises(SourceReadError, match=rf"a\.jsonl\.{ending}: ends at byte {cut} inside its compressed"):
            prepare(source, tmp_path / "s", on_error=on_error)
        assert not (tmp_path / "s" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["a.jsonl.bz2", "a.json.xz", "a.ndjson.zst", "a.jsonlines", "a.JSONL.GZ", "a.ndjson"])
def test_endings(tmp_path: Path, name: str) -> None:
    ending = name.rsplit(".", 1)[-1].lower()
    (tmp_path / name).write_bytes(compressed(ending) if ending in ("gz", "zst", "bz2", "xz") else LINES)
    assert records_of(tmp_path / name) == RECORDS


def test_a_compressed_table(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert records_of(tmp_path / "b.parquet.gz") == RECORDS


# ---------------------------------------------------------------------------------------------------------- text, CSV


@pytest.mark.parametrize("ending", ["txt", "txt.gz", "txt.xz"])
def test_a_line_of_text_is_a_record(tmp_path: Path, ending: str) -> None:
    data = b"\xef\xbb\xbffirst\r\n\nthird \xc3\xa9\nfourth\xff\nlast"
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(data) if "gz" in ending else lzma.compress(data) if "xz" in ending else data)
    found = records_of(path)
    assert [record["text"] for record in found if isinstance(record, dict)] == ["first", "", "third é", "last"]
    assert found[3].startswith("line 4: a byte that is not UTF-8")
    (block,) = read_blocks(find_sources(path))
    assert lines_of(block, block.read(), {0, 2, 4}) == {0: 1, 2: 3, 4: 5}


def test_text_is_what_datasets_reads(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.txt").write_text("one\n\n two \nthree", encoding="utf-8")
    expected = datasets.load_dataset("text", data_files=str(tmp_path / "a.txt"), split="train", cache_dir=str(tmp_path))
    assert records_of(tmp_path / "a.txt") == expected.to_list()


@pytest.mark.parametrize(("name", "delimiter"), [("x.csv", ","), ("x.CSV", ","), ("x.TSV", "\t"), ("x.tsv", "\t")])
def test_a_delimiter_goes_by_the_ending_alone(tmp_path: Path, name: str, delimiter: str) -> None:
    folder = tmp_path / "data.tsv_export"
    folder.mkdir()
    other = "," if delimiter == "\t" else "\t"
    (folder / name).write_text(f"instruction{delimiter}output\na{other}b{delimiter}c\n")
    assert records_of(folder / name) == [{"instruction": f"a{other}b", "output": "c"}]


@pytest.mark.parametrize(
    ("body", "first", "swallowed"),
    [
        ('a,"b\nc,d\ne,f\n', 3, 2),
        ('"a,b\nc,d\n"e",f\n', 3, 2),
        ('a,b\na,"b\n' + "c,d\n" * 6, 4, 6),
    ],
)
def test_a_quotation_mark_that_is_never_closed(tmp_path: Path, body: str, first: int, swallowed: int) -> None:
    (tmp_path / "a.csv").write_text(f"instruction,output\nx,y\n{body}")
    reasons = [found for found in records_of(tmp_path / "a.csv") if isinstance(found, str)]
    assert len(reasons) == 1
    assert reasons[0].startswith(f"line {first}: not valid CSV")
    assert reasons[0].endswith(f"a quotation mark that opens there takes in the {swallowed} lines that follow")


# ---------------------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_utf16_is_named(tmp_path: Path, name: str, encoding: str) -> None:
    text = '{"instruction": "a", "output": "b"}\n' if "json" in name else "instruction,output\na,b\n"
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match=rf"{name}: is UTF-\d\d\S*, not UTF-8; convert it: iconv -f ") as told:
        prepare(tmp_path / name, tmp_path / "s", on_error="skip")
    named = str(told.value).split("iconv -f ")[1].split()[0]
    assert text.encode(encoding).decode(named) == text


@pytest.mark.slow
@pytest.mark.parametrize("text", ["naïve", "“quoted”", "5 €"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_windows_1252_is_a_bad_record_that_says_how_to_convert(tmp_path: Path, name: str, text: str) -> None:
    good, bad = {"instruction": "a", "output": "b"}, {"instruction": "c", "output": text}
    if name == "a.csv":
        data = f"instruction,output\na,b\nc,{text}\n"
    else:
        dumped = [json.dumps(record, ensure_ascii=False) for record in (good, bad)]
        data = "\n".join(dumped) if name == "a.jsonl" else f"[{','.join(dumped)}]"
    (tmp_path / name).write_bytes(data.encode("windows-1252"))
    ((*_, record, reason),) = report_of(tmp_path / name, tmp_path / "s")
    assert record == "1"
    assert "a byte that is not UTF-8" in reason
    assert "iconv -f WINDOWS-1252 -t UTF-8" in reason


# --------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b'[{"a": 1}}', "the JSON array is closed by a curly bracket"),
        (b'[{"a": 1}, {"b": 2}}\n]', "the JSON array is closed by a curly bracket"),
        (b'[{"a": 1}]\x0b', "something follows the end of the JSON array"),
        (b'[{"a": 1}]\x0c\n', "something follows the end of the JSON array"),
        (b'[{"a": 1}]]', "something follows the end of the JSON array"),
    ],
)
def test_what_is_no_json_behind_an_array(tmp_path: Path, data: bytes, fault: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    assert records_of(tmp_path / "a.json")[-1] == fault
    with pytest.raises(json.JSONDecodeError):
        json.loads(data)


@pytest.mark.parametrize("data", [b'\x0b[{"a": 1}]', b'[\x0b{"a": 1}]', b'[{"a": 1},\x0c]', b'\x0b{"a": 1}'])
def test_white_space_is_what_json_calls_so(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    assert any(isinstance(found, str) for found in records_of(tmp_path / "a.json"))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("indent", [1, 4, "\t"])
def test_one_object_over_many_lines_is_named(tmp_path: Path, name: str, indent: Any) -> None:
    (tmp_path / name).write_text(json.dumps({"instruction": "a", "output": "b"}, indent=indent))
    with pytest.raises(InputError, match=rf"{name}: holds an object that takes several lines; write one record a line"):
        prepare(tmp_path / name, tmp_path / "s")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(LINES)
    for name in ("~/a.jsonl", "~/*.jsonl", Path("~/a.jsonl")):
        assert records_of(name) == RECORDS


# ------------------------------------------------------------------------------------------------------------- tables


def bad_column(kind: str) -> pa.Array:
    """Three values, of which Python cannot hold the second."""
    if kind == "text":
        offsets = pa.py_buffer(np.array([0, 1, 2, 3], np.int32))
        return pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffc")])
    if kind == "time":
        return pa.array([0, 1 << 60, 0], pa.int64()).cast(pa.timestamp("s"))
    return pa.array([None, 0, None], pa.int64()).cast(pa.timestamp("us", tz="Mars/Olympus"))


@pytest.mark.parametrize("kind", ["text", "time", "zone"])
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_value_that_python_cannot_hold_hurts_only_who_reads_it(tmp_path: Path, name: str, kind: str) -> None:
    texts = pa.array(["a", "b", "c"])
    column = bad_column(kind)
    for read, table in {
        False: pa.table({"instruction": texts, "output": texts, "other": column}),
        True: pa.table({"instruction": texts, "output": column, "other": texts}),
    }.items():
        path, store = tmp_path / f"{read}-{name}", tmp_path / f"s{read}"
        if name == "a.parquet":
            try:
                pq.write_table(table, path)
            except pa.ArrowException:
                pytest.skip("Parquet has no such value")
        else:
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)
        if not read:
            assert prepare(path, store).num_rows == 3
        elif kind == "text":
            ((*_, record, reason),) = report_of(path, store)
            assert record == "1"
            assert reason.startswith("field 'output' is unreadable (UnicodeDecodeError: ")
        else:
            with pytest.raises(InputError, match=r"record [01]: field 'output' is .*, not text"):
                prepare(path, store)


def test_a_value_that_cannot_be_held_stands_for_itself(tmp_path: Path) -> None:
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), pa.schema([("t", pa.timestamp("s"))])) as writer:
        writer.write_table(pa.table({"t": bad_column("time")}))
    first, second, _ = records_of(tmp_path / "a.arrow")
    assert first["t"].year == 1970
    assert isinstance(second["t"], Unreadable)


def test_messages_that_datasets_keeps_as_json(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    if not hasattr(datasets.features, "Json"):
        pytest.skip("this release of datasets has no such type")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "weight": 1}]
    for number, feature in enumerate((datasets.List(datasets.Json()), datasets.Json())):
        data = datasets.Dataset.from_list([{"messages": messages}], features=datasets.Features(messages=feature))
        data.save_to_disk(tmp_path / f"saved{number}")
        data.to_parquet(tmp_path / f"{number}.parquet")
        for source in (data, tmp_path / f"saved{number}", tmp_path / f"{number}.parquet"):
            assert records_of(source) == [{"messages": messages}]
        prepare(tmp_path / f"{number}.parquet", tmp_path / f"s{number}", template="chat")
        assert "<|im_start|>assistant\nHo<|im_end|>" in first_text(tmp_path / f"s{number}")


@pytest.mark.parametrize("way", ["set_transform", "with_transform"])
def test_a_transform_is_refused(tmp_path: Path, way: str) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(RECORDS[:3])
    data = getattr(data, way)(lambda batch: batch) or data
    with pytest.raises(InputError, match=r"has a transform .*dataset\.map.*dataset\.reset_format"):
        prepare(data, tmp_path / "s")
    data.reset_format()
    assert prepare(data, tmp_path / "s").num_rows == 3


def test_what_datasets_says_of_columns_may_be_nested_beyond_reading(tmp_path: Path) -> None:
    table = pa.table({"instruction": ["a"], "output": ["b"]})
    pq.write_table(
        table.replace_schema_metadata({"huggingface": "[" * 200_000 + "]" * 200_000}), tmp_path / "a.parquet"
    )
    assert records_of(tmp_path / "a.parquet") == [{"instruction": "a", "output": "b"}]
