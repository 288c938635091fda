"""What batches cost, and how they are dealt so that the ranks of a step finish together.

Packs equal in tokens are not equal in work: attention is quadratic in a row's length. So a window's packs (or batches)
are sorted by cost and cut into optimizer steps, whose order is then shuffled: the packs of a step cost alike, whoever
takes which. Where a rank takes several of a step, it takes one of each so many neighbours, the dearest where the least
has been given so far: longest first, as Graham, "Bounds on multiprocessing timing anomalies", 1969, with equal counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError
from fastcollate.plan import kernels as plan_kernels
from fastcollate.plan.cost import kernels as cost_kernels
from fastcollate.plan.kernels import LONGEST
from fastcollate.store import layout

if TYPE_CHECKING:
    from fastcollate.plan.packing import Packs

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]
_TRIES = 4  # to find a budget that cuts a multiple
_FEW = 1 / 32  # of the batches: so many may be halved

Cost = int | Callable[[Int64Array], npt.ArrayLike]


class StepCosts(NamedTuple):
    """What the steps of a window cost; float64 `(num_steps,)` each, in whatever the cost counts.

    Attributes:
        slowest: of the rank that has most to do.
        mean: of all ranks.
    """

    slowest: Float64Array
    mean: Float64Array

    @property
    def imbalance(self) -> float:
        """How many times the ideal all steps take together."""
        mean = float(self.mean.sum())
        return float(self.slowest.sum()) / mean if mean else 1.0


def row_costs(lengths: npt.NDArray[Any], cost: Cost) -> Float64Array:
    """What rows of so many tokens cost; refuses what a function gives instead of a number of at least 0 a row."""
    if not callable(cost):
        exact = lengths.astype(np.float64)
        return exact * exact + cost * exact
    given = lengths.astype(np.int64)
    found = np.asarray(cost(given.copy()))
    if found.shape != given.shape or found.dtype.kind not in "iuf" or not (np.isfinite(found) & (found >= 0)).all():
        raise InputError(
            f"cost(lengths) gave {found.dtype} of shape {found.shape} for {len(given)} lengths: give a finite number "
            "of at least 0 a length"
        )
    return found.astype(np.float64)


def cost_name(cost: Cost, longest: int) -> int | str:
    """A number as it is, a function by what it gives for some lengths: what a saved state compares."""
    if not callable(cost):
        return cost
    lengths = np.unique(np.minimum(1 << np.arange(41, dtype=np.int64), longest))
    return f"function {hashlib.blake2b(row_costs(lengths, cost).astype('<f8').tobytes(), digest_size=8).hexdigest()}"


def of_packs(lengths: npt.NDArray[Any], packs: Packs, limit: int, cost: Cost) -> Float64Array:
    """What packs cost: attention is within rows, so a pack costs what its rows do, of at most so many tokens each.

    The lengths are those of all rows of the data set.
    """
    out = np.empty(packs.num_packs, np.float64)
    if not callable(cost):
        cost_kernels.pack_costs(lengths, packs.rows, packs.starts, packs.bounds, limit, cost, out)
        return out
    own = np.minimum(lengths[packs.rows], LONGEST)
    if len(packs.starts):
        most = packs.starts >> layout.COUNT_AT & layout.MOST_TOKENS
        own = own - (packs.starts & layout.FIRST_TOKEN)
        own = np.where(most > 0, np.minimum(own, most), own)
    cost_kernels.group_sums(row_costs(np.minimum(own, limit), cost), packs.bounds, out)
    return out


def widths(lengths: npt.NDArray[Any], bounds: Int64Array) -> Int64Array:
    """Each batch's longest row."""
    return np.maximum.reduceat(lengths, bounds[:-1]).astype(np.int64)


