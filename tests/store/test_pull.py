"""A store copied from object storage: the same bytes, resumed within a file, nothing of others touched; commands."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
from helpers import numbered_store, run_cli, sample_store

from fastcollate.errors import InputError
from fastcollate.store.manifest import verify_checksums
from fastcollate.store.remote import cache as caches
from fastcollate.store.remote.copy import push
from fastcollate.store.remote.download import pull
from fastcollate.store.remote.objects import Objects


@pytest.fixture
def store(tmp_path: Path) -> Path:
    numbered_store(tmp_path / "store", 1000)
    (tmp_path / "store" / "sources.json").write_bytes(b"{}")
    return tmp_path / "store"


@pytest.fixture
def url(store: Path) -> str:
    push(store, f"memory://{store}")
    return f"memory://{store}"


def files(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


@pytest.mark.parametrize("kind", ["memory", pytest.param("s3", marks=pytest.mark.slow)])
def test_the_same_bytes_and_nothing_twice(
    store: Path, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    if kind == "s3":
        request.getfixturevalue("s3")
    url = "s3://bucket/a/store" if kind == "s3" else f"memory://{store}"
    push(store, url)
    report = pull(url, tmp_path / "copy")
    assert files(tmp_path / "copy") == files(store)
    assert (report.num_files, report.num_there) == (12, 0)
    again = pull(url, tmp_path / "copy")
    assert (again.num_files, again.num_there) == (0, 12)
    (tmp_path / "copy" / "shard-00003.arrow").write_bytes(b"damaged")
    assert pull(url, tmp_path / "copy").num_there == 11
    assert files(tmp_path / "copy") == files(store)


def test_stopped_anywhere_it_goes_on_within_a_file(
    store: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "CHUNK", 3000)
    read, left, lock = Objects.read, [0], threading.Lock()
    sent: dict[tuple[str, int], int] = {}

    def stops(self: Objects, name: str, start: int = 0, stop: int = 0) -> bytes:
        with lock:
            if not left[0]:
                raise InputError("stopped")
            left[0] -= 1
            sent[name, start] = sent.get((name, start), 0) + 1
        return read(self, name, start, stop)

    monkeypatch.setattr(Objects, "read", stops)
    for most in (0, 1, 2, 5, 9):
        left[0] = most
        with pytest.raises(InputError, match="stopped"):
            pull(url, tmp_path / "copy")
        assert not (tmp_path / "copy" / "manifest.json").exists()
    left[0] = 10_000
    pull(url, tmp_path / "copy")
    assert files(tmp_path / "copy") == files(store)
    assert max(sent.values()) == 1  # no range came twice


def test_what_is_damaged_or_other_is_refused(store: Path, url: str, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    raw = memory.cat(f"{store}/shard-00002.arrow")
    memory.pipe(f"{store}/shard-00002.arrow", raw[:50] + b"!" + raw[51:])
    with pytest.raises(InputError, match=r"shard-00002\.arrow: its SHA-256 is not"):
        pull(url, tmp_path / "copy")
    assert not (tmp_path / "copy" / "manifest.json").exists()
    assert verify_checksums(Objects(url))[0].startswith(f"{url}/shard-00002.arrow: damaged, its SHA-256 is ")
    numbered_store(tmp_path / "other", 50)
    before = files(tmp_path / "other")
    with pytest.raises(InputError, match="other: holds another store"):
        pull(url, tmp_path / "other")
    assert files(tmp_path / "other") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"holds files that are not of .*, such as thesis\.tex"):
        pull(url, tmp_path / "mine")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: is a file; give a folder"):
        pull(url, tmp_path / "file")
    with pytest.raises(InputError, match="no finished token store here"):
        pull(f"{url}/none", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.slow
def test_commands_on_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FASTCOLLATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    sample_store(tmp_path / "store", 300)
    push("store", f"memory://me:secret@host{tmp_path}/store")
    url = f"memory://me:secret@host{tmp_path}/store"

    def both(*command: str) -> list[Any]:
        found = []
        for place in ("store", url):
            assert run_cli(monkeypatch, *(place if word == "STORE" else word for word in command), "--json") == 0
            printed = capsys.readouterr()
            assert "secret" not in printed.out + printed.err
            found.append(json.loads(printed.out))
        return found

    one, other = both("verify", "STORE", "--checksums", "--mask-prompt")
    assert one == other
    one, other = both("inspect", "STORE")
    assert {**one, "path": ""} == {**other, "path": ""}
    one, other = both("inspect", "STORE", "--row", "17")
    assert one == other
    assert run_cli(monkeypatch, "bench", url, "--rounds", "1") == 0
    assert run_cli(monkeypatch, "verify", url) == 0
    assert "secret" not in "".join(capsys.readouterr())
    losses = []
    for place in ("store", url):
        out = tmp_path / f"run{len(losses)}"
        assert run_cli(monkeypatch, "train", "--store", place, "--out", str(out), "--max-steps", "3", "--json") == 0
        losses.append([json.loads(line).get("loss") for line in (out / "metrics.jsonl").read_text().splitlines()])
        assert "secret" not in "".join(path.read_text() for path in out.rglob("*.json*"))
    assert losses[0] == losses[1]
    assert run_cli(monkeypatch, "pull", url, "copy") == 0
    assert run_cli(monkeypatch, "verify", "copy", "--checksums") == 0
    assert "secret" not in "".join(capsys.readouterr())
