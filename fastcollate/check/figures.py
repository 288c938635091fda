"""The report page's plots: SVG without scripts, whose colours are the page's own, each with its numbers below."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcollate.check.counts import Histogram, pack_capacity
from fastcollate.errors import import_extra
from fastcollate.plan import EpochPlan, plan_epoch

POLICIES = ("sequential", "shuffled", "bucketed", "packed")
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# matplotlib wants colours, the page has variables: one stands for the other until the drawing is text
_COLORS = {"ink": "#010101", "line": "#020202", "sequential": "#030303", "shuffled": "#040404", "bucketed": "#050505",
           "packed": "#060606"}  # fmt: skip
_LINES = {
    "sequential": {"linestyle": ":", "marker": "o"},
    "shuffled": {"linestyle": "--", "marker": "s"},
    "bucketed": {"linestyle": "-", "marker": "D"},
    "packed": {"linestyle": "-.", "marker": "^"},
}
_SIZE_INCHES = (5, 3.1)  # 360 units wide, which a narrow window shows in about as many pixels
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.edgecolor": _COLORS["line"],
    "grid.color": _COLORS["line"],
    "axes.labelcolor": _COLORS["ink"],
    "text.color": _COLORS["ink"],
    "xtick.color": _COLORS["ink"],
    "ytick.color": _COLORS["ink"],
    "legend.frameon": False,
}


class Padding(NamedTuple):
    """Input cells of an epoch, and how many hold padding."""

    num_batches: int
    cells: int
    padded: int

    @property
    def share(self) -> float:
        """Padded cells among all, 0 to 1."""
        return self.padded / max(self.cells, 1)


# ------------------------------------------------------------------------------------------------------- padding


def padding_by_policy(
    lengths: npt.NDArray[Any], max_length: int | None, *, seed: int = 0, batch_sizes: Sequence[int] = BATCH_SIZES
) -> dict[str, dict[int, Padding]]:
    """Padding of an epoch by policy and batch size."""
    sizes = [size for size in batch_sizes if size <= len(lengths)] or [len(lengths)]
    return {
        policy: {size: _padding_of(plan_of(lengths, policy, size, seed, max_length)) for size in sizes}
        for policy in POLICIES
    }


def plan_of(lengths: npt.NDArray[Any], policy: str, batch_size: int, seed: int, max_length: int | None) -> EpochPlan:
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


# --------------------------------------------------------------------------------------------------------- plots


def draw_bars(name: str, series: Mapping[str, Histogram], title: str, *, percent: bool = False) -> str:
    """Rows by some number: the first of `series` filled, another as an outline."""
    with _drawing(name, title, "rows") as (figure, axes, out):
        for (label, found), policy in zip(series.items(), ("bucketed", "shuffled"), strict=False):
            edges = [edge * (100 if percent else 1) for edge in found.edges]
            how = {"fill": True, "linewidth": 0} if policy == "bucketed" else {"linewidth": 2}
            axes.stairs(found.counts, edges, label=label, color=_COLORS[policy], **how)
        if len(series) > 1:
            figure.legend(loc="outside upper left")
    first = next(iter(series.values()))
    rows = [
        [_range(low, high, percent), *(f"{found.counts[index]:,}" for found in series.values())]
        for index, (low, high) in enumerate(pairwise(first.edges))
    ]
    return _element(out, name, title) + _numbers([title, *series], rows)


def draw_padding(name: str, padding: Mapping[str, Mapping[int, Padding]]) -> str:
    """Padded cells by batch size, a line a policy."""
    title, unit = "rows (packed: packs) in a batch", "padded cells, %"
    with _drawing(name, title, unit) as (figure, axes, out):
        for policy, by_size in padding.items():
            shares = [100 * found.share for found in by_size.values()]
            style = {**_LINES[policy], "color": _COLORS[policy], "linewidth": 2, "markersize": 5}
            axes.plot([*map(str, by_size)], shares, label=policy, **style)
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=2)
    sizes = next(iter(padding.values()))
    rows = [[f"{size:,}", *(f"{by_size[size].share:.1%}" for by_size in padding.values())] for size in sizes]
    return _element(out, name, f"{unit}, by {title}") + _numbers([title, *padding], rows)


@contextlib.contextmanager
def _drawing(name: str, x_title: str, y_title: str) -> Iterator[tuple[Any, Any, io.StringIO]]:
    """A figure, its axes, and where its SVG is written at the end of the block."""
    out = io.StringIO()
    with import_extra("matplotlib", "report").rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = import_extra("matplotlib.figure", "report").Figure(figsize=_SIZE_INCHES, layout="constrained")
        yield figure, figure.add_subplot(xlabel=x_title, ylabel=y_title), out
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


def _element(out: io.StringIO, name: str, title: str) -> str:
    """A drawing as an element of a page: without a size, without ids that two of them would have."""
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' id="[a-z][a-zA-Z.]*\d*_\d+"', "", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text)
    for variable, color in _COLORS.items():
        text = text.replace(color, f"var(--{variable})")
    return text.replace("<svg", f'<svg id="figure-{name}" role="img" aria-label="{escape(title)}"', 1)


def _numbers(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A picture's numbers, folded."""
    lines = ["".join(f"<th>{escape(name)}</th>" for name in head)]
    lines += ["".join(f"<td>{escape(value)}</td>" for value in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<details><summary>the numbers</summary><table>{body}</table></details>"


def _range(low: float, high: float, percent: bool) -> str:
    """A bar's values; lengths are whole numbers, a bar's last is one below the next edge."""
    if percent:
        return f"{100 * low:g} to {100 * high:g}"
    return f"{low:,.0f}" if high - low == 1 else f"{low:,.0f} to {high - 1:,.0f}"
