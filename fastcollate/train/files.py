"""What a run leaves under its directory: checkpoints, a line a step, evaluations, TensorBoard events, the loss plot."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import mmap
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcollate.errors import InputError
from fastcollate.options import local_path
from fastcollate.store import TokenStore, files
from fastcollate.train.model import GPT2, GPT2Config, config_of, load_published, read_torch_file
from fastcollate.train.options import TrainOptions

FORMAT_VERSION = 2  # 1 had no seal
# Behind what `torch.save` wrote; the hash of that in hexadecimal follows, then a line's end.
_SEAL = b"fastcollate sha256 "
_SEAL_SIZE = len(_SEAL) + 64 + 1
_REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.EACCES: "ask its owner for the right to write there",
    errno.EPERM: "ask its owner for the right to write there",
    errno.EROFS: "make that disk writable",
}
CHECKPOINT = "checkpoint.pt"
BEST = "best.pt"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
PLOT = "loss.png"
_SHOWN = ("loss", "learning_rate", "useful_tokens", "validation_loss")  # in TensorBoard


@dataclass(slots=True, kw_only=True)
class Checkpoint:
    """A run after an optimizer step; tensors and plain values only, so that reading one runs no code."""

    step: int
    config: GPT2Config
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    loader: Mapping[str, Any]  # its `state_dict`: which rows are still to come
    random: list[Mapping[str, Any]]  # each rank's `random_states`
    progress: Mapping[str, Any]  # `Counters`
    options: Mapping[str, Any]
    data: Mapping[str, Any]  # where the rows are: the store's path and fingerprint, its splits


@dataclass(slots=True)
class TrainReport:
    """What a run has done, resumed parts included unless said otherwise."""

    steps: int = 0
    skipped_steps: int = 0  # without a trained token
    epochs: int = 0  # whole passes over the training rows
    tokens_seen: int = 0  # useful ones: padding is not counted
    first_loss: float | None = None  # of this process
    last_loss: float | None = None  # the mean of the last ten steps at most
    validation_loss: float | None = None  # of the last evaluation; `None` without one
    seconds: float = 0.0  # of this process's steps, without evaluation and checkpoints
    tokens_per_second: float = 0.0  # useful ones, of that time
    wait_share: float = 0.0  # of that time, waiting for data; the start (kernels, the first batch) is no part of it
    compilations: int = 0  # graphs that `--compile` compiled
    ended: str = "finished"  # or "early stop" or "interrupted"
    out: str = ""
    plot: str | None = None  # `None` without matplotlib


@dataclass(slots=True)
class Counters:
    """What a checkpoint keeps besides states; the same on every rank."""

    step: int = 0
    epoch: int = 0
    tokens_seen: int = 0
    skipped_steps: int = 0
    total_steps: int = 0
    best_loss: float | None = None
    evaluations_since_best: int = 0
    last_evaluation: int = 0
    validation_loss: float | None = None


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `path` atomically, sealed with its hash: a crash leaves the old file or the new one, never a part."""
    content = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    content |= {"format_version": FORMAT_VERSION, "config": asdict(checkpoint.config)}

    def write(file: files.HashedFile) -> None:
        torch.save(content, file)  # type: ignore[arg-type]  # it only writes
        file.write(_seal(file.digest))

    with writing(path):
        files.write_file(path, write)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever the system refuses of a file of the run is an `InputError` with the cause and its remedy."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # PyTorch hides it behind its own
        if not isinstance(cause, OSError):
            raise
        remedy = _REMEDIES.get(cause.errno or 0, "is the disk in order?")
        raise InputError(
            f"{path}: cannot be written ({cause.strerror or cause}); {remedy}, or choose another --out. The last "
            "checkpoint that was written is whole, and the same command with --resume goes on from it"
        ) from error


def _is_sealed(path: Path) -> bool:
    """Whether a checkpoint has a seal; one that does not fit is refused."""
    if path.stat().st_size < _SEAL_SIZE:
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        seal = content[-_SEAL_SIZE:]
        if not seal.startswith(_SEAL):
            return False
        if seal != _seal(hashlib.sha256(memoryview(content)[:-_SEAL_SIZE])):
            raise _damaged(path, "its bytes are not those that were written")
    return True


