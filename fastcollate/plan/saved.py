"""A saved state, of which nothing is believed before it is checked."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from fastcollate.errors import LARGEST, InputError, integer, shown
from fastcollate.plan.options import Int64Array, PlanOptions
from fastcollate.plan.orders.order import Order

STATE_VERSION = 5
# May differ, as long as a step holds the same rows.
_SIZES = ("batch_size", "max_tokens", "world_size", "shares", "accumulation")
_SINCE_4 = {"balance": False, "accumulation": 1, "cost": 0}  # and what that means for states of before


class Position(NamedTuple):
    """The next batch: of an epoch, of a window in it, and its number there."""

    epoch: int
    window: int = 0
    batch: int = 0


class SavedState:
    """A saved state, of which nothing is believed before it is checked."""

    def __init__(self, state: Mapping[str, Any], kind: str) -> None:
        self._kind = kind
        if not isinstance(state, Mapping):
            raise self._error(f"is a {type(state).__name__}: give what state_dict gave")
        self._state = {
            "packing": "best_fit",
            "stride": None,
            "order": "rows",
            "nodes": 1,
            **state,
        }  # of states of before
        self._version = self._field("version")
        if type(self._version) is not int or self._version not in (2, 3, 4, STATE_VERSION):
            raise self._error(
                f"has version={shown(self._version)}, and this release reads 2 to {STATE_VERSION}: load it with the "
                "release that saved it, or start afresh"
            )
        if self._version < 4:
            self._state = {**self._state, **_SINCE_4}

    def _error(self, what: str) -> InputError:
        return InputError(f"the saved {self._kind} state {what}")

    def _field(self, name: str) -> Any:
        if name not in self._state:
            raise self._error(f"has no {name!r}: it is damaged, or of something else")
        return self._state[name]

    def _differs(self, name: str, saved: Any, own: Any) -> InputError:
        return self._error(
            f"has {name}={shown(saved)}, this {self._kind} {shown(own)}; make the {self._kind} with the saved value, "
            "or start afresh"
        )

    def read(self, order: Order, options: PlanOptions) -> tuple[Position, Int64Array]:
        """The position, and the rows of each source before it; every field is checked."""
        identity = order.identity(options) if self._version > 2 else self._identity_2(order)
        for name, own in identity.items():
            if not _is_same(self._field(name), own):
                raise self._differs(name, self._field(name), own)
        saved = self._check_options(options)
        position = self._position(order, saved, replace(options, rank=0))
        return position, self._source_rows(order.names)

    def with_balance(self, own: PlanOptions) -> PlanOptions:
        """The options with the balance of the saved run, which goes on as it began."""
        balance = self._field("balance")
        if type(balance) is not bool or balance == own.balance:
            return own  # what is no truth value is told later
        if own.balance:
            warnings.warn(
                f"the saved {self._kind} state is of an order that is not balanced by cost: the run goes on in it; "
                "balance=False says so",
                stacklevel=3,
            )
        try:
            return replace(own, balance=balance, shares=None).checked()
        except InputError as error:
            raise self._error(f"has balance={balance}: {error}") from error

    def _identity_2(self, order: Order) -> dict[str, Any]:
        """What a state of version 2 must agree on."""
        num_rows = len(order.lengths) if order.mix else order.num_rows
        if "store" not in self._state:  # of a sampler
            warnings.warn(
                "a sampler's state of version 2 does not say of which store and rows it is: only their number is "
                "compared",
                stacklevel=5,
            )
            return {"num_rows": num_rows}
        if order.mix or not isinstance(order.rows, range):
            raise self._error(
                "is of version 2, whose loaders knew neither mixes nor row numbers: it is of another order of rows; "
                "start afresh"
            )
        store = order.identity()["store"]
        store = "" if store.startswith("lengths ") else store
        return {"num_rows": num_rows, "first_row": order.rows.start, "store": store}

    def _check_options(self, own: PlanOptions) -> PlanOptions:
        """The saved options; refuses others than the own ones."""
        names = set(own.plain()) - {"rank"}
        added = {"longest_first", "pad_to_multiple_of", "cp_size"}  # since such a state
        added |= {"block", "shares"} if self._version == 2 else set()
        absent = added - set(self._state) if self._version < 4 else set()
        values = {name: self._field(name) for name in names - absent}
        if own.balance and self._state["balance"] is True and not _is_same(values["cost"], own.plain()["cost"]):
            raise self._differs("cost", values["cost"], own.plain()["cost"])
        try:
            saved = PlanOptions(**{**values, "cost": own.cost}).checked()
        except InputError as error:
            raise self._error(f"is damaged: {error}") from error
        for name in sorted(names - {"cost", *_SIZES}):
            if getattr(saved, name) != getattr(own, name):
                raise self._differs(name, getattr(saved, name), getattr(own, name))
        if of_all_ranks(saved) == of_all_ranks(own):
            return saved
        sizes = [", ".join(f"{name}={getattr(part, name)!r}" for name in _SIZES) for part in (saved, own)]
        raise self._error(
            f"has {sizes[0]}, this {self._kind} {sizes[1]}: then a step holds other rows; make the {self._kind} with "
            f"{_remedy(saved)}, or start afresh"
        )

    def _position(self, order: Order, saved: PlanOptions, own: PlanOptions) -> Position:
        """The position; the options are those of the first rank, which has the most batches."""
        sizes = [(one.batch_size, one.world_size, one.batches_a_step) for one in (saved, own)]
        try:
            epoch = integer("epoch", self._field("epoch"), 0, LARGEST)
            plan = order.plan(saved, epoch).plan
            window = integer("next_window", self._field("next_window"), 0, plan.num_windows - 1)
            most = plan.num_batches(window)
            batch = integer("next_batch", self._field("next_batch"), 0, most)
        except InputError as error:
            raise self._error(f"is damaged: {error}") from error
        steps, within = divmod(batch, saved.batches_a_step)
        if sizes[0] != sizes[1] and max(one.batches_a_step for one in (saved, own)) > 1:
            own_most = order.plan(own, epoch).plan.num_batches(window)
            if within and batch < most:
                raise self._error(
                    f"has next_batch={batch}, within an optimizer step of accumulation={saved.accumulation} batches: "
                    f"continue with the same batch_size, world_size and accumulation, or save behind a whole step"
                )
            batch = own_most if batch == most else steps * own.batches_a_step
        left_out = own.drop_last and plan.num_windows == 1 and plan.num_rows % own.group
        if self._version == 2 and left_out and own.policy in ("shuffled", "bucketed"):
            raise self._error(
                "is of version 2, where drop_last left out the same rows in each epoch; now it leaves out others, so "
                "that the order is another one: start afresh"
            )
        if self._version < STATE_VERSION and 0 < batch < most and window == plan.num_windows - 1:
            self._refuse_moved_rows(saved, (plan.num_places - 1) % plan.window_rows + 1)
        return Position(epoch, window, batch)

    def _refuse_moved_rows(self, saved: PlanOptions, num_rows: int) -> None:
        """Refuse a place in a last window of so many rows whose steps older releases cut elsewhere."""
        was_cut = saved.batch_size is not None and saved.policy == "bucketed" and not saved.drop_last
        if was_cut and saved.tail == "repeat" and num_rows % saved.world_size:
            raise self._error(
                f"is of version {self._version}, within an epoch's last window of {num_rows:,} rows, no multiple of "
                f"world_size={saved.world_size}: rows were repeated there before they were sorted, and now are behind "
                "them, so that its steps hold other rows; end the epoch with the release that saved it, or begin the "
                "next one with set_epoch"
            )

    def _source_rows(self, names: Sequence[str]) -> Int64Array:
        saved = self._state.get("source_rows", ()) if self._version == 2 else self._field("source_rows")
        if not isinstance(saved, (list, tuple)) or len(saved) != len(names):
            raise self._differs("source_rows", saved, list(names))
        return np.array([integer("source_rows", count, 0, LARGEST) for count in saved], np.int64)


def of_all_ranks(options: PlanOptions) -> tuple[Any, ...]:
    """What a step of all ranks together holds: rows; or cells, and rows in multiples of something; or batches."""
    batches = options.world_size * options.batches_a_step
    if options.batch_size is not None:
        return (options.batch_size * batches,)
    assert options.max_tokens is not None
    if options.balance:
        return options.max_tokens, batches
    return options.max_tokens * batches, options.shares


def _remedy(saved: PlanOptions) -> str:
    """Which sizes give the saved steps."""
    found = of_all_ranks(saved)
    factors = "world_size * accumulation" if saved.balance else "world_size"
    if saved.batch_size is not None:
        return f"batch_size * {factors} = {found[0]}"
    if saved.balance:
        return f"max_tokens={found[0]} and {factors} = {found[1]}"
    return f"max_tokens * {factors} = {found[0]} and shares={found[1]} (which world_size must divide)"


def _is_same(saved: Any, own: Any) -> bool:
    """Whether plain values are the same, and of the same kind; a tuple is as good as a list."""
    if isinstance(own, (list, tuple)):
        return isinstance(saved, (list, tuple)) and len(saved) == len(own) and all(map(_is_same, saved, own))
    if isinstance(own, dict):
        return isinstance(saved, dict) and saved.keys() == own.keys() and all(_is_same(saved[k], own[k]) for k in own)
    return type(saved) is type(own) and bool(saved == own)
