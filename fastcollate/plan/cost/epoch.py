"""What the steps of a planned epoch cost, on all ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fastcollate.plan.cost.deal import StepCosts, padded_to, row_costs, step_costs, widths

if TYPE_CHECKING:
    from fastcollate.plan.plan import EpochPlan


def step_costs_of(plan: EpochPlan, index: int) -> StepCosts:
    """The steps of one window. Padded batches that are dealt in turn are planned once more for each rank."""
    options = plan.options
    if options.policy == "packed" or options.balance:
        dealt = plan.dealt_packs if options.policy == "packed" else plan.dealt_batches
        return step_costs(dealt(index)[2], options.group, options.world_size)
    ranks = []
    for rank in range(options.world_size):
        rows, bounds = replace(plan, options=replace(options, rank=rank)).window(index)
        each = widths(plan.lengths[rows].astype(np.int64), bounds)
        each = padded_to(np.minimum(each, options.max_length or each), options.pad_to_multiple_of)
        ranks.append(row_costs(each, options.cost) * np.diff(bounds))
    found = np.zeros((max(map(len, ranks)), options.world_size))
    for rank, own in enumerate(ranks):
        found[: len(own), rank] = own
    return StepCosts(found.max(1, initial=0), found.mean(1))
