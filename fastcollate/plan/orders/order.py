"""The rows that each epoch takes, of one store or as a mix draws them, and the plan over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError
from fastcollate.plan.mixing import ANSWERS, MixedStore, Rows, digest_of, identity_of, numbers_of
from fastcollate.plan.options import Int64Array, PlanOptions, as_lengths, row_numbers
from fastcollate.plan.packing import PackWindow, Window
from fastcollate.plan.pairs import units
from fastcollate.plan.plan import EpochPlan, plan_with
from fastcollate.plan.sharded.order import Shards, by_shard, shards_of


class Order:
    """The rows that each epoch takes: all of a store (or of lengths alone), some by number, or what a mix draws.

    Of pairs `rows` are the first rows alone, and stand for both. `lengths` are those of the whole store.
    """

    def __init__(self, source: Any, rows: npt.ArrayLike | range | None = None) -> None:
        self._source, self._given = source, rows
        self.lengths = as_lengths(getattr(source, "cells", getattr(source, "lengths", source)))
        self.mix = source if isinstance(source, MixedStore) and rows is None else None
        self.rows: Rows = range(len(self.lengths)) if rows is None else row_numbers(rows, len(self.lengths))
        self.has_pairs = getattr(source, "kind", "rows") == units.KIND
        if self.has_pairs:
            self.rows = units.first_rows(self.rows)
        self.num_rows = int(self.mix.shares.sum()) if self.mix else len(self.rows)
        if not self.num_rows:
            raise InputError("no rows to load: the store, or the choice of rows, is empty")
        self._last: tuple[Any, Rows, npt.NDArray[Any], Shards | None] | None = None  # an epoch's rows, their lengths
        self._identity: dict[str, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Order, (self._source, self._given)  # a store is opened again, not copied

    @property
    def names(self) -> tuple[str, ...]:
        """The sources of a mix."""
        return self.mix.names if self.mix else ()

    def _lengths_of(self, rows: Rows, options: PlanOptions) -> npt.NDArray[Any]:
        if self.has_pairs:
            return units.cells_of(self.lengths, numbers_of(rows), options)
        return self.lengths[rows.start : rows.stop] if isinstance(rows, range) else self.lengths[rows]

    def plan(self, options: PlanOptions, epoch: int) -> OrderedPlan:
        """An epoch's plan, by checked options."""
        asked = options
        drawn: Any = epoch if self.mix else 0
        if self.has_pairs:
            own = options.capacity, options.max_length, options.pad_to_multiple_of, options.row_multiple
            drawn, options = (drawn, own, options.long_rows), replace(options, max_length=None)
        last = self._last
        if last is None or last[0] != drawn:
            rows = self.mix.rows_of_epoch(epoch) if self.mix else self.rows
            rows, shards = by_shard(self._source, rows, options)
            self._last = last = drawn, rows, self._lengths_of(rows, asked), shards
        in_order = self.mix is not None and self.mix.schedule is not None
        plan = plan_with(last[2], options, epoch, in_order=in_order, shards=last[3])
        return OrderedPlan(plan, last[1], self.mix, self.has_pairs)

    def check(self, options: PlanOptions) -> None:
        """Refuse options under which a row stands in no batch, or there is no batch at all."""
        by_shard(self._source, range(0), options)
        if self.mix is not None and self.mix.schedule is not None:
            self.mix.schedule.check(options)
        if getattr(self._source, "kind", "rows") == ANSWERS:
            units.refuse_parts(options, ANSWERS)
        widest, longest = options.widest, getattr(self._source, "max_length", None)
        if self.has_pairs:
            firsts = numbers_of(self.mix.rows_drawn() if self.mix else self.rows)
            units.refuse_what_parts(firsts, self._lengths_of(firsts, options), options)
        elif widest is not None and all(bound is None or bound > widest for bound in (options.max_length, longest)):
            rows = self.mix.rows_drawn() if self.mix else self.rows
            lengths = self._lengths_of(rows, options)
            place = int(np.argmax(lengths))
            if int(lengths[place]) > widest:
                raise options.too_long(int(rows[place]), int(lengths[place]))
        if options.drop_last or options.long_rows == "drop":
            plan = self.plan(replace(options, rank=0), 0).plan  # no rank has more batches
            if not any(map(plan.num_batches, range(plan.num_windows))):
                raise InputError(
                    f"drop_last={options.drop_last}, long_rows={options.long_rows!r} leave no batch of the "
                    f"{self.num_rows} rows, with {options.group} rows (or packs) a step on {options.world_size} ranks "
                    "together: leave these options out, or give smaller batches"
                )

    def identity(self, options: PlanOptions | None = None) -> dict[str, Any]:
        """What a state must agree on, in plain numbers and strings."""
        if not self._identity:
            self._identity = {
                "num_rows": self.num_rows,
                "store": str(getattr(self._source, "fingerprint", "")) or f"lengths {digest_of(self.lengths)}",
                "rows": identity_of(self.rows),
                "mix": self.mix.identity() if self.mix else None,
            }
        shards = {"shards": digest_of(shards_of(self._source).starts)} if options and options.order == "shards" else {}
        return {**self._identity, **shards}


class OrderedPlan:
    """An epoch's plan over the rows that an order takes: windows of row numbers of the store; `plan` counts from 0."""

    def __init__(self, plan: EpochPlan, rows: Rows, mix: MixedStore | None, has_pairs: bool = False) -> None:
        self.plan = plan
        self._has_pairs = has_pairs
        self._rows = rows
        self._mix = mix
        self._sources: dict[int, Int64Array] = {}

    def window(self, index: int) -> Window:
        """The batches of a window."""
        window = self.plan.window(index)
        window = window._replace(rows=self._numbers(window.rows))
        window = units.both_rows(window) if self._has_pairs else window
        self._count(index, window.rows, window.bounds)
        return window

    def packs(self, index: int) -> PackWindow:
        """The packed batches of a window."""
        window = self.plan.packs(index)
        packs = window.packs._replace(rows=self._numbers(window.packs.rows))
        packs = units.both_rows_of_packs(packs) if self._has_pairs else packs
        self._count(index, packs.rows, packs.bounds[window.bounds])
        return window._replace(packs=packs)

    def _numbers(self, rows: Int64Array) -> Int64Array:
        if isinstance(self._rows, range):
            return rows + self._rows.start if self._rows.start else rows
        return self._rows[rows]

    def _count(self, index: int, rows: Int64Array, bounds: Int64Array) -> None:
        if self._mix is not None:
            self._sources[index] = self._mix.count_sources_up_to(rows, bounds)

    def take_sources(self, index: int) -> Int64Array | None:
        """Rows of each source before each batch of a planned window, once; `(num_batches + 1, num_sources)`."""
        return self._sources.pop(index, None)
