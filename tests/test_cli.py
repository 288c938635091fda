"""The command line as a user meets it: instant help, and one line for each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

from fastcollate.cli import app
from fastcollate.ingest.options import PrepareOptions
from fastcollate.options import flag_of
from fastcollate.progress import _shown
from fastcollate.train.options import AnswerOptions, MaskOptions, OrderOptions, TrainOptions
from tests.forks import Forks
from tests.helpers import run_cli, store_of_rows

MISTAKES = {
    "malformed.json": (b'[{"instruction": "a", "output": ', "not valid JSON"),
    "missing.json": (b'[{"instruction": "a"}]', "no field 'output'"),
    "empty.json": (b"", "is empty"),
    "bytes.jsonl": (b'{"instruction": "a\xff", "output": "b"}\n', "not UTF-8"),
    "number.jsonl": (b'{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": 7}\n', "record 1"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "name"),
    [*(("prepare", name) for name in (*MISTAKES, "directory")), ("train", "missing.json"), ("train", "directory")],
)
def test_a_mistake_is_one_line_and_leaves_no_store(tmp_path: Path, forks: Forks, command: str, name: str) -> None:
    content, says = MISTAKES.get(name, (b"", "is a directory"))
    source = tmp_path / name
    if name == "directory":
        source.mkdir()
    else:
        source.write_bytes(content)
    arguments = ("prepare", name, "store") if command == "prepare" else ("train", "--data", name, "--out", "run")
    result = forks.run("-m fastcollate", *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert name in line
    assert says in line
    assert not list(tmp_path.rglob("manifest.json"))
    assert not list(tmp_path.rglob("*.arrow"))


@pytest.mark.slow
def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['fastcollate', 'train', '--help']\n"
        "from fastcollate.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'numba', 'pyarrow', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "--policy" in result.stdout
    assert result.stderr.strip() == "[]"


@pytest.mark.slow
def test_a_wrong_field_mapping_is_named(tmp_path: Path, forks: Forks) -> None:
    result = forks.run("-m fastcollate", "prepare", "a.json", "store", "--field", "x", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (
        1,
        "error: --field 'x': write it as NAME=SOURCE, such as instruction=question\n",
    )


def test_ctrl_c_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastcollate.ingest.prepare", interrupted)
    assert run_cli(monkeypatch, "prepare", "records.jsonl", tmp_path / "store") == 130
    assert capsys.readouterr().err.split("\n")[-2:] == [
        "error: interrupted; what was finished is kept, and the same command goes on",
        "",
    ]


@pytest.mark.slow
def test_the_version(tmp_path: Path, forks: Forks) -> None:
    from fastcollate import __version__

    result = forks.run("-m fastcollate", "--version", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    ("command", "kinds"),
    [
        ("train", [TrainOptions]), ("generate", [AnswerOptions]), ("evaluate", [AnswerOptions]),
        ("inspect", [MaskOptions]), ("verify", [OrderOptions, MaskOptions]), ("bench", [OrderOptions, MaskOptions]),
        ("prepare", [PrepareOptions]),
    ],
)  # fmt: skip
def test_each_option_is_declared_in_its_dataclass(command: str, kinds: list[Any]) -> None:
    parameters = {p.name: p for p in typer.main.get_command(app).commands[command].params}  # type: ignore[attr-defined]
    for item in (item for kind in kinds for item in fields(kind)):
        option = parameters[item.name]
        assert (option.help, option.default) == (item.metadata["help"], item.default)
        assert option.opts[0] == (item.metadata["flags"] or [flag_of(item)])[0].split("/")[0]


def test_both_helps_say_what_a_batch_size_counts() -> None:
    assert "of all ranks together" in TrainOptions.__dataclass_fields__["batch_size"].metadata["help"]
    assert "train: of all ranks" in OrderOptions.__dataclass_fields__["batch_size"].metadata["help"]
    assert flag_of(TrainOptions.__dataclass_fields__["batch_size"]) == "--global-batch-size"


URLS = [
    "sample s3://bucket/sample.jsonl",
    "inspect store --report s3://bucket/page.html",
    "convert s3://bucket/old new", "convert old memory://new", "train --out s3://bucket/run",
    "generate --checkpoint https://host/run?secret --prompt Hi",
    "evaluate --checkpoint s3://bucket/run",
]  # fmt: skip


@pytest.mark.parametrize("command", URLS)
def test_a_url_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "records.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    store_of_rows(tmp_path / "store", [[1, 2]])
    before = sorted(tmp_path.rglob("*"))
    assert run_cli(monkeypatch, *command.split()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a URL (")
    assert "secret" not in line
    assert sorted(tmp_path.rglob("*")) == before


def test_the_sample_is_not_written_anew_where_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sample.jsonl"
    assert run_cli(monkeypatch, "sample", path, "--num-records", 5) == 0
    os.utime(path, ns=(1, 1))
    assert run_cli(monkeypatch, "sample", path, "--num-records", 5) == 0
    assert path.stat().st_mtime_ns == 1
    path.write_text(path.read_text()[:-5])  # torn, or another release's
    assert run_cli(monkeypatch, "sample", path, "--num-records", 5) == 0
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 5
    assert [file.name for file in tmp_path.iterdir()] == ["sample.jsonl"]


@pytest.mark.parametrize("place", ["records.jsonl", "data/*.json", "two words.csv"])
def test_prepare_without_a_store_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli(monkeypatch, "prepare", place) == 1
    assert f"prepare got only '{place}': name the sources first, the store's directory last" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_store_that_is_reused_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "sample", tmp_path / "r.jsonl", "--num-records", 5) == 0
    assert run_cli(monkeypatch, "prepare", tmp_path / "r.jsonl", tmp_path / "s") == 0
    assert "mean length" in capsys.readouterr().out
    assert run_cli(monkeypatch, "prepare", tmp_path / "r.jsonl", tmp_path / "s") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "s: found unchanged; 5 rows" in line


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (10.824913024902344, "10.82"), (0.012345678, "0.01235"), (3808.1234, "3,808.1"), (1234567, "1,234,567"),
        (True, "True"), (0.0, "0"), (float("nan"), "nan"), (float("inf"), "inf"), (-2.5, "-2.5"), ("a", "a"),
    ],
)  # fmt: skip
def test_a_summary_shows_as_many_digits_as_one_reads(value: object, shown: str) -> None:
    assert _shown(value) == shown
