"""What opens a storage is nowhere told: not in its objects, not in files of this machine, messages, tracebacks."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from test_prepare import SMALL, many, write_lines

from fastcollate.errors import InputError
from fastcollate.ingest.job import prepare
from fastcollate.ingest.places.storage import StorageJournal
from fastcollate.sources import blocks as sources_module
from fastcollate.store.remote import Objects

SECRET = "s3cr3t"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources_module, "SIZES", SMALL)
    monkeypatch.setattr("fastcollate.sources.remote._WAITS", (0.0, 0.0))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "a.jsonl", many(600, seed=3))


@pytest.fixture
def shown(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """All that is printed, warned of and logged (from `info` on), and what the test adds; at its end the secret is
    looked for in it.
    """
    caplog.set_level(logging.INFO)
    said: list[str] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield said
    printed = capfd.readouterr()
    everything = "\n".join([*said, printed.out, printed.err, caplog.text, *(str(one.message) for one in told)])
    assert SECRET not in everything


def all_content(url: str) -> bytes:
    """All objects of a store, of its job and its lock, with their names."""
    folder = Objects(url)
    names = [name for place in ("", ".job/", ".lock/") for name in folder.found(place)]
    return b"\n".join(part for name in names for part in (name.encode(), folder.get(name) or b""))


def all_files(folder: Path) -> bytes:
    return b"\n".join(path.name.encode() + path.read_bytes() for path in folder.rglob("*") if path.is_file())


def with_password(tmp_path: Path) -> str:
    return f"memory://me:{SECRET}@bucket{tmp_path}/store"


def test_a_password_in_a_url_is_in_no_object_file_or_line(source: Path, tmp_path: Path, shown: list[str]) -> None:
    url, seen = with_password(tmp_path), []

    def stop(self: Any, infos: Any) -> None:
        seen.append(all_content(url))  # the notes, the header, the lock
        seen.append(all_files(tmp_path / "tmp"))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StorageJournal, "check", stop)
        with pytest.raises(KeyboardInterrupt) as found:
            prepare(source, url, workers=1)
    shown.append("".join(traceback.format_exception(found.value)))
    assert b'"token"' in seen[0]
    assert b"job.json" in seen[0]
    assert seen[1], "files of the stage"
    report = prepare(source, url, workers=1, progress=True)
    shown += [repr(report), repr(prepare(source, url, workers=1)), repr(Objects(url)), str(Objects(url))]
    assert report.store == f"memory://bucket{tmp_path}/store"
    with pytest.raises(InputError, match="holds a store that differs") as other:
        prepare(source, url, workers=1, max_length=100)
    shown.append("".join(traceback.format_exception(other.value)))
    assert not any(SECRET.encode() in content for content in [*seen, all_content(url), all_files(tmp_path)])


@pytest.mark.parametrize("call", ["pipe_file", "open", "info", "ls", "rm_file", "cat_file", "makedirs"])
def test_no_error_of_a_call_tells_it(
    source: Path, tmp_path: Path, shown: list[str], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Libraries write the address that they asked, and the credentials that were refused, into their errors."""
    url, files, asked = with_password(tmp_path), fsspec.filesystem("memory"), []
    real = getattr(files, call)

    def fail(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments)
        if len(asked) < 3:
            return real(*arguments, **options)
        raise OSError(5, f"https://me:{SECRET}@host/?X-Amz-Signature={SECRET} with {SECRET} failed")

    monkeypatch.setattr(type(files), call, lambda self, *arguments, **options: fail(*arguments, **options))
    told = ""
    try:
        prepare(source, url, workers=1)
    except InputError as error:
        told = str(error)
        shown.append("".join(traceback.format_exception(error)))
    assert told.startswith("memory://bucket/") == (len(asked) > 2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_keys_of_the_environment_are_in_no_object_file_or_line(
    source: Path, tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    del s3
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, f"{SECRET}-{name}")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    start = "from fastcollate.sources import blocks; blocks.SIZES = blocks.Sizes(20_000, 60_000); "
    code = f"{start}from fastcollate.cli import main; main()"
    told = []
    for store in ("s3://bucket/a/store", "s3://bucket/a/store", "s3://nowhere/store"):
        command = [sys.executable, "-c", code, "prepare", str(source), store, "--workers", workers, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        told.append(done.stdout + done.stderr)
        assert done.returncode == (1 if "nowhere" in store else 0), done.stderr
    assert json.loads(told[0][: told[0].rindex("}") + 1])["store"] == "s3://bucket/a/store"
    assert "no such bucket" in told[2]
    assert "Traceback" not in told[2]
    content = all_content("s3://bucket/a/store") + all_files(tmp_path)
    assert b"manifest.json" in content
    assert SECRET.encode() not in content + "".join(told).encode()
