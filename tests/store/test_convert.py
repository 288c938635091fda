"""`fastcollate convert`: the same rows in few shards, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcollate.errors import InputError
from fastcollate.load.loader import BatchLoader
from fastcollate.store import older as room
from fastcollate.store.manifest import verify_checksums
from fastcollate.store.older import convert
from fastcollate.store.store import TokenStore
from tests.helpers import Row, run_cli, write_format_1

ROWS: list[Row] = [
    ([1, 2], [1, 2, 3]), ([0, 2], [4, 50256]), ([1, 0], [6]), ([0, 0], []), ([2, 3, 1], [9, 8, 7, 6, 5, 4]),
]  # fmt: skip


def contents(store: TokenStore) -> list[Any]:
    return [(row.input_ids.tolist(), row.input_ids.dtype, row.spans.tolist(), row.source_row) for row in store]


@pytest.mark.slow
@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, 9), max_size=4), st.lists(st.integers(0, 300), max_size=9)), min_size=1
    ),
    shard_rows=st.integers(1, 4),
    shard_bytes=st.integers(1, 500),
    vocab_size=st.sampled_from([301, 70_000]),
)
def test_any_store_keeps_its_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], shard_rows: int, shard_bytes: int, vocab_size: int
) -> None:
    path = tmp_path_factory.mktemp("convert")
    tokenizer = {"name": "gpt2", "fingerprint": "00", "vocab_size": vocab_size, "pad_token_id": 300}
    old = TokenStore(write_format_1(path / "old", rows, shard_rows=shard_rows, tokenizer=tokenizer))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "SHARD_BYTES", shard_bytes)
        report = convert(old.path, path / "new")
    new = TokenStore(path / "new")
    assert contents(new) == contents(old)
    assert new.lengths.tolist() == old.lengths.tolist()
    assert new.lengths.dtype == old.lengths.dtype
    assert verify_checksums(new.path) == []
    assert (new.fingerprint, new.manifest["format_version"]) == (old.fingerprint, 2)
    for key in ("sources", "options", "kind", "end", "columns", "num_rows", "num_tokens", "max_length", "summary"):
        assert new.manifest[key] == old.manifest[key], key
    assert report.new_shards == len(new.manifest["shards"]) <= len(old.manifest["shards"]) == report.old_shards
    for shard in new.manifest["shards"]:
        size = 4 * shard["num_tokens"] + 4 * shard["num_spans"] + 24 * shard["num_rows"]
        assert size <= shard_bytes or shard["num_rows"] <= shard_rows
    written = [path / "old" / name for name in ("manifest.json", "lengths.npy")]
    assert all(file.exists() for file in written)


def test_it_is_written_the_same_everywhere(tmp_path: Path) -> None:
    for place in ("a", "b"):
        old = write_format_1(tmp_path / place / "old", ROWS, shard_rows=1, files={"skipped.txt": b"file\tline\n"})
        convert(old, tmp_path / place / "deep" / "new")
    names = sorted(file.name for file in (tmp_path / "a/deep/new").iterdir())
    assert names == ["lengths.npy", "manifest.json", "shard-00000.arrow", "skipped.txt"]
    for name in names:
        assert (tmp_path / "a/deep/new" / name).read_bytes() == (tmp_path / "b/deep/new" / name).read_bytes()


def test_a_loader_goes_on_with_the_new_store(tmp_path: Path) -> None:
    rows: list[Row] = [([1, n], list(range(1 + n))) for n in range(30)]
    old = write_format_1(tmp_path / "old", rows, shard_rows=1)
    convert(old, tmp_path / "new")
    loader = BatchLoader(TokenStore(old), batch_size=4, seed=3)
    batches = iter(loader)
    first = [next(batches) for _ in range(3)]
    state = loader.state_dict()
    rest = [batch.inputs.tolist() for batch in batches]
    again = BatchLoader(TokenStore(tmp_path / "new"), batch_size=4, seed=3)
    again.load_state_dict(state)
    assert len(first) == 3
    assert [batch.inputs.tolist() for batch in again] == rest


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    old = write_format_1(tmp_path / "old", ROWS)
    (tmp_path / "empty").mkdir()
    convert(old, tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for target in ("empty", "full", "file", "old"):
        before = sorted(p.name for p in tmp_path.rglob("*"))
        with pytest.raises(InputError, match=f"{target}: is there already and not empty; choose another directory"):
            convert(old, tmp_path / target)
        assert sorted(p.name for p in tmp_path.rglob("*")) == before
    with pytest.raises(InputError, match="of format 2 already; there is nothing to convert"):
        convert(tmp_path / "empty", tmp_path / "new")
    with pytest.raises(InputError, match="no finished token store here"):
        convert(tmp_path / "full", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["shard-00000.arrow", "shard-00004.arrow", "skipped.txt"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_gets_no_new_checksum(tmp_path: Path, name: str, damage: str) -> None:
    old = write_format_1(tmp_path / "old", ROWS, shard_rows=1, files={"skipped.txt": b"file\tline\n"})
    raw = bytearray((old / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (old / name).unlink()
    if damage != "remove":
        (old / name).write_bytes(raw if damage == "flip" else raw[:-1])
    with pytest.raises(InputError, match=name):
        convert(old, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_fails_leaves_nothing(tmp_path: Path, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_format_1(tmp_path / "old", ROWS)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(room, "write_manifest", fail)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        convert(old, tmp_path / "new")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["old"]


@pytest.mark.parametrize("is_there", ["unchanged", "changed", "gone"])
def test_a_tokenizer_json_comes_along_where_it_is_still_the_same(tmp_path: Path, is_there: str) -> None:
    import hashlib

    place = tmp_path / "deep" / "mine.json"
    place.parent.mkdir()
    place.write_text("{}")
    (place.parent / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    fingerprint = hashlib.sha256(b"{}").hexdigest()
    tokenizer = {"name": str(place), "fingerprint": fingerprint, "vocab_size": 10, "pad_token_id": 9}
    old = write_format_1(tmp_path / "old", [([1, 1], [1, 2])], tokenizer=tokenizer)
    if is_there != "unchanged":
        place.unlink()
    if is_there == "changed":
        place.write_text("{ }")
    report = convert(old, tmp_path / "new")
    new = TokenStore(tmp_path / "new")
    assert report.has_tokenizer == (is_there == "unchanged")
    assert new.manifest["tokenizer"]["name"] == "mine.json"
    assert str(tmp_path) not in (new.path / "manifest.json").read_text()
    if is_there == "unchanged":
        assert new.manifest["tokenizer"]["files"] == ["tokenizer.json", "tokenizer_config.json"]
        assert new.tokenizer_name == str(new.path / "tokenizer.json")
        assert (new.path / "tokenizer.json").read_bytes() == b"{}"
    else:
        assert new.manifest["tokenizer"]["files"] == []
        assert "ids cannot be shown as texts without it" in str(report)
    assert verify_checksums(new.path) == []


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    old = write_format_1(tmp_path / "old", ROWS, shard_rows=2)
    assert run_cli(monkeypatch, "convert", old, tmp_path / "new") == 0
    shown = capsys.readouterr().out
    assert "5 rows; 3 shards before, 1 now" in shown
    assert f"next: fastcollate verify --checksums {tmp_path / 'new'}, then delete {old}" in shown
    assert run_cli(monkeypatch, "convert", old, tmp_path / "json", "--json") == 0
    assert json.loads(capsys.readouterr().out)["new_shards"] == 1
    assert run_cli(monkeypatch, "convert", old, tmp_path / "new") == 1
    assert capsys.readouterr().err.endswith("choose another directory, or delete it\n")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_thousands_of_shards_within_64_descriptors(tmp_path: Path) -> None:
    old = write_format_1(tmp_path / "old", ROWS * 400, shard_rows=1)
    script = "ulimit -n 64; exec " + sys.executable + ' -m fastcollate convert "$0" "$1" --json'
    command = ["bash", "-c", script, str(old), str(tmp_path / "new")]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    assert json.loads(result.stdout)["new_shards"] == 1
    assert np.array_equal(TokenStore(tmp_path / "new").lengths, [3, 2, 1, 0, 6] * 400)
