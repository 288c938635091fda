"""The output head and its cross-entropy, computed only on cells that carry a target, a chunk at a time.

With a vocabulary of 50,257 the head is most of a small model's work, and the logits most of its memory. Each chunk's
gradient is computed right after its logits, so that they never stand in memory for more than a chunk of cells and
are never computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORE_INDEX = -100
# On CUDA from 2.7 on; before, only on the CPU.
_HAS_STATIC_NONZERO = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 7)


def trained_cells(
    targets: Tensor, ignore_index: int = IGNORE_INDEX, *, num_trained: int | None = None
) -> tuple[Tensor, Tensor]:
    """The cells that carry a target: places in the flattened targets, and the targets there, int64 `(cells,)` each.

    Given `num_trained`, how many there are, nothing waits for a GPU.

    Example:
        >>> trained_cells(torch.tensor([[-100, 7], [8, -100]]))
        (tensor([1, 2]), tensor([7, 8]))
    """
    flat = targets.reshape(-1)
    is_trained = flat != ignore_index
    if flat.is_cuda and num_trained is not None and _HAS_STATIC_NONZERO:
        cells = torch.nonzero_static(is_trained, size=num_trained).squeeze(1)
    else:
        cells = is_trained.nonzero().squeeze(1)
    return cells, flat[cells]


def _default_chunk(vocab_size: int, device: torch.device) -> int:
    """Cells a chunk: logits that stay near the cache on a CPU, and fill a GPU (half a GB in float32)."""
    logits = 1 << 27 if device.type == "cuda" else 1 << 25
    return max(64, logits // vocab_size)


def cell_losses(hidden: Tensor, head_weight: Tensor, labels: Tensor, *, chunk: int | None = None) -> Tensor:
    """The cross-entropy of each cell, float32 or wider `(cells,)`, without gradient (evaluation); see `scaled_loss`."""
    chunk = chunk or _default_chunk(head_weight.shape[0], hidden.device)
    with torch.no_grad():
        parts = [
            functional.cross_entropy(_wide(functional.linear(part, head_weight)), wanted, reduction="none")
            for part, wanted in zip(torch.split(hidden, chunk), torch.split(labels, chunk), strict=True)
        ]
    return torch.cat(parts)


def scaled_loss(
    hidden: Tensor, head_weight: Tensor, labels: Tensor, scale: float, *, chunk: int | None = None
) -> Tensor:
    """The sum of the cells' cross-entropies times `scale`, with gradients for `hidden` and `head_weight`.

    With `scale` one over the trained tokens of the whole optimizer step, losses of micro-batches and ranks add up to
    the mean over that step.

    Args:
        hidden: what the head reads, `(cells, width)`; no cells give 0.
        head_weight: `(vocabulary, width)`.
        labels: int64 `(cells,)`.
        scale: multiplies the sum.
        chunk: cells at a time.

    Example:
        >>> scaled_loss(torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([1, 5]), scale=1 / 2)
        tensor(2.0794)
    """
    chunk = chunk or _default_chunk(head_weight.shape[0], hidden.device)
    loss: Tensor = _ChunkedLoss.apply(hidden, head_weight, labels, scale, chunk)  # type: ignore[no-untyped-call]
    return loss


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are computed in the forward pass, where the logits are at hand."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_weight: Tensor, labels: Tensor, scale: float, chunk: int) -> Tensor:
        device = hidden.device.type
        compute_type = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head_weight.dtype
        with torch.autocast(device, enabled=False):
            weight = head_weight.to(compute_type)
            cells = hidden.to(compute_type)
            grad_hidden = torch.empty_like(cells)
            grad_weight = torch.zeros_like(head_weight)
            total = torch.zeros((), dtype=torch.float64 if device == "cpu" else torch.float32, device=hidden.device)
            for start in range(0, len(labels), chunk):
                part = slice(start, start + chunk)
                total -= _chunk(cells[part], weight, labels[part], scale, grad_hidden[part], grad_weight)
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_weight)
        return (total * scale).to(grad_weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss.to(grad_hidden.dtype), grad_weight.mul_(grad_loss), None, None, None


def _chunk(
    cells: Tensor, weight: Tensor, labels: Tensor, scale: float, grad_hidden: Tensor, grad_weight: Tensor
) -> Tensor:
    """Fill `grad_hidden`, add to `grad_weight`, return the sum of the labels' log-probabilities."""
    log_probs = _wide(cells @ weight.T)
    torch.log_softmax(log_probs, 1, out=log_probs)
    rows = torch.arange(len(labels), device=labels.device)
    log_likelihood = log_probs[rows, labels].sum()
    grad_logits = log_probs.exp_()
    grad_logits[rows, labels] -= 1
    if cells.dtype == grad_logits.dtype:
        torch.mm(grad_logits, weight, out=grad_hidden)
        grad_hidden.mul_(scale)
        torch.addmm(grad_weight, grad_logits.T, cells, alpha=scale, out=grad_weight)
    else:
        narrow = grad_logits.mul_(scale).to(cells.dtype)
        torch.mm(narrow, weight, out=grad_hidden)
        grad_weight += narrow.T @ cells
    return log_likelihood


class Readback:
    """A number on its way from the device; reading it waits for that copy alone, not for what was queued behind it."""

    def __init__(self, value: Tensor) -> None:
        self._copied = None
        if value.is_cuda:
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._value.copy_(value.detach().reshape(()), non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        else:
            self._value = value.detach()

    def read(self) -> float:
        """The number."""
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value)
