"""A checkpoint that is damaged is noticed, and one that cannot be written leaves the one before."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastcollate.errors import InputError
from fastcollate.train import files as room
from fastcollate.train.files import Checkpoint, load_checkpoint, read_lines, save_checkpoint
from fastcollate.train.model import GPT2, GPT2Config
from tests.helpers import run_cli

CONFIG = GPT2Config(num_layers=1, num_heads=2, width=8, vocab_size=30, context_length=16)


def make_checkpoint(step: int = 3) -> Checkpoint:
    torch.manual_seed(0)
    return Checkpoint(
        step=step, config=CONFIG, model=GPT2(CONFIG).state_dict(), optimizer={"state": {}}, loader={"epoch": 1},
        random=[], progress={"step": step}, options={"seed": 1}, data={"store": "store"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoints") / "checkpoint.pt"
    save_checkpoint(path, make_checkpoint())
    return path.read_bytes()


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = make_checkpoint()
    save_checkpoint(tmp_path / "checkpoint.pt", saved)
    found = load_checkpoint(tmp_path)
    assert all(torch.equal(found.model[name], tensor) for name, tensor in saved.model.items())
    assert {**asdict(found), "model": None} == {**asdict(saved), "model": None}
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3  # by PyTorch alone, too


def test_any_flipped_byte_is_noticed(content: bytes, tmp_path: Path) -> None:
    places = [*np.random.default_rng(0).integers(0, len(content), 150).tolist(), *range(-84, 0)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(InputError, match=r"checkpoint\.pt: damaged"):
            load_checkpoint(tmp_path)


@given(cut=st.integers(0, 10_000), grown=st.binary(max_size=3))
def test_a_part_of_a_checkpoint_is_noticed(content: bytes, cut: int, grown: bytes) -> None:
    cut = min(cut, len(content))
    part = content[: len(content) - cut] + grown
    if part != content:
        path = Path(tempfile.gettempdir()) / f"part-{os.getpid()}.pt"
        path.write_bytes(part)
        try:
            with pytest.raises(InputError, match=r"\.pt: damaged"):
                load_checkpoint(path)
        finally:
            path.unlink()


def test_a_checkpoint_of_the_last_release_has_no_seal_and_is_loaded(tmp_path: Path) -> None:
    saved = make_checkpoint()
    old = {field.name: getattr(saved, field.name) for field in fields(saved)}
    old["config"] = asdict(saved.config)
    torch.save({**old, "format_version": 1}, tmp_path / "checkpoint.pt")
    assert load_checkpoint(tmp_path).step == 3
    torch.save({**old, "format_version": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="checkpoint format 3, this release reads 1 and 2"):
        load_checkpoint(tmp_path)


def refusing(number: int, *_: Any, **__: Any) -> Any:
    raise OSError(number, os.strerror(number))


def after_some_bytes(number: int) -> Callable[..., Any]:
    room_left = [5000]

    def write(self: Any, data: Any) -> None:
        size = memoryview(data).nbytes
        self.digest.update(data)
        self.num_bytes += size
        room_left[0] -= size
        if room_left[0] < 0:
            raise OSError(number, os.strerror(number))
        self._file.write(data)

    return write


REMEDIES = [
    (errno.ENOSPC, "No space left on device.*free some space there"),
    (errno.EDQUOT, "quota"),
    (errno.EACCES, "Permission denied.*the right to write"),
    (errno.EROFS, "Read-only file system.*make that disk writable"),
    (errno.EIO, "Input/output error.*is the disk in order"),
]


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
@pytest.mark.parametrize(("number", "says"), REMEDIES, ids=[errno.errorcode[number] for number, _ in REMEDIES])
def test_what_cannot_be_written_leaves_the_checkpoint_before(
    at: str, number: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, make_checkpoint(step=3))
    with monkeypatch.context() as patch:
        if at == "write":
            patch.setattr(room.files.HashedFile, "write", after_some_bytes(number))
        else:
            patch.setattr(os, at, lambda *_: refusing(number))
        with pytest.raises(InputError, match=rf"checkpoint\.pt: cannot be written \(.*{says}.*--resume"):
            save_checkpoint(path, make_checkpoint(step=4))
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert load_checkpoint(path).step == 3


def test_other_errors_of_pytorch_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="no such thing"):
        save_checkpoint(tmp_path / "checkpoint.pt", make_checkpoint())


@pytest.mark.slow
def test_a_full_disk_ends_a_run_in_one_line_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second checkpoint does not fit; a line of metrics does not either, in another run."""
    assert run_cli(monkeypatch, "sample", tmp_path / "r.jsonl", "--num-records", 40) == 0
    assert run_cli(monkeypatch, "prepare", tmp_path / "r.jsonl", tmp_path / "s") == 0
    command = [
        "train", "--store", tmp_path / "s", "--out", tmp_path / "run", "--max-steps", 4, "--checkpoint-every", 2,
        "--eval-every", 0, "--sample-tokens", 0, "--batch-size", 2, "--max-length", 20, "--no-tensorboard", "--json",
        "--device", "cpu",
    ]  # fmt: skip
    torch_save = torch.save

    def full_at_step_4(content: Any, file: Any) -> None:
        if content["step"] == 4:
            refusing(errno.ENOSPC)
        torch_save(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_at_step_4)
        capsys.readouterr()
        assert run_cli(patch, *command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoint.pt: cannot be written (No space left on device); free some space there" in line
    assert load_checkpoint(tmp_path / "run").step == 2
    dumps = json.dumps
    with monkeypatch.context() as patch:
        patch.setattr(
            json, "dumps", lambda *a, **keys: refusing(errno.EACCES) if "allow_nan" in keys else dumps(*a, **keys)
        )
        assert run_cli(patch, *command, "--resume") == 1
    assert "metrics.jsonl: cannot be written (Permission denied)" in capsys.readouterr().err
    assert run_cli(monkeypatch, *command, "--resume") == 0
    assert load_checkpoint(tmp_path / "run").step == 4


@pytest.mark.parametrize("torn", ['{"step": 3', "[" * 200_000, '{"a": ' * 5_000 + "1" + "}" * 5_000])
def test_nothing_behind_a_torn_line_of_a_log_is_believed(tmp_path: Path, torn: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n' + torn + '\n{"step": 4}\n')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
