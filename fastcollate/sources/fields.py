"""The text fields of flat JSON records, found and put into a template without making an object of any of them.

What is not a plain record of texts is left to the parser, which decides what is right and what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcollate.sources.field_kernels import INPUT, INSTRUCTION, NUM_FIELDS, NUM_SCRATCH, OUTPUT, scan_records
from fastcollate.sources.text_kernels import write_texts


class Recipe(NamedTuple):
    """A template of one prompt and one response.

    Attributes:
        instruction, input, output: the names of each field, those to be preferred first.
        head: begins every prompt.
        before_input: stands before an input that is not empty.
        before_output: begins every response.
    """

    instruction: Sequence[str]
    input: Sequence[str]
    output: Sequence[str]
    head: str
    before_input: str
    before_output: str


class FlatRecords:
    """A block of JSON records, scanned.

    Args:
        data: lines of JSON, or the inside of a JSON array.
        in_array: which of the two.
        num_rows: the number of records in it.
        recipe: the fields to find.

    Attributes:
        regular: bool `(num_rows,)`, the records whose texts `write` can write.
        bounds: int64 `(num_rows, 2)`, where each record begins and ends.
        agrees: whether there are as many records as there should be; nothing else means anything where not.
    """

    def __init__(self, data: bytes | memoryview, *, in_array: bool, num_rows: int, recipe: Recipe) -> None:
        self._data = np.frombuffer(data, np.uint8)
        self._recipe = recipe
        fields = {INSTRUCTION: recipe.instruction, INPUT: recipe.input, OUTPUT: recipe.output}
        names = [(name.encode("utf-8", "surrogatepass"), field) for field, given in fields.items() for name in given]
        self.regular = np.zeros(num_rows, np.bool_)
        self.bounds = np.zeros((num_rows, 2), np.int64)
        self._spans = np.empty((num_rows, NUM_FIELDS, 3), np.int64)
        found = scan_records(
            self._data,
            in_array,
            _bytes(b"".join(name for name, _ in names)),
            np.cumsum([len(name) for name, _ in names]),
            np.array([field for _, field in names], np.int64),
            self._spans,
            self.bounds,
            self.regular,
            np.empty(NUM_SCRATCH, np.int64),
        )
        self.agrees = found == num_rows and len({name for name, _ in names}) == len(names) <= 62

    def write(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """The regular records' prompts and responses by turns, end to end as UTF-8, and where each begins.

        Behind the last text the memory may be longer.
        """
        rows = np.flatnonzero(self.regular)
        spans = self._spans[rows]
        head, *before = (_bytes(text.encode()) for text in self._recipe[3:])
        size = len(rows) * (len(head) + len(before[0]) + len(before[1])) + int((spans[..., 1] - spans[..., 0]).sum())
        out = np.empty(size, np.uint8)
        offsets = np.empty(2 * len(rows) + 1, np.int64)
        write_texts(self._data, self._spans, rows, head, before[0], before[1], out, offsets)
        return out, offsets


def _bytes(value: bytes) -> npt.NDArray[Any]:
    return np.frombuffer(value, np.uint8)
