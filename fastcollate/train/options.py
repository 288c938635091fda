"""What a training run can be asked for; the command line and `torchrun` read the same fields."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastcollate.errors import InputError


def _option(default: Any, help_text: str, *, fixed: bool = False) -> Any:
    """A field with its help; `fixed` ones decide what is trained on what, and cannot change when a run is resumed."""
    return field(default=default, metadata={"help": help_text, "fixed": fixed})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """The options of a training run; each field's meaning is its `help`."""

    out: Path = _option(Path("runs/train"), "Directory for everything the run writes.")  # noqa: RUF009 (immutable)
    resume: bool = _option(False, "Continue from the checkpoint in OUT, if there is one.")
    model: str = _option("tiny", "tiny, 124M, 355M, 774M or 1558M.", fixed=True)
    weights: Path | None = _option(  # noqa: RUF009
        None, "Start from published weights: a local model.safetensors or pytorch_model.bin.", fixed=True
    )
    tie_weights: bool = _option(True, "Use the token embedding as output head too.", fixed=True)
    dropout: float = _option(0.0, "Share of activations dropped in training.", fixed=True)
    epochs: int | None = _option(None, "Passes over the data; 1 if --max-steps is not given either.")
    max_steps: int | None = _option(None, "Stop after so many optimizer steps.")
    policy: str = _option("bucketed", "Order: sequential, shuffled, bucketed, packed (end to end).", fixed=True)
    batch_size: int | None = _option(
        None, "Rows a batch (packs, if packed), over all ranks; 8, or 1 pack a rank, without --max-tokens.", fixed=True
    )
    max_tokens: int | None = _option(None, "Cells a batch, over all ranks, in place of --batch-size.", fixed=True)
    max_length: int | None = _option(None, "Tokens kept of a row; the model's context if rows are longer.", fixed=True)
    capacity: int | None = _option(
        None, "With --policy packed, cells a pack; --max-length or the model's context if not given.", fixed=True
    )
    long_rows: str = _option(
        "truncate", "With --policy packed, what becomes of rows beyond --max-length: truncate, split, drop.", fixed=True
    )
    mask_prompt: bool = _option(False, "Train the responses only.", fixed=True)
    mode: str = _option(
        "reference", "reference: the chapter's masks, corners included; positional: by position.", fixed=True
    )
    accumulate: int = _option(1, "Batches an optimizer step.", fixed=True)
    learning_rate: float | None = _option(None, "Peak learning rate; 3e-3 for tiny, 5e-5 for the others.", fixed=True)
    warmup: int = _option(10, "Steps of linear warm-up.", fixed=True)
    schedule: str = _option("cosine", "After the warm-up: cosine (down to a tenth) or constant.", fixed=True)
    weight_decay: float = _option(0.1, "AdamW's weight decay, on matrices.", fixed=True)
    clip: float = _option(1.0, "Largest norm of the gradient; 0 for no limit.", fixed=True)
    seed: int = _option(123, "Decides weights, order and dropout.", fixed=True)
    precision: str = _option("float32", "float32, or bfloat16 (autocast).", fixed=True)
    device: str = _option("auto", "auto, cpu, cuda or cuda:N.")
    compile: bool = _option(False, "Compile the model; worth it on long runs.")
    width_multiple: int = _option(64, "With --compile, widths are rounded up to a multiple of this.")
    eval_every: int = _option(50, "Steps between evaluations; 0 for none.")
    eval_batches: int = _option(8, "Batches an evaluation, at most; 0 for the whole validation split.")
    patience: int | None = _option(None, "Stop after so many evaluations without a lower validation loss.")
    checkpoint_every: int = _option(0, "Steps between checkpoints; 0 writes one at the end only.")
    train_share: float = _option(0.85, "Share of the rows, from the start, to train on.", fixed=True)
    test_share: float = _option(0.10, "Share of the rows, after those, kept for the test split.", fixed=True)
    sample_tokens: int = _option(60, "Length of the sample printed after each epoch; 0 for none.")
    tensorboard: bool = _option(True, "Write TensorBoard events, if the package is installed.")

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
        _require("test_share", self.test_share, lambda value: 0 <= value <= 1 - self.train_share, "what is left")
        _require("schedule", self.schedule, lambda value: value in ("cosine", "constant"), "cosine or constant")
        _require("precision", self.precision, lambda value: value in ("float32", "bfloat16"), "float32 or bfloat16")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warm-up."""
        return self.learning_rate or (3e-3 if self.model == "tiny" else 5e-5)

    def plain(self) -> dict[str, Any]:
        """The options as plain values, for a checkpoint."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def check_against(self, saved: dict[str, Any]) -> None:
        """Refuse to resume a run with options under which it would become another run.

        Raises:
            InputError: a fixed option differs.
        """
        own = self.plain()
        for item in fields(self):
            if item.metadata["fixed"] and own[item.name] != saved.get(item.name):
                flag = f"--{item.name.replace('_', '-')}"
                raise InputError(
                    f"{self.out}: the run was started with {flag} {saved.get(item.name)}, not {own[item.name]}; "
                    "resume it with that, or choose another --out"
                )


def _require(name: str, value: Any, is_right: Any, wanted: str) -> None:
    if not is_right(value):
        raise InputError(f"--{name.replace('_', '-')} {value}: give {wanted}")
