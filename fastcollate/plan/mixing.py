"""Several stores as one, with the rows of each epoch drawn from them by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError
from fastcollate.plan import kernels as plan_kernels
from fastcollate.store.store import Example, ShardColumns, TokenStore

Int64Array = npt.NDArray[np.int64]


class _Source(NamedTuple):
    name: str
    store: TokenStore
    rows: Int64Array  # the store's rows to draw from


class MixedStore:
    """Stores end to end, read like one store, and the rows that each epoch draws from them.

    An epoch has `num_rows` rows. Each source gives its share: fewer than it has, then other epochs continue where this
    one stopped, or more, then rows repeat; at any time no row of a source has been drawn twice more often than another.
    What an epoch draws is a pure function of the arguments and its number. Shares are whole rows by largest remainder
    (Hamilton's method).

    Args:
        stores: by name; all of one tokenizer.
        weights: each source's share, any positive numbers, by name; or
        temperature: shares in proportion to `size ** (1 / temperature)`: 1 (the default) is in proportion to size,
            larger values favour small sources (Arivazhagan et al., 2019).
        rows: row numbers to draw from, by name, such as one split of each store; all rows by default.
        num_rows: rows an epoch; by default as many as all sources have together.
        seed: decides which rows.

    Attributes:
        names: the sources, in order.
        shards: the shards of all stores, in order.
        lengths: each row's length in tokens, `(num_rows_of_all_stores,)`.
        starts: int64 `(num_sources + 1,)`, the first row of each source.
        shares: rows that each source gives to an epoch, int64.

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

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        *,
        weights: Mapping[str, float] | None = None,
        temperature: float | None = None,
        rows: Mapping[str, npt.ArrayLike] | None = None,
        num_rows: int | None = None,
        seed: int = 0,
    ) -> None:
        if not stores:
            raise InputError("no store to mix: give at least one, by name")
        for what, mapping in (("weights", weights), ("rows", rows)):
            if mapping is not None and set(mapping) - set(stores):
                raise InputError(f"{what} name {sorted(set(mapping) - set(stores))}; the stores are {sorted(stores)}")
        self._sources = [_Source(name, store, _chosen(name, store, rows)) for name, store in stores.items()]
        self._check_tokenizers()
        self._seed = seed
        self.names = tuple(stores)
        self.shards: tuple[ShardColumns, ...] = sum((store.shards for store in stores.values()), ())
        self.lengths: npt.NDArray[Any] = np.concatenate([store.lengths for store in stores.values()])
        self.starts: Int64Array = np.cumsum([0, *(len(store) for store in stores.values())], dtype=np.int64)
        sizes = [len(source.rows) for source in self._sources]
        self.shares = _shares(self.names, sizes, weights, temperature, sum(sizes) if num_rows is None else num_rows)

    def _check_tokenizers(self) -> None:
        first = self._sources[0].store
        for _, store, _ in self._sources:
            if store.manifest["tokenizer"]["fingerprint"] != first.manifest["tokenizer"]["fingerprint"]:
                raise InputError(
                    f"{store.path} is tokenized by {store.tokenizer_name}, {first.path} by {first.tokenizer_name}: "
                    "their ids mean different texts; prepare one of them again with the other's tokenizer"
                )

    @property
    def path(self) -> str:
        """The stores' paths, for messages."""
        return " + ".join(str(source.store.path) for source in self._sources)

    @property
    def pad_token_id(self) -> int:
        """The end-of-text id."""
        return self._sources[0].store.pad_token_id

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return self._sources[0].store.vocab_size

    @property
    def tokenizer_name(self) -> str:
        """The encoding's name."""
        return self._sources[0].store.tokenizer_name

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
        """The rows that an epoch draws, int64 `(num_rows,)`, source after source; a plan then orders them."""
        drawn = [
            int(self.starts[index]) + self._draw(index, epoch * int(share), int(share))
            for index, share in enumerate(self.shares)
        ]
        return np.concatenate(drawn)

    def count_sources(self, rows: npt.ArrayLike) -> Int64Array:
        """How many of some rows come from each source, int64 `(num_sources,)`."""
        sources = np.searchsorted(self.starts, np.asarray(rows, np.int64), side="right") - 1
        return np.bincount(sources, minlength=len(self.names)).astype(np.int64)

    def _draw(self, index: int, first: int, count: int) -> Int64Array:
        """Places `first` to `first + count` of the source's rows, shuffled anew each time all of them are through."""
        rows = self._sources[index].rows
        parts = []
        while count:
            repeat, place = divmod(first, len(rows))
            order = rows.copy()
            with np.errstate(over="ignore"):  # uint64 arithmetic wraps, and plain Python mode would warn of it
                key = np.uint64(self._seed & 0xFFFFFFFFFFFFFFFF)
                for part in (index, repeat):
                    key = np.uint64(plan_kernels.mix(key, np.uint64(part)))
                plan_kernels.shuffle(order, key)
            parts.append(order[place : place + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _chosen(name: str, store: TokenStore, rows: Mapping[str, npt.ArrayLike] | None) -> Int64Array:
    if rows is None or name not in rows:
        return np.arange(len(store))
    chosen = np.asarray(rows[name], np.int64)
    if chosen.ndim != 1 or (len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(store)):
        raise InputError(f"rows[{name!r}]: give row numbers from 0 to {len(store) - 1}, the rows of {store.path}")
    return chosen


def _shares(
    names: Sequence[str],
    sizes: Sequence[int],
    weights: Mapping[str, float] | None,
    temperature: float | None,
    num_rows: int,
) -> Int64Array:
    """Rows from each source: whole numbers that sum to `num_rows`, by largest remainder."""
    if weights is not None and temperature is not None:
        raise InputError("give either weights or temperature, not both")
    if weights is not None:
        missing = [name for name in names if name not in weights]
        if missing or any(not 0 <= weights[name] < np.inf for name in names) or not any(weights.values()):
            raise InputError(f"weights={dict(weights)}: give each of {list(names)} a number of 0 or more")
        wanted = np.array([weights[name] for name in names], np.float64)
    else:
        if temperature is not None and not temperature > 0:
            raise InputError(f"temperature={temperature}: give a positive number; 1 draws in proportion to size")
        wanted = np.array(sizes, np.float64) ** (1 / (temperature or 1.0))
    empty = [name for name, size, want in zip(names, sizes, wanted, strict=True) if want > 0 and size == 0]
    if empty or num_rows < 1:
        raise InputError(f"nothing to draw: sources without rows {empty}, num_rows={num_rows}")
    exact = wanted / wanted.sum() * num_rows
    shares: Int64Array = np.floor(exact).astype(np.int64)
    largest = np.argsort(shares - exact, kind="stable")[: num_rows - int(shares.sum())]
    shares[largest] += 1
    return shares
