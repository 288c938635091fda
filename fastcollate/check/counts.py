"""What is in a store: counts, lengths, masks, and what a loader would make of a row.

Whatever is said about masks is read off batches that the fast path has filled, never computed a second time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.check.imbalance import Imbalance, imbalance_of
from fastcollate.collate import fill as kernels
from fastcollate.errors import InputError
from fastcollate.load import row_reports
from fastcollate.plan import EpochPlan, Order, PlanOptions
from fastcollate.progress import progress_bar, renamed_switch
from fastcollate.store import TokenStore
from fastcollate.text import Tokenizer, load_tokenizer
from fastcollate.train import MaskOptions, OrderOptions

Int64Array = npt.NDArray[np.int64]

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
NUM_SHARES = 20  # bars of the histogram of rows by their share of trained tokens
_MOST_NAMED = 10
_CONTEXT = 1024  # columns of the bundled models


@dataclass(frozen=True, slots=True)
class TrainedByMask:
    """What is trained as asked, and what would be with the other `mask_prompt`.

    Example:
        >>> TrainedByMask(False, 1000, 1000, 0, 370, 2).sentence
        'trained: 100%; 37.0% with --mask-prompt (2 rows without a trained token)'
    """

    mask_prompt: bool
    kept_tokens: int  # input cells that hold a token
    trained_tokens: int
    rows_without_trained: int
    other_trained_tokens: int
    other_rows_without_trained: int

    @property
    def sentence(self) -> str:
        """Both shares as a sentence."""
        return f"trained: {self.in_words}"

    @property
    def in_words(self) -> str:
        """Both shares."""
        flag = "--train-prompt" if self.mask_prompt else "--mask-prompt"
        line = f"{self._share(self.trained_tokens)}; {self._share(self.other_trained_tokens)} with {flag}"
        empty = self.other_rows_without_trained
        if empty > self.rows_without_trained:
            line += f" ({empty:,} row{'s' if empty > 1 else ''} without a trained token)"
        return line

    def _share(self, trained: int) -> str:
        return "100%" if trained == self.kept_tokens else f"{trained / max(self.kept_tokens, 1):.1%}"


def order_of(store: TokenStore, options: MaskOptions, order: OrderOptions | None) -> dict[str, Any]:
    """The order's options, packs by default of `pack_capacity`."""
    chosen = asdict(order or OrderOptions())
    if chosen["policy"] == "packed" and chosen["capacity"] is None:
        chosen["capacity"] = pack_capacity(store.cells, options.max_length)
    return chosen


def plan_of_store(store: TokenStore, order: dict[str, Any], epoch: int = 0) -> EpochPlan:
    """An epoch of all rows, each by itself; its row numbers are the store's."""
    return Order(store.as_rows()).plan(PlanOptions(**order).checked(), epoch).plan


def pack_capacity(cells: npt.NDArray[Any], max_length: int | None) -> int:
    """Cells of a pack where none were asked for: `max_length`, else what `train` takes, or the longest row if longer.

    Example:
        >>> pack_capacity(np.array([5, 1500]), None), pack_capacity(np.array([5, 9]), None)
        (1500, 1024)
    """
    return max_length or max(int(cells.max(initial=0)), _CONTEXT)


def packed_batches(plan: EpochPlan) -> Iterator[Any]:
    """The batches of a packed epoch, whose packs lie in them one after the other."""
    for index in range(plan.num_windows):
        window = plan.packs(index)
        yield from map(window.batch, range(window.num_batches))


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts in bars of equal width; bar `i` holds `edges[i] <= value < edges[i + 1]`."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True, slots=True)
class Inspection:
    """Counts over a whole store; the trained ones with each row as a batch of its own."""

    path: str
    num_rows: int
    num_tokens: int  # without an end-of-text that the collate appends
    num_shards: int
    num_bytes: int  # of all shards
    tokenizer: str
    template: str
    fingerprint: str
    end: str  # `append` or `in_row`
    options: MaskOptions  # what is counted below depends on them
    mean_length: float
    percentiles: dict[str, int]  # lengths; "50" is the median
    lengths: Histogram
    shares: Histogram  # rows by share of trained targets among their kept columns
    other_shares: Histogram  # the same with the other `mask_prompt`
    kept_tokens: int  # input cells that hold a token after `max_length`
    trained_tokens: int
    rows_cut: int
    rows_without_trained: int
    examples_without_trained: list[int]  # the first of these rows
    corner_rows: int  # on which `mode="reference"` differs from `mode="positional"`
    masks: TrainedByMask
    imbalance: Imbalance  # of packs as wide as a row may be
    boundary_mismatches: int | None  # rows whose prompt, tokenized alone, is no prefix of them; `None`: not recorded
    skipped_records: int | None  # by prepare; `None`: not recorded
    padding: dict[str, float]  # shares that prepare has found, by its names for them; empty: not recorded
    dropped_fields: dict[str, int]  # records by the name of a field whose text is in no row


