"""Progress bars and summary tables for every long task, in one look (rich); silent with `--json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def progress_bar(*columns: str, unit: str = "", disable: bool = False) -> Iterator[Progress]:
    """A rich progress display on standard error: description, bar, count, time, then `columns`.

    Args:
        columns: names of task fields to show at the end of the line, such as `"loss"`; each must be given as a
            keyword to `add_task` and `update`.
        unit: what is counted, shown behind the count (`records`, `batches`).
        disable: show nothing (scripts, `--json`).
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    layout: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
    ]
    if unit:
        layout.append(TextColumn(unit))
    layout += [TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(compact=True)]
    layout += [TextColumn(f"{{task.fields[{name}]}}") for name in columns]
    with Progress(*layout, console=Console(stderr=True), disable=disable) as progress:
        yield progress


def print_summary(title: str, rows: Mapping[str, object]) -> None:
    """Print a two-column table on standard output: a name and its value a line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    Console().print(table)
