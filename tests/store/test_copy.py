"""A store copied to object storage: the same bytes, resumed where it stopped, nothing of others touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import numbered_store, run_cli

from fastcollate.errors import InputError
from fastcollate.store.remote.copy import push
from fastcollate.store.remote.objects import Objects


@pytest.fixture
def store(tmp_path: Path) -> Path:
    numbered_store(tmp_path / "store", 300)
    (tmp_path / "store" / "sources.json").write_bytes(b"{}")
    (tmp_path / "store" / ".lock").touch()
    return tmp_path / "store"


def files(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir() if not path.name.startswith(".")}


def objects(url: str) -> dict[str, bytes]:
    folder = Objects(url)
    return {name: folder.get(name) or b"" for name in folder.found()}


@pytest.mark.parametrize("kind", ["memory", pytest.param("s3", marks=pytest.mark.slow)])
def test_the_same_bytes_and_nothing_twice(store: Path, kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "s3":
        request.getfixturevalue("s3")
    url = "s3://bucket/a/store" if kind == "s3" else f"memory://{store}"
    report = push(store, url)
    assert objects(url) == files(store)
    assert (report.num_files, report.num_there) == (len(files(store)), 0)
    assert report.num_bytes == sum(map(len, files(store).values()))
    again = push(store, url)
    assert (again.num_files, again.num_bytes, again.num_there) == (0, 0, len(files(store)))


def test_stopped_anywhere_it_goes_on_and_the_manifest_comes_last(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, write = f"memory://{store}", Objects.write
    written: list[str] = []

    def stops(self: Objects, name: str, content: bytes, *, create: bool = False) -> bool:
        if written:
            raise OSError(5, "Input/output error")
        written.append(name)
        return write(self, name, content, create=create)

    for stop in range(len(files(store))):
        written.clear()

        monkeypatch.setattr("fastcollate.store.remote.copy._AT_ONCE", 1)
        with monkeypatch.context() as patch:
            patch.setattr(Objects, "write", stops)
            if stop < len(files(store)) - 1:
                with pytest.raises(OSError, match="Input/output"):
                    push(store, url)
                assert "manifest.json" not in objects(url)
            else:
                push(store, url)
                assert written == ["manifest.json"]
        assert len(objects(url)) == stop + 1, "each call goes on where the last one stopped"
    assert objects(url) == files(store)


def test_what_arrived_damaged_is_sent_again(store: Path) -> None:
    url = f"memory://{store}"
    push(store, url)
    folder = Objects(url)
    content = folder.get("shard-00000.arrow") or b""
    folder.write("shard-00000.arrow", content[:-1] + b"?")
    assert push(store, url).num_files == 1
    assert objects(url) == files(store)


def test_a_damaged_store_and_a_place_of_others_are_refused(store: Path, tmp_path: Path) -> None:
    url = f"memory://{store}"
    with pytest.raises(InputError, match="no finished token store here"):
        push(tmp_path, url)
    numbered_store(tmp_path / "other", 7)
    push(tmp_path / "other", url)
    with pytest.raises(InputError, match="holds another store; choose another place"):
        push(store, url)
    Objects(f"{url}/b").write("photo.png", b"1")
    with pytest.raises(InputError, match=r"not of this store, such as photo\.png"):
        push(store, f"{url}/b")
    Objects(f"{url}/c").write(".job/job.json", b"{}")
    with pytest.raises(InputError, match="a job is at work here"):
        push(store, f"{url}/c")
    shard = store / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"shard-00000\.arrow: damaged"):
        push(store, f"{url}/d")
    assert "manifest.json" not in objects(f"{url}/d")


def test_the_command(store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"memory://{store}"
    assert run_cli(monkeypatch, "push", store, url) == 0
    assert f"{url}: {len(files(store))} files" in capsys.readouterr().out
    assert run_cli(monkeypatch, "push", store, url, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found == {"store": url, "num_files": 0, "num_bytes": 0, "num_there": len(files(store))}
