"""Checkpoints: everything a run needs to go on to the last bit, in one file that is there whole or not at all."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcollate.errors import InputError
from fastcollate.train.model import GPT2, GPT2Config, read_torch_file

FORMAT_VERSION = 1
CHECKPOINT = "checkpoint.pt"


@dataclass(slots=True, kw_only=True)
class Checkpoint:
    """A run after an optimizer step; tensors and plain values only, so that reading one runs no code.

    Attributes:
        step: optimizer steps done.
        config: the model's shape.
        model: its parameters by name.
        optimizer: the optimizer's `state_dict`.
        loader: the loader's `state_dict`: which rows are still to come.
        random: each rank's random states.
        progress: the run's counters (tokens seen, steps skipped, best validation loss, ...).
        options: the run's options.
        data: where the rows are: the store's path and fingerprint, its splits.
    """

    step: int
    config: GPT2Config
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    loader: Mapping[str, Any]
    random: list[Mapping[str, Any]]
    progress: Mapping[str, Any]
    options: Mapping[str, Any]
    data: Mapping[str, Any]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `path` atomically: a crash leaves the old file or the new one, never a part."""
    content = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    content |= {"format_version": FORMAT_VERSION, "config": asdict(checkpoint.config)}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, or the one in the directory `path`, onto the CPU.

    Raises:
        InputError: there is none, it is damaged, or another release wrote it.
    """
    path = path / CHECKPOINT if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no checkpoint here; train first: fastcollate train --out {path.parent}")
    content = read_torch_file(path)
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: checkpoint format {version}, this release reads {FORMAT_VERSION}; train again")
    del content["format_version"]
    return Checkpoint(**{**content, "config": GPT2Config(**content["config"])})


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[GPT2, Checkpoint]:
    """The model of a checkpoint, ready to generate, and the checkpoint.

    Raises:
        InputError: as `load_checkpoint`.
    """
    checkpoint = load_checkpoint(path)
    model = GPT2(checkpoint.config)
    model.load_state_dict(checkpoint.model)
    return model.to(device).eval(), checkpoint


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of the generators that training may draw from."""
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Continue with states of `random_states`."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
