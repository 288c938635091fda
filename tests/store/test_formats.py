"""The formats on disk: bytes pinned, what is refused by name, and format 1, which reads as format 2."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastcollate.errors import InputError
from fastcollate.integrations.pytorch import StoreDataset
from fastcollate.load.loader import BatchLoader
from fastcollate.store.manifest import StoreIdentity, read_manifest, sources_of, verify_checksums, write_manifest
from fastcollate.store.shards import ShardColumns, shard_name, write_shard
from fastcollate.store.store import TokenStore, require_served
from tests.helpers import GPT2, write_format_1, write_store
from tests.store.test_manifest import forge

ROWS = [
    ([1, 2], [1, 2, 3]), ([0, 2], [4, 50256]), ([1, 0], [6]), ([0, 0], []), ([2, 3, 1], [9, 8, 7, 6, 5, 4]),
]  # fmt: skip
# What release 0.1 wrote of these rows (commit 3981236), two rows a shard.
FORMAT_1 = {
    "lengths.npy": "00886f6d372f023c0955bca2e0cde902a83080cd3decf37cecf06b96d1fa68ab",
    "manifest.json": "db1a57a0616fbdd851e80fa29bfbd2c9c99f87493277c9b77c497c07093c2e6c",
    "shard-00000.arrow": "b263505621c295fff86e35106dc79d58bfe67630919285e126e6c38aa841b5fe",
    "shard-00001.arrow": "8ba848e17140425e9c7f42e6a4da38d5162681f6ff02bcee0f28514e0ca9eeaf",
    "shard-00002.arrow": "21f6720a4312dd4a81e71733439a9765e3581f38a7be41db91c10790377f6f7b",
    "skipped.txt": "2fbd12f883ab708e1f451248a451e829e21f58c0f37a9b593e942c23ff8a4fe7",
}
FORMAT_2 = FORMAT_1 | {
    "manifest.json": "3c6fefb4bf2aa0487711992f663b173074ddd0babdb3bbbf23fbef36ad0ef9b2",
}
del FORMAT_2["skipped.txt"]


def hashes(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


def make_format_1(path: Path) -> Path:
    return write_format_1(path, ROWS, shard_rows=2, files={"skipped.txt": b"file\tline\n"})


def test_format_1_is_what_the_old_release_wrote(tmp_path: Path) -> None:
    assert hashes(make_format_1(tmp_path / "old")) == FORMAT_1


def test_the_bytes_of_format_2_are_pinned(tmp_path: Path) -> None:
    write_store(tmp_path / "new", ROWS, shard_rows=2)
    assert hashes(tmp_path / "new") == FORMAT_2


def test_format_1_reads_as_format_2(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = TokenStore(make_format_1(tmp_path / "old"))
    assert [(row.spans.tolist(), row.input_ids.tolist()) for row in store] == [(list(s), list(i)) for s, i in ROWS]
    assert [row.source_row for row in store] == [0, 10, 20, 30, 40]
    assert (store.kind, store.end, store.pad_token_id, store.end_token_id) == ("rows", "append", 50256, 50256)
    wanted = set(read_manifest(write_store(tmp_path / "new", ROWS).path) or ())
    assert set(store.manifest) == wanted
    assert store.manifest["format_version"] == 1
    assert store.manifest["options"] == {"boundary": "reference"}
    assert store.manifest["sources"] == {
        "sha256": store.fingerprint, "num_sources": 1, "num_records": 7, "format": 1,
    }  # fmt: skip
    assert verify_checksums(store.path) == []
    assert sum(len(batch.inputs) for batch in BatchLoader(store, batch_size=2)) == len(ROWS)


def test_a_format_1_store_made_from_ids_warns_once(tmp_path: Path) -> None:
    path = write_format_1(tmp_path / "ids", ROWS, template={"name": "tokenized"})
    with pytest.warns(UserWarning, match="made from ready ids by an older release") as caught:
        TokenStore(path)
    assert len(caught) == 1


@pytest.mark.parametrize("version", [0, 3, 17, -1, True, None, "2", 2.0, [2], 10**30])
def test_other_versions_are_refused(tmp_path: Path, version: Any) -> None:
    path = write_store(tmp_path / "store", ROWS).path
    forge(path, lambda manifest: manifest.update(format_version=version))
    with pytest.raises(InputError, match=r"format .*; this release reads 1 and 2: upgrade with"):
        TokenStore(path)


@pytest.mark.parametrize("make", [make_format_1, lambda path: write_store(path, ROWS).path], ids=["1", "2"])
@pytest.mark.parametrize("part", ["manifest", "tokenizer"])
def test_keys_that_are_not_known_are_refused(tmp_path: Path, make: Callable[[Path], Path], part: str) -> None:
    path = make(tmp_path / "store")
    forge(path, lambda manifest: (manifest if part == "manifest" else manifest[part]).update(rotated=1))
    with pytest.raises(InputError, match=f"{part} has a key that this release does not know .'rotated'"):
        TokenStore(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["sources"].update(path="/x"), "sources has a key that this release does not know"),
        (lambda m: m["sources"].pop("sha256"), "sources sha256 is None"),
        (lambda m: m.update(kind="songs"), "kind is 'songs', but this release knows rows, pairs, documents"),
        (lambda m: m.update(end="never"), "end is 'never', but this release knows append, in_row"),
        (lambda m: m.update(end=None), "end is None"),
        (lambda m: m.pop("columns"), "columns is None"),
        (lambda m: m.update(columns={"label": "object"}), "column 'label' is of type 'object'"),
        (lambda m: m.update(columns={"label": ["int8"]}), r"column 'label' is of type \['int8'\]"),
        (lambda m: m.update(columns={"a b": "int8"}), "column 'a b' is of type 'int8'"),
        (lambda m: m["tokenizer"].pop("end_token_id"), "tokenizer end_token_id is None"),
        (lambda m: m["tokenizer"].update(end_token_id=-1), "tokenizer end_token_id is -1"),
        (lambda m: m["tokenizer"].update(files=["tokenizer.json"]), "the tokenizer's files are not among the store's"),
        (lambda m: m["tokenizer"].update(files=[["a"]]), "the tokenizer's files are not among the store's"),
        (lambda m: m["options"].update(max_length=3), "its fingerprint is not that of what it was made from"),
        (lambda m: m.update(fingerprint="00"), "its fingerprint is not that of what it was made from"),
        (lambda m: m.update(num_rows=6), "num_rows is 6, but its shards have others"),
        (lambda m: m.update(num_tokens=11), "num_tokens is 11, but its shards have others"),
        (lambda m: m.update(num_rows=0, num_tokens=0, shards=[]), "num_rows is 0, but its shards have others"),
    ],
)
def test_a_forged_manifest_is_refused(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    path = write_store(tmp_path / "store", ROWS).path
    forge(path, change)
    with pytest.raises(InputError, match=message):
        TokenStore(path)


def test_a_manifest_without_end_is_one_line(tmp_path: Path) -> None:
    for raw in (b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"null", b"[]", b"0"):
        (tmp_path / "manifest.json").write_bytes(raw)
        with pytest.raises(InputError, match=r"manifest\.json: damaged"):
            TokenStore(tmp_path)


def special_store(path: Path, **identity: Any) -> TokenStore:
    """A store of two rows of another kind, with a label and a score a row."""
    path.mkdir()
    extra = {"score": np.array([0.5, -1], np.float32), "label": np.array([1, 0], np.int8)}
    columns = ShardColumns(
        np.array([1, 2, 3, 4, 5], np.uint16), np.array([0, 3, 5]), np.array([1, 2, 1, 1], np.uint32),
        np.array([0, 2, 4]), np.array([7, 7], np.uint64), extra,
    )  # fmt: skip
    made = StoreIdentity(
        **{"sources": sources_of(["00"], 1), "tokenizer": GPT2, "template": {}, "options": {}, **identity},
        columns={name: values.dtype.name for name, values in extra.items()},
    )
    write_manifest(path, made, [write_shard(path, shard_name(0), columns)])
    return TokenStore(path)


@pytest.mark.parametrize("kind", ["pairs", "answers"])
def test_what_is_no_text_to_follow_is_read_and_refused_by_what_trains_texts(tmp_path: Path, kind: str) -> None:
    store = special_store(tmp_path / "store", kind=kind)
    assert [row.input_ids.tolist() for row in store] == [[1, 2, 3], [4, 5]]
    assert [row.source_row for row in store] == [7, 7]
    assert store.shards[0].extra["label"].tolist() == [1, 0]
    assert store.shards[0].extra["score"].dtype == np.float32
    assert store.shards[0].extra["score"].tolist() == [0.5, -1]
    assert verify_checksums(store.path) == []
    for use in (lambda: require_served(store), lambda: StoreDataset(store)):
        with pytest.raises(InputError, match=rf"a store of {kind}; this makes batches of rows"):
            use()


def test_further_columns_of_ordinary_rows_are_served(tmp_path: Path) -> None:
    store = special_store(tmp_path / "store")
    assert [len(batch.inputs) for batch in BatchLoader(store, batch_size=2)] == [2]


def test_the_fingerprint_covers_kind_end_and_columns() -> None:
    plain = StoreIdentity(sources_of(["00"], 1), GPT2, {}, {})
    others = [
        StoreIdentity(sources_of(["00"], 1), GPT2, {}, {}, **changes)
        for changes in ({"kind": "pairs"}, {"end": "in_row"}, {"columns": {"label": "int8"}})
    ]
    assert len({plain.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert sources_of(["00", "11"], 2)["sha256"] != sources_of(["0011"], 2)["sha256"]


def test_a_store_keeps_its_own_tokenizer(tmp_path: Path) -> None:
    path = write_store(tmp_path / "store", ROWS).path
    assert TokenStore(path).tokenizer_name == "gpt2"

    def own(manifest: dict[str, Any]) -> None:
        (path / "tokenizer.json").write_text("{}")
        digest = hashlib.sha256(b"{}").hexdigest()
        manifest["files"].append({"name": "tokenizer.json", "num_bytes": 2, "sha256": digest})
        manifest["tokenizer"].update(name="mine.json", files=["tokenizer.json"])
        parts = ("sources", "tokenizer", "template", "options", "kind", "end", "columns")
        manifest["fingerprint"] = StoreIdentity(**{part: manifest[part] for part in parts}).fingerprint

    forge(path, own)
    assert TokenStore(path).tokenizer_name == str(path / "tokenizer.json")
    assert verify_checksums(path) == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts maps and descriptors as Linux tells them")
def test_thousands_of_shards_open_within_256_descriptors_and_few_maps(tmp_path: Path) -> None:
    path = write_format_1(tmp_path / "many", ROWS[:4] * 1250, shard_rows=1)
    script = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from fastcollate import BatchLoader, TokenStore
before = sum(1 for _ in open("/proc/self/maps"))
store = TokenStore(sys.argv[1])
rows = sum(len(batch.inputs) for batch in BatchLoader(store, batch_size=64))
assert rows == len(store) == 5000 and len(store.manifest["shards"]) == 5000, rows
assert [row.input_ids.tolist() for row in store][-4:] == [[1, 2, 3], [4, 50256], [6], []]
assert sum(1 for _ in open("/proc/self/maps")) < before + 1000
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, env=environment, timeout=300)


def test_the_manifest_holds_no_path_time_or_machine(tmp_path: Path) -> None:
    first = write_store(tmp_path / "a" / "store", ROWS)
    second = write_store(tmp_path / "b" / "other", ROWS)
    assert (first.path / "manifest.json").read_bytes() == (second.path / "manifest.json").read_bytes()
    assert str(tmp_path) not in json.dumps(first.manifest)
