"""What the command line can be asked for, an option a field; each is declared and explained here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from fastcollate.errors import InputError, shown
from fastcollate.options import flag_of, local_path, option

if TYPE_CHECKING:
    from fastcollate.collate import Collator
    from fastcollate.plan import MixedStore
    from fastcollate.store import TokenStore

_NEWER = ("objective", "beta", "packing", "mask_boundaries", "order", "nodes")  # than some checkpoints
_AT_LEAST = {
    0: ("warmup", "weight_decay", "clip", "eval_every", "eval_batches", "checkpoint_every", "sample_tokens"),
    1: (
        "epochs", "max_steps", "batch_size", "max_tokens", "max_length", "capacity", "accumulate", "patience",
        "width_multiple", "nodes",
    ),
}  # fmt: skip
_CHOICES = {
    "objective": ("sft", "dpo"),
    "schedule": ("cosine", "constant"),
    "precision": ("auto", "float32", "bfloat16"),
}


@dataclass(frozen=True, slots=True)
class MaskOptions:
    """How rows become targets; each field's meaning is its `help`. Prompts are trained unless masked, as everywhere.

    Example:
        >>> MaskOptions(max_length=512).mask_prompt
        False
    """

    max_length: int | None = option(
        None, "Columns kept of a row; all by default (train: the model's context, where rows are longer).", fixed=True
    )
    mask_prompt: bool = option(
        False, "Train the responses only, or all (the default).", "--mask-prompt/--train-prompt", " /--no-mask-prompt",
        fixed=True,
    )  # fmt: skip
    mode: str | None = option(
        None,
        "reference: the chapter's masks, corners included; positional: what you mean. By default positional where rows "
        "hold their end, else reference.",
        fixed=True,
        choices=("reference", "positional"),
    )

    def of(self, store: TokenStore | MixedStore, saved: Mapping[str, Any] | None = None) -> Self:
        """The same with a mode, where none was asked for: that of a run which goes on, else the store's."""
        from fastcollate.load import mode_of

        return replace(self, mode=mode_of(store, self.mode or (saved or {}).get("mode")))

    def collator(self, store: TokenStore) -> Collator:
        """The fast path with these options, over the store's rows one by one; ignored targets are -100."""
        from fastcollate.load import collator_of

        return collator_of(
            store.as_rows(), {name: getattr(self, name) for name in ("max_length", "mask_prompt", "mode")}
        )

    def with_other_mask(self) -> MaskOptions:
        """The same with the other `mask_prompt`."""
        return replace(self, mask_prompt=not self.mask_prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderOptions:
    """Which rows make a batch of one process; each field's meaning is its `help`.

    Example:
        >>> OrderOptions(policy="packed", capacity=1024).batch_size
        8
    """

    policy: str = option("bucketed", "The order of rows.", choices=("sequential", "shuffled", "bucketed", "packed"))
    batch_size: int = option(8, "Rows (packs) in a batch of one process, as a loader counts (train: of all ranks).")
    capacity: int | None = option(
        None, "With --policy packed, cells a pack; if not given --max-length, or 1024, or the longest row if longer."
    )
    order: str = option(
        "rows", "shards: of a store behind a URL, each shard once an epoch.", choices=("rows", "shards")
    )
    seed: int = option(0, "Seed of the epoch's order.")

    def __post_init__(self) -> None:
        if self.capacity is not None and self.policy != "packed":
            raise InputError(f"--capacity {self.capacity}: give --policy packed with it, not {self.policy}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions(MaskOptions):
    """The options of a training run; each field's meaning is its `help`, which `fastcollate train --help` prints.

    Example:
        >>> options = TrainOptions(out=Path("runs/first"), max_steps=100, mask_prompt=True)
        >>> options.peak_learning_rate
        0.003
    """

    out: Path = option(Path("runs/train"), "Directory for everything the run writes.")  # noqa: RUF009 (immutable)
    resume: bool = option(False, "Continue from the checkpoint in OUT, if there is one.")
    objective: str = option(
        "sft",
        "sft: learn the rows; dpo: of a store of pairs, to prefer the chosen answers (prompts are masked).",
        fixed=True,
        choices=("sft", "dpo"),
    )
    reference_checkpoint: Path | None = option(  # noqa: RUF009
        None, "With --objective dpo, the run (or its checkpoint) that is the reference, and where training starts.",
        fixed=True,
    )  # fmt: skip
    beta: float = option(0.1, "With --objective dpo, what a margin of log-probabilities is multiplied by.", fixed=True)
    model: str = option("tiny", "The GPT-2 to train.", fixed=True, choices=("tiny", "124M", "355M", "774M", "1558M"))
    weights: Path | None = option(  # noqa: RUF009
        None, "Start from published weights: a local model.safetensors or pytorch_model.bin.", fixed=True
    )
    tie_weights: bool = option(True, "Use the token embedding as output head too.", fixed=True)
    dropout: float = option(0.0, "Share of activations dropped in training.", fixed=True)
    epochs: int | None = option(None, "Passes over the data; 1 if --max-steps is not given either.")
    max_steps: int | None = option(None, "Stop after so many optimizer steps.")
    policy: str = option(
        "bucketed",
        "The order of rows; packed: end to end.",
        fixed=True,
        choices=("sequential", "shuffled", "bucketed", "packed"),
    )
    batch_size: int | None = option(
        None,
        "Rows a batch (packs, if packed), of all ranks together (a `BatchLoader`'s batch_size is one rank's); "
        "8, or 1 pack a rank, without --max-tokens.",
        "--global-batch-size",
        "--batch-size",
        fixed=True,
    )
    max_tokens: int | None = option(None, "Cells a batch, of all ranks together, in place of rows.", fixed=True)
    capacity: int | None = option(
        None, "With --policy packed, cells a pack; --max-length or the model's context if not given.", fixed=True
    )
    long_rows: str = option(
        "truncate",
        "With --policy packed, what becomes of rows beyond --max-length: truncate, split, drop.",
        fixed=True,
        choices=("truncate", "split", "drop"),
    )
    packing: str = option(
        "best_fit",
        "With --policy packed, how packs are filled: best_fit, with whole rows; without padding, as documents are: "
        "concatenate, or crop.",
        fixed=True,
        choices=("best_fit", "concatenate", "crop"),
    )
    mask_boundaries: bool = option(
        True, "With --policy packed, a row of a pack sees itself alone, or (documents) the whole pack.",
        "--mask-boundaries/--see-across", fixed=True,
    )  # fmt: skip
    order: str = option(
        "rows",
        "shards: of a store behind a URL, each shard once an epoch, the rows of eight mixed at a time.",
        fixed=True,
        choices=("rows", "shards"),
    )
    nodes: int = option(
        1,
        "With --order shards, parts of the store, one for the ranks of each node, which fetches no other.",
        fixed=True,
    )
    accumulate: int = option(1, "Batches an optimizer step.", fixed=True)
    learning_rate: float | None = option(
        None,
        "Peak learning rate; 3e-3 for tiny, 5e-5 for the others, 1e-5 for dpo.",
        "--learning-rate",
        "--lr",
        fixed=True,
    )
    warmup: int = option(10, "Steps of linear warm-up.", fixed=True)
    schedule: str = option(
        "cosine", "After the warm-up: cosine (down to a tenth) or constant.", fixed=True, choices=("cosine", "constant")
    )
    weight_decay: float = option(0.1, "AdamW's weight decay, on matrices.", fixed=True)
    clip: float = option(1.0, "Largest norm of the gradient; 0 for no limit.", fixed=True)
    seed: int = option(123, "Decides weights, order and dropout.", fixed=True)
    precision: str = option(
        "auto",
        "float32, bfloat16 (autocast), or auto: bfloat16 on CUDA, float32 on a CPU.",
        fixed=True,
        choices=("auto", "float32", "bfloat16"),
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    compile: bool = option(False, "Compile the model; worth it on long runs.")
    cuda_graphs: bool = option(False, "With --compile on CUDA, replay recorded kernels; worth it on small batches.")
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
        object.__setattr__(self, "out", local_path(self.out))
        for least, names in _AT_LEAST.items():
            for name in names:
                value = getattr(self, name)
                self._require(name, value is None or value >= least, f"{least} or more")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            is_one = isinstance(value, str) and value in choices
            self._require(name, is_one, f"{', '.join(choices[:-1])} or {choices[-1]}")
        self._require("dropout", 0 <= self.dropout < 1, "0 or more, below 1")
        self._require(
            "cuda_graphs", self.compile or not self.cuda_graphs, "--compile with it, whose kernels it replays"
        )
        self._require("learning_rate", self.learning_rate is None or self.learning_rate > 0, "more than 0")
        self._require_effect()
        self._require("beta", self.beta > 0, "more than 0")
        self._require("train_share", 0 < self.train_share <= 1, "more than 0, at most 1")
        left = round(1 - self.train_share, 9)  # 1 - 0.9 is a little less than 0.1
        share = min(0.10, left) if self.test_share is None else self.test_share
        object.__setattr__(self, "test_share", share)
        self._require("test_share", 0 <= share <= left, f"0 to {left}, which is left")

    def _require_effect(self) -> None:
        """Refuse what another option would pass over."""
        given = {item.name for item in fields(self) if getattr(self, item.name) != item.default}
        for name in () if self.policy == "packed" else ("capacity", "long_rows", "packing", "mask_boundaries"):
            self._require(name, name not in given, f"--policy packed with it, not {self.policy}")
        for name in () if self.objective == "dpo" else ("reference_checkpoint", "beta"):
            self._require(name, name not in given, "--objective dpo with it")
        has_reference = self.objective != "dpo" or self.reference_checkpoint is not None
        self._require("objective", has_reference, "--reference-checkpoint RUN with it, such as of: fastcollate train")

    def _require(self, name: str, is_right: bool, wanted: str) -> None:
        if not is_right:
            value = getattr(self, name)
            value = value if isinstance(value, (str, Path)) else shown(value)
            flag = "--see-across" if name == "mask_boundaries" else f"--{name.replace('_', '-')} {value}"
            raise InputError(f"{flag}: give {wanted}")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warm-up."""
        default = 3e-3 if self.model == "tiny" else 5e-5
        return self.learning_rate or (1e-5 if self.objective == "dpo" else default)

    def with_precision(self, device_type: str, saved: Mapping[str, Any] | None = None) -> TrainOptions:
        """The options with a precision in place of `auto`: the one that the run was started with, else the device's."""
        if self.precision != "auto":
            return self
        by_device = "bfloat16" if device_type == "cuda" else "float32"
        return replace(self, precision=by_device if saved is None else saved["precision"])

    def ending(self, *, step: int, epoch: int, evaluations_since_best: int = 0) -> str | None:
        """How a run has ended, or `None` while it goes on; a pure function of what all ranks know.

        `epoch` counts whole epochs that all ranks have handed over.

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
        """Refuse to resume a run with options under which it would become another run: a fixed one differs."""
        own, options = self.plain(), fields(self)
        for item in options:
            is_given = item.name != "mode" or self.mode is not None
            before = saved.get(item.name, _default(item))
            if item.metadata["fixed"] and is_given and own[item.name] != before:
                free = (o for o in options if not o.metadata["fixed"] and o.name not in ("out", "resume"))
                raise InputError(
                    f"{self.out}: the run was started {_given(flag_of(item), before)}, not "
                    f"{_given(flag_of(item), own[item.name])}; resume it so, or choose another --out; with --resume "
                    f"may change: {', '.join(map(flag_of, free))}"
                )


def _default(item: Any) -> Any:
    """Of an option that a run's release did not have."""
    return item.default if item.name in _NEWER else None


def _given(flag: str, value: Any) -> str:
    return f"without {flag}" if value is None else f"with {flag} {value}"


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
        """What `generate` takes of them, besides a generator."""
        return {"max_new_tokens": self.max_new_tokens, "top_k": self.top_k, "temperature": self.temperature}
