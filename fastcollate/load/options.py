"""What a loader may be told, by name: how rows are ordered, and how they are collated."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch

from fastcollate.collate import Collator
from fastcollate.collate import fill as kernels
from fastcollate.errors import InputError
from fastcollate.plan import OrderKeywords
from fastcollate.store import TokenStore, require_served

Int64Array = npt.NDArray[np.int64]
_AT_ONCE = 1 << 12  # rows
_JUDGED = ("pairs", "answers")


class CollateKeywords(TypedDict, total=False):
    """The keyword arguments that decide how rows are collated; `Collator` explains them.

    The padding is the store's own by default, and the mode `"positional"` where rows hold their end, else
    `"reference"`.
    """

    max_length: int | None
    mask_prompt: bool
    mode: str | None
    truncation: str
    pad_token_id: int | None
    ignore_index: int
    pad_to_multiple_of: int | None
    cp_size: int | None
    max_segments: int | None
    mask_boundaries: bool
    stride: int | None
    inputs_dtype: torch.dtype


_ORDER_ONLY = set(OrderKeywords.__annotations__) - set(CollateKeywords.__annotations__)


class LoaderKeywords(OrderKeywords, CollateKeywords, total=False):
    """Both; `PlanOptions` and `Collator` explain them."""


def order_keywords(options: LoaderKeywords) -> OrderKeywords:
    """Those that decide the order, also where they decide the collate too, as `max_length` does."""
    return {name: value for name, value in options.items() if name in OrderKeywords.__annotations__}  # type: ignore[return-value]


def collate_keywords(options: LoaderKeywords) -> dict[str, Any]:
    """Those that decide how rows are collated."""
    return {name: value for name, value in options.items() if name not in _ORDER_ONLY}


def open_store(store: Any) -> Any:
    """A store that is given by its directory, opened; others as they are."""
    return TokenStore(store) if isinstance(store, (str, os.PathLike)) else store


def mode_of(store: Any, mode: str | None) -> str:
    """How targets are told where a store's user does not say it."""
    is_plain = getattr(store, "end", "append") == "append" and getattr(store, "kind", "rows") == "rows"
    return mode or ("reference" if is_plain else "positional")


def _ends_of(store: Any) -> str | Sequence[str]:
    """How rows end, of a mix where they end in several ways of each shard."""
    end = getattr(store, "end", "append")
    return store.ends if end == "mixed" else end


def collator_of(store: Any, options: dict[str, Any], kinds: Collection[str] = ("rows", "documents")) -> Collator:
    """A collator of a store's rows, by `CollateKeywords`; refuses stores of other kinds. Of pairs and answers
    prompts are masked.

    `end` may be given too, to see rows that hold their end as if one was appended: their inputs are then all their ids.
    """
    require_served(store, kinds)
    pad = getattr(store, "pad_token_id", 50256)
    kind = getattr(store, "kind", "rows")
    if kind in _JUDGED:
        options = {"mask_prompt": True, **options}
        if options.get("mode") == "reference" or options.get("cp_size") or not options.get("mask_boundaries", True):
            raise InputError(
                f"mode={options.get('mode')!r}, cp_size={options.get('cp_size')}, mask_boundaries="
                f"{options.get('mask_boundaries', True)} with {kind}: their targets are told by position, and their "
                "rows are not split over ranks, nor see each other; leave these out"
            )
    options = {"end": _ends_of(store), **options, "mode": mode_of(store, options.get("mode"))}
    if getattr(store, "end_token_id", pad) != pad:  # where it is the same id, another padding is another end too
        options["end_token_id"] = store.end_token_id
    if options.get("pad_token_id") is None:
        options["pad_token_id"] = pad
    return Collator.of(store.shards, name=str(getattr(store, "path", "the store")), **options)


def verdicts_of(store: Any) -> dict[str, npt.NDArray[Any]] | None:
    """What a store's batches say of its rows: of answers a column, of pairs nothing but which they are, else `None`."""
    kind = getattr(store, "kind", "rows")
    if kind not in _JUDGED:
        return None
    return {name: store.column(name) for name in ("label", "score") if name in store.columns and kind == "answers"}


def row_reports(collator: Collator, rows: Int64Array | range) -> Iterator[tuple[Int64Array, Int64Array]]:
    """What the kernel says of rows, each collated by itself: some row numbers, and a line of its report each."""
    out = np.empty(1 << 18, np.int64)
    report = np.empty((_AT_ONCE + 1, kernels.REPORT_COLUMNS), np.int64)
    first = 0
    while first < len(rows):
        part = np.ascontiguousarray(rows[first : first + _AT_ONCE])
        filled = collator.fill_group(part, np.arange(len(part) + 1), out, report)
        first += filled
        if filled:
            yield part[:filled], report[:filled]
        else:
            out = np.empty(report[0, kernels.END], np.int64)


def trained_rows(collator: Collator, rows: Int64Array) -> Int64Array:
    """Those of a store's rows that have a trained target, each collated by itself; reads all of them once.

    In `mode="reference"` a row whose prompt length is 0 may train something alone and nothing in a wider batch.
    """
    reports = row_reports(collator, rows)
    return np.concatenate([rows[:0], *(part[report[:, kernels.UNTRAINED] == 0] for part, report in reports)])
