"""Loss and trained tokens of each source of a mix, in what a `Trainer` logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional

from fastcollate.errors import InputError, import_extra

_TrainerCallback: Any = import_extra("transformers.trainer_callback", "hf").TrainerCallback
_CELLS = 1 << 25  # logits that are widened at a time
IGNORE = -100


class LossBySource(_TrainerCallback):  # type: ignore[misc]
    """Has a `Trainer` with `BucketedTrainerMixin` over a `MixedStore` log the loss of each source, and its tokens.

    With each logged `loss` come `loss/NAME`, the mean cross-entropy of the source's trained tokens since the line
    before, and `trained_tokens/NAME`, how many there were: on all ranks together, over all batches of the optimizer
    steps. A source that trained nothing has no `loss/NAME` there. They stand in `trainer.state.log_history`, and in
    what TensorBoard and the like are given. The cross-entropy is computed once more, without gradient, from the
    model's logits (or taken from the log-probabilities that TRL's `SFTTrainer` has).

    Attributes:
        names: the sources, in order; known when training starts.
        totals: by source, the trained tokens of all lines so far.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments
        >>> from fastcollate import MixedStore, StoreDataset, TokenStore
        >>> from fastcollate.integrations.huggingface import BucketedTrainerMixin, DataCollator, LossBySource
        >>> class Mixing(BucketedTrainerMixin, Trainer):
        ...     pass
        >>> mix = MixedStore({"a": TokenStore("store"), "b": TokenStore("store")}, weights={"a": 3, "b": 1})
        >>> args = TrainingArguments(
        ...     "runs/mix", max_steps=2, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no",
        ...     disable_tqdm=True,
        ... )
        >>> trainer = Mixing(
        ...     GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=1)), args,
        ...     train_dataset=StoreDataset(mix), data_collator=DataCollator(), callbacks=[LossBySource()],
        ... )
        >>> trainer.remove_callback(PrinterCallback)
        >>> _ = trainer.train()
        >>> [name for name in trainer.state.log_history[0] if "/" in name]
        ['loss/a', 'loss/b', 'trained_tokens/a', 'trained_tokens/b']
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.totals: dict[str, int] = {}
        self._sums: Tensor | None = None  # float64 (2, num_sources), since the last line: losses, and cells
        self._device: Any = None

    def connect(self, names: Sequence[str], device: torch.device) -> None:
        """Told by `BucketedTrainerMixin`: the sources, and where sums belong."""
        self.names, self._device, self._sums = tuple(names), device, None

    def note(self, labels: Tensor, sources: Tensor, outputs: Any) -> None:
        """Add a batch: its unshifted labels, the source of each cell, and what the model gave for it."""
        if self._sums is None:
            self._sums = torch.zeros((2, len(self.names)), dtype=torch.float64, device=self._device)
        labels, sources = labels[:, 1:], sources.expand(labels.shape)[:, 1:]
        is_trained = labels != IGNORE
        losses = _losses(outputs, labels, is_trained).to(self._sums)
        self._sums.index_add_(1, sources[is_trained].to(self._device), torch.stack([losses, torch.ones_like(losses)]))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse a trainer that would tell this nothing."""
        if not self.names:
            raise InputError(
                "LossBySource in a trainer that has no sources to tell: train over StoreDataset(MixedStore(...)) with "
                "class Mine(BucketedTrainerMixin, Trainer), or leave the callback out"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add the sources to a line that has a loss."""
        if logs is None or "loss" not in logs or self._sums is None:
            return
        sums, self._sums = self._sums, None
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        losses, counts = sums.tolist()
        found = {f"loss/{name}": loss / n for name, loss, n in zip(self.names, losses, counts, strict=True) if n}
        for name, count in zip(self.names, map(int, counts), strict=True):
            found[f"trained_tokens/{name}"] = count
            self.totals[name] = self.totals.get(name, 0) + count
        logs.update(found)
        if state.log_history and "loss" in state.log_history[-1]:  # the same line, which stands there already
            state.log_history[-1].update(found)


@torch.no_grad()
def _losses(outputs: Any, labels: Tensor, is_trained: Tensor) -> Tensor:
    """The cross-entropy of each trained label, in their order; labels are shifted to the outputs' places."""
    log_probs, logits = (getattr(outputs, name, None) for name in ("log_probs", "logits"))
    if log_probs is not None and log_probs.shape == labels.shape:
        found: Tensor = -log_probs[is_trained]
        return found
    if logits is None or logits.shape[:2] != (len(labels), labels.shape[1] + 1):
        raise InputError(
            "LossBySource needs the model's logits of all cells, and it gave "
            f"{'none' if logits is None else tuple(logits.shape)}: switch off the fused loss (use_liger_kernel), or "
            "leave the callback out"
        )
    cells, wanted = is_trained.nonzero(), labels[is_trained]
    size = max(1, _CELLS // logits.shape[-1])
    parts = zip(torch.split(cells, size), torch.split(wanted, size), strict=True)
    return torch.cat(
        [wanted[:0].float()]
        + [
            functional.cross_entropy(logits[own[:, 0], own[:, 1]].float(), some, reduction="none")
            for own, some in parts
        ]
    )
