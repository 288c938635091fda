"""How evenly several ranks would be loaded, by the cost model: the slowest over the mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastcollate.plan import Order, PlanOptions
from fastcollate.store import TokenStore

_MOST_WINDOWS = 4  # of an epoch, which are like the others


@dataclass(frozen=True, slots=True)
class Imbalance:
    """How many times as long as the mean of all ranks the slowest takes, in a step and in all of them.

    Example:
        >>> Imbalance(8, "packs of 1,024 cells", epoch=1.002, worst_step=1.3, in_turn=1.141).in_words
        '1.002 times the mean (worst step 1.30; 1.141 dealt in turn)'
    """

    ranks: int
    batches: str
    epoch: float
    worst_step: float
    in_turn: float  # the epoch without balance

    @property
    def sentence(self) -> str:
        """All of it as a sentence."""
        return f"on {self.ranks} ranks, {self.batches}: the slowest takes {self.in_words}"

    @property
    def in_words(self) -> str:
        """The figures."""
        return f"{self.epoch:.3f} times the mean (worst step {self.worst_step:.2f}; {self.in_turn:.3f} dealt in turn)"


def imbalance_of(store: TokenStore, ranks: int, **order: Any) -> Imbalance:
    """What an order's epoch is by the cost model on so many ranks, each with batches of that size."""
    found = {}
    for balance in (None, False):
        options = PlanOptions(world_size=ranks, balance=balance, **order).checked()
        plan = Order(store.as_rows()).plan(options, 0).plan
        windows = [plan.step_costs(index) for index in range(min(plan.num_windows, _MOST_WINDOWS))]
        found[balance] = tuple(np.concatenate([getattr(one, name) for one in windows]) for name in ("slowest", "mean"))
    slowest, mean = found[None]
    epochs = {balance: float(most.sum() / max(even.sum(), 1e-300)) for balance, (most, even) in found.items()}
    batches = f"packs of {plan.capacity:,} cells" if plan.capacity else f"{plan.policy} batches"
    worst = float((slowest / np.maximum(mean, 1e-300)).max(initial=1.0))
    return Imbalance(ranks, batches, epochs[None], worst, epochs[False])
