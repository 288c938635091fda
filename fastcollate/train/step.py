"""One optimizer step: losses normalized by the trained tokens of the whole step, over micro-batches and ranks."""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcollate.train.loss import IGNORE_INDEX, cell_losses, scaled_loss, trained_cells
from fastcollate.train.model import GPT2
from fastcollate.train.options import TrainOptions
from fastcollate.train.ranks import Ranks

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class MicroBatch(NamedTuple):
    """A batch on its device.

    Attributes:
        inputs: int64 `(rows, width)`.
        targets: int64 `(rows, width)`, -100 where nothing is trained.
        position_ids: int64 `(packs, capacity)`, packed batches only.
        cu_seqlens: int32 bounds over the flattened batch, packed batches only.
        num_useful: input cells that hold a row's token.
        num_trained: targets that are not ignored.
    """

    inputs: Tensor
    targets: Tensor
    position_ids: Tensor | None
    cu_seqlens: Tensor | None
    num_useful: int
    num_trained: int


def empty_batch(device: torch.device) -> MicroBatch:
    """One cell without target: what a rank computes when the others have one batch more."""
    inputs = torch.zeros((1, 1), dtype=torch.int64, device=device)
    return MicroBatch(inputs, torch.full_like(inputs, IGNORE_INDEX), None, None, 0, 0)


def learning_rate_at(step: int, options: TrainOptions, total_steps: int) -> float:
    """The learning rate of step 1, 2, ...: linear warm-up, then constant, or a cosine down to a tenth."""
    peak = options.peak_learning_rate
    if step <= options.warmup:
        return peak * step / options.warmup
    if options.schedule == "constant":
        return peak
    done = min(1.0, (step - options.warmup) / max(1, total_steps - options.warmup))
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def round_up_width(batch: MicroBatch, multiple: int) -> MicroBatch:
    """A padded batch with its width rounded up, so that a compiled model sees few widths."""
    missing = -batch.inputs.shape[1] % multiple
    if not missing or batch.cu_seqlens is not None:
        return batch
    return batch._replace(
        inputs=functional.pad(batch.inputs, (0, missing)),  # right of every row: causal attention never looks there
        targets=functional.pad(batch.targets, (0, missing), value=IGNORE_INDEX),
    )


def fill_bounds(cu_seqlens: Tensor) -> Tensor:
    """`cu_seqlens` filled up with empty segments to a power of two, so that a compiled model sees few sizes."""
    missing = (1 << (len(cu_seqlens) - 1).bit_length()) - len(cu_seqlens)
    return torch.cat([cu_seqlens, cu_seqlens[-1:].expand(missing)])


class _Loss(nn.Module):
    """What ranks share: from a batch to its part of the step's loss."""

    def __init__(self, model: GPT2, *, compiled: bool) -> None:
        super().__init__()
        self.model = model
        self._hidden: Any = torch.compile(model.hidden) if compiled else model.hidden

    def forward(self, batch: MicroBatch, scale: float) -> Tensor:
        hidden = self._hidden(batch.inputs, batch.position_ids, batch.cu_seqlens)
        cells, labels = trained_cells(batch.targets, num_trained=batch.num_trained)
        return scaled_loss(hidden.flatten(0, 1).index_select(0, cells), self.model.head_weight, labels, scale)


class Stepper:
    """Model and optimizer, a step at a time.

    Args:
        model: on its device.
        options: what the optimizer, precision and compilation are to be.
        ranks: who trains together.
    """

    def __init__(self, model: GPT2, options: TrainOptions, ranks: Ranks) -> None:
        self.model = model
        self.options = options
        self.ranks = ranks
        self._loss = ranks.share(_Loss(model, compiled=options.compile))
        self.optimizer = make_optimizer(model, options.weight_decay)

    def step(self, batches: Sequence[MicroBatch], num_trained: int, learning_rate: float) -> Tensor:
        """Train on micro-batches.

        Args:
            batches: as many on every rank; `empty_batch` where a rank has none.
            num_trained: trained tokens in all batches of all ranks, not 0.
            learning_rate: of this step.

        Returns:
            this rank's part of the mean loss per trained token, on the device; the ranks' parts add up to it.
        """
        assert num_trained > 0
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        scale = self.ranks.world_size / num_trained  # gradients are averaged over ranks, and we want their sum
        total = torch.zeros((), device=batches[0].inputs.device)
        for index, batch in enumerate(batches):
            with self._no_sync(index < len(batches) - 1):
                with self.autocast():
                    loss = self._loss(self._shaped(batch), scale)
                loss.backward()
            total += loss.detach()
        if self.options.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total / self.ranks.world_size

    @torch.no_grad()
    def sum_of_losses(self, batch: MicroBatch) -> float:
        """The sum of the batch's losses, for evaluation."""
        self.model.eval()
        with self.autocast():
            hidden = self.model.hidden(batch.inputs, batch.position_ids, batch.cu_seqlens)
            cells, labels = trained_cells(batch.targets, num_trained=batch.num_trained)
            return float(cell_losses(hidden.flatten(0, 1)[cells], self.model.head_weight, labels).double().sum())

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the run."""
        if self.options.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16)

    def _shaped(self, batch: MicroBatch) -> MicroBatch:
        if not self.options.compile:
            return batch
        if batch.cu_seqlens is not None:
            return batch._replace(cu_seqlens=fill_bounds(batch.cu_seqlens))
        return round_up_width(batch, self.options.width_multiple)

    @contextlib.contextmanager
    def _no_sync(self, more_to_come: bool) -> Iterator[None]:
        if more_to_come and isinstance(self._loss, nn.parallel.DistributedDataParallel):
            with self._loss.no_sync():
                yield
        else:
            yield


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, fused; matrices decay, biases and norms do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def recycle_freed_memory() -> None:
    """Let the C library keep large blocks that a step frees for the next one (glibc; elsewhere nothing happens).

    Otherwise each logit chunk and each gradient comes as fresh pages, which cost a sixth of a small model's step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def num_compilations() -> int:
    """Graphs that `torch.compile` has compiled in this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
