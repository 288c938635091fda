"""Direct preference optimization (Rafailov et al., 2023): a loss over pairs, from log-probabilities of whole answers.

Of a pair it is `-log(sigmoid(beta * margin))`, where the margin is by how much more than the reference the model
prefers the chosen answer. With the reference's own weights it is ln 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fastcollate.train.loss import trained_cells

if TYPE_CHECKING:
    from fastcollate.train.model import GPT2
    from fastcollate.train.options import TrainOptions

_CHUNK = 1 << 25  # logits that stand in memory at a time


class Judged(NamedTuple):
    """What a batch of pairs knows besides its cells.

    Attributes:
        rows: int64, `PreferenceBatch.rows`.
        reference: float64 `(2, pairs)`, the reference's log-probabilities of the chosen and of the rejected answers.
    """

    rows: Tensor
    reference: Tensor


def log_probs(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> Tensor:
    """The log-probability of each label, `(cells,)`; logits are computed again for the gradient, a chunk at a time."""
    size = max(1, _CHUNK // len(head_weight))
    parts = zip(torch.split(hidden, size), torch.split(labels, size), strict=True)
    return torch.cat([checkpoint(_log_probs, cells, head_weight, some, use_reentrant=False) for cells, some in parts])


def _log_probs(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> Tensor:
    logits = functional.linear(hidden, head_weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return -functional.cross_entropy(logits.to(wide), labels, reduction="none")


def answer_log_probs(hidden: Tensor, head_weight: Tensor, targets: Tensor, rows: Tensor, bounds: Any) -> Tensor:
    """The log-probability of each answer, float64 `(2, pairs)`: of the chosen and of the rejected ones.

    `hidden` is what the head reads of a batch with these `targets`; `rows` and `bounds` are the batch's `rows` and
    `cu_seqlens`, the last `None` where it is padded.
    """
    cells, labels = trained_cells(targets)
    values = log_probs(hidden.flatten(0, 1).index_select(0, cells), head_weight, labels).double()
    if bounds is None:
        line = cells // targets.shape[1]
    else:
        line = torch.searchsorted(bounds, cells.to(bounds.dtype), right=True) - 1
    sums = values.new_zeros(len(rows)).index_add(0, line, values)
    return sums.view(2, -1) if bounds is None else sums[rows >= 0].view(-1, 2).T


class DPOLoss(nn.Module):
    """From a batch of pairs to its part of the step's loss.

    Attributes:
        sums: float64 `(2, 1)`, to which the margins of a batch's pairs are added, and how many of them are right.
    """

    def __init__(self, model: GPT2, options: TrainOptions) -> None:
        super().__init__()
        self.model = model
        self.beta = options.beta
        self.sums: Tensor | None = None
        self._hidden: Any = torch.compile(model.hidden) if options.compile else model.hidden

    def forward(self, batch: Any, scale: float) -> Tensor:
        """The sum of the pairs' losses times `scale`."""
        hidden = self._hidden(batch.inputs, batch.position_ids, batch.cu_seqlens)
        if batch.judged is None:  # an empty batch: every rank has gradients of all weights
            nothing: Tensor = hidden.sum() * 0
            return nothing
        rows, reference = batch.judged
        found = answer_log_probs(hidden, self.model.head_weight, batch.targets, rows, batch.cu_seqlens)
        chosen, rejected = self.beta * (found - reference)
        margins = chosen - rejected
        if self.sums is not None:
            of_batch = torch.stack([margins.detach().sum(), (margins.detach() > 0).sum()])
            self.sums += of_batch[:, None].to(self.sums.dtype)
        loss: Tensor = -functional.logsigmoid(margins).sum() * scale
        return loss
