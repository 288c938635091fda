"""Shards: put together as if written at once, further columns, and how many of them are opened."""

from __future__ import annotations

import errno
import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcollate.errors import InputError
from fastcollate.store import shards as room
from fastcollate.store.shards import (
    EXTRA_DTYPES,
    ShardColumns,
    ShardInfo,
    join_columns,
    merge_shards,
    open_shard,
    open_shards,
    shard_name,
    shard_schema,
    write_shard,
)
from fastcollate.store.store import TokenStore
from tests.helpers import Row, write_store

ROWS: list[Row] = [([1, 2], [1, 2, 3]), ([0, 2], [4, 5]), ([1, 0], [6]), ([0, 0], []), ([], [7, 8])]


def columns_of(rows: list[Row], first: int = 0, *, dtype: Any = np.uint16, extra: str | None = None) -> ShardColumns:
    """The rows as columns; with a column `extra` of that type."""
    numbers = np.arange(first, first + len(rows))
    return ShardColumns(
        np.array([token for _, ids in rows for token in ids], dtype),
        np.cumsum([0, *(len(ids) for _, ids in rows)], dtype=np.int64),
        np.array([count for spans, _ in rows for count in spans], np.uint32),
        np.cumsum([0, *(len(spans) for spans, _ in rows)], dtype=np.int64),
        numbers.astype(np.uint64),
        {} if extra is None else {"extra": numbers.astype(extra)},
    )


@pytest.mark.slow
@given(
    rows=st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=4), st.lists(st.integers(0, 65535), max_size=9))),
    cuts=st.lists(st.integers(0, 20), max_size=5),
    dtype=st.sampled_from([np.uint16, np.uint32]),
    extra=st.none() | st.sampled_from(EXTRA_DTYPES),
)
def test_parts_put_together_are_the_shard_written_at_once(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], cuts: list[int], dtype: Any, extra: str | None
) -> None:
    path = tmp_path_factory.mktemp("parts")
    bounds = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})
    bounds = bounds if len(bounds) > 1 else [0, 0]
    parts = [
        write_shard(path, f"part-{i}", columns_of(rows[a:b], a, dtype=dtype, extra=extra), sync=False)
        for i, (a, b) in enumerate(itertools.pairwise(bounds))
    ]
    merged = merge_shards(path, parts, path, "merged")
    at_once = write_shard(path, "at_once", columns_of(rows, dtype=dtype, extra=extra))
    assert (path / "merged").read_bytes() == (path / "at_once").read_bytes()
    assert merged == ShardInfo(**{**{n: getattr(at_once, n) for n in ShardInfo.__slots__}, "name": "merged"})
    opened = open_shard(path, merged)
    wanted = columns_of(rows, dtype=dtype, extra=extra)
    for name, found, value in zip(ShardColumns._fields, opened[:5], wanted[:5], strict=False):
        assert found.dtype == value.dtype, name
        assert found.tolist() == value.tolist(), name
    assert {n: (v.dtype, v.tolist()) for n, v in opened.extra.items()} == {
        n: (v.dtype, v.tolist()) for n, v in wanted.extra.items()
    }


def test_parts_of_different_columns_are_refused(tmp_path: Path) -> None:
    narrow = write_shard(tmp_path, "narrow", columns_of(ROWS))
    for name, other in {
        "wide": columns_of(ROWS, dtype=np.uint32),
        "labelled": columns_of(ROWS, extra="int8"),
    }.items():
        with pytest.raises(InputError, match=f"{name}: its columns are"):
            merge_shards(tmp_path, [narrow, write_shard(tmp_path, name, other)], tmp_path, "merged")


@pytest.mark.parametrize("column", ["offsets", "span_offsets"])
def test_offsets_that_go_back_are_not_put_among_other_rows(tmp_path: Path, column: str) -> None:
    good = columns_of(ROWS)
    back = getattr(good, column).copy()
    back[2] = back[1] - 1
    info = write_shard(tmp_path, "good", good)
    with pytest.raises(InputError, match="good: damaged offsets"):
        join_columns([info], [good._replace(**{column: back})])


