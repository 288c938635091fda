"""The output head and its cross-entropy, computed only on cells that carry a target, a chunk at a time.

With a vocabulary of 50,257 the head is most of a small model's work, and the logits most of its memory. Each chunk's
gradient is computed right after its logits, so that they never stand in memory for more than a chunk of cells and
are never computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastcollate.train.cuda.compiler import triton_compiles

IGNORE_INDEX = -100
# On CUDA from 2.7 on; before, only on the CPU.
_HAS_STATIC_NONZERO = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 7)
_HAS_WIDE_PRODUCTS = "dtype_out" in torch.ops.aten.addmm.overloads()  # type: ignore[no-untyped-call]


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


def cell_losses(hidden: Tensor, head_weight: Tensor, labels: Tensor, *, chunk: int | None = None) -> Tensor:
    """The cross-entropy of each cell, float32 or wider `(cells,)`, without gradient (evaluation); see `scaled_loss`."""
    with torch.no_grad():
        cells, weight = _in_product_type(hidden, head_weight)
        losses = torch.empty(len(labels), dtype=_wide_type(cells), device=cells.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _parts(len(labels), chunk or _default_chunk(weight)):
                logits = cells[part] @ weight.T
                logits[:, len(head_weight) :] = -torch.inf
                losses[part] = functional.cross_entropy(logits.to(losses.dtype), labels[part], reduction="none")
    return losses


def scaled_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    scale: float,
    *,
    chunk: int | None = None,
    groups: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """The sum of the cells' cross-entropies times `scale`, with gradients for `hidden` and `head_weight`.

    With `scale` one over the trained tokens of the whole optimizer step, losses of micro-batches and ranks add up to
    the mean over that step. `hidden` is what the head reads, `(cells, width)` (no cells give 0), `head_weight`
    `(vocabulary, width)`, `labels` int64 `(cells,)`; at most `chunk` cells are computed at a time. With `groups`, int64
    `(cells,)`, each group's losses and cells are added to `sums`, `(2, num_groups)`.

    Example:
        >>> scaled_loss(torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([1, 5]), scale=1 / 2)
        tensor(2.0794)
    """
    loss: Tensor = _ChunkedLoss.apply(hidden, head_weight, labels, scale, chunk, groups, sums)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are computed in the forward pass, where the logits are at hand; the scale is left to the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        labels: Tensor,
        scale: float,
        chunk: int | None,
        groups: Tensor | None,
        sums: Tensor | None,
    ) -> Tensor:
        cells, weight = _in_product_type(hidden, head_weight)
        grad_hidden = torch.empty_like(cells)
        grad_weight = torch.zeros(weight.shape, dtype=head_weight.dtype, device=weight.device)
        total = torch.zeros((), dtype=torch.float32 if hidden.is_cuda else torch.float64, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _parts(len(labels), chunk or _default_chunk(weight)):
                logits = cells[part] @ weight.T
                losses = -_to_gradient(logits, labels[part], len(head_weight))
                total += losses.sum()
                if groups is not None and sums is not None:
                    of_cells = torch.stack([losses, torch.ones_like(losses)]).to(sums.dtype)
                    sums.index_add_(1, groups[part], of_cells)
                torch.mm(logits, weight, out=grad_hidden[part])
                _add_product(grad_weight, logits.T, cells[part])
        ctx.save_for_backward(grad_hidden, grad_weight[: len(head_weight)])
        ctx.scale, ctx.hidden_type = scale, hidden.dtype
        return (total * scale).to(grad_weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = grad_loss * ctx.scale
        return (grad_hidden * factor).to(ctx.hidden_type), grad_weight.mul_(factor), None, None, None, None, None


def _in_product_type(hidden: Tensor, head_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's type where it is on; on a GPU the head with rows of zeros up to a multiple of 128.

    Products with 50,257 columns instead of 50,304 take up to seven times as long there. Checkpoints know nothing of it.
    """
    device = hidden.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head_weight.dtype
    missing = -len(head_weight) % 128 if head_weight.is_cuda else 0
    if not missing:
        return hidden.to(kind), head_weight.to(kind)
    padded = head_weight.new_zeros((len(head_weight) + missing, head_weight.shape[1]), dtype=kind)
    padded[: len(head_weight)] = head_weight
    return hidden.to(kind), padded


def _default_chunk(weight: Tensor) -> int:
    """Cells a chunk: logits that stay near the cache on a CPU, and fill a GPU (a GB in 16 bits)."""
    return max(64, (1 << 29 if weight.is_cuda else 1 << 25) // len(weight))


def _parts(num_cells: int, chunk: int) -> Iterator[slice]:
    """Even parts of at most `chunk` cells."""
    num_parts = -(-num_cells // chunk)
    bounds = [num_cells * i // num_parts for i in range(num_parts + 1)] if num_parts else []
    return (slice(start, end) for start, end in pairwise(bounds))


def _wide_type(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _to_gradient(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Turn logits into the gradient of the summed cross-entropy, in place; the labels' log-probabilities.

    Columns from `vocab_size` on count as minus infinity.
    """
    if logits.is_cuda and logits.dtype != torch.float64 and triton_compiles(logits.device):
        from fastcollate.train.cuda.cross_entropy import to_gradient

        return to_gradient(logits, labels, vocab_size)
    logits[:, vocab_size:] = -torch.inf
    log_probs = torch.log_softmax(logits, 1, dtype=_wide_type(logits))
    of_labels = log_probs.gather(1, labels[:, None])
    torch.exp(log_probs, out=logits)
    # In 16 bits a label's probability near 1 would leave no gradient.
    logits.scatter_(1, labels[:, None], of_labels.expm1().to(logits.dtype))
    return of_labels.squeeze(1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, added up in the type of `total` where the products are of another."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    elif total.is_cuda and _HAS_WIDE_PRODUCTS:
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total += left @ right


class Readback:
    """Numbers on their way from the device; reading them waits for that copy alone, not for what was queued behind."""

    def __init__(self, value: Tensor) -> None:
        self._copied = None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value.detach(), non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        else:
            self._value = value.detach()

    def read(self) -> float:
        """The number."""
        return float(self.read_all()[0])

    def read_all(self) -> list[float]:
        """All numbers, as they lie."""
        if self._copied is not None:
            self._copied.synchronize()
        return [float(value) for value in self._value.flatten().tolist()]
