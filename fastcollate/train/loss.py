"""The output head and its cross-entropy, computed only on cells that carry a target, a chunk at a time.

With a vocabulary of 50,257 the head is most of a small model's work, and the logits most of its memory. Each chunk's
gradient is computed right after its logits, so that they never stand in memory for more than a chunk of cells and
are never computed twice.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    scale: float,
    *,
    chunk: int | None = None,
    compiled: bool = False,
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
        compiled: what lies between the products is compiled to one pass over the logits (`torch.compile`).

    Example:
        >>> scaled_loss(torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([1, 5]), scale=1 / 2)
        tensor(2.0794)
    """
    chunk = chunk or _default_chunk(head_weight.shape[0], hidden.device)
    loss: Tensor = _ChunkedLoss.apply(hidden, head_weight, labels, scale, chunk, compiled)  # type: ignore[no-untyped-call]
    return loss


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are computed in the forward pass, where the logits are at hand; the scale is left to the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head_weight: Tensor, labels: Tensor, scale: float, chunk: int, compiled: bool
    ) -> Tensor:
        device = hidden.device.type
        compute_type = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head_weight.dtype
        to_gradient = _to_gradient_compiled if compiled else _to_gradient
        with torch.autocast(device, enabled=False):
            weight = _padded(head_weight, compute_type)
            cells = hidden.to(compute_type)
            grad_hidden = torch.empty_like(cells)
            grad_weight = torch.zeros(weight.shape, dtype=head_weight.dtype, device=weight.device)
            total = torch.zeros((), dtype=torch.float64 if device == "cpu" else torch.float32, device=hidden.device)
            for start in range(0, len(labels), chunk):
                part = slice(start, start + chunk)
                logits = cells[part] @ weight.T
                total -= to_gradient(logits, labels[part], len(head_weight))
                torch.mm(logits, weight, out=grad_hidden[part])
                _add_product(grad_weight, logits.T, cells[part])
        ctx.save_for_backward(grad_hidden, grad_weight[: len(head_weight)])
        ctx.scale, ctx.hidden_type = scale, hidden.dtype
        return (total * scale).to(grad_weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = grad_loss * ctx.scale
        return (grad_hidden * factor).to(ctx.hidden_type), grad_weight.mul_(factor), None, None, None, None


def _padded(head_weight: Tensor, compute_type: torch.dtype) -> Tensor:
    """The head in the type of its products, on a GPU with rows of zeros up to a multiple of 128 (50,304 of 50,257).

    Products with an odd vocabulary take up to twice as long there. Checkpoints know nothing of it.
    """
    missing = -len(head_weight) % 128 if head_weight.is_cuda else 0
    if not missing:
        return head_weight.to(compute_type)
    padded = head_weight.new_zeros((len(head_weight) + missing, head_weight.shape[1]), dtype=compute_type)
    padded[: len(head_weight)] = head_weight
    return padded


def _to_gradient(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Turn logits into the gradient of the summed cross-entropy, in place; the sum of the labels' log-probabilities.

    In 16 bits a label's probability near 1 would leave no gradient; it is computed from the wide logarithm.
    """
    logits[:, vocab_size:] = -torch.inf
    log_probs = torch.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))
    of_labels = log_probs.gather(1, labels[:, None])
    torch.exp(log_probs, out=logits)
    logits.scatter_(1, labels[:, None], of_labels.expm1().to(logits.dtype))
    return of_labels.sum()


def _to_gradient_in_one_pass(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """As `_to_gradient`, in operations that a compiler joins."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(columns >= vocab_size, -torch.inf)
    log_sums = torch.logsumexp(wide, 1, keepdim=True)
    log_probs = logits.gather(1, labels[:, None]).to(wide.dtype) - log_sums
    # `expm1` of every cell would take twice the time; the subtraction is exact beside the digits of 16 bits.
    logits.copy_((wide - log_sums).exp() - (columns == labels[:, None]).to(wide.dtype))
    return log_probs.sum()


@functools.cache
def _compiled() -> Any:
    return torch.compile(_to_gradient_in_one_pass)


def _to_gradient_compiled(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    for tensor in (logits, labels):  # the last chunk has fewer cells
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    of_labels: Tensor = _compiled()(logits, labels, vocab_size)
    return of_labels


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, added up in the type of `total` where the products are of another."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    elif total.is_cuda and _HAS_WIDE_PRODUCTS:
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total += left @ right


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
