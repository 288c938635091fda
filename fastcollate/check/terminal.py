"""What `inspect` prints: a row with its marks, bars, and the table of counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcollate.check.counts import IGNORED, KINDS, MARKS, PADDING, PROMPT, TRAINED, Histogram, Inspection, RowView
from fastcollate.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.text import Text

STYLES = {PROMPT: "cyan", TRAINED: "bold green", IGNORED: "red", PADDING: "bright_black"}


def render_row(view: RowView, tokenizer: Tokenizer | None) -> Text:
    """The row's text with a marked margin a kind, then a line a column: input, target, and what becomes of it."""
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
    """`render_row` on standard output, in colour where it is a terminal; lines are left to the terminal to wrap."""
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
    """A line a bar: the range, the bar, the count."""
    tallest = max(histogram.counts)
    lines = []
    for index, count in enumerate(histogram.counts):
        bar = "█" * max(round(count / tallest * width), 1 if count else 0)
        low, high = int(histogram.edges[index]), int(histogram.edges[index + 1]) - 1
        name = f"{low}" if low == high else f"{low}-{high}"
        lines.append(f"{name:>13} │{bar:<{width}} {count:,}")
    return "\n".join(lines)


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
    share = found.trained_tokens / max(found.kept_tokens, 1)
    rows["trained tokens"] = f"{found.trained_tokens:,} ({share:.1%})"
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
