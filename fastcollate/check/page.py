"""One HTML page about a store, for a browser: nothing is loaded from elsewhere, and nothing leaves the page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from html import escape
from importlib.resources import files
from itertools import islice, pairwise
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.check.counts import Inspection, pack_capacity, packed_batches, tokenizer_of
from fastcollate.check.figures import POLICIES, Padding, draw_bars, draw_padding, padding_by_policy, plan_of
from fastcollate.check.terminal import KINDS, MARKS, PADDING, PROMPT, TRAINED, RowView, printable, summary_of, view_rows
from fastcollate.collate import AnyBatch
from fastcollate.errors import InputError, import_extra, integer
from fastcollate.ingest import source_names
from fastcollate.store import TokenStore
from fastcollate.text import Tokenizer
from fastcollate.train import MaskOptions

_PLANNED_ROWS = 1 << 20  # rows that the padding figure plans; more would say the same, later
_PICTURED_BATCHES, _PICTURED_ROWS = 96, 768
_MOST_BYTES = 1_900_000  # of the page
_MOST_BYTES_PICTURED = 800_000  # of that, for the pictures of an epoch
_AROUND = 2  # rows before and after one that was asked for
_NAMED_SOURCES = 5
_WORTH = 0.02  # less padding than this is not worth another policy


def write_report(
    store: TokenStore,
    path: Path,
    found: Inspection,
    *,
    batch_size: int = 8,
    seed: int = 0,
    num_rows: int = 2000,
    row: int | None = None,
) -> None:
    """Write the page to `path`: less than 2 MB, however large the store is.

    Args:
        found: what `inspect_store` counted; its options decide the masks.
        batch_size: rows a batch in the picture of an epoch, whose order goes by `seed`.
        num_rows: rows in the mask viewer at most, as far as they fit.
        row: one that is in the page with its neighbours, and shown when it opens.

    Raises:
        InputError: `batch_size` or `num_rows` is below 1, or there is no such row.
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> write_report(store, Path("report.html"), inspect_store(store, progress=False))  # needs matplotlib
    """
    integer("batch_size", batch_size, 1)
    integer("num_rows", num_rows, 1)
    if row is not None and not 0 <= row < len(store):
        raise InputError(f"row {row}: the store {store.path} has rows 0 to {len(store) - 1}; give one of them")
    import_extra("matplotlib", "report")
    other = found.options.with_other_mask()
    tokenizer, problem = tokenizer_of(store)
    planned = store.cells[:: -(-len(store) // _PLANNED_ROWS)]  # the rows that `prepare` counts padding of
    limit = found.options.max_length
    asked = padding_by_policy(planned, limit, seed=seed, batch_sizes=[batch_size])
    padding = {policy: next(iter(by_size.values())) for policy, by_size in asked.items()}
    names = {_mask_name(found.options): found.shares, _mask_name(other): found.other_shares}
    data = {"kinds": KINDS, "marks": [MARKS[kind] for kind in KINDS], **_epochs(store, found.options, batch_size, seed)}
    parts = {
        "name": escape(printable(Path(str(store.path)).resolve().name)),
        "trained": _trained(found),
        "padding": _padding(padding, batch_size),
        "advice": "\n".join(f"<li>{line}</li>" for line in advice(found, padding, str(store.path))),
        "origin": escape(printable(_origin(store))),
        "figure_lengths": draw_bars("lengths", {"rows": found.lengths}, "length in tokens"),
        "figure_padding": draw_padding("padding", padding_by_policy(planned, limit, seed=seed)),
        "figure_shares": draw_bars("shares", names, "trained columns of a row, %", percent=True),
        "summary": _table(summary_of(found)),
        "problem": escape(printable(problem)),
        "planned": f"{len(planned):,}",
        "capacity": f"{pack_capacity(store.cells, limit):,}",
        "batch_size": f"{batch_size:,}",
        "masks": escape(found.masks.sentence),
        "other_mask": escape(_mask_name(other)),
    }
    page = Template(files("fastcollate").joinpath("report_page.html").read_text(encoding="utf-8"))
    room = _MOST_BYTES - len(page.substitute(**parts, data=_json(data)).encode())
    viewer = _viewer(store, found, tokenizer, num_rows, row=row, room=room)
    commands = {name: printable(shlex.quote(str(file))) for name, file in (("store", store.path), ("report", path))}
    text = page.substitute(**parts, data=_json({**data, "rows": {**viewer, **commands}}))
    path.write_text(text, encoding="utf-8")


def _json(data: object) -> str:
    """For an element of a page, which nothing in it ends."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