def inspect_store(
    store: TokenStore,
    options: MaskOptions | None = None,
    *,
    ranks: int = 8,
    progress: bool = True,
    silent: bool | None = None,
) -> Inspection:
    """Count everything once over; memory does not grow with the store. `silent` is the old name of `progress=False`.

    `ranks` is the number of those whose balance is told.

    Example:
        >>> found = inspect_store(TokenStore("store"), MaskOptions(max_length=256), progress=False)
        >>> found.masks.sentence
        'trained: 100%; 28.0% with --mask-prompt'
    """
    progress = renamed_switch(progress, old="silent", given=silent)
    options = (options or MaskOptions()).of(store)
    by_length = count_lengths(store.lengths)
    totals, other, masks = _both_masks(store, options, progress=progress)
    summary, template = store.manifest["summary"], store.manifest["template"]
    return Inspection(
        path=str(store.path),
        num_rows=len(store),
        num_tokens=store.num_tokens,
        num_shards=len(store.manifest["shards"]),
        num_bytes=sum(entry["num_bytes"] for entry in store.manifest["shards"]),
        tokenizer=store.tokenizer_name,
        template="preference:" * ("preference" in template) + str(template.get("name", "unknown")),
        fingerprint=store.fingerprint,
        end=store.end,
        options=options,
        mean_length=store.num_tokens / len(store),
        percentiles={str(p): percentile(by_length, p) for p in PERCENTILES},
        lengths=length_histogram(by_length),
        boundary_mismatches=summary.get("boundary_mismatches"),
        skipped_records=summary.get("num_skipped"),
        padding={name: share for name, share in summary.items() if name.startswith("padding_")},
        dropped_fields=summary.get("dropped_fields", {}),
        masks=masks,
        imbalance=imbalance_of(store, ranks, **order_of(store, options, OrderOptions(policy="packed", batch_size=1))),
        other_shares=other["shares"],
        **totals,
    )


def trained_by_mask(store: TokenStore, options: MaskOptions | None = None) -> TrainedByMask:
    """Count what is trained, with both values of `mask_prompt`."""
    return _both_masks(store, options or MaskOptions(), progress=False)[2]


def _both_masks(
    store: TokenStore, options: MaskOptions, *, progress: bool
) -> tuple[dict[str, Any], dict[str, Any], TrainedByMask]:
    """The counts as asked, those with the other `mask_prompt`, and what they say together."""
    asked, other = (_add_up(store, one, progress=progress) for one in (options, options.with_other_mask()))
    names = ("kept_tokens", "trained_tokens", "rows_without_trained")
    masks = TrainedByMask(options.mask_prompt, *(asked[name] for name in names), *(other[name] for name in names[1:]))
    return asked, other, masks


def _add_up(store: TokenStore, options: MaskOptions, *, progress: bool) -> dict[str, Any]:
    """Each row is collated as a batch of its own, and the kernel counts."""
    totals = np.zeros(kernels.REPORT_COLUMNS, np.int64)
    examples: list[int] = []
    shares = np.zeros(NUM_SHARES, np.int64)
    with progress_bar(unit="rows", progress=progress) as bar:
        task = bar.add_task(f"prompts {'masked' if options.mask_prompt else 'trained'}", total=len(store))
        for rows, report in row_reports(options.collator(store), range(len(store))):
            totals += report.sum(0)
            trained = report[:, kernels.TRAINED]
            examples += rows[trained == 0][: _MOST_NAMED - len(examples)].tolist()
            share = trained * NUM_SHARES // np.maximum(report[:, kernels.REAL], 1)
            shares += np.bincount(np.minimum(share, NUM_SHARES - 1), minlength=NUM_SHARES)
            bar.update(task, advance=len(rows))
    return {
        "kept_tokens": int(totals[kernels.REAL]),
        "rows_cut": int(totals[kernels.CUT_ROWS]),
        "trained_tokens": int(totals[kernels.TRAINED]),
        "rows_without_trained": int(totals[kernels.UNTRAINED]),
        "examples_without_trained": examples,
        "corner_rows": int(totals[kernels.CORNERS]),
        "shares": Histogram([i / NUM_SHARES for i in range(NUM_SHARES + 1)], shares.tolist()),
    }


def count_lengths(lengths: npt.NDArray[Any]) -> Int64Array:
    """Rows by length: int64 `(longest + 1,)`; reads a memory map a piece at a time."""
    counts = np.zeros(1, np.int64)
    for start in range(0, len(lengths), 1 << 20):
        piece = np.bincount(lengths[start : start + (1 << 20)], minlength=len(counts))
        piece[: len(counts)] += counts
        counts = piece
    return counts


def percentile(by_length: Int64Array, percent: float) -> int:
    """The smallest length that at least `percent` of all rows do not exceed."""
    rank = max(1, int(np.ceil(by_length.sum() * percent / 100)))
    return int(np.searchsorted(np.cumsum(by_length), rank))


def length_histogram(by_length: Int64Array, *, num_bars: int = 24) -> Histogram:
    """At most `num_bars` bars over the lengths that occur, their width a round number of tokens."""
    shortest, longest = percentile(by_length, 0), len(by_length) - 1
    steps = (step * 10**power for power in range(10) for step in (1, 2, 5))
    width = next(step for step in steps if longest // step - shortest // step < num_bars)
    start = shortest // width * width
    starts = np.arange(start, longest + 1, width)
    counts = np.add.reduceat(by_length, np.maximum(starts, 0))
    return Histogram([float(edge) for edge in (*starts, starts[-1] + width)], counts.tolist())


def tokenizer_of(store: TokenStore) -> tuple[Tokenizer | None, str]:
    """The tokenizer that the store was made with, or `None` and the reason why there is none."""
    try:
        name = store.tokenizer_name
        tokenizer = load_tokenizer(name, "auto" if name.endswith(".json") else "tiktoken")
    except InputError as error:
        return None, str(error)
    written = {entry["name"]: entry["sha256"] for entry in store.manifest["files"]}
    files = store.manifest["tokenizer"]["files"]
    same = all(hashlib.sha256(tokenizer.files.get(name, b"")).hexdigest() == written[name] for name in files)
    if tokenizer.fingerprint != store.manifest["tokenizer"]["fingerprint"] or not same:
        return None, f"the vocabulary {name!r} on this machine is not the one the store was made with"
    return tokenizer, ""
