"""What a training run can be asked for; the command line and `torchrun` read the same fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fastcollate.errors import InputError

PRECISIONS = ("auto", "float32", "bfloat16")


def option(default: Any, help_text: str, *flags: str, fixed: bool = False) -> Any:
    """A field of an option dataclass, declared and explained once: the command line takes it from there.

    Args:
        default: its value where none is given.
        help_text: what it means.
        flags: what the command line calls it, the plainest first; `--its-name` without.
        fixed: of a run: it decides what is trained on what, and cannot change when the run is resumed.

    Example:
        >>> @dataclass(frozen=True)
        ... class Options:
        ...     limit: int = option(5, "At most so many rows.")
        >>> Options().limit
        5
    """
    return field(default=default, metadata={"help": help_text, "flags": flags, "fixed": fixed})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """The options of a training run; each field's meaning is its `help`, which `fastcollate train --help` prints.

    Example:
        >>> options = TrainOptions(out=Path("runs/first"), max_steps=100, mask_prompt=True)
        >>> options.peak_learning_rate
        0.003
    """

    out: Path = option(Path("runs/train"), "Directory for everything the run writes.")  # noqa: RUF009 (immutable)
    resume: bool = option(False, "Continue from the checkpoint in OUT, if there is one.")
    model: str = option("tiny", "tiny, 124M, 355M, 774M or 1558M.", fixed=True)
    weights: Path | None = option(  # noqa: RUF009
        None, "Start from published weights: a local model.safetensors or pytorch_model.bin.", fixed=True
    )
    tie_weights: bool = option(True, "Use the token embedding as output head too.", fixed=True)
    dropout: float = option(0.0, "Share of activations dropped in training.", fixed=True)
    epochs: int | None = option(None, "Passes over the data; 1 if --max-steps is not given either.")
    max_steps: int | None = option(None, "Stop after so many optimizer steps.")
    policy: str = option("bucketed", "Order: sequential, shuffled, bucketed, packed (end to end).", fixed=True)
    batch_size: int | None = option(
        None,
        "Rows a batch (packs, if packed), of all ranks together (a `BatchLoader`'s batch_size is one rank's); "
        "8, or 1 pack a rank, without --max-tokens.",
        "--global-batch-size",
        "--batch-size",
        fixed=True,
    )
    max_tokens: int | None = option(None, "Cells a batch, of all ranks together, in place of rows.", fixed=True)
    max_length: int | None = option(None, "Tokens kept of a row; the model's context if rows are longer.", fixed=True)
    capacity: int | None = option(
        None, "With --policy packed, cells a pack; --max-length or the model's context if not given.", fixed=True
    )
    long_rows: str = option(
        "truncate", "With --policy packed, what becomes of rows beyond --max-length: truncate, split, drop.", fixed=True
    )
    mask_prompt: bool = option(False, "Train the responses only.", fixed=True)
    mode: str = option(
        "reference", "reference: the chapter's masks, corners included; positional: by position.", fixed=True
    )
    accumulate: int = option(1, "Batches an optimizer step.", fixed=True)
    learning_rate: float | None = option(None, "Peak learning rate; 3e-3 for tiny, 5e-5 for the others.", fixed=True)
    warmup: int = option(10, "Steps of linear warm-up.", fixed=True)
    schedule: str = option("cosine", "After the warm-up: cosine (down to a tenth) or constant.", fixed=True)
    weight_decay: float = option(0.1, "AdamW's weight decay, on matrices.", fixed=True)
    clip: float = option(1.0, "Largest norm of the gradient; 0 for no limit.", fixed=True)
    seed: int = option(123, "Decides weights, order and dropout.", fixed=True)
    precision: str = option(
        "auto", "float32, bfloat16 (autocast), or auto: bfloat16 on CUDA, float32 on a CPU.", fixed=True
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    compile: bool = option(False, "Compile the model; worth it on long runs.")
    width_multiple: int = option(64, "With --compile, widths are rounded up to a multiple of this.")
    eval_every: int = option(50, "Steps between evaluations; 0 for none.")
    eval_batches: int = option(8, "Batches an evaluation, at most; 0 for the whole validation split.")
    patience: int | None = option(None, "Stop after so many evaluations without a lower validation loss.")
    checkpoint_every: int = option(0, "Steps between checkpoints; 0 writes one at the end only.")
    train_share: float = option(0.85, "Share of the rows, from the start, to train on.", fixed=True)
    test_share: float | None = option(
        None, "Share of the rows, after those, kept for the test split; 0.1 if that is left.", fixed=True
    )
    sample_tokens: int = option(60, "Length of the sample printed after each epoch; 0 for none.")
    tensorboard: bool = option(True, "Write TensorBoard events, if the package is installed.")

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "max_steps",
            "batch_size",
            "max_tokens",
            "max_length",
            "capacity",
            "accumulate",
            "patience",
        ):
            _require(name, getattr(self, name), lambda value: value is None or value >= 1, "1 or more")
        for name in ("warmup", "eval_every", "eval_batches", "checkpoint_every", "sample_tokens"):
            _require(name, getattr(self, name), lambda value: value >= 0, "0 or more")
        for name in ("weight_decay", "clip"):
            _require(name, getattr(self, name), lambda value: value >= 0, "0 or more")
        _require("width_multiple", self.width_multiple, lambda value: value >= 1, "1 or more")
        _require("dropout", self.dropout, lambda value: 0 <= value < 1, "0 or more, below 1")
        _require("learning_rate", self.learning_rate, lambda value: value is None or value > 0, "more than 0")
        _require("train_share", self.train_share, lambda value: 0 < value <= 1, "more than 0, at most 1")
        left = round(1 - self.train_share, 9)  # 1 - 0.9 is a little less than 0.1
        if self.test_share is None:
            object.__setattr__(self, "test_share", min(0.10, left))
        _require("test_share", self.test_share, lambda value: 0 <= value <= left, f"0 to {left}, which is left")
        _require("schedule", self.schedule, lambda value: value in ("cosine", "constant"), "cosine or constant")
        _require("precision", self.precision, lambda value: value in PRECISIONS, "auto, float32 or bfloat16")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warm-up."""
        return self.learning_rate or (3e-3 if self.model == "tiny" else 5e-5)

    def with_precision(self, device_type: str, saved: Mapping[str, Any] | None = None) -> TrainOptions:
        """The options with a precision in place of `auto`: the one that the run was started with, else the device's.

        Example:
            >>> TrainOptions().with_precision("cpu").precision
            'float32'
        """
        if self.precision != "auto":
            return self
        by_device = "bfloat16" if device_type == "cuda" else "float32"
        return replace(self, precision=by_device if saved is None else saved["precision"])

    def ending(self, *, step: int, epoch: int, evaluations_since_best: int = 0) -> str | None:
        """How a run has ended, or `None` while it goes on; a pure function of what all ranks know.

        Args:
            step: optimizer steps done.
            epoch: whole epochs that all ranks have handed over.
            evaluations_since_best: evaluations since the lowest validation loss.

        Example:
            >>> TrainOptions(max_steps=5).ending(step=5, epoch=0)
            'finished'
        """
        if self.max_steps is not None and step >= self.max_steps:
            return "finished"
        epochs = self.epochs if self.epochs is not None or self.max_steps is not None else 1
        if epochs is not None and epoch >= epochs:
            return "finished"
        if self.patience is not None and evaluations_since_best >= self.patience:
            return "early stop"
        return None

    def plain(self) -> dict[str, Any]:
        """The options as plain values, for a checkpoint."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def check_against(self, saved: Mapping[str, Any]) -> None:
        """Refuse to resume a run with options under which it would become another run.

        Raises:
            InputError: a fixed option differs.
        """
        own = self.plain()
        for item in fields(self):
            if item.metadata["fixed"] and own[item.name] != saved.get(item.name):
                raise InputError(
                    f"{self.out}: the run was started with {flag_of(item)} {saved.get(item.name)}, not "
                    f"{own[item.name]}; resume it with that, or choose another --out; with --resume may change: "
                    f"{', '.join(changeable_flags())}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """How a trained model answers; each field's meaning is its `help`.

    Example:
        >>> AnswerOptions(temperature=0.8, top_k=40).max_new_tokens
        256
    """

    max_new_tokens: int = option(256, "Length of an answer, at most.")
    top_k: int | None = option(None, "Draw only from the K most probable tokens.")
    temperature: float = option(0.0, "0 takes the most probable token; higher is more varied.")
    seed: int = option(0, "Decides what is drawn.")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")

    def drawing(self) -> dict[str, Any]:
        """What `generate` takes of them, besides a generator.

        Example:
            >>> AnswerOptions(top_k=40).drawing()
            {'max_new_tokens': 256, 'top_k': 40, 'temperature': 0.0}
        """
        return {"max_new_tokens": self.max_new_tokens, "top_k": self.top_k, "temperature": self.temperature}


def flag_of(item: Field[Any]) -> str:
    """What the command line calls an option.

    Example:
        >>> [flag_of(item) for item in fields(TrainOptions)][:2]
        ['--out', '--resume']
    """
    return str(next(iter(item.metadata["flags"]), f"--{item.name.replace('_', '-')}"))


def changeable_flags() -> list[str]:
    """The options that may change when a run is resumed.

    Example:
        >>> changeable_flags()[:2]
        ['--epochs', '--max-steps']
    """
    return [
        flag_of(item)
        for item in fields(TrainOptions)
        if not item.metadata["fixed"] and item.name not in ("out", "resume")
    ]


def _require(name: str, value: Any, is_right: Any, wanted: str) -> None:
    if not is_right(value):
        raise InputError(f"--{name.replace('_', '-')} {value}: give {wanted}")
