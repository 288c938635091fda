"""Stores whose files agree in size and checksum, but not in what they say: each refused at opening, by name."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fastcollate.errors import InputError
from fastcollate.store import files, shards
from fastcollate.store import manifest as manifest_room
from fastcollate.store import store as room
from fastcollate.store.files import FileInfo
from fastcollate.store.manifest import StoreIdentity, canonical, pretty, verify_checksums
from fastcollate.store.shards import ShardColumns, ShardInfo, write_shard
from fastcollate.store.store import TokenStore
from tests.helpers import make_shards, write_store

ROWS = [([1, 2], [1, 2, 3]), ([0, 2], [4, 5]), ([1, 0], [6])]


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    """Three rows, six tokens, in one shard."""
    return write_store(tmp_path / "store", ROWS)


def rewrite_manifest(store: TokenStore, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it the checksum that belongs to it, as a forger would."""
    manifest = {key: value for key, value in store.manifest.items() if key != "checksum"}
    change(manifest)
    manifest["checksum"] = hashlib.sha256(canonical(manifest)).hexdigest()
    (store.path / manifest_room.MANIFEST).write_bytes(pretty(manifest))


def with_shard(entry: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of a store of this one shard."""
    return {"shards": [entry], "num_rows": entry["num_rows"], "num_tokens": entry["num_tokens"]}


def replace_shard(store: TokenStore, columns: ShardColumns, **counts: int) -> None:
    """Put another shard in the place of the store's, with counts that may be wrong."""
    info = write_shard(store.path, "shard-00000.arrow", columns)
    entry = {**dataclasses.asdict(info), **counts}
    rewrite_manifest(store, lambda manifest: manifest.update(with_shard(entry)))


@pytest.mark.parametrize(
    "offsets", [[1, 3, 5, 6], [0, 3, 5, 5], [1, 3, 5, 5]], ids=["begins late", "ends early", "both"]
)
@pytest.mark.parametrize("column", ["offsets", "span_offsets"])
def test_offsets_that_do_not_span_the_column(store: TokenStore, column: str, offsets: list[int]) -> None:
    (good,) = make_shards([[1, 2, 3], [4, 5], [6]], [[1, 1, 1], [1, 1], [1]])
    forged = good._replace(**{column: np.array(offsets, np.int64)})
    # Arrow writes only what its offsets reach, so the counts are told as they were meant to be.
    replace_shard(store, forged, num_tokens=6, num_spans=6)
    with pytest.raises(InputError, match=r"shard-00000\.arrow: (damaged offsets|a column holds)"):
        TokenStore(store.path)


@pytest.mark.parametrize("name", ["num_rows", "num_tokens", "num_spans"])
def test_counts_beyond_a_column(store: TokenStore, name: str) -> None:
    entry = {**store.manifest["shards"][0], name: 1000}
    rewrite_manifest(store, lambda manifest: manifest.update(with_shard(entry)))
    with pytest.raises(InputError, match=r"a column holds .* bytes, too few for"):
        TokenStore(store.path)


@pytest.mark.parametrize(("name", "dtype"), [("input_ids", np.uint16), ("spans", np.uint32)])
def test_a_column_may_be_exactly_long_enough_and_no_shorter(name: str, dtype: type) -> None:
    import pyarrow as pa

    values = np.arange(4, dtype=dtype)
    buffer = pa.py_buffer(values.tobytes())
    assert shards._view(buffer, dtype, 4, Path(name)).tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError, match=f"{name}: a column holds {4 * values.itemsize} bytes, too few for 5"):
        shards._view(buffer, dtype, 5, Path(name))
    with pytest.raises(InputError, match=r"a column holds 0 bytes, too few for 1"):
        shards._view(None, dtype, 1, Path(name))
    assert shards._view(None, dtype, 0, Path(name)).tolist() == []


def test_lengths_of_another_shape_or_type(store: TokenStore) -> None:
    np.save(store.path / "lengths.npy", np.array([3, 2], np.uint16))
    with pytest.raises(InputError, match=r"lengths\.npy: uint16 \(2,\) does not fit the manifest"):
        TokenStore(store.path)
    np.save(store.path / "lengths.npy", np.array([3, 2, 1], np.int64))
    with pytest.raises(InputError, match=r"lengths\.npy: int64 \(3,\) does not fit"):
        TokenStore(store.path)