def _seal(digest: Any) -> bytes:
    return _SEAL + str(digest.hexdigest()).encode() + b"\n"


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path}: damaged ({why}); put a copy of it there, or train anew with another --out")


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, or the one in the directory `path`, onto the CPU; what cannot be read is an `InputError`."""
    path = local_path(path)
    path = path / CHECKPOINT if path.is_dir() else path
    if not path.is_file():
        run = path.parent if path.suffix else path
        raise InputError(f"{path}: no checkpoint here; train first: fastcollate train --out {run}")
    with files.naming(path):
        is_sealed = _is_sealed(path)
    content = read_torch_file(path)
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in (1, FORMAT_VERSION):
        raise InputError(f"{path}: checkpoint format {version}, this release reads 1 and {FORMAT_VERSION}; train again")
    if version == FORMAT_VERSION and not is_sealed:
        raise _damaged(path, "its seal is gone")
    del content["format_version"]
    return Checkpoint(**{**content, "config": GPT2Config(**content["config"])})


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[GPT2, Checkpoint]:
    """The model of a checkpoint, ready to generate, and the checkpoint."""
    checkpoint = load_checkpoint(path)
    model = GPT2(checkpoint.config)
    model.load_state_dict(checkpoint.model)
    return model.to(device).eval(), checkpoint


def make_model(store: TokenStore, options: TrainOptions, saved: Checkpoint | None) -> GPT2:
    """The model that a run begins with, or goes on with: of dpo first the reference itself."""
    config = config_of(options.model, dropout=options.dropout, tie_weights=options.tie_weights)
    if store.vocab_size > config.vocab_size:
        raise InputError(
            f"{store.path}: token ids up to {store.vocab_size - 1}, the model knows {config.vocab_size}; "
            "prepare the data with the gpt2 tokenizer"
        )
    if saved is None and options.reference_checkpoint is not None and options.weights is None:
        saved = load_checkpoint(options.reference_checkpoint)
        saved.config = replace(saved.config, dropout=options.dropout)
    if saved is not None:
        model = GPT2(saved.config)
        model.load_state_dict(saved.model)
        return model
    return load_published(options.weights, config) if options.weights is not None else GPT2(config)


def find_checkpoint(options: TrainOptions) -> Checkpoint | None:
    """The checkpoint to go on from, or `None` to start afresh.

    A run that has ended may be asked for again, without `resume`: then nothing is left to train.

    Raises:
        InputError: the directory holds a run that has not ended and `resume` is not asked for, or one with other
            options, or the checkpoint cannot be read.

    Example:
        >>> saved = find_checkpoint(TrainOptions(out=Path("runs/first"), resume=True))
        >>> saved.step
        2
    """
    saved = load_checkpoint(options.out) if (options.out / CHECKPOINT).exists() else None
    if saved is not None:
        options.with_precision("", saved.options).check_against(saved.options)
    if options.resume or (saved is not None and _has_ended(saved, options)):
        return saved
    if saved is not None or (options.out / METRICS).exists():
        raise InputError(f"{options.out}: holds a run already; continue it with --resume, or choose another --out")
    return None


def _has_ended(saved: Checkpoint, options: TrainOptions) -> bool:
    """Whether a run with these options has nothing left to train."""
    ending = options.ending(
        step=saved.step,
        epoch=saved.progress.get("epoch", saved.loader["epoch"]),  # releases before 0.2 kept it there only
        evaluations_since_best=saved.progress["evaluations_since_best"],
    )
    return ending is not None


def how_it_goes_on(saved: Checkpoint, options: TrainOptions, total_steps: int) -> str:
    """A line for a run that goes on from a checkpoint."""
    if _has_ended(saved, options):
        return f"{options.out}: this run has ended, at step {saved.step}; for more, --resume with more --max-steps"
    line = f"{options.out}: going on after step {saved.step} of {total_steps}"
    before = saved.progress["total_steps"]
    if before != total_steps and options.schedule == "cosine":
        line += f"; the learning rate goes by {total_steps} steps from here on, not {before}"
    return line


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


class RunLog:
    """Writes `metrics.jsonl` (a line a step), `evaluations.jsonl` and TensorBoard events under one directory.

    Lines after `first_step`, of a run that died after its last checkpoint, are removed: those steps are done again.
    """

    def __init__(self, directory: Path, *, first_step: int = 0, tensorboard: bool = True) -> None:
        self._files = {}
        with writing(directory):
            for path in (directory / METRICS, directory / EVALUATIONS):
                if path.exists():
                    kept = [json.dumps(line) for line in read_lines(path) if line["step"] <= first_step]
                    files.write_file(path, kept)
                self._files[path.name] = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        self._writer = None
        if tensorboard and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step or None)

    def write(self, name: str, values: Mapping[str, float | int | None]) -> None:
        """Write a line to the file `METRICS` or `EVALUATIONS`; `None` stands for a loss that there is not."""
        file = self._files[name]
        with writing(Path(file.name)):
            file.write(json.dumps(values, allow_nan=False) + "\n")
            file.flush()
        if self._writer is not None:
            for shown in _SHOWN:
                if values.get(shown) is not None:
                    self._writer.add_scalar(shown, values[shown], values["step"])

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        if self._writer is not None:
            self._writer.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; a last line that a kill cut short is left out."""
    objects: list[dict[str, Any]] = []
    if path.exists():
        with contextlib.suppress(json.JSONDecodeError, RecursionError):  # nothing behind a torn line can be trusted
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                objects.append(json.loads(line))
    return objects


def plot_losses(directory: Path) -> Path | None:
    """Draw the losses of a run into `loss.png`; `None` where matplotlib (the extra `plot`) is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    steps = [line for line in read_lines(directory / METRICS) if line["loss"] is not None]
    evaluations = [line for line in read_lines(directory / EVALUATIONS) if line["validation_loss"] is not None]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss")
    axes.plot([line["step"] for line in steps], [line["loss"] for line in steps], linewidth=0.8, label="training")
    if evaluations:
        found = [line["step"] for line in evaluations], [line["validation_loss"] for line in evaluations]
        axes.plot(*found, marker="o", markersize=3, label="validation")
    axes.legend()
    axes.grid(alpha=0.3)
    with writing(directory / PLOT), files.replacing(directory / PLOT) as file:
        figure.savefig(file, format="png")
    return directory / PLOT
