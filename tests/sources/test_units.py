"""Blocks, units and shards depend on the content alone: not on names, compression or chunks."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcollate.sources.blocks import Block, Sizes, Unit, read_blocks, read_units
from fastcollate.sources.find import find_sources, spooled
from fastcollate.sources.records import read_records
from fastcollate.sources.tables import table_size

SMALL = Sizes(block=1600, shard=8000)


def digests(*sources: Any, sizes: Sizes = SMALL) -> list[str]:
    with spooled(find_sources(list(sources) if len(sources) > 1 else sources[0]), is_shared=False) as found:
        return [block.digest(block.read()).hex() for block in read_blocks(found, sizes=sizes)]


def texts(count: int, size: int = 30) -> list[dict[str, str]]:
    return [{"instruction": f"{i}" * (i % size), "input": "", "output": "ä" * (i % 7)} for i in range(count)]


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def check(units: list[Unit], sizes: Sizes) -> list[Block]:
    """Every block once, in order, in units and shards that are not too large; returns the blocks."""
    blocks = [block for unit in units for block in unit.blocks]
    assert [unit.index for unit in units] == list(range(len(units)))
    assert [block.index for block in blocks] == list(range(len(blocks)))
    row = 0
    for block in blocks:
        assert block.first_row == row
        row += block.num_rows
    shards: dict[int, int] = {}
    for unit in units:
        assert len(unit.blocks) == 1 or unit.num_bytes <= sizes.target(unit.index)
        shards[unit.shard] = shards.get(unit.shard, 0) + unit.num_bytes
    assert list(shards) == list(range(len(shards)))
    assert all(size <= sizes.shard or sum(unit.shard == shard for unit in units) == 1 for shard, size in shards.items())
    return blocks


@pytest.mark.slow
@given(
    files=st.lists(st.lists(st.integers(0, 4000), min_size=1, max_size=30), min_size=1, max_size=12),
    block=st.integers(16, 4000),
    shard=st.integers(16, 20_000),
)
def test_every_record_is_in_one_unit_and_none_is_too_large(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[int]], block: int, shard: int
) -> None:
    folder, sizes = tmp_path_factory.mktemp("units"), Sizes(block, shard)
    names = [write(folder / f"{i}.jsonl", ["x" * size for size in lines]) for i, lines in enumerate(files)]
    blocks = check(list(read_units(find_sources(names), sizes=sizes)), sizes)
    found = [json.loads(line) for block_ in blocks for line in block_.read().splitlines()]
    assert found == ["x" * size for lines in files for size in lines]


def test_a_file_of_5_mb_has_work_for_all_workers_and_small_ones_share(tmp_path: Path) -> None:
    large = write(tmp_path / "a.jsonl", ["x" * 1000] * 5000)
    units = list(read_units(find_sources(large)))
    assert len(units) >= 6
    assert {unit.shard for unit in units} == {0}
    names = [write(tmp_path / f"{i}.jsonl", ["x" * 100]) for i in range(300)]
    units = list(read_units(find_sources(names)))
    assert [len(unit.blocks) for unit in units] == [300]
    units = list(read_units(find_sources([large, *names, large])))
    check(units, Sizes())
    assert {unit.shard for unit in units} == {0}
    assert len(units) < 20


@pytest.mark.slow
def test_many_small_files_are_cut_by_number_too(tmp_path: Path) -> None:
    names = [write(tmp_path / f"{i}.jsonl", [""]) for i in range(20)] * 500
    assert [len(unit.blocks) for unit in read_units(find_sources(names))] == [4096, 4096, 1808]


def test_json_content_is_the_same_however_it_is_named_or_compressed(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    plain = write(tmp_path / "a.jsonl", texts(500))
    expected = digests(plain)
    assert len(expected) > 4
    raw = Path(plain).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "c.ndjson.zst").write_bytes(zstandard.compress(raw))
    (tmp_path / "d.json").write_bytes(raw)
    for name in ("b.jsonl.gz", "c.ndjson.zst", "d.json"):
        assert digests(str(tmp_path / name)) == expected
    assert digests(texts(500)) != digests(texts(501))
    array = tmp_path / "e.json"
    array.write_text(json.dumps(texts(500)))
    (tmp_path / "f.json.gz").write_bytes(gzip.compress(array.read_bytes()))
    assert digests(str(array)) == digests(str(tmp_path / "f.json.gz"))


def test_a_sources_blocks_do_not_depend_on_what_stands_before_it(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", texts(300)), write(tmp_path / "b.jsonl", texts(400, size=90))
    assert digests(first, second) == digests(first) + digests(second)


def arrow(path: Path, table: pa.Table, rows: int, *, stream: bool = False) -> str:
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return str(path)


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [{"role": "user", "content": "é" * (i % 90)}, {"role": "assistant", "content": None}][: i % 3],
            "score": None if i % 11 == 0 else i / 3,
            "good": i % 5 == 0,
            "kind": ["a", "b", None][i % 3],
            "nothing": None,
        }
        for i in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("make", [texts, chats])
def test_a_tables_content_is_the_same_however_it_is_stored(tmp_path: Path, make: Any) -> None:
    datasets = pytest.importorskip("datasets")
    table = pa.Table.from_pylist(make(1500))
    expected = digests(arrow(tmp_path / "a.arrow", table, 1500))
    assert len(expected) > 4
    assert digests(arrow(tmp_path / "b.arrow", table, 70)) == expected
    assert digests(arrow(tmp_path / "c.arrow", table, 700, stream=True)) == expected
    for number, rows in enumerate((100, 1500)):
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=rows)
        assert digests(str(tmp_path / f"{number}.parquet")) == expected
    whole = datasets.Dataset(table)
    assert digests(whole) == expected
    whole.save_to_disk(tmp_path / "saved", num_shards=3)
    assert digests(str(tmp_path / "saved")) == expected
    part = pa.concat_tables([table.slice(3), table])
    assert digests(arrow(tmp_path / "d.arrow", part.slice(1497), 333)) == expected


def test_the_width_of_offsets_and_dictionaries_are_no_content(tmp_path: Path) -> None:
    words = [["one", "two", None, "three"][i % 4] for i in range(1000)]
    plain = pa.table({"word": pa.array(words, pa.string())})
    expected = digests(arrow(tmp_path / "a.arrow", plain, 300))
    for number, kind in enumerate((pa.large_string(), pa.dictionary(pa.int8(), pa.string()), pa.string_view())):
        other = pa.table({"word": plain["word"].combine_chunks().cast(kind)})
        assert digests(arrow(tmp_path / f"{number}.arrow", other, 1000)) == expected
    changed = pa.table({"word": pa.array([*words[:-1], "four"], pa.string())})
    assert digests(arrow(tmp_path / "b.arrow", changed, 300)) != expected
    renamed = pa.table({"world": plain["word"]})
    assert digests(arrow(tmp_path / "c.arrow", renamed, 300)) != expected


def test_one_large_row_does_not_make_a_block_of_all_its_neighbours(tmp_path: Path) -> None:
    table = pa.table({"text": ["x" * 5000 if i % 50 == 0 else "y" for i in range(500)]})
    blocks = list(read_blocks(find_sources(arrow(tmp_path / "a.arrow", table, 500)), sizes=SMALL))
    assert sum(block.num_rows for block in blocks) == 500
    for block in blocks:
        with pa.ipc.open_stream(block.read()) as reader:
            assert table_size(reader.read_all()) <= 2 * 5000 + SMALL.block


def test_an_iterable_is_read_once_and_a_record_that_is_no_json_is_named() -> None:
    from fastcollate.errors import InputError

    generator = ({"instruction": str(i)} for i in range(10))
    with spooled(find_sources(generator), is_shared=False) as found:
        for _ in range(2):
            assert sum(block.num_rows for block in read_blocks(found)) == 10
    assert not Path(found[0].local).exists()
    with (
        pytest.raises(InputError, match="the records given, record 1, field 'a': cannot be written as JSON"),
        spooled(find_sources([{"a": 1}, {"a": object()}]), is_shared=False),
    ):
        pass
    lone = [{"a": "\ud800"}]
    with spooled(find_sources(lone), is_shared=False) as found:
        assert [json.loads(block.read()) for block in read_blocks(found)] == lone


RECORDS = [{"instruction": f"a{n}", "output": f"b, {n}]}}"} for n in range(7)]
TURNS = [[{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("name", "says"),
    [("array.jsonl", "a JSON array, in a file named as lines"), ("data.json", "records inside 'data'")],
)
def test_records_in_an_array_that_its_name_or_an_object_hides(
    name: str, says: str, indent: int | None, tmp_path: Path
) -> None:
    content = RECORDS if name == "array.jsonl" else {"data": RECORDS}
    (tmp_path / name).write_text("\n " + json.dumps(content, indent=indent) + " \n")
    with pytest.warns(UserWarning, match=re.escape(says)):
        found = records_of(tmp_path / name)
    assert found == RECORDS


@pytest.mark.parametrize(
    "value", [{"data": TURNS[0]}, TURNS[0], {"data": [1, 2]}, {"data": TURNS[0], "score": float("inf")}]
)
def test_lines_that_begin_like_an_array_stay_lines(value: object, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(2 * (json.dumps(value) + "\n"))
    assert records_of(tmp_path / "a.jsonl") == [value, value]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"data": [{"a": 1}], "version": 1}', "holds more than its records"),
        ('{"data": [{"a": 1}]', "ends"),
        ('{"data": [{"a": 1}]}{', "something follows the end"),
    ],
)
def test_more_than_records_in_the_object_is_a_fault(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.warns(UserWarning, match="inside 'data'"):
        faults = [block.fault for block in read_blocks(find_sources(str(tmp_path / "a.json")))]
    assert says in faults[-1]


@pytest.mark.parametrize(("mark", "says"), [(";", "semicolons"), ("\t", "tabs")])
def test_a_csv_that_is_parted_otherwise(mark: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f'instruction{mark}output\n"a{mark}b"{mark}c, d\ne{mark}f\n')
    with pytest.warns(UserWarning, match=says):
        found = records_of(tmp_path / "a.csv")
    assert found == [{"instruction": f"a{mark}b", "output": "c, d"}, {"instruction": "e", "output": "f"}]


def records_of(path: Path) -> list[object]:
    chunks = [chunk for block in read_blocks(find_sources(str(path))) for chunk in read_records(block, block.read())]
    return [chunk[number] for chunk in chunks for number in range(len(chunk))]
