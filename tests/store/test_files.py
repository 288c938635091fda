"""The atomic writer: the old file or the new one, never a part, and nothing left over."""

from __future__ import annotations

import ast
import hashlib
import os
import threading
from pathlib import Path

import pytest

from fastcollate.store.files import FileInfo, HashedFile, describe, write_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that holds `old`."""
    (tmp_path / "file").write_bytes(b"old")
    return tmp_path / "file"


def write_in_parts(file: HashedFile) -> None:
    for part in (b"one\n", memoryview(b"two"), bytearray(b"\n")):
        file.write(part)
    file.flush()
    file.close()


@pytest.mark.parametrize("content", [b"one\ntwo\n", ["one", "two"], iter(["one", "two"]), write_in_parts])
@pytest.mark.parametrize("sync", [True, False])
def test_each_kind_of_content(path: Path, content: object, sync: bool) -> None:
    content = ["one", "two"] if hasattr(content, "__next__") else content  # an iterator serves one test only
    info = write_file(path, content, sync=sync)  # type: ignore[arg-type]
    assert path.read_bytes() == b"one\ntwo\n"
    assert info == FileInfo("file", 8, hashlib.sha256(b"one\ntwo\n").hexdigest()) == describe(path)
    assert [file.name for file in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_what_fails_leaves_the_old_file_and_nothing_else(path: Path, error: type[BaseException]) -> None:
    def fail(file: HashedFile) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(error):
        write_file(path, fail)
    assert path.read_bytes() == b"old"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_what_the_disk_refuses_leaves_the_old_file(path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_a_link_stays_and_a_pipe_is_written_straight(path: Path) -> None:
    (path.parent / "link").symlink_to(path)
    assert write_file(path.parent / "link", b"new").name == "link"
    assert (path.parent / "link").is_symlink()
    assert path.read_bytes() == b"new"
    os.mkfifo(path.parent / "pipe")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append((path.parent / "pipe").read_bytes()))
    reader.start()
    write_file(path.parent / "pipe", ["one", "two"])
    reader.join()
    assert found == [b"one\ntwo\n"]
    assert sorted(file.name for file in path.parent.iterdir()) == ["file", "link", "pipe"]


def test_many_may_write_one_file(path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(20):
            write_file(path, [str(number)] * 1000, sync=False)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = path.read_text().splitlines()
    assert len(lines) == 1000
    assert len(set(lines)) == 1
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_without_sync_nothing_is_synced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    write_file(path, b"new", sync=False)
    assert synced == []
    write_file(path, b"new")
    assert len(synced) == (2 if os.name == "posix" else 1)


@pytest.mark.slow
def test_nothing_else_in_the_package_replaces_files() -> None:
    """The one atomic writer is the only one; downloads are moved when their SHA-256 is right."""
    package = Path(__file__).resolve().parents[2] / "fastcollate"
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in (("os", "replace"), ("os", "rename"), ("tempfile", "NamedTemporaryFile"))
    }  # fmt: skip
    assert users == {"store/files.py", "store/remote/cache.py", "store/remote/download.py"}
