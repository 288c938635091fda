"""A window's packs, or padded batches, dealt by cost; with several nodes each part by itself, then step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcollate.plan.cost import deal as costs
from fastcollate.plan.documents.pack import packs_of_window
from fastcollate.plan.packing import Packs

if TYPE_CHECKING:
    from fastcollate.plan.plan import EpochPlan

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]


class Dealt(NamedTuple):
    """Packs, or batches, and how they are dealt.

    Attributes:
        packs: all of them.
        order: int64, their numbers: rank `r` takes `r`, `r + world_size`, ... of it.
        costs: float64, what each costs, in this order.
    """

    packs: Packs
    order: Int64Array
    costs: Float64Array


def dealt_packs_of(plan: EpochPlan, index: int) -> Dealt:
    """A window's packs; not the epoch's last window: whole steps of them."""
    options = plan.options
    assert options.capacity is not None
    plan.check_window(index)
    limit = options.capacity if options.max_length is None else min(options.max_length, options.capacity)
    is_last = index == plan.num_windows - 1
    with np.errstate(over="ignore"):
        parts = [
            packs_of_window(rows, plan.lengths_of(rows, None)[0], options, limit, is_last=is_last)
            for rows in plan.rows_of_parts(index)
        ]
        unit = 1 if is_last else options.part_group
        most = max(-(-part.num_packs // unit) * unit for part in parts)
        parts = [part.filled_up(most, repeat=options.tail == "repeat") for part in parts]
        return plan.note_costs(joined([_deal_packs(plan, part, index, limit) for part in parts], options.part_ranks))


def _deal_packs(plan: EpochPlan, packs: Packs, index: int, limit: int) -> Dealt:
    options = plan.options

    def price(packs: Packs) -> Float64Array:
        return costs.of_packs(plan.lengths, packs, limit, options.cost)

    each = price(packs)
    order = plan.order_by_cost(each, index)
    if packs.num_packs % options.part_group:  # the epoch's last, which fill no step
        whole = len(order) - len(order) % options.part_group
        rest = packs.take(order[whole:] if not options.drop_last else order[:0])
        missing = -rest.num_packs % options.part_ranks if options.tail == "repeat" else 0
        rest = rest.filled_up(rest.num_packs + missing, repeat=True)
        order = np.append(order[:whole], packs.num_packs + np.arange(rest.num_packs))
        packs, each = packs.followed_by(rest), np.append(each, price(rest))
    return Dealt(packs, *plan.deal_by_cost(each, order, index))


def dealt_batches_of(plan: EpochPlan, index: int) -> Dealt:
    """A window's padded batches of `max_tokens`."""
    options = plan.options
    with np.errstate(over="ignore"):
        parts = [_batches(plan, rows) for rows in plan.rows_of_parts(index)]
        counts = [batches.num_packs for batches, _ in parts]
        most = max(counts) if min(counts) else 0
        dealt = []
        for batches, widths in parts:
            even = batches.filled_up(most, repeat=True) if most else batches.take(np.arange(0))
            if len(even.rows) != len(widths):
                widths = np.resize(widths, len(even.rows))  # of rows that are repeated too
            bounds = even.bounds
            bucketed = options.policy == "bucketed"
            longest = widths[bounds[1:] - 1] if bucketed else costs.widths(widths, bounds)
            each = costs.row_costs(longest, options.cost) * np.diff(bounds)
            dealt.append(Dealt(even, *plan.deal_by_cost(each, plan.order_by_cost(each, index), index)))
        return plan.note_costs(joined(dealt, options.part_ranks))


def _batches(plan: EpochPlan, rows: npt.NDArray[Any]) -> tuple[Packs, npt.NDArray[Any]]:
    """Rows cut into batches, as many as make whole steps, and what each row takes."""
    options = plan.options
    assert options.max_tokens is not None
    bucketed = options.policy == "bucketed"
    rows, lengths = plan.sorted_by_length(rows) if bucketed else (rows, plan.lengths_of(rows, options.max_length)[0])
    widths = costs.padded_to(lengths, options.pad_to_multiple_of)
    if len(rows) and widths[place := len(rows) - 1 if bucketed else int(widths.argmax())] > options.max_tokens:
        raise options.too_long(int(rows[place]), int(lengths[place]))
    bounds = costs.cut_evenly(widths, options.max_tokens, options.part_group, is_sorted=bucketed)
    if (len(bounds) - 1) % options.part_group:  # a row a batch, and still no whole steps
        size = options.evened(len(rows))
        rows, widths = np.resize(rows, size), np.resize(widths, size)
        bounds = np.arange(size + 1)
    return Packs(rows, bounds[:0], bounds), widths


def joined(parts: Sequence[Dealt], ranks: int) -> Dealt:
    """The same of all nodes: in each step the first `ranks` are the first node's, and so on."""
    if len(parts) == 1:
        return parts[0]
    packs, orders = parts[0].packs, [parts[0].order]
    for part in parts[1:]:
        orders.append(part.order + packs.num_packs)
        packs = packs.followed_by(part.packs)
    return Dealt(packs, in_turn(orders, ranks), in_turn([part.costs for part in parts], ranks))


def in_turn(parts: Sequence[npt.NDArray[Any]], ranks: int) -> npt.NDArray[Any]:
    """Items of parts of one size: `ranks` of the first, as many of the second, and so on, then the next of the first.

    Example:
        >>> in_turn([np.array([1, 2, 3, 4]), np.array([5, 6, 7, 8])], 2)
        array([1, 2, 5, 6, 3, 4, 7, 8])
    """
    if len(parts) == 1:
        return parts[0]
    turns = np.stack(parts).reshape(len(parts), -1, ranks)
    found: npt.NDArray[Any] = turns.swapaxes(0, 1).reshape(-1)
    return found