@pytest.mark.parametrize(
    "change",
    [
        lambda lengths: lengths + 1,
        lambda lengths: lengths * 0,
        lambda lengths: lengths[::-1],
        lambda lengths: np.roll(lengths, 1),
        lambda lengths: np.where(np.arange(len(lengths)) == 0, 9, lengths),
        lambda lengths: np.where(np.arange(len(lengths)) == len(lengths) - 1, 9, lengths),
        lambda lengths: np.where(np.arange(len(lengths)) == 7, 60000, lengths),
        lambda lengths: np.where(np.arange(len(lengths)) == 27, lengths - 1, lengths),
    ],
)
@pytest.mark.parametrize("shard_rows", [1, 7, 100])
def test_lengths_of_the_right_size_with_other_numbers(
    tmp_path: Path, change: Callable[[Any], Any], shard_rows: int
) -> None:
    rows = [([0, n % 11 + 1], [n] * (n % 11 + 1)) for n in range(41)]
    store = write_store(tmp_path / "store", rows, shard_rows=shard_rows)
    path = store.path / "lengths.npy"
    size = path.stat().st_size
    np.save(path, change(store.lengths).astype(store.lengths.dtype))
    assert path.stat().st_size == size
    with pytest.raises(InputError, match=r"lengths\.npy: damaged, or not of this store .rows \d+ to \d+ have other"):
        TokenStore(store.path)


def test_lengths_of_another_store(tmp_path: Path) -> None:
    """The sum of all rows is the same, and that of each shard is not."""
    first = write_store(tmp_path / "a", [([0, n], [1] * n) for n in (5, 5, 5, 1, 1, 1)])
    second = write_store(tmp_path / "b", [([0, n], [1] * n) for n in (1, 1, 1, 5, 5, 5)])
    (first.path / "lengths.npy").write_bytes((second.path / "lengths.npy").read_bytes())
    with pytest.raises(InputError, match=r"lengths\.npy: damaged, or not of this store .rows 0 to 2"):
        TokenStore(first.path)


@pytest.mark.parametrize("content", [b"", b"x", b"\x93NUMPY", b"\x93NUMPY\x01\x00v\x00{'descr'", b"PK\x03\x04", None])
def test_lengths_that_are_no_array(store: TokenStore, content: bytes | None) -> None:
    path = store.path / "lengths.npy"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=r"lengths\.npy: .*prepare the store again"):
        TokenStore(store.path)


@pytest.mark.parametrize(
    "name", [".DS_Store", "Thumbs.db", "desktop.ini", "._shard-00000.arrow", "notes.txt", "sources.json"]
)
def test_what_others_leave_in_the_folder_hurts_nobody(store: TokenStore, name: str) -> None:
    (store.path / name).write_bytes(b"\x00\x01")
    (store.path / ".Trashes").mkdir()
    assert [row.input_ids.tolist() for row in TokenStore(store.path)] == [ids for _, ids in ROWS]
    assert verify_checksums(store.path) == []


def test_lengths_are_never_unpickled(store: TokenStore, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (store.path / "lengths.npy").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match=r"lengths\.npy: cannot be opened"):
        TokenStore(store.path)
    np.save(store.path / "lengths.npy", np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"lengths\.npy: cannot be opened"):
        TokenStore(store.path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(("longest", "dtype"), [((1 << 16) - 1, "<u2"), (1 << 16, "<u4")])
def test_lengths_take_the_narrowest_type_for_the_longest_row(tmp_path: Path, longest: int, dtype: str) -> None:
    rows = [([0, 2], [1, 2]), ([0, longest], [7] * longest), ([0, 1], [3])]
    store = write_store(tmp_path / "store", rows, shard_rows=1)  # the longest row in a shard of its own, not the last
    assert store.max_length == longest
    assert store.lengths.dtype == np.dtype(dtype)
    assert store.lengths.tolist() == [2, longest, 1]
    header = np.lib.format.read_array_header_1_0
    with open(store.path / "lengths.npy", "rb") as file:
        np.lib.format.read_magic(file)
        assert header(file) == ((3,), False, np.dtype(dtype))


@pytest.mark.parametrize(
    ("bounds", "is_whole"),
    [((0, 0), True), ((0, 4), True), ((4, 4), True), ((2, 1), False), ((-1, 2), False), ((3, 5), False)],
)
def test_a_cell_lies_within_its_column(bounds: tuple[int, int], is_whole: bool) -> None:
    values, offsets = np.arange(4, dtype=np.uint16), np.array([9, *bounds], np.int64)
    if is_whole:
        assert room._cell(values, offsets, 1, Path("s")).tolist() == list(range(*bounds))
    else:
        with pytest.raises(InputError, match="damaged offsets at row 1"):
            room._cell(values, offsets, 1, Path("s"))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, "u2"), (1 << 16, "u2"), ((1 << 16) + 1, "u4")])