# ------------------------------------------------------------------------------------------------------ the headline


def _trained(found: Inspection) -> str:
    """What is trained: a share, and behind it the rest."""
    masks = found.masks
    share, _, rest = masks.in_words.partition("; ")
    return (
        f"<b>{escape(share)}</b> of the tokens are trained: {masks.trained_tokens:,} of {masks.kept_tokens:,}; "
        f"{escape(rest)}."
    )


def _padding(padding: Mapping[str, Padding], batch_size: int) -> str:
    """What padding costs with the loader's own order, and beside it with the others."""
    own = padding["bucketed"]
    times = padding["shuffled"].cells / max(own.cells, 1)
    others = ", ".join(f"{policy} {padding[policy].share:.1%}" for policy in ("shuffled", "packed"))
    return (
        f"<b>{own.share:.1%}</b> of a bucketed epoch's cells are padding, at {batch_size:,} rows a batch ({others}). "
        f"Shuffled batches have {times:.2f} times the cells."
    )


def advice(found: Inspection, padding: Mapping[str, Padding], store: str) -> list[str]:
    """What to do, a line of HTML each: what is wrong first, the command that trains last."""
    options, lines = found.options, []

    def say(text: str, flag: str = "") -> None:
        lines.append(escape(printable(text)) + (f" <code>{escape(printable(flag))}</code>" if flag else ""))

    if found.rows_without_trained:
        say(f"{found.rows_without_trained:,} rows train nothing; look at one:", f"#{found.examples_without_trained[0]}")
    if options.max_length is not None and found.rows_cut:
        say(f"{found.rows_cut:,} rows are cut; none would be with", f"--max-length {found.percentiles['100'] + 1}")
    if found.skipped_records:
        say(f"{found.skipped_records:,} records were skipped; prepare stops at the first with", "--on-error raise")
    if found.dropped_fields:
        say(f"Text of these fields is in no row: {', '.join(found.dropped_fields)}; name them with", "prepare --field")
    if found.boundary_mismatches:
        say(
            f"{found.boundary_mismatches:,} prompts, tokenized alone, do not begin their rows:",
            "prepare --boundary exact",
        )
    if found.corner_rows and options.mode == "reference":
        say(f"{found.corner_rows:,} rows have corners of the chapter's masks; without them:", "--mode positional")
    if not options.mask_prompt and found.masks.other_trained_tokens < found.masks.trained_tokens:
        say("Prompts are trained too; the answers alone with", "--mask-prompt")
    packs = padding["bucketed"].share - padding["packed"].share > _WORTH
    if packs:
        say("Packs hold less padding than buckets here:", "--policy packed")
    flags = ["--policy", "packed"] * packs + ["--mask-prompt"] * options.mask_prompt
    flags += [] if options.max_length is None else ["--max-length", str(options.max_length)]
    say(
        "Train it:" if not lines else "Or train it as it is:",
        shlex.join(["fastcollate", "train", "--store", store, *flags]),
    )
    return lines


