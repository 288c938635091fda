"""The rows that each epoch takes: of one store, or drawn by weight from several that are read as one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcollate.errors import LARGEST, InputError, integer
from fastcollate.plan import kernels as plan_kernels
from fastcollate.plan.moving.schedule import Schedule, exact_shares, steps_of, whole_shares, whole_steps
from fastcollate.plan.options import Int64Array, row_numbers
from fastcollate.plan.pairs import units
from fastcollate.plan.plan import key_of
from fastcollate.store import Example, TokenStore, require_served, shards

Rows = range | npt.NDArray[np.int64]
_CHUNK = 1 << 20
ANSWERS = "answers"  # a store's kind


class _Source(NamedTuple):
    name: str
    store: TokenStore
    rows: Rows  # the store's rows to draw from


class MixedStore:
    """Stores end to end, read like one store, and the rows that each epoch draws from them.

    An epoch has `num_rows` rows. Each source gives its share: fewer than it has, then other epochs continue where this
    one stopped, or more, then rows repeat; at any time no row of a source has been drawn twice more often than another.
    What an epoch draws is a pure function of the arguments and its number. Shares are whole rows by largest remainder
    (Hamilton's method).

    With `step_rows` steps count from the first epoch on, and each holds its own share: up to any step, the rows of each
    source are within one of the exact ones (with `policy="bucketed"`, `"packed"` and `max_tokens` up to any window).

    Args:
        stores: by name, of one tokenizer and padding; chats that hold their end and stores that one is appended to
            mix, and their targets are then told by position (`mode="positional"`).
        weights: each source's share, any positive numbers, by name; or a table of such lines by step, such as `{0:
            {"chat": 3, "code": 1}, 1000: {"chat": 1, "code": 1}}`, whose shares are linear between its lines and
            constant before and behind them; or
        temperature: shares in proportion to `size ** (1 / temperature)`: 1 (the default) is in proportion to size,
            larger values favour small sources (Arivazhagan et al., 2019).
        rows: row numbers to draw from, by name, such as one split of each store; all rows by default.
        num_rows: rows an epoch; by default as many as all sources have together (whole steps of `step_rows`).
        seed: decides which rows.
        step_rows: rows that all ranks together take in a step: `batch_size * world_size` (times `accumulation`), or of
            packs and `max_tokens` about so many. A table of weights needs it.

    Attributes:
        names: the sources, in order.
        path: the stores' paths, for messages; other attributes of a store are those of each.
        shards: the shards of all stores, in order.
        lengths: each row's length in ids, `(num_rows_of_all_stores,)`.
        cells: see `TokenStore.cells`.
        starts: int64 `(num_sources + 1,)`, the first row of each source.
        shares: rows that each source gives to an epoch, int64; where weights move, to the first one.

    Raises:
        InputError: no store, different tokenizers, or weights that do not fit.

    Example:
        >>> from fastcollate import BucketBatchSampler, MixedStore, TokenStore
        >>> stores = {"chat": TokenStore("store"), "code": TokenStore("store")}
        >>> mix = MixedStore(stores, weights={"chat": 3, "code": 1}, num_rows=40)
        >>> mix.shares  # rows that each gives to an epoch
        array([30, 10])
        >>> len(mix), len(mix.rows_of_epoch(0))
        (1200, 40)
        >>> sum(len(rows) for rows in BucketBatchSampler(mix, batch_size=8))
        40
    """

    path: str
    kind: str
    end: str
    pad_token_id: int
    end_token_id: int
    vocab_size: int
    tokenizer_name: str

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        *,
        weights: Mapping[str, float] | Mapping[int, Mapping[str, float]] | None = None,
        temperature: float | None = None,
        rows: Mapping[str, npt.ArrayLike] | None = None,
        num_rows: int | None = None,
        seed: int = 0,
        step_rows: int | None = None,
    ) -> None:
        if not stores:
            raise InputError("no store to mix: give at least one, by name")
        table = steps_of(weights)
        lines: dict[int, Any] = {0: weights} if table is None else {**table}
        for what, mapping in (*(("weights", line) for line in lines.values()), ("rows", rows)):
            if mapping is not None and set(mapping) - set(stores):
                raise InputError(f"{what} name {sorted(set(mapping) - set(stores))}; the stores are {sorted(stores)}")
        self._sources = [_Source(name, store, _chosen(name, store, rows)) for name, store in stores.items()]
        self._check_tokenizers()
        self._seed = integer("seed", seed)
        self.names = tuple(stores)
        self.path = " + ".join(str(store.path) for store in stores.values())
        self._asked: dict[str, Any] = {
            "weights": weights, "temperature": temperature, "num_rows": num_rows, "seed": seed, "step_rows": step_rows,
        }  # fmt: skip
        self._counts_ends = False
        first = next((store for store in stores.values() if store.end == "append"), self._sources[0].store)
        self.end = first.end if len({store.end for store in stores.values()}) == 1 else "mixed"
        self.pad_token_id, self.end_token_id = first.pad_token_id, first.end_token_id
        self.vocab_size, self.tokenizer_name = first.vocab_size, first.tokenizer_name
        self.kind = next((store.kind for store in stores.values() if store.kind != "rows"), "rows")
        self.max_length = max(store.max_length for store in stores.values())
        self._join()
        self.starts: Int64Array = np.cumsum([0, *(len(store) for store in stores.values())], dtype=np.int64)
        sizes = [len(source.rows) for source in self._sources]
        asked, num_rows = num_rows, sum(sizes) if num_rows is None else integer("num_rows", num_rows, -LARGEST, LARGEST)
        if num_rows < 1:
            raise InputError(f"nothing to draw: {sum(sizes)} rows in all stores, num_rows={num_rows}")
        exact = {step: exact_shares(self.names, sizes, line, temperature) for step, line in lines.items()}
        self.schedule: Schedule | None = None
        if step_rows is None and table is None:
            self.shares = whole_shares(exact[0], num_rows)
        else:
            num_rows, step_rows = whole_steps(num_rows, step_rows, is_asked=asked is not None)
            self.schedule = Schedule(exact, step_rows, num_rows)
            self.shares = self.schedule.counts_of_epoch(0)[1].sum(0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shards": None, "lengths": None, "cells": None}  # a process opens the stores again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._join()

    def _join(self) -> None:
        stores = [source.store for source in self._sources]
        self.shards: tuple[shards.ShardColumns, ...] = sum((store.shards for store in stores), ())
        self.lengths: npt.NDArray[Any] = np.concatenate([store.lengths for store in stores])
        self.cells: npt.NDArray[Any] = self.lengths
        if self._counts_ends:
            self.cells = np.concatenate([store.lengths.astype(np.int64) + (store.end == "append") for store in stores])
        elif self.end != "append":
            self.cells = np.concatenate([store.cells for store in stores])

    def _check_tokenizers(self) -> None:
        first = self._sources[0].store
        appending = [source.store for source in self._sources if source.store.end == "append"][:1]
        for _, store, _ in self._sources:
            require_served(store, (first.kind,) if first.kind in (units.KIND, ANSWERS) else ("rows", "documents"))
            if first.kind == ANSWERS and store.columns != first.columns:
                raise InputError(
                    f"{store.path} has {store.columns} for verdicts, {first.path} {first.columns}: a batch has one kind"
                )
            if store.manifest["tokenizer"]["fingerprint"] != first.manifest["tokenizer"]["fingerprint"]:
                raise InputError(
                    f"{store.path} is tokenized by {store.tokenizer_name}, {first.path} by {first.tokenizer_name}: "
                    "their ids mean different texts; prepare one of them again with the other's tokenizer"
                )
            if store.pad_token_id != first.pad_token_id:
                raise InputError(
                    f"{store.path} is padded with {store.pad_token_id}, {first.path} with {first.pad_token_id}: a "
                    "batch has one padding; prepare one of them again, with the tokenizer files of the other"
                )
            appends = [s for s in (store, *appending) if s.end == "append"]
            if len({s.end_token_id for s in appends}) > 1:
                raise InputError(
                    f"{store.path} is ended by {store.end_token_id}, {appends[1].path} by {appends[1].end_token_id}: "
                    "a batch appends one end-of-text; prepare one of them again, with the tokenizer files of the other"
                )

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        """The sources' stores, in order."""
        return tuple(source.store for source in self._sources)

    @property
    def rows(self) -> dict[str, Int64Array]:
        """The row numbers of each store that epochs draw from, by name."""
        return {source.name: numbers_of(source.rows) for source in self._sources}

    @property
    def columns(self) -> tuple[str, ...]:
        """The further columns that all stores have."""
        return tuple(name for name in self.stores[0].columns if all(name in store.columns for store in self.stores))

    def column(self, name: str) -> npt.NDArray[Any]:
        """A further column of the rows in all stores; see `TokenStore.column`."""
        return np.concatenate([store.column(name) for store in self.stores])

    @property
    def ends(self) -> tuple[str, ...]:
        """How the rows of each shard end, as `TokenStore.end`."""
        return sum(((store.end,) * len(store.shards) for store in self.stores), ())

    def with_rows(self, rows: Mapping[str, npt.ArrayLike]) -> MixedStore:
        """The same mix of other rows of its stores."""
        return MixedStore({source.name: source.store for source in self._sources}, rows=rows, **self._asked)

    def for_labels(self, rows: Int64Array | None = None) -> MixedStore:
        """The same mix for a model that shifts labels itself: each row's end counts in `cells`.

        With `rows`, ascending row numbers in all stores, of those alone.
        """
        chosen = self.rows
        if rows is not None:
            starts = dict(zip(self.names, self.starts.tolist(), strict=False))
            chosen = {name: own[np.isin(own + starts[name], rows)] for name, own in chosen.items()}
        mix = self.with_rows(chosen)
        mix._counts_ends = True
        mix._join()
        return mix

    def __len__(self) -> int:
        """Rows in all stores, whether an epoch draws them or not."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in all stores")
        row = index % len(self)
        source = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self._sources[source].store[row - int(self.starts[source])]

    def rows_of_epoch(self, epoch: int) -> Int64Array:
        """The rows that an epoch draws, int64 `(num_rows,)`: source after source, and a plan then orders them; or with
        `step_rows` step after step."""
        if self.schedule is None:
            return np.concatenate(self._drawn(epoch * self.shares, self.shares))
        before, counts = self.schedule.counts_of_epoch(epoch)
        drawn = self._drawn(before, counts.sum(0))
        return self.schedule.in_steps(drawn, counts, key_of(self._seed, len(self.names), epoch))

    def _drawn(self, firsts: Int64Array, counts: Int64Array) -> list[Int64Array]:
        """So many rows of each source, from the given places in its draws on."""
        places = zip(self.starts.tolist(), firsts.tolist(), counts.tolist(), strict=False)
        return [start + self._draw(index, first, count) for index, (start, first, count) in enumerate(places)]

    def source_of(self, rows: npt.ArrayLike) -> Int64Array:
        """The source of each of some rows: its place in `names`."""
        return np.searchsorted(self.starts, np.asarray(rows, np.int64), side="right") - 1

    def count_sources(self, rows: npt.ArrayLike) -> Int64Array:
        """How many of some rows come from each source, int64 `(num_sources,)`."""
        return np.bincount(self.source_of(rows), minlength=len(self.names)).astype(np.int64)

    def count_sources_up_to(self, rows: Int64Array, bounds: Int64Array) -> Int64Array:
        """How many of the rows before each bound come from each source, int64 `(num_bounds, num_sources)`."""
        groups, num_sources = len(bounds) - 1, len(self.names)
        sources = self.source_of(rows[bounds[0] : bounds[-1]])
        cells = np.repeat(np.arange(groups), np.diff(bounds)) * num_sources + sources
        counts = np.zeros((groups + 1, num_sources), np.int64)
        np.cumsum(np.bincount(cells, minlength=groups * num_sources).reshape(groups, -1), axis=0, out=counts[1:])
        return counts

    def rows_drawn(self) -> Int64Array:
        """All rows that some epoch draws."""
        shares = self.shares if self.schedule is None else self.schedule.most
        chosen = zip(self._sources, self.starts[:-1], shares, strict=True)
        return np.concatenate([numbers_of(source.rows) + start for source, start, share in chosen if share])

    def identity(self) -> dict[str, Any]:
        """What decides the rows that an epoch draws, in plain numbers and strings."""
        sources = [
            [name, store.fingerprint, identity_of(rows), int(share)]
            for (name, store, rows), share in zip(self._sources, self.shares, strict=True)
        ]
        return {"sources": sources, "seed": self._seed, **(self.schedule.identity() if self.schedule else {})}

    def _draw(self, index: int, first: int, count: int) -> Int64Array:
        """Places `first` to `first + count` of the source's rows, shuffled anew each time all of them are through."""
        rows = self._sources[index].rows
        parts = []
        while count:
            repeat, place = divmod(first, len(rows))
            order = numbers_of(rows).copy()
            with np.errstate(over="ignore"):  # uint64 arithmetic wraps, and plain Python mode would warn of it
                plan_kernels.shuffle(order, key_of(self._seed, index, repeat))
            parts.append(order[place : place + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _chosen(name: str, store: TokenStore, rows: Mapping[str, npt.ArrayLike] | None) -> Rows:
    where = f"rows[{name!r}] of {store.path}"
    asked = range(len(store)) if rows is None or name not in rows else row_numbers(rows[name], len(store), where)
    return units.first_rows(asked, where) if store.kind == units.KIND else asked


def numbers_of(rows: Rows) -> Int64Array:
    """Row numbers as an array."""
    return np.arange(rows.start, rows.stop) if isinstance(rows, range) else rows


def identity_of(rows: Rows) -> list[int] | str:
    """Row numbers in short: first and end of a range, else a hash."""
    return [rows.start, rows.stop] if isinstance(rows, range) else digest_of(rows)


def digest_of(numbers: npt.NDArray[Any]) -> str:
    """A hash of numbers, the same on every machine."""
    digest = hashlib.blake2b(digest_size=16)
    for first in range(0, len(numbers), _CHUNK):
        digest.update(numbers[first : first + _CHUNK].astype("<i8").tobytes())
    return digest.hexdigest()