def test_ids_take_the_narrowest_type_for_the_vocabulary(vocab_size: int, dtype: str) -> None:
    assert np.dtype(shards.token_dtype(vocab_size)) == np.dtype(dtype)


def test_contracts_are_frozen_and_slotted() -> None:
    for contract in (FileInfo("a", 1, "00"), ShardInfo("a", 1, "00", 1, 1, 1, 1), StoreIdentity({}, {}, {}, {})):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(contract, dataclasses.fields(contract)[0].name, None)
        assert not hasattr(contract, "__dict__")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced and renamed, in order."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append("directory synced" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file synced")
        fsync(descriptor)

    def renamed(before: Path, after: Path) -> None:
        events.append(f"{after.name} renamed")
        replace(before, after)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    return events


def test_a_temporary_file_is_synced_before_it_is_renamed(tmp_path: Path, events: list[str]) -> None:
    files.write_file(tmp_path / "report", ["line"])
    assert events == ["file synced", "report renamed", "directory synced"][: 3 if os.name == "posix" else 2]
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


@pytest.mark.skipif(os.name != "posix", reason="directories cannot be synced here")
def test_the_manifest_comes_last_and_after_every_name_is_on_disk(store: TokenStore, events: list[str]) -> None:
    infos = [ShardInfo(**entry) for entry in store.manifest["shards"]]
    identity = StoreIdentity({}, store.manifest["tokenizer"], {}, {})
    manifest_room.write_manifest(store.path, identity, infos)
    assert events == [
        *("file synced", "lengths.npy renamed", "directory synced"),
        *("file synced", f"{manifest_room.MANIFEST} renamed", "directory synced"),
    ]


def test_a_shard_of_several_record_batches_is_none(store: TokenStore) -> None:
    path = store.path / "shard-00000.arrow"
    with pa.ipc.open_file(path) as reader:
        schema, batch = reader.schema, reader.get_batch(0)
    for batches in ([batch.slice(0, 1), batch.slice(1)], []):
        with pa.ipc.new_file(path, schema) as writer:
            for part in batches:
                writer.write_batch(part)
        size = path.stat().st_size
        entry = {**store.manifest["shards"][0], "num_bytes": size}
        rewrite_manifest(store, lambda manifest, entry=entry: manifest.update(with_shard(entry)))
        with pytest.raises(InputError, match=r"shard-00000\.arrow: not a shard of a token store"):
            TokenStore(store.path)


def test_no_value_of_a_shard_may_be_missing(store: TokenStore) -> None:
    with pa.ipc.open_file(store.path / "shard-00000.arrow") as reader:
        schema = reader.schema
    assert not any(field.nullable for field in schema)
    assert not any(field.type.value_field.nullable for field in list(schema)[:2])


@pytest.mark.parametrize(("rows", "longest"), [([], 0), ([[]], 0), ([[], [5]], 1), ([[4, 5, 6], [7]], 3)])
def test_a_shard_knows_its_longest_row(tmp_path: Path, rows: list[list[int]], longest: int) -> None:
    columns = ShardColumns(
        np.array([i for row in rows for i in row], np.uint16), np.cumsum([0, *map(len, rows)]),
        np.empty(0, np.uint32), np.zeros(len(rows) + 1, np.int64), np.arange(len(rows), dtype=np.uint64),
    )  # fmt: skip
    info = write_shard(tmp_path, "shard-00000.arrow", columns)
    assert (info.max_length, info.num_rows, info.num_tokens) == (longest, len(rows), sum(map(len, rows)))


def test_rows_are_counted_from_either_end(store: TokenStore) -> None:
    assert store[-3].input_ids.tolist() == store[0].input_ids.tolist() == [1, 2, 3]
    assert store[-1].input_ids.tolist() == [6]
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"row {index} of a store with 3 rows"):
            store[index]