def padded_to(lengths: npt.NDArray[Any], multiple: int | None) -> npt.NDArray[Any]:
    """The widths of batches whose longest rows these are."""
    return lengths if multiple is None else -(-lengths.astype(np.int64) // multiple) * multiple


def cut_evenly(lengths: npt.NDArray[Any], max_tokens: int, group: int, *, is_sorted: bool) -> Int64Array:
    """Bounds of batches of at most `max_tokens` cells, and of so much less that they make whole steps of `group`.

    Where there are fewer rows than that they make a batch each.
    """
    cut = plan_kernels.cut_sorted_batches if is_sorted else plan_kernels.cut_batches
    room = np.empty(len(lengths) + 1, np.int64)
    count = int(cut(lengths, max_tokens, room))
    budget = max_tokens
    bounds: Int64Array = room[: count + 1].copy()
    wanted = -(-count // group) * group
    for _ in range(_TRIES if wanted - count > _FEW * count else 0):
        if count == wanted:
            break
        budget = min(budget * count // wanted + (count > wanted), max_tokens)
        count = int(cut(lengths, budget, room))
        if len(bounds) - 1 < count <= wanted:
            bounds = room[: count + 1].copy()
    while missing := wanted - (len(bounds) - 1):
        sizes = np.diff(bounds)
        halved = np.flatnonzero(sizes > 1)[:missing]
        if not len(halved):
            break
        bounds = np.insert(bounds, halved + 1, bounds[halved] + sizes[halved] // 2)
    return bounds


def steps_of_like_cost(costs: Float64Array, group: int, key: np.uint64) -> Int64Array:
    """An order in which each `group` neighbours, which make a step, cost alike, and the steps come in any order.

    What does not fill a step comes last. It is of like cost too, anywhere among the others.
    """
    order: Int64Array = np.argsort(costs, kind="stable")[::-1]  # sorted batches are long runs already, this way round
    num_steps, rest = divmod(len(order), group)
    if rest:
        place = int(plan_kernels.mix(key, np.uint64(num_steps))) % (num_steps + 1) * group
        order = np.concatenate([order[:place], order[place + rest :], order[place : place + rest]])
    steps = np.arange(num_steps)
    plan_kernels.shuffle(steps, key)
    whole = num_steps * group
    order[:whole] = order[:whole].reshape(num_steps, group)[steps].ravel()
    return order


def deal(costs: Float64Array, group: int, world_size: int, key: np.uint64) -> Int64Array:
    """How the items of steps are dealt out: in the order given here rank `r` takes `r`, `r + world_size`, ... of each.

    The items come step after step, `group` in each, the dearest of a step first; in the last one there may be fewer, in
    any order. Each rank takes as many, and its items cost as much as another's, as nearly as that goes. No rank is
    always the slowest.
    """
    num_steps, whole = len(costs) // group, len(costs) - len(costs) % group
    shifts = np.arange(num_steps) % world_size
    plan_kernels.shuffle(shifts, key)
    items = np.arange(whole).reshape(num_steps, group // world_size, world_size)
    _deal_rounds(items, costs)
    dealt = np.empty_like(items)
    cost_kernels.turn(items, shifts, dealt)
    rest = whole + np.argsort(-costs[whole:], kind="stable")
    missing = -len(rest) % world_size  # in the last round
    last = np.append(rest, np.arange(missing) + len(costs)).reshape(1, -1, world_size)
    _deal_rounds(last, np.append(costs, np.zeros(missing)))
    if missing:  # the last ranks go without
        last = last[:, :, np.argsort(last[0, -1] >= len(costs), kind="stable")]
    return np.append(dealt, last)[: len(costs)]


def _deal_rounds(items: Int64Array, costs: Float64Array) -> None:
    """Reorder each round of items, `(num_steps, num_rounds, world_size)`: its dearest for whom has been given least."""
    if items.shape[1] < 2:
        return
    given = costs[items[:, 0]]
    for turn in range(1, items.shape[1]):
        own = items[:, turn].copy()
        np.put_along_axis(items[:, turn], np.argsort(given, axis=1, kind="stable"), own, axis=1)
        given += costs[items[:, turn]]


def step_costs(costs: Float64Array, group: int, world_size: int) -> StepCosts:
    """What steps cost, of what is dealt out in this order; the last step may be a shorter one."""
    missing = -len(costs) % group
    ranks = np.append(costs, np.zeros(missing)).reshape(-1, group // world_size, world_size).sum(1)
    return StepCosts(ranks.max(1, initial=0), ranks.mean(1))