def test_a_part_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    part = write_shard(tmp_path, "part", columns_of(ROWS), sync=False)
    raw = (tmp_path / "part").read_bytes()
    for wrong in (raw[:-1], raw[:0], bytes(len(raw)), raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2)):
        (tmp_path / "part").write_bytes(wrong)
        with pytest.raises(InputError, match="part: "):
            merge_shards(tmp_path, [part], tmp_path, "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("extra", EXTRA_DTYPES)
def test_a_further_column_of_each_type(tmp_path: Path, extra: str) -> None:
    info = write_shard(tmp_path, "shard", columns_of(ROWS, extra=extra))
    found = open_shard(tmp_path, info, shard_schema(np.uint16, {"extra": extra})).extra["extra"]
    assert (found.dtype.name, found.tolist()) == (extra, list(range(len(ROWS))))
    with pytest.raises(InputError, match="not a shard of a token store"):
        open_shard(tmp_path, info, shard_schema(np.uint16))


@pytest.fixture
def many(tmp_path: Path) -> TokenStore:
    """Forty shards of a row each, of which every tenth has a long row."""
    rows: list[Row] = [([0, n], list(range(n))) for n in [600 if i % 10 == 5 else i % 7 for i in range(40)]]
    return write_store(tmp_path / "many", rows, shard_rows=1)


@pytest.mark.parametrize("most", [40, 39, 0])
@pytest.mark.parametrize("small", [0, 1300, 1 << 18])
def test_small_neighbours_are_read_as_one(
    many: TokenStore, most: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MANY_SHARDS", most)
    monkeypatch.setattr(room, "SMALL_BYTES", small)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = TokenStore(many.path)
    num_small = {0: 0, 1300: 36, 1 << 18: 40}[small]
    assert [str(w.message).split(";")[0] for w in said] == [f"{many.path}: 40 shards take a while to open"] * (
        num_small > most
    )
    wanted = 40 if most == 40 or not small else {1300: 9, 1 << 18: 1}[small]  # 4 long ones part 5 runs
    assert len(again.shards) == wanted
    assert [row.input_ids.tolist() for row in again] == [row.input_ids.tolist() for row in many]
    assert [row.source_row for row in again] == [row.source_row for row in many]


def test_shards_that_are_too_many_to_read_are_mapped_and_too_many_to_map_refused(
    many: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MANY_SHARDS", 10)
    monkeypatch.setattr(room, "MAX_READ_BYTES", 1000)
    assert len(TokenStore(many.path).shards) == 40
    monkeypatch.setattr(room, "MAX_MAPS", 39)
    with pytest.raises(InputError, match=r"40 shards, too many to open; merge them .*: fastcollate convert .*many"):
        TokenStore(many.path)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: bytes(len(raw)), lambda raw: None])
def test_shards_that_are_read_are_checked_as_those_that_are_mapped(
    many: TokenStore, damage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MANY_SHARDS", 10)
    path = many.path / shard_name(17)
    content = damage(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=r"shard-00017\.arrow: "):
        TokenStore(many.path)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EMFILE, "raise the limit on open files: ulimit -n"),
        (errno.ENFILE, "too many files are open on this machine"),
        (errno.EACCES, "ask its owner for the right to read it"),
        (errno.ENOMEM, "open fewer stores at once"),
        (errno.EIO, "is the disk in order"),
        (errno.ENOENT, "prepare the store again"),
    ],
)
def test_what_the_system_refuses_has_its_own_remedy(
    many: TokenStore, number: int, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "refused by a test")

    monkeypatch.setattr(room.pa, "memory_map", refuse)
    with pytest.raises(InputError, match=rf"shard-00000\.arrow: .*refused by a test.*{remedy}") as caught:
        TokenStore(many.path)
    assert ("prepare the store again" in str(caught.value)) == (number == errno.ENOENT)


def test_a_manifest_that_cannot_be_opened_has_the_same_remedies(
    many: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"manifest\.json: cannot be opened .*raise the limit on open files"):
        TokenStore(many.path)


def test_views_of_many_shards_stay_alive(many: TokenStore) -> None:
    infos = [ShardInfo(**entry) for entry in many.manifest["shards"]]
    opened = open_shards(many.path, infos, shard_schema(np.uint16))
    del many
    assert sum(len(shard.input_ids) for shard in opened) == sum(info.num_tokens for info in infos)
