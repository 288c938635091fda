"""What a run leaves to read: a JSON object a step, evaluations, TensorBoard if installed, and the loss plot."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
PLOT = "loss.png"


class RunLog:
    """Writes `metrics.jsonl` (a line a step), `evaluations.jsonl` and TensorBoard events under one directory.

    Args:
        directory: the run's directory.
        first_step: lines of later steps, left by a run that died after its last checkpoint, are removed: those
            steps are done again.
        tensorboard: also write TensorBoard events, if the package is installed.
    """

    def __init__(self, directory: Path, *, first_step: int = 0, tensorboard: bool = True) -> None:
        for name in (METRICS, EVALUATIONS):
            _keep_until(directory / name, first_step)
        self._metrics = open(directory / METRICS, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        self._evaluations = open(directory / EVALUATIONS, "a", encoding="utf-8")  # noqa: SIM115
        self._writer = None
        if tensorboard and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step or None)

    def step(self, values: Mapping[str, float | int | None]) -> None:
        """Write one step's line; `None` stands for a loss that there is not."""
        self._write(self._metrics, values, ("loss", "learning_rate", "useful_tokens"))

    def evaluation(self, values: Mapping[str, float | int | None]) -> None:
        """Write one evaluation's line."""
        self._write(self._evaluations, values, ("validation_loss",))

    def _write(self, file: Any, values: Mapping[str, Any], shown: tuple[str, ...]) -> None:
        file.write(json.dumps(values, allow_nan=False) + "\n")
        file.flush()
        if self._writer is not None:
            for name in shown:
                if values.get(name) is not None:
                    self._writer.add_scalar(name, values[name], values["step"])

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._evaluations.close()
        if self._writer is not None:
            self._writer.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; a last line that a kill cut short is left out."""
    objects = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            break  # nothing behind a torn line can be trusted
    return objects


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if line["step"] <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def plot_losses(directory: Path) -> Path | None:
    """Draw the losses of a run into `loss.png`.

    Returns:
        The picture's path, or `None` where matplotlib (the extra `plot`) is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    steps = [line for line in read_lines(directory / METRICS) if line["loss"] is not None]
    evaluations = [line for line in read_lines(directory / EVALUATIONS) if line["validation_loss"] is not None]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss")
    axes.plot([line["step"] for line in steps], [line["loss"] for line in steps], linewidth=0.8, label="training")
    if evaluations:
        axes.plot(
            [line["step"] for line in evaluations],
            [line["validation_loss"] for line in evaluations],
            marker="o",
            markersize=3,
            label="validation",
        )
    axes.legend()
    axes.grid(alpha=0.3)
    temporary = directory / f".{PLOT}.tmp"
    figure.savefig(temporary, format="png")
    os.replace(temporary, directory / PLOT)
    return directory / PLOT
