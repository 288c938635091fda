"""One HTML page about a store, for a browser: nothing is loaded from elsewhere, and nothing leaves the page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from itertools import islice, pairwise
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcollate.check.counts import Histogram, Inspection, pack_capacity, packed_batches, tokenizer_of
from fastcollate.check.terminal import KINDS, MARKS, PADDING, PROMPT, TRAINED, RowView, summary_of, view_rows
from fastcollate.collate import AnyBatch
from fastcollate.errors import import_extra, integer
from fastcollate.plan import EpochPlan, plan_epoch
from fastcollate.store import TokenStore
from fastcollate.text import Tokenizer
from fastcollate.train import MaskOptions

POLICIES = ("sequential", "shuffled", "bucketed", "packed")
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_PLANNED_ROWS = 1 << 20  # rows that the padding figure plans; more would say the same, later
_PICTURED_BATCHES = 96
_SHOWN_TOKENS = 500_000  # tokens in the mask viewer: keeps the page at a few megabytes
_INK = "#1f2937"
_SHADES = {"sequential": "#6b7280", "shuffled": "#b45309", "bucketed": "#1d4ed8", "packed": "#047857"}
_DASHES = {"sequential": "dot", "shuffled": "dash", "bucketed": "solid", "packed": "dashdot"}
_SYMBOLS = {"sequential": "circle", "shuffled": "square", "bucketed": "diamond", "packed": "triangle-up"}


class Padding(NamedTuple):
    """Input cells of an epoch, and how many hold padding."""

    num_batches: int
    cells: int
    padded: int

    @property
    def share(self) -> float:
        """Padded cells among all, 0 to 1."""
        return self.padded / max(self.cells, 1)


def write_report(
    store: TokenStore, path: Path, found: Inspection, *, batch_size: int = 8, seed: int = 0, num_rows: int = 2000
) -> None:
    """Write the page to `path`.

    Args:
        found: what `inspect_store` counted; its options decide the masks.
        batch_size: rows a batch in the picture of an epoch, whose order goes by `seed`.
        num_rows: rows in the mask viewer at most.

    Raises:
        InputError: `batch_size` or `num_rows` is below 1.
        MissingExtraError: plotly is not installed.

    Example:
        >>> write_report(store, Path("report.html"), inspect_store(store, progress=False))  # needs plotly
    """
    integer("batch_size", batch_size, 1)
    integer("num_rows", num_rows, 1)
    offline = import_extra("plotly.offline", "report")
    other = found.options.with_other_mask()
    tokenizer, problem = tokenizer_of(store)
    planned = store.cells[:: -(-len(store) // _PLANNED_ROWS)]  # the rows that `prepare` counts padding of
    data = {
        "kinds": KINDS,
        "marks": [MARKS[kind] for kind in KINDS],
        "epochs": {name: picture(store, found.options, name, batch_size, seed) for name in POLICIES},
        "other_epochs": {name: picture(store, other, name, batch_size, seed) for name in POLICIES},
        "rows": _viewer(store, found, tokenizer, num_rows),
    }
    page = Template(files("fastcollate").joinpath("report_page.html").read_text(encoding="utf-8"))
    text = page.substitute(
        **_figures(found, padding_by_policy(planned, found.options.max_length, seed=seed)),
        name=escape(Path(str(store.path)).resolve().name),
        summary=_table(summary_of(found)),
        plotly=offline.get_plotlyjs(),
        data=json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"),  # ends no element
        problem=escape(problem),
        planned=f"{len(planned):,}",
        capacity=f"{pack_capacity(store.cells, found.options.max_length):,}",
        num_rows=f"{len(store):,}",
        batch_size=batch_size,
        masks=escape(found.masks.sentence),
        other_mask=escape(_mask_name(other)),
    )
    path.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- padding


def padding_by_policy(
    lengths: npt.NDArray[Any], max_length: int | None, *, seed: int = 0
) -> dict[str, dict[int, Padding]]:
    """Padding of an epoch by policy and batch size."""
    sizes = [size for size in BATCH_SIZES if size <= len(lengths)]
    return {
        policy: {size: _padding_of(_plan(lengths, policy, size, seed, max_length)) for size in sizes}
        for policy in POLICIES
    }


def _plan(lengths: npt.NDArray[Any], policy: str, batch_size: int, seed: int, max_length: int | None) -> EpochPlan:
    """An epoch, packs of `pack_capacity`."""
    capacity = pack_capacity(lengths, max_length) if policy == "packed" else None
    return plan_epoch(
        lengths, batch_size=batch_size, policy=policy, seed=seed, max_length=max_length, capacity=capacity
    )


def _padding_of(plan: EpochPlan) -> Padding:
    """Count the cells of a plan's batches without filling them."""
    num_batches = cells = filled = 0
    for index in range(plan.num_windows):
        rows, bounds = plan.window(index)
        if len(bounds) < 2:
            continue
        lengths = plan.lengths[rows].astype(np.int64)
        if plan.max_length is not None:
            lengths = np.minimum(lengths, plan.max_length)
        num_batches += len(bounds) - 1
        if plan.capacity is None:
            cells += int((np.maximum.reduceat(lengths, bounds[:-1]) * np.diff(bounds)).sum())
        else:
            cells += plan.packs(index).packs.num_packs * plan.capacity
        filled += int(lengths.sum())
    return Padding(num_batches, cells, cells - filled)


