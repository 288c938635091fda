"""prepare where storage, disk or kernel fail: one clear line, finished shards kept, the same bytes after."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_prepare import SMALL, check_against_reference, many, store_hash, write_lines

from fastcollate.errors import SourceReadError
from fastcollate.ingest.job import prepare
from fastcollate.sources import blocks as sources_module
from fastcollate.sources import json_blocks as json_pieces
from fastcollate.store.manifest import verify_checksums
from fastcollate.store.store import TokenStore

START = (
    "import sys; from fastcollate.sources import blocks as sources; "
    "sources.SIZES = sources.Sizes(20_000, 60_000); "
    "from fastcollate.cli import main; "
)


@pytest.fixture
def records() -> list[dict[str, str]]:
    return many(2500, seed=7)


def command(source: Path, store: Path, *options: str, before: str = "") -> list[str]:
    """The command line on blocks of 20 kB, so that a small file has many."""
    return [
        sys.executable,
        "-c",
        f"{START}{before}main()",
        "prepare",
        str(source),
        str(store),
        "--workers",
        "2",
        *options,
    ]


def units(store: Path) -> int:
    """Finished units."""
    journal = store / ".journal"
    return journal.read_bytes().count(b'"line": "unit"') if journal.exists() else 0


def check_one_line_and_resume(
    result: subprocess.CompletedProcess[str], source: Path, store: Path, message: str
) -> None:
    """A failed job says one line, leaves no manifest, and the same command finishes it."""
    assert result.returncode == 1, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr
    assert not (store / "manifest.json").exists()
    assert subprocess.run(command(source, store), check=False, capture_output=True).returncode == 0
    assert verify_checksums(store) == []


@pytest.mark.slow
def test_a_worker_that_the_kernel_kills(tmp_path: Path, records: list[dict[str, str]]) -> None:
    psutil = pytest.importorskip("psutil")
    source = write_lines(tmp_path / "a.jsonl", records)
    prepare(source, tmp_path / "other")
    process = subprocess.Popen(command(source, tmp_path / "s"), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    killed = False
    while not killed and process.poll() is None and time.monotonic() < deadline:
        if (tmp_path / "s").exists() and units(tmp_path / "s") > 2:
            with contextlib.suppress(psutil.Error):
                psutil.Process(process.pid).children()[0].kill()
                killed = True
        time.sleep(0.001)
    _, errors = process.communicate(timeout=60)
    assert killed
    kept = units(tmp_path / "s")
    assert kept > 0
    result = subprocess.CompletedProcess([], process.returncode, "", errors)
    check_one_line_and_resume(result, source, tmp_path / "s", "a worker process was killed")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a limit on file sizes stands in for a full disk")
def test_a_disk_that_takes_no_more(tmp_path: Path, records: list[dict[str, str]]) -> None:
    source = write_lines(tmp_path / "a.jsonl", [*records, {"instruction": "long", "output": "x y " * 60_000}])
    before = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000)); "
    result = subprocess.run(
        command(source, tmp_path / "s", "--backend", "tiktoken", before=before),
        capture_output=True,
        text=True,
        check=False,
    )
    assert units(tmp_path / "s") > 2
    message = "; what is finished is kept: mend that and run the same command again"
    check_one_line_and_resume(result, source, tmp_path / "s", message)
    assert [path.name for path in (tmp_path / "s").glob(".*")] == [".lock"]


@pytest.mark.slow
def test_a_read_error_in_the_middle_of_a_file(
    tmp_path: Path, records: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "a.jsonl", records)
    monkeypatch.setattr(sources_module, "SIZES", SMALL)
    fill, calls = json_pieces._Reader.fill, []

    def counts(self: Any) -> None:
        calls.append(1)
        fill(self)

    monkeypatch.setattr(json_pieces._Reader, "fill", counts)
    prepare(source, tmp_path / "s0", workers=1)
    last = len(calls)  # of them the first are the look at the first record
    calls.clear()

    def fails_once(self: Any) -> None:
        calls.append(1)
        if len(calls) == last - 2:
            raise OSError(5, "Input/output error")
        fill(self)

    monkeypatch.setattr(json_pieces._Reader, "fill", fails_once)
    with pytest.raises(SourceReadError, match=r"a\.jsonl: cannot be read to its end \(.*Input/output error\)"):
        prepare(source, tmp_path / "s", workers=1)
    assert units(tmp_path / "s") > 2
    prepare(source, tmp_path / "s", workers=1)
    assert store_hash(tmp_path / "s") == store_hash(tmp_path / "s0")


@pytest.mark.slow
def test_a_compressed_file_that_was_cut_off(tmp_path: Path, records: list[dict[str, str]]) -> None:
    import gzip

    raw = gzip.compress(write_lines(tmp_path / "a.jsonl", records).read_bytes())
    source = tmp_path / "a.jsonl.gz"
    source.write_bytes(raw[: len(raw) // 2])
    result = subprocess.run(command(source, tmp_path / "s"), capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: {source}: ends at byte {len(raw) // 2} ")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "s" / "manifest.json").exists()


@pytest.mark.slow
def test_an_s3_server(tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "SIZES", SMALL)
    records = many(300, seed=2)
    raw = write_lines(tmp_path / "a.jsonl", records).read_bytes()
    half = raw.index(b"\n", len(raw) // 2) + 1
    s3.pipe("bucket/a/p1.jsonl", raw[:half])
    s3.pipe("bucket/a/p2.jsonl", raw[half:])
    prepare("s3://bucket/a/*.jsonl", tmp_path / "s", workers=1)
    check_against_reference(TokenStore(tmp_path / "s"), records)
    assert prepare("s3://bucket/a/*.jsonl", tmp_path / "s", workers=1).reused
    from fastcollate.errors import InputError

    with pytest.raises(InputError, match=r"s3://bucket/none\.jsonl: no such file"):
        prepare("s3://bucket/none.jsonl", tmp_path / "t")
