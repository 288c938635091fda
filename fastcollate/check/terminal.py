"""A row token by token, and what `inspect` prints: a row with its marks, bars, and the table of counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from fastcollate.check.chat.turns import Turn, special_tokens, turns_of
from fastcollate.check.counts import Histogram, Inspection, Int64Array, tokenizer_of
from fastcollate.collate import Batch
from fastcollate.errors import InputError
from fastcollate.ingest import summary_in_words
from fastcollate.progress import glyph, print_summary
from fastcollate.store import TokenStore
from fastcollate.text import Tokenizer
from fastcollate.train import MaskOptions

PROMPT, TRAINED, IGNORED, PADDING = KINDS = ("prompt", "trained", "ignored", "padding")
MARKS = {PROMPT: "?", TRAINED: "+", IGNORED: "x", PADDING: "."}
_SAID_TOKENS = 16  # shown of a turn
STYLES = {PROMPT: "cyan", TRAINED: "bold green", IGNORED: "red", PADDING: "bright_black"}


class RowView(NamedTuple):
    """A row as a loader hands it over, padded to the width of a batch together with the store's longest row."""

    row: int
    source_row: int  # the record's position in the sources
    num_tokens: int  # without an end-of-text that the collate appends
    inputs: Int64Array  # (width,)
    targets: Int64Array  # (width,); that of column `c` is token `c + 1`
    tokens: list[int]  # `width + 1` (none where the width is 0): the row's own, an appended end, and padding
    kinds: list[str]  # of each token: one of `KINDS`; it is trained where it is a target, and the first never is one
    turns: Sequence[Turn] = ()  # of the row's own tokens; only `view_row` looks for them

    def runs(self) -> Iterator[tuple[str, int, int]]:
        """(kind, first token, end) of each stretch of one kind."""
        end = 0
        for kind, run in groupby(self.kinds):
            start, end = end, end + sum(1 for _ in run)
            yield kind, start, end


def view_row(store: TokenStore, row: int, options: MaskOptions | None = None) -> RowView:
    """Collate one row together with the longest, and tell its tokens apart.

    Example:
        >>> view = view_row(store, 3, MaskOptions(mask_prompt=True))
        >>> view.kinds.count("trained") > 0
        True
    """
    view = next(view_rows(store, [row], options))
    return view._replace(turns=turns_of(store, row, tokenizer_of(store)[0]))


def view_rows(store: TokenStore, rows: Iterable[int], options: MaskOptions | None = None) -> Iterator[RowView]:
    """`view_row` of several rows, without their turns."""
    collator = (options or MaskOptions()).collator(store)
    longest = int(np.argmax(store.lengths))  # and fills the most cells
    for row in rows:
        if not 0 <= row < len(store):
            raise InputError(f"row {row}: the store {store.path} has rows 0 to {len(store) - 1}; give one of them")
        yield _view(store, row, collator([row, longest]))


def _view(store: TokenStore, row: int, batch: Batch) -> RowView:
    inputs, targets = batch.inputs[0].numpy(), batch.targets[0].numpy()
    example = store[row]
    ids = example.input_ids.tolist()
    width = len(inputs)
    own = ids if store.end == "in_row" else [*ids, store.end_token_id]
    tokens = (own + [store.pad_token_id] * (width + 1))[: width + 1] if width else []
    spans = example.spans.tolist()
    untrained = np.full(len(tokens), PADDING, dtype=object)
    untrained[: len(own)] = IGNORED
    for start, count in zip(np.cumsum([0, *spans])[:-1:2], spans[::2], strict=True):
        untrained[start : min(start + count, len(own))] = PROMPT
    is_trained = np.append(False, targets != -100)[: len(tokens)]
    kinds = np.where(is_trained, TRAINED, untrained).tolist()
    return RowView(row, example.source_row, len(ids), inputs, targets, tokens, kinds)


# ------------------------------------------------------------------------------------------------- for the terminal


