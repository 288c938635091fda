"""Batches of few shapes, which a compiled model needs."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from fastcollate.train.loss import IGNORE_INDEX


def round_up_width(batch: Any, multiple: int) -> Any:
    """A padded batch with its width rounded up, so that a compiled model sees few widths."""
    missing = -batch.inputs.shape[1] % multiple
    if not missing or batch.cu_seqlens is not None:
        return batch
    return batch._replace(
        inputs=functional.pad(batch.inputs, (0, missing)),  # right of every row: causal attention never looks there
        targets=functional.pad(batch.targets, (0, missing), value=IGNORE_INDEX),
    )


def fill_packs(batch: Any, num_packs: int, num_bounds: int) -> Any:
    """A packed batch with empty packs up to `num_packs` and empty segments up to `num_bounds`, at least what it has.

    A compiled model then sees one shape.
    """
    missing, capacity = num_packs - len(batch.inputs), batch.inputs.shape[1]
    bounds, positions = batch.cu_seqlens, batch.position_ids
    assert bounds is not None
    assert positions is not None
    if missing > 0:
        more = (
            torch.arange(1, missing + 1, dtype=bounds.dtype, device=bounds.device) * capacity
            + len(batch.inputs) * capacity
        )
        bounds = torch.cat([bounds, more])
        positions = torch.cat([positions, torch.arange(capacity, device=positions.device).expand(missing, -1)])
        batch = batch._replace(
            inputs=functional.pad(batch.inputs, (0, 0, 0, missing)),
            targets=functional.pad(batch.targets, (0, 0, 0, missing), value=IGNORE_INDEX),
        )
    bounds = torch.cat([bounds, bounds[-1:].expand(max(0, num_bounds - len(bounds)))])
    return batch._replace(position_ids=positions, cu_seqlens=bounds)
