"""Progress on terminals of any width, in files, and tables where an encoding has few characters."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pytest

from fastcollate import progress
from fastcollate.cli.app import _show_warning
from fastcollate.progress import glyph, print_summary, progress_bar
from tests.helpers import run_cli, store_of_rows

FIELDS = {"loss": "loss 3.123", "rate": "12,345 tok/s", "waiting": "wait 0.1%"}


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """A terminal of that width."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


@pytest.mark.parametrize("wide", [60, 80, 120], indirect=True)
def test_a_bar_keeps_its_numbers(wide: int, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(*FIELDS, unit="steps") as bar:
        bar.add_task("training", total=1200, completed=1200, **FIELDS)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", capsys.readouterr().err).replace("\r", "\n").replace("\n", "")
    assert lines.startswith("training ")
    assert "1,200/1,200 steps loss 3.123 12,345 tok/s wait 0.1%" in lines
    assert ("0:00" in lines) == (wide > 60)  # the time goes first


def test_in_a_file_there_is_a_line_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress_bar("loss", unit="steps") as bar:
        task = bar.add_task("training", total=30, loss="")
        for step in range(30):
            now += 1.0
            if step % 2:
                bar.update(task, advance=1, loss=f"loss {step}.5")
            else:
                bar.advance(task)
    steps = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().err.splitlines()]
    assert steps == [5, 10, 15, 20, 25, 30]


def test_the_last_numbers_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(unit="rows") as bar:
        assert list(bar.track(range(3), description="answering")) == [0, 1, 2]
    assert capsys.readouterr().err == "answering: 3/3 rows\n"
    with progress_bar(unit="rows", progress=False) as bar:
        bar.add_task("answering", total=3, completed=3)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_prepare_ends_at_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n' * 9)
    assert run_cli(monkeypatch, "prepare", path, tmp_path / "s") == 0
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("prepare: 1/1 MB ")
    assert last == f"next: fastcollate inspect {tmp_path / 's'}"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_what_an_encoding_lacks_is_written_otherwise(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of_rows(tmp_path / "s", [[1, 2, 3], [4, 5]])
    with open(tmp_path / "out", "w", encoding=encoding) as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert glyph("█", "#") == ("█" if encoding == "utf-8" else "#")
        assert run_cli(monkeypatch, "inspect", store.path) == 0
        assert run_cli(monkeypatch, "inspect", store.path, "--row", 1) == 0
        print("日本")
    text = (tmp_path / "out").read_text(encoding=encoding)
    assert ("█" in text) == (encoding == "utf-8")
    assert ("日本" if encoding == "utf-8" else r"\u65e5\u672c") in text


@pytest.mark.parametrize("wide", [80], indirect=True)
def test_a_digest_is_shown_whole(wide: int, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary("verified", {"files with the right checksum": 2, "digest": "0123456789abcdef" * 4})
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= wide
    assert "0123456789abcdef" * 4 in "".join(re.findall(r"[0-9a-f]{4,}", "".join(lines)))


def test_a_warning_is_a_line_without_the_place_in_the_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", _show_warning)
        for _ in range(2):
            warnings.warn("of something", RuntimeWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: of something\n"
