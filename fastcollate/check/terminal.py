"""A row token by token, and what `inspect` prints: a row with its marks, bars, and the table of counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcollate.check.counts import Histogram, Inspection, MaskOptions
from fastcollate.collate.batch import Batch
from fastcollate.errors import InputError
from fastcollate.store import TokenStore
from fastcollate.text import Tokenizer

if TYPE_CHECKING:
    from rich.text import Text

Int64Array = npt.NDArray[np.int64]

PROMPT, TRAINED, IGNORED, PADDING = KINDS = ("prompt", "trained", "ignored", "padding")
MARKS = {PROMPT: "?", TRAINED: "+", IGNORED: "x", PADDING: "."}
STYLES = {PROMPT: "cyan", TRAINED: "bold green", IGNORED: "red", PADDING: "bright_black"}


class RowView(NamedTuple):
    """A row as a loader hands it over, padded to the width of a batch together with the store's longest row.

    Attributes:
        row: the row's number.
        source_row: the record's position in the sources.
        num_tokens: the row's length, without the end-of-text.
        inputs: int64 `(width,)`.
        targets: int64 `(width,)`; the target of column `c` is token `c + 1`.
        tokens: the row's tokens, its end-of-text and padding, as far as they are an input or a target: `width + 1`
            ids, or none where the width is 0.
        kinds: for each token `prompt`, `trained`, `ignored` or `padding`. A token is trained where it is a target;
            the first never is one.
    """

    row: int
    source_row: int
    num_tokens: int
    inputs: Int64Array
    targets: Int64Array
    tokens: list[int]
    kinds: list[str]

    def runs(self) -> Iterator[tuple[str, int, int]]:
        """(kind, first token, end) of each stretch of one kind."""
        start = 0
        for index in range(1, len(self.kinds) + 1):
            if index == len(self.kinds) or self.kinds[index] != self.kinds[start]:
                yield self.kinds[start], start, index
                start = index


def view_row(store: TokenStore, row: int, options: MaskOptions | None = None) -> RowView:
    """Collate one row together with the longest, and tell its tokens apart.

    Raises:
        InputError: there is no such row.

    Example:
        >>> view = view_row(store, 3, MaskOptions(mask_prompt=True))
        >>> view.kinds.count("trained") > 0
        True
    """
    return next(view_rows(store, [row], options))


def view_rows(store: TokenStore, rows: Iterable[int], options: MaskOptions | None = None) -> Iterator[RowView]:
    """`view_row` of several rows.

    Example:
        >>> [view.row for view in view_rows(store, [3, 5])]
        [3, 5]
    """
    collator = (options or MaskOptions()).collator(store)
    longest = int(np.argmax(store.lengths))
    for row in rows:
        if not 0 <= row < len(store):
            raise InputError(f"row {row}: the store {store.path} has rows 0 to {len(store) - 1}")
        yield _view(store, row, collator([row, longest]))


def _view(store: TokenStore, row: int, batch: Batch) -> RowView:
    inputs, targets = batch.inputs[0].numpy(), batch.targets[0].numpy()
    example = store[row]
    ids = example.input_ids.tolist()
    width = len(inputs)
    tokens = (ids + [store.pad_token_id] * (width + 1))[: width + 1] if width else []
    in_prompt = _prompt_tokens(example.spans.tolist(), len(ids))
    kinds = []
    for index in range(len(tokens)):
        if index and targets[index - 1] != -100:
            kinds.append(TRAINED)
        elif index > len(ids):
            kinds.append(PADDING)
        else:
            kinds.append(PROMPT if in_prompt[index] else IGNORED)
    return RowView(row, example.source_row, len(ids), inputs, targets, tokens, kinds)


def _prompt_tokens(spans: Sequence[int], length: int) -> list[bool]:
    """Whether each token, the end-of-text included, belongs to a prompt."""
    flags: list[bool] = []
    for index, count in enumerate(spans):
        flags += [index % 2 == 0] * count
    return (flags + [False] * (length + 1))[: length + 1]


# ------------------------------------------------------------------------------------------------- for the terminal


def render_row(view: RowView, tokenizer: Tokenizer | None) -> Text:
    """The row's text with a marked margin a kind, then a line a column: input, target, and what becomes of it.

    Example:
        >>> print(render_row(view_row(store, 3), None).plain.splitlines()[0])
        row 3, record 3: ... tokens, shown ... wide
    """
    from rich.text import Text

    out = Text()
    out.append(f"row {view.row}, record {view.source_row}: {view.num_tokens} tokens, shown {len(view.inputs)} wide\n")
    for kind in KINDS:
        out.append(f" {MARKS[kind]} {kind}: {view.kinds.count(kind)} ", STYLES[kind])
    out.append("\n\n")
    for kind, start, end in view.runs():
        body = f"({end - start} tokens)"
        if kind != PADDING and tokenizer is not None:
            body = tokenizer.decode(view.tokens[start:end])
        for index, line in enumerate(body.split("\n")):
            out.append(f"{kind if index == 0 else '':>8} {MARKS[kind]} │ {_printable(line)}\n", STYLES[kind])
    out.append(f"\n{'column':>6} {'input':>6} {'':18}    {'target':>6} {'':18} kind\n", "bold")
    for column, (token, target) in enumerate(zip(view.inputs.tolist(), view.targets.tolist(), strict=True)):
        kind = view.kinds[column + 1]
        out.append(f"{column:>6} {token:>6} {_piece(token, tokenizer)} -> ")
        out.append(f"{target:>6} {_piece(target, tokenizer)} {MARKS[kind]} {kind}\n", STYLES[kind])
    return out


def print_row(view: RowView, tokenizer: Tokenizer | None) -> None:
    """`render_row` on standard output, in colour where it is a terminal; lines are left to the terminal to wrap.

    Example:
        >>> print_row(view_row(store, 3), tokenizer_of(store)[0])
        row 3, record 3: ...
    """
    from rich.console import Console

    Console(highlight=False).print(render_row(view, tokenizer), soft_wrap=True, end="")


def _piece(token: int, tokenizer: Tokenizer | None) -> str:
    if token < 0 or tokenizer is None:
        return " " * 18
    return f"{_printable(repr(tokenizer.decode([token]))):<18}"


def _printable(text: str) -> str:
    """Without control characters, which would move the cursor or recolour the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def render_histogram(histogram: Histogram, *, width: int = 50) -> str:
    """A line a bar: the range, the bar, the count.

    Example:
        >>> print(render_histogram(Histogram([0.0, 1.0, 3.0], [1, 4]), width=4))
                    0 │█    1
                  1-2 │████ 4
    """
    tallest = max(histogram.counts)
    lines = []
    for index, count in enumerate(histogram.counts):
        bar = "█" * max(round(count / tallest * width), 1 if count else 0)
        low, high = int(histogram.edges[index]), int(histogram.edges[index + 1]) - 1
        name = f"{low}" if low == high else f"{low}-{high}"
        lines.append(f"{name:>13} │{bar:<{width}} {count:,}")
    return "\n".join(lines)


def summary_of(found: Inspection) -> dict[str, object]:
    """What `print_summary` shows of an inspection.

    Example:
        >>> summary_of(inspect_store(store, progress=False))["rows"]
        600
    """
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
    rows["trained tokens"] = f"{found.trained_tokens:,}"
    rows["trained"] = found.masks.in_words
    if found.options.max_length is not None:
        rows[f"rows cut at {found.options.max_length}"] = found.rows_cut
    named = ", ".join(map(str, found.examples_without_trained))
    more = ", ..." if found.rows_without_trained > len(found.examples_without_trained) else ""
    rows["rows without a trained token"] = f"{found.rows_without_trained:,}" + (f" ({named}{more})" if named else "")
    rows["rows where reference and positional differ"] = found.corner_rows
    unknown = "not recorded"
    rows["boundary mismatches"] = unknown if found.boundary_mismatches is None else found.boundary_mismatches
    rows["records skipped"] = unknown if found.skipped_records is None else found.skipped_records
    return rows
