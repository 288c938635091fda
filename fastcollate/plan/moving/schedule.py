"""A table of steps and weights as whole rows of each source in each step, a pure function of the step's number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.errors import LARGEST, InputError, integer
from fastcollate.plan.moving import kernels
from fastcollate.plan.options import Int64Array, PlanOptions

_NUMBER = (int, float, np.number)


class Schedule:
    """How many rows of each source each step has.

    Args:
        table: by step, the sources' shares, each a line of numbers that sum to 1.
        step_rows: rows of a step.
        num_rows: rows of an epoch, whole steps.
    """

    def __init__(self, table: Mapping[int, npt.NDArray[np.float64]], step_rows: int, num_rows: int) -> None:
        self.step_rows, self.steps_an_epoch = step_rows, num_rows // step_rows
        steps = sorted(table)
        lines = steps if steps[0] == 0 else [0, *steps]
        self._lines = np.array(lines, np.int64)
        self._shares = np.array([table[steps[0]], *(table[step] for step in steps[len(steps) + 1 - len(lines) :])])
        self.most: npt.NDArray[np.float64] = self._shares.max(0)  # of each source, the largest share it ever has

    def counts_of_epoch(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """Rows drawn before an epoch, `(num_sources,)`, and in each of its steps, `(num_steps, num_sources)`.

        Example:
            >>> Schedule({0: np.array([1.0, 0.0]), 4: np.array([0.0, 1.0])}, 4, 16).counts_of_epoch(0)[1].tolist()
            [[4, 0], [3, 1], [2, 2], [1, 3]]
        """
        drawn = np.empty(self._shares.shape[1], np.int64)
        counts = np.empty((self.steps_an_epoch, len(drawn)), np.int64)
        exact = self._shares * self.step_rows
        kernels.rows_of_steps(self._lines, exact, self.step_rows, epoch * self.steps_an_epoch, drawn, counts)
        return drawn, counts

    def in_steps(self, drawn: Sequence[Int64Array], counts: Int64Array, key: np.uint64) -> Int64Array:
        """Each source's rows in the steps that have so many of each, shuffled within each step."""
        source = np.repeat(np.tile(np.arange(len(drawn), dtype=np.int16), len(counts)), counts.ravel())
        rows = np.empty(len(source), np.int64)
        for number, own in enumerate(drawn):
            rows[source == number] = own
        with np.errstate(over="ignore"):  # uint64 arithmetic wraps, and plain Python mode would warn of it
            kernels.shuffle_steps(rows, self.step_rows, key)
        return rows

    def check(self, options: PlanOptions) -> None:
        """Refuse batches that do not make up the steps."""
        if options.batch_size is not None and options.policy != "packed":
            group = options.batch_size * options.world_size
            if self.step_rows % group:
                raise InputError(
                    f"a mix of step_rows={self.step_rows} rows a step, and batch_size={options.batch_size} on "
                    f"{options.world_size} ranks takes {group} at once: give step_rows = batch_size * world_size, "
                    "times the batches that an optimizer step accumulates"
                )

    def identity(self) -> dict[str, Any]:
        """What decides the counts, in plain numbers."""
        table = [[step, *shares] for step, shares in zip(self._lines.tolist(), self._shares.tolist(), strict=True)]
        return {"table": table, "step_rows": self.step_rows}


def steps_of(weights: Mapping[Any, Any] | None) -> Mapping[int, Mapping[str, float]] | None:
    """The weights where they are a table by step, else `None`; refuses a step that is none."""
    if not weights or not all(isinstance(line, Mapping) for line in weights.values()):
        return None
    return {integer("a step of weights", step, 0, LARGEST): line for step, line in weights.items()}


def whole_steps(num_rows: int, step_rows: Any, *, is_asked: bool) -> tuple[int, int]:
    """Rows of an epoch and of a step, checked: whole steps, rounded up where the epoch's rows were not asked for."""
    if step_rows is None:
        raise InputError(
            "weights by step: say step_rows, the rows that all ranks together take in an optimizer step (batch_size * "
            "world_size * accumulation; of packs and max_tokens about so many)"
        )
    step_rows = integer("step_rows", step_rows, 1, LARGEST)
    if num_rows % step_rows and is_asked:
        raise InputError(
            f"num_rows={num_rows}: an epoch has whole steps of step_rows={step_rows}; give "
            f"{-(-num_rows // step_rows) * step_rows}"
        )
    return -(-num_rows // step_rows) * step_rows, step_rows


def exact_shares(
    names: Sequence[str], sizes: Sequence[int], weights: Mapping[str, float] | None, temperature: float | None
) -> npt.NDArray[np.float64]:
    """Each source's share, float64, which sum to 1."""
    if weights is not None and temperature is not None:
        raise InputError("give either weights or temperature, not both")
    if weights is not None:
        given = [weights.get(name) for name in names]
        if not all(isinstance(one, _NUMBER) and 0 <= one < np.inf for one in given) or not any(given):
            raise InputError(f"weights={dict(weights)}: give each of {list(names)} a number of 0 or more")
        wanted = np.array(given, np.float64)
    else:
        if temperature is not None and not (isinstance(temperature, _NUMBER) and temperature > 0):
            raise InputError(f"temperature={temperature}: give a positive number; 1 draws in proportion to size")
        wanted = np.array(sizes, np.float64) ** (1 / (temperature or 1.0))
    empty = [name for name, size, want in zip(names, sizes, wanted, strict=True) if want > 0 and size == 0]
    if empty:
        raise InputError(f"nothing to draw: sources without rows {empty}")
    shares: npt.NDArray[np.float64] = wanted / wanted.sum()
    return shares


def whole_shares(shares: npt.NDArray[np.float64], num_rows: int) -> Int64Array:
    """Rows from each source: whole numbers that sum to `num_rows`, by largest remainder."""
    exact = shares * num_rows
    whole: Int64Array = np.floor(exact).astype(np.int64)
    largest = np.argsort(whole - exact, kind="stable")[: num_rows - int(whole.sum())]
    whole[largest] += 1
    return whole