def _origin(store: TokenStore) -> str:
    """Of which sources the store is made, and when; the time of an object is when it was copied there, and not said."""
    stored, folder = store.manifest["sources"], store.path
    names = source_names(folder, stored) if isinstance(folder, Path) else None
    if names is None:
        told = f"{stored['num_sources']:,} sources" if "num_sources" in stored else "sources that are not named"
    else:
        more = len(names) - _NAMED_SOURCES
        told = ", ".join(names[:_NAMED_SOURCES]) + (f" and {more:,} more" if more > 0 else "")
    count = stored.get("num_records", 0)
    records = f" ({count:,} record{'s' * (count != 1)})" if count else ""
    times = [datetime.now(timezone.utc)]
    if isinstance(folder, Path):
        times.insert(0, datetime.fromtimestamp((folder / "manifest.json").stat().st_mtime, timezone.utc))
    *made, now = (f"{time:%Y-%m-%d %H:%M} UTC" for time in times)
    return f"{', '.join([f'Made from {told}{records}', *made])}. This page: {now}."


# ------------------------------------------------------------------------------------------- the picture of an epoch


def _epochs(store: TokenStore, options: MaskOptions, batch_size: int, seed: int) -> dict[str, Any]:
    """The pictures of an epoch by policy, under either mask; of so many batches that they fit."""
    masks = {"epochs": options, "other_epochs": options.with_other_mask()}
    most = min(_PICTURED_BATCHES, max(1, _PICTURED_ROWS // batch_size))
    while True:
        found = {
            name: {policy: picture(store, mask, policy, batch_size, seed, most=most) for policy in POLICIES}
            for name, mask in masks.items()
        }
        if most == 1 or len(_json(found)) <= _MOST_BYTES_PICTURED:
            return found
        most //= 2


def picture(
    store: TokenStore,
    options: MaskOptions,
    policy: str,
    batch_size: int,
    seed: int,
    *,
    most: int = _PICTURED_BATCHES,
) -> dict[str, Any]:
    """At most so many batches of an epoch, evenly spaced, each row (each pack) as stretches of cells of one kind."""
    lengths = store.cells[:_PLANNED_ROWS] if policy == "packed" else store.cells
    plan = plan_of(lengths, policy, batch_size, seed, options.max_length)
    total, collator = len(plan), options.collator(store)
    every = -(-total // most)
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


def _viewer(
    store: TokenStore,
    found: Inspection,
    tokenizer: Tokenizer | None,
    num_rows: int,
    *,
    row: int | None = None,
    room: int = _MOST_BYTES,
) -> dict[str, Any]:
    """Rows for the page, as far as `room` bytes hold them: the asked one and its neighbours before all others."""
    around = [] if row is None else range(max(row - _AROUND, 0), min(row + _AROUND + 1, len(store)))
    asked = [] if row is None else [row]
    wanted = dict.fromkeys([*asked, *around, *found.examples_without_trained, *range(min(num_rows, len(store)))])
    by_mask = [view_rows(store, wanted, options) for options in (found.options, found.options.with_other_mask())]
    rows: list[dict[str, Any]] = []
    pieces: dict[int, str] = {}
    for view, other in zip(*by_mask, strict=True):
        entry = _entry(view, other, tokenizer)
        new = {} if tokenizer is None else {token: tokenizer.decode([token]) for token in {*view.tokens} - {*pieces}}
        room -= len(_json(entry).encode()) + len(_json(new).encode())
        if room < 0:
            break
        rows.append(entry)
        pieces.update(new)
    rows.sort(key=lambda entry: int(entry["row"]))
    return {"total": len(store), "first": row, "pieces": pieces, "rows": rows}


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


def _mask_name(options: MaskOptions) -> str:
    return "with --mask-prompt" if options.mask_prompt else "with --train-prompt (the default)"


def _table(rows: Mapping[str, object]) -> str:
    lines = []
    for name, value in rows.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        lines.append(f"<tr><th scope=row>{escape(printable(name))}</th><td>{escape(printable(shown))}</td></tr>")
    return "\n".join(lines)