# ------------------------------------------------------------------------------------------- the picture of an epoch


def picture(store: TokenStore, options: MaskOptions, policy: str, batch_size: int, seed: int) -> dict[str, Any]:
    """Some batches of an epoch, evenly spaced, each row (each pack) as stretches of cells of one kind."""
    lengths = store.cells[:_PLANNED_ROWS] if policy == "packed" else store.cells
    plan = _plan(lengths, policy, batch_size, seed, options.max_length)
    total, collator = len(plan), options.collator(store)
    every = -(-total // _PICTURED_BATCHES)
    planned: Iterable[Any] = plan if plan.capacity is None else packed_batches(plan)
    batches = []
    for found in islice(planned, 0, None, every):
        batch: AnyBatch
        if plan.capacity is None:
            batch, used = collator(found), lengths[found].astype(np.int64)
        else:
            batch = collator.pack(found.rows, found.bounds, capacity=plan.capacity)
            ends = np.cumsum(np.minimum(lengths[found.rows].astype(np.int64), plan.capacity))
            used = np.diff(np.append(0, ends)[found.bounds])
        batches.append({"width": batch.inputs.shape[1], "rows": stretches(batch, used)})
    return {"total": total, "every": every, "batches": batches}


def stretches(batch: AnyBatch, lengths: npt.NDArray[np.int64]) -> list[list[list[int]]]:
    """For each row `[kind, cells]` pairs, the kind by its place in `KINDS`.

    A column is padding where its input is; otherwise it is trained or, where its target is ignored, shown as prompt.
    """
    width = batch.inputs.shape[1]
    kinds = np.where(batch.targets.numpy() != -100, KINDS.index(TRAINED), KINDS.index(PROMPT))
    kinds[np.arange(width) >= lengths[:, None]] = KINDS.index(PADDING)
    rows = []
    for row in kinds:
        starts = np.flatnonzero(np.diff(row, prepend=-1))
        counts = np.diff(np.append(starts, width))
        rows.append([[int(row[start]), int(count)] for start, count in zip(starts, counts, strict=True)])
    return rows


# ---------------------------------------------------------------------------------------------------- mask viewer


def _viewer(store: TokenStore, found: Inspection, tokenizer: Tokenizer | None, num_rows: int) -> dict[str, Any]:
    ends = np.cumsum(store.lengths[:num_rows], dtype=np.int64)
    count = max(1, int(np.searchsorted(ends, _SHOWN_TOKENS, side="right")))
    numbers = range(min(count, len(ends)))
    shown = [*numbers, *(row for row in found.examples_without_trained if row not in numbers)]
    rows, used = [], set()
    by_mask = [view_rows(store, shown, options) for options in (found.options, found.options.with_other_mask())]
    for view, other in zip(*by_mask, strict=True):
        rows.append(_entry(view, other, tokenizer))
        used.update(view.tokens)
    pieces = {} if tokenizer is None else {token: tokenizer.decode([token]) for token in sorted(used)}
    return {"total": len(store), "pieces": pieces, "rows": rows}


def _entry(view: RowView, other: RowView, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """One row for the page, without its padding, which is only counted; a run is of one kind under either mask."""
    end = len(view.tokens) - view.kinds.count(PADDING)
    bounds = sorted({start for kinds in (view, other) for _, start, _ in kinds.runs()} | {len(view.tokens)})
    runs = []
    for start, stop in pairwise(bounds):
        kind, other_kind = view.kinds[start], other.kinds[start]
        text = "" if tokenizer is None or kind == PADDING else tokenizer.decode(view.tokens[start:stop])
        runs.append([KINDS.index(kind), stop - start, text, KINDS.index(other_kind)])
    ids = view.tokens[:end]
    return {"row": view.row, "record": view.source_row, "length": view.num_tokens, "ids": ids, "runs": runs}


# -------------------------------------------------------------------------------------------------------- the page


def _figures(found: Inspection, padding: Mapping[str, Mapping[int, Padding]]) -> dict[str, str]:
    """The page's pictures, by their names in it."""
    asked, other = _mask_name(found.options), _mask_name(found.options.with_other_mask())
    shares = [  # as asked, and beside it with the other `mask_prompt`
        _bars(found.shares, asked, unit=100),
        _bars(found.other_shares, other, unit=100, color=_SHADES["shuffled"]),
    ]
    lines = [
        {
            "type": "scatter",
            "x": [str(size) for size in by_size],
            "y": [100 * cells.share for cells in by_size.values()],
            "name": policy,
            "mode": "lines+markers",
            "line": {"color": _SHADES[policy], "dash": _DASHES[policy], "width": 2.5},
            "marker": {"symbol": _SYMBOLS[policy], "size": 9},
            "hovertemplate": f"{policy}, %{{x}} {'packs' if policy == 'packed' else 'rows'}: "
            "%{y:.1f}% padding<extra></extra>",
        }
        for policy, by_size in padding.items()
    ]
    return {
        "figure_lengths": _html_of("lengths", [_bars(found.lengths, "rows", unit=1)], "length in tokens", "rows"),
        "figure_padding": _html_of("padding", lines, "rows (packed: packs) in a batch", "padded cells, %"),
        "figure_shares": _html_of("shares", shares, "trained columns of a row, %", "rows"),
    }


def _bars(histogram: Histogram, name: str, *, unit: int, color: str = _SHADES["bucketed"]) -> dict[str, Any]:
    edges = histogram.edges
    last = 1 if unit == 1 else 0  # lengths are whole numbers, a bar's last is one below the next edge
    return {
        "type": "bar",
        "x": [(low + high) / 2 * unit for low, high in pairwise(edges)],
        "y": histogram.counts,
        "name": name,
        "customdata": [f"{low * unit:g} to {high * unit - last:g}" for low, high in pairwise(edges)],
        "width": (edges[1] - edges[0]) * unit * 0.92,
        "marker": {"color": color},
        "hovertemplate": "%{customdata}: %{y} rows<extra></extra>",
    }


def _mask_name(options: MaskOptions) -> str:
    return "with --mask-prompt" if options.mask_prompt else "with --train-prompt (the default)"


def _html_of(name: str, traces: list[dict[str, Any]], x_title: str, y_title: str) -> str:
    is_line = traces[0]["type"] == "scatter"
    layout = {
        "template": "plotly_white",
        "barmode": "overlay",
        "font": {"family": "system-ui, sans-serif", "size": 14, "color": _INK},
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "height": 320,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": {"title": {"text": x_title}, "automargin": True, "type": "category" if is_line else "-"},
        "yaxis": {"title": {"text": y_title}, "automargin": True, "rangemode": "tozero"},
    }
    to_html = import_extra("plotly.io", "report").to_html
    config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    figure = {"data": traces, "layout": layout}
    return str(to_html(figure, full_html=False, include_plotlyjs=False, div_id=f"figure-{name}", config=config))


def _table(rows: Mapping[str, object]) -> str:
    lines = []
    for name, value in rows.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        lines.append(f"<tr><th scope=row>{escape(name)}</th><td>{escape(shown)}</td></tr>")
    return "\n".join(lines)