def render_row(view: RowView, tokenizer: Tokenizer | None) -> Text:
    """The row's text with a marked margin a kind, then a line a column: input, target, and what becomes of it."""
    out = Text()
    out.append(f"row {view.row}, record {view.source_row}: {view.num_tokens} tokens, shown {len(view.inputs)} wide\n")
    for kind in KINDS:
        out.append(f" {MARKS[kind]} {kind}: {view.kinds.count(kind)} ", STYLES[kind])
    out.append(f"\n\n{'turn':>10} {'tokens':>7} {'trained':>7}\n", "bold")
    for turn in view.turns:
        trained = view.kinds[turn.start : turn.stop].count(TRAINED)
        said = "" if tokenizer is None else repr(tokenizer.decode(view.tokens[turn.start : turn.stop][:_SAID_TOKENS]))
        cut = " ..." if turn.stop - turn.start > _SAID_TOKENS else ""
        style = STYLES[TRAINED] if trained else STYLES[PROMPT]
        out.append(f"{turn.role:>10} {turn.stop - turn.start:>7} {trained:>7}  {printable(said)}{cut}\n", style)
    out.append("\n")
    special = {} if tokenizer is None else special_tokens(tokenizer)
    bar = glyph("│", "|")
    for kind, start, end in view.runs():
        body = f"({end - start} tokens)"
        if kind != PADDING and tokenizer is not None:
            body = tokenizer.decode(view.tokens[start:end])
        for index, line in enumerate(body.split("\n")):
            out.append(f"{kind if index == 0 else '':>8} {MARKS[kind]} {bar} {printable(line)}\n", STYLES[kind])
    out.append(f"\n{'column':>6} {'input':>6} {'':18}    {'target':>6} {'':18} kind\n", "bold")
    columns = list(zip(view.inputs.tolist(), view.targets.tolist(), strict=True))
    for kind, first, end in view.runs():
        shown = range(max(first - 1, 0), end - 1)
        for column in shown[:1] if kind == PADDING else shown:
            token, target = columns[column]
            out.append(f"{column:>6} {token:>6} ").append(*_piece(token, tokenizer, special)).append(
                f" -> {target:>6} "
            )
            out.append(*_piece(target, tokenizer, special)).append(f" {MARKS[kind]} {kind}\n", STYLES[kind])
        if kind == PADDING and len(shown) > 1:
            out.append(f"{'...':>6} the same to column {shown[-1]}\n", STYLES[kind])
    return out


def print_row(store: TokenStore, view: RowView) -> str:
    """`render_row` on standard output, in colour where it is a terminal, which wraps the lines.

    Returned is why there is no text, or nothing.

    Example:
        >>> print_row(store, view_row(store, 3))
        row 3, record 3: ...
        ''
    """
    tokenizer, problem = tokenizer_of(store)
    Console(highlight=False).print(render_row(view, tokenizer), soft_wrap=True, end="")
    return problem


def _piece(token: int, tokenizer: Tokenizer | None, special: Mapping[int, str]) -> tuple[str, str]:
    """A token's text in quotation marks, or the bare name of a special one; how it is shown."""
    if token < 0 or tokenizer is None:
        return " " * 18, ""
    if token in special:
        return f"{printable(special[token]):<18}", "reverse"
    return f"{printable(repr(tokenizer.decode([token]))):<18}", ""


def printable(text: str) -> str:
    """Without control characters, which would move the cursor or recolour the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def render_histogram(histogram: Histogram, *, width: int = 50) -> str:
    """A line a bar: the range, the bar, the count."""
    tallest, full, edge = max(histogram.counts), glyph("█", "#"), glyph("│", "|")
    lines = []
    for count, (start, end) in zip(histogram.counts, pairwise(histogram.edges), strict=True):
        bar = full * max(round(count / tallest * width), 1 if count else 0)
        low, high = int(start), int(end) - 1
        name = f"{low}" if low == high else f"{low}-{high}"
        lines.append(f"{name:>13} {edge}{bar:<{width}} {count:,}")
    return "\n".join(lines)


def print_inspection(found: Inspection) -> None:
    """The table of counts and the bars of lengths on standard output.

    Example:
        >>> print_inspection(inspect_store(store, progress=False))
        store
        ...
    """
    print_summary(found.path, summary_of(found))
    print(f"\nrows by length in tokens\n{render_histogram(found.lengths)}")


def summary_of(found: Inspection) -> dict[str, object]:
    """What `print_summary` shows of an inspection."""
    rows: dict[str, object] = {
        "rows": found.num_rows,
        "tokens": found.num_tokens,
        "shards": f"{found.num_shards:,} ({found.num_bytes:,} bytes)",
        "tokenizer, template": f"{found.tokenizer}, {found.template}",
        "mean length": f"{found.mean_length:.1f}",
    }
    names = {"0": "shortest", "50": "median", "100": "longest"}
    for percent, length in found.percentiles.items():
        rows[names.get(percent, f"percentile {percent}")] = length
    rows["a row's end"] = "appended by the collate" if found.end == "append" else "in the row"
    rows["trained tokens"] = f"{found.trained_tokens:,}"
    rows["trained"] = found.masks.in_words
    if found.options.max_length is not None:
        rows[f"rows cut at {found.options.max_length}"] = found.rows_cut
    named = ", ".join(map(str, found.examples_without_trained))
    more = ", ..." if found.rows_without_trained > len(found.examples_without_trained) else ""
    rows["rows without a trained token"] = f"{found.rows_without_trained:,}" + (f" ({named}{more})" if named else "")
    rows["rows where reference and positional differ"] = found.corner_rows
    rows[f"{found.imbalance.ranks} ranks, {found.imbalance.batches}"] = f"the slowest takes {found.imbalance.in_words}"
    unknown = "not recorded"
    rows["boundary mismatches"] = unknown if found.boundary_mismatches is None else found.boundary_mismatches
    rows["records skipped"] = unknown if found.skipped_records is None else found.skipped_records
    dropped = {"dropped_fields": found.dropped_fields} if found.dropped_fields else {}
    return rows | summary_in_words({**dropped, **found.padding})
