"""The token store: layout, atomic writes, checks at opening, checksums."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcollate.errors import InputError
from fastcollate.store.files import write_file
from fastcollate.store.manifest import StoreIdentity, sources_of, verify_checksums, write_manifest
from fastcollate.store.shards import ShardColumns, ShardInfo, shard_name, token_dtype, write_shard
from fastcollate.store.store import TokenStore
from tests.helpers import GPT2

IDENTITY = StoreIdentity(
    sources=sources_of(["00"], 3),
    tokenizer=GPT2,
    template={"name": "alpaca"},
    options={"boundary": "reference"},
)


def columns(rows: list[list[int]], first_row: int = 0, dtype: type = np.uint16) -> ShardColumns:
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    spans = np.array([n for row in rows for n in (1, len(row) - 1)], np.uint32)
    return ShardColumns(
        np.array([t for row in rows for t in row], dtype),
        offsets,
        spans,
        np.arange(len(rows) + 1, dtype=np.int64) * 2,
        np.arange(first_row, first_row + len(rows), dtype=np.uint64),
    )


def make_store(path: Path, shards: list[list[list[int]]], identity: StoreIdentity = IDENTITY) -> TokenStore:
    path.mkdir(exist_ok=True)
    dtype = token_dtype(identity.tokenizer["vocab_size"])
    infos: list[ShardInfo] = []
    for index, rows in enumerate(shards):
        first = sum(info.num_rows for info in infos)
        infos.append(write_shard(path, shard_name(index), columns(rows, first, dtype)))
    report = write_file(path / "skipped.jsonl", ["{}"])
    write_manifest(path, identity, infos, files=[report], summary={"num_skipped": 1})
    return TokenStore(path)


ROWS = [[[1, 2, 3], [4, 50256]], [[7]], [[8, 9, 10, 11]]]


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return make_store(tmp_path / "store", ROWS)


def test_rows_come_back_in_order(store: TokenStore) -> None:
    flat = [row for shard in ROWS for row in shard]
    assert [example.input_ids.tolist() for example in store] == flat
    assert [example.source_row for example in store] == [0, 1, 2, 3]
    assert [example.spans.tolist() for example in store] == [[1, len(row) - 1] for row in flat]
    assert store[-1].input_ids.tolist() == flat[-1]
    assert store[np.int64(2)].input_ids.dtype == np.uint16
    assert store.lengths.tolist() == [3, 2, 1, 4]
    assert store.lengths.dtype == np.uint16
    assert store.shard_starts.tolist() == [0, 2, 3, 4]
    assert (len(store), store.num_tokens, store.max_length) == (4, 10, 4)
    assert (store.vocab_size, store.tokenizer_name, store.pad_token_id) == (50257, "gpt2", 50256)
    assert store.fingerprint == IDENTITY.fingerprint
    for wrong in (4, -5):
        with pytest.raises(IndexError, match=f"row {wrong} of a store with 4 rows"):
            store[wrong]
    with pytest.raises(TypeError):
        store["0"]  # type: ignore[index]


def test_columns_are_read_only_views_of_the_map(store: TokenStore) -> None:
    shard = store.shards[0]
    assert [c.dtype for c in shard[:5]] == [np.uint16, np.int64, np.uint32, np.int64, np.uint64]
    assert not any(c.flags.writeable or c.flags.owndata for c in shard[:5])


def test_a_wide_vocabulary_takes_uint32_and_empty_rows_are_kept(tmp_path: Path) -> None:
    wide = dataclasses.replace(IDENTITY, tokenizer={**IDENTITY.tokenizer, "vocab_size": 100277})
    path = tmp_path / "store"
    path.mkdir()
    empty = ShardColumns(
        np.array([70000], np.uint32), np.array([0, 0, 1]), np.array([1], np.uint32), np.array([0, 0, 1]),
        np.array([5, 9], np.uint64),
    )  # fmt: skip
    write_manifest(path, wide, [write_shard(path, "shard-00000.arrow", empty)])
    store = TokenStore(path)
    assert [row.input_ids.tolist() for row in store] == [[], [70000]]
    assert store[1].input_ids.dtype == np.uint32
    assert store[0].spans.tolist() == []
    assert store[1].source_row == 9


def test_pyarrow_reads_a_shard_unaided(store: TokenStore) -> None:
    with pa.OSFile(str(store.path / shard_name(0))) as file:
        table = pa.ipc.open_file(file).read_all()
    assert table.to_pydict() == {
        "input_ids": [[1, 2, 3], [4, 50256]],
        "spans": [[1, 2], [1, 1]],
        "source_row": [0, 1],
    }
    assert str(table.schema.field("input_ids").type) == "large_list<item: uint16 not null>"


def test_datasets_reads_a_shard_unaided(store: TokenStore, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = [str(store.path / shard_name(index)) for index in range(3)]
    data = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert data["input_ids"][:] == [row for shard in ROWS for row in shard]


def test_bytes_on_disk_are_pinned(store: TokenStore, tmp_path: Path) -> None:
    again = make_store(tmp_path / "again", ROWS)
    for file in sorted(store.path.iterdir()):
        assert file.read_bytes() == (again.path / file.name).read_bytes()
    raw = (store.path / shard_name(1)).read_bytes()
    assert raw[:6] == b"ARROW1"
    assert raw[-6:] == b"ARROW1"
    assert (store.path / "lengths.npy").read_bytes()[:8] == b"\x93NUMPY\x01\x00"
    assert (store.path / "lengths.npy").read_bytes()[-8:] == bytes([3, 0, 2, 0, 1, 0, 4, 0])
    manifest = json.loads((store.path / "manifest.json").read_text())
    assert manifest["format"] == "fastcollate-store"
    assert manifest["format_version"] == 2
    assert list(manifest) == [
        "format", "format_version", "fingerprint", "sources", "tokenizer", "template", "options", "kind", "end",
        "columns", "num_rows", "num_tokens", "max_length", "summary", "files", "shards", "checksum",
    ]  # fmt: skip


def test_views_outlive_the_store_and_descriptors_are_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    store = make_store(tmp_path / "store", ROWS)
    shard = store.shards[0]
    lengths = store.lengths
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # one for lengths.npy, none for the shards
    del store
    assert shard.input_ids.tolist() == [1, 2, 3, 4, 50256]
    assert lengths.tolist() == [3, 2, 1, 4]


def test_pickling_opens_the_store_anew(store: TokenStore) -> None:
    copy = pickle.loads(pickle.dumps(store))
    assert copy[3].input_ids.tolist() == store[3].input_ids.tolist()
    assert len(pickle.dumps(store)) < 500


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no finished token store here.*fastcollate prepare"):
        TokenStore(tmp_path)
    with pytest.raises(InputError, match="no finished token store here"):
        TokenStore(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"no finished token store here.* fastcollate prepare .*/file STORE"):
        TokenStore(tmp_path / "file")
    with pytest.raises(InputError, match="no usable record"):
        write_manifest(tmp_path, IDENTITY, [])


def rewrite_manifest(store: TokenStore, **changes: object) -> None:
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest.update(changes)
    (store.path / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def test_other_format_versions_are_refused(store: TokenStore) -> None:
    rewrite_manifest(store, format_version=3)
    with pytest.raises(InputError, match="format 3; this release reads 1 and 2: upgrade with"):
        TokenStore(store.path)


def test_an_edited_manifest_is_refused(store: TokenStore) -> None:
    rewrite_manifest(store, num_rows=5)
    with pytest.raises(InputError, match="checksum differs"):
        TokenStore(store.path)
    (store.path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="damaged, or not of a token store"):
        TokenStore(store.path)


@pytest.mark.parametrize("name", ["shard-00000.arrow", "lengths.npy"])
def test_truncated_and_missing_files_are_refused_at_opening(store: TokenStore, name: str) -> None:
    path = store.path / name
    raw = path.read_bytes()
    path.write_bytes(raw[:-3])
    with pytest.raises(InputError, match=name):
        TokenStore(store.path)
    assert verify_checksums(store.path) == [f"{path}: {len(raw) - 3} bytes, but {len(raw)} were written"]
    path.unlink()
    with pytest.raises(InputError, match=name):
        TokenStore(store.path)
    assert verify_checksums(store.path) == [f"{path}: No such file or directory"]


@pytest.mark.slow
def test_any_flipped_byte_is_found(store: TokenStore) -> None:
    assert verify_checksums(store.path) == []
    for path in store.path.iterdir():
        raw = bytearray(path.read_bytes())
        for position in range(0, len(raw), 1 if len(raw) < 300 else 37):
            raw[position] ^= 1
            path.write_bytes(raw)
            if path.name == "manifest.json":
                with pytest.raises(InputError, match=r"manifest\.json: damaged|no finished|format version"):
                    verify_checksums(store.path)
            else:
                assert verify_checksums(store.path)[0].startswith(f"{path}: damaged")
            raw[position] ^= 1
        path.write_bytes(raw)
    assert verify_checksums(store.path) == []


@pytest.mark.slow
@given(st.data())
def test_a_flipped_byte_never_reads_out_of_bounds(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "flip"
    if not (path / "manifest.json").exists():
        make_store(path, ROWS)
    shard = path / shard_name(0)
    raw = shard.read_bytes()
    position = data.draw(st.integers(0, len(raw) - 1))
    flipped = bytearray(raw)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        shard.write_bytes(flipped)
        try:
            for example in TokenStore(path):
                assert len(example.input_ids) <= 5
        except InputError:
            pass  # found at opening; what is not found there only changes values, never bounds
    finally:
        shard.write_bytes(raw)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path, shard_name(0), columns([[1, 2]]))
    assert list(tmp_path.iterdir()) == []
