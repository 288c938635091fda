"""Progress bars and summary tables for every long task, in one look (rich); silent with `--json`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Table


@contextmanager
def progress_bar(
    *columns: str, unit: str = "", progress: bool = True, disable: bool | None = None
) -> Iterator[rich_progress.Progress]:
    """A rich progress display on standard error: description, bar, count, its `unit`, time, then `columns`.

    Columns are names of task fields, such as `"loss"`, each given as a keyword to `add_task` and `update`. Without
    `progress` (scripts, `--json`) nothing is shown; `disable` is its old name, the other way round.

    Example:
        >>> with progress_bar(unit="rows", progress=False) as bar:
        ...     task = bar.add_task("count", total=3)
        ...     for row in range(3):
        ...         bar.update(task, advance=1)
    """
    progress = renamed_switch(progress, old="disable", given=disable)
    layout: list[str | rich_progress.ProgressColumn] = [
        "{task.description}", rich_progress.BarColumn(bar_width=20), rich_progress.MofNCompleteColumn(),
        *[unit] * bool(unit), rich_progress.TimeElapsedColumn(), "eta", rich_progress.TimeRemainingColumn(compact=True),
        *(f"{{task.fields[{name}]}}" for name in columns),
    ]  # fmt: skip
    with rich_progress.Progress(*layout, console=Console(stderr=True, quiet=not progress), disable=not progress) as bar:
        yield bar


def renamed_switch(progress: bool, *, old: str, given: bool | None) -> bool:
    """`progress`, or what its old name says: `show` means the same, `silent` and `disable` the contrary."""
    if given is None:
        return progress
    warnings.warn(
        f"{old}={given} is now progress={given if old == 'show' else not given}; the old name goes with the next "
        "release",
        FutureWarning,
        stacklevel=3,
    )
    return given if old == "show" else not given


def print_summary(title: str, rows: Mapping[str, object]) -> None:
    """Print a two-column table on standard output: a name and its value a line."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, _shown(value))
    Console().print(table)


def _shown(value: object) -> str:
    """A number with as many digits as one reads, anything else as it is."""
    if isinstance(value, float):
        return f"{value:,.1f}" if 1000 <= abs(value) < float("inf") else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
