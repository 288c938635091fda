"""Progress and summary tables for every long task, in one look (rich); silent with `--json`.

On a terminal a bar; elsewhere, in a file or a log, a plain line every few seconds.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

_EVERY_S = 5.0  # seconds between two lines, where there is no terminal


@contextmanager
def progress_bar(
    *columns: str, unit: str = "", progress: bool = True, disable: bool | None = None
) -> Iterator[rich_progress.Progress]:
    """A rich progress display on standard error: description, bar, count, its `unit`, then `columns`, then the time.

    Columns are names of task fields, such as `"loss"`, each given as a keyword to `add_task` and `update`. A narrow
    terminal keeps the numbers: the bar shrinks first, then the times go. Where standard error is no terminal, a plain
    line is written every few seconds. Without `progress` (scripts, `--json`) nothing is shown; `disable` is its old
    name, the other way round.

    Example:
        >>> with progress_bar(unit="rows", progress=False) as bar:
        ...     task = bar.add_task("count", total=3)
        ...     for row in range(3):
        ...         bar.update(task, advance=1)
    """
    progress = renamed_switch(progress, old="disable", given=disable)
    console = Console(stderr=True, quiet=not progress)
    numbers = _Numbers(unit, columns, console)
    if progress and not console.is_terminal:
        with _Lines(numbers) as lines:
            yield lines
        return
    bar = rich_progress.BarColumn(bar_width=20)  # the column that shrinks: all others are kept whole
    layout = [rich_progress.TextColumn("{task.description}", table_column=Column(no_wrap=True)), bar, numbers]
    with rich_progress.Progress(*layout, console=console, disable=not progress) as shown:
        yield shown


class _Numbers(rich_progress.ProgressColumn):
    """A task's numbers in one column; what is least missed goes where the terminal is too narrow for all."""

    max_refresh = 0.5  # seconds; the estimate would flicker

    def __init__(self, unit: str, columns: Sequence[str], console: Console) -> None:
        super().__init__(Column(no_wrap=True))
        self._unit, self._columns, self.console = unit, columns, console

    def render(self, task: rich_progress.Task) -> Text:
        """Count, fields, then the times as far as there is room."""
        text, room = self.text(task), self.console.width - len(task.description) - len(" ━━━━ ")
        seconds, left = task.finished_time if task.finished else task.elapsed, task.time_remaining
        for more in (_clock(seconds), f"eta {_clock(left)}"):
            if len(text) + 1 + len(more) <= room and not (task.finished and more.startswith("eta")):
                text = f"{text} {more}"
        return Text(text)

    def text(self, task: rich_progress.Task) -> str:
        """Count and fields."""
        count = f"{int(task.completed):,}" + ("" if task.total is None else f"/{int(task.total):,}")
        fields = (str(task.fields[name]) for name in self._columns)
        return " ".join(filter(None, (count, self._unit, *fields)))


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-:--"
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{hours}:{minutes % 60:02}:{int(seconds) % 60:02}" if hours else f"{minutes}:{int(seconds) % 60:02}"


class _Lines(rich_progress.Progress):
    """The same tasks as plain lines: one every few seconds, and one when a task ends."""

    def __init__(self, numbers: _Numbers) -> None:
        super().__init__(console=numbers.console, disable=True, auto_refresh=False)
        self._numbers, self._told, self._said = numbers, time.monotonic(), ""

    def update(self, task_id: rich_progress.TaskID, **values: Any) -> None:
        """As a bar's; a line where it is time for one."""
        super().update(task_id, **values)
        self._tell(task_id)

    def advance(self, task_id: rich_progress.TaskID, advance: float = 1) -> None:
        """As a bar's; a line where it is time for one."""
        super().advance(task_id, advance)
        self._tell(task_id)

    def stop(self) -> None:
        """The last numbers of each task. There is no display to stop, and rich before 14.3 would end its line."""
        for task in self.tasks:
            self._say(task)

    def _tell(self, task_id: rich_progress.TaskID) -> None:
        if time.monotonic() - self._told >= _EVERY_S:
            self._say(self._tasks[task_id])

    def _say(self, task: rich_progress.Task) -> None:
        line = f"{task.description}: {self._numbers.text(task)}"
        if line != self._said:
            self._told, self._said = time.monotonic(), line
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


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
    table.add_column(justify="right", overflow="fold")  # a digest is of use only whole
    for name, value in rows.items():
        table.add_row(name, _shown(value))
    Console().print(table)


def glyph(preferred: str, plain: str) -> str:
    """A character for standard output, or a plain one where its encoding has no such character.

    Example:
        >>> glyph("█", "#") in "█#"
        True
    """
    try:
        preferred.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return plain
    return preferred


def _shown(value: object) -> str:
    """A number with as many digits as one reads, anything else as it is."""
    if isinstance(value, float):
        return f"{value:,.1f}" if 1000 <= abs(value) < float("inf") else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
