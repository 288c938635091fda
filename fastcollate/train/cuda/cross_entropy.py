"""The cross-entropy's gradient in one pass over the logits, on a GPU: a program a row.

Needs Triton, which PyTorch for CUDA brings along on Linux.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 2048, 4


@triton.jit
def _gradient_of_row(
    logits, labels, log_probs, vocab_size: tl.constexpr, num_columns: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * num_columns
    label = tl.load(labels + row)
    of_label = tl.load(logits + label).to(tl.float32)
    # Each lane keeps its own maximum and sum, so that nothing waits for other lanes inside the loop.
    lowest = -3.4e38  # finite: a lane beyond a small vocabulary must not subtract infinities
    greatest = tl.full((block,), lowest, tl.float32)
    total = tl.zeros((block,), tl.float32)
    for start in range(0, vocab_size, block):
        columns = start + tl.arange(0, block)
        part = tl.load(logits + columns, mask=columns < vocab_size, other=lowest).to(tl.float32)
        new = tl.maximum(greatest, part)
        total = total * tl.exp(greatest - new) + tl.exp(part - new)
        greatest = new
    most = tl.max(greatest)
    log_sum = most + tl.log(tl.sum(total * tl.exp(greatest - most)))
    for start in range(0, num_columns, block):
        columns = start + tl.arange(0, block)
        part = tl.load(logits + columns, mask=columns < vocab_size, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(part - log_sum) - tl.where(columns == label, 1.0, 0.0)
        tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=columns < num_columns)
    tl.store(log_probs + row, of_label - log_sum)


def to_gradient(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Turn logits into the gradient of the summed cross-entropy, in place; the labels' log-probabilities.

    `logits` are contiguous, `(cells, columns)`; columns from `vocab_size` on count as minus infinity.
    """
    assert logits.is_contiguous()
    log_probs = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
    _gradient_of_row[(len(labels),)](
        logits, labels, log_probs, vocab_size, logits.shape[1], block=_BLOCK, num_warps=_WARPS
    )
    return log_probs
