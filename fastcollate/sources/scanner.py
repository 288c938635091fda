"""Where the elements of a JSON array part, found without parsing them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_QUOTE, _OPEN, _CLOSE, _COMMA = 1, 2, 3, 4
_KIND = np.zeros(256, np.uint8)
_KIND[ord('"')] = _QUOTE
_KIND[[ord("["), ord("{")]] = _OPEN
_KIND[[ord("]"), ord("}")]] = _CLOSE
_KIND[ord(",")] = _COMMA


class ArrayScan(NamedTuple):
    """Positions in a piece of a JSON array: the commas between its elements, and its closing bracket if it is there."""

    commas: list[int]
    end: int | None


def scan_array(data: bytes | memoryview) -> ArrayScan:
    """Scan a piece of a JSON array that begins inside the array and outside every element.

    Strings, escapes and nesting are followed exactly; nothing else of the grammar is checked.
    """
    values = np.frombuffer(data, np.uint8)
    kinds = _KIND[values]
    places = np.flatnonzero(kinds)
    kinds = kinds[places]
    escaped = _escaped_quotes(values, places[kinds == _QUOTE])
    if len(escaped):
        keep = ~np.isin(places, escaped, assume_unique=True)
        places, kinds = places[keep], kinds[keep]
    outside = np.cumsum(kinds == _QUOTE, dtype=np.int32) % 2 == 0
    places, kinds = places[outside], kinds[outside]  # closing quotes stay, and count for nothing
    depth = 1 + np.cumsum((kinds == _OPEN).astype(np.int32) - (kinds == _CLOSE))
    ends = np.flatnonzero(depth == 0)
    if len(ends):
        places, kinds, depth = places[: ends[0] + 1], kinds[: ends[0] + 1], depth[: ends[0] + 1]
    commas = places[(kinds == _COMMA) & (depth == 1)].tolist()
    return ArrayScan(commas, int(places[-1]) if len(ends) else None)


def _escaped_quotes(values: npt.NDArray[np.uint8], quotes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The quotes that stand behind an odd number of backslashes."""
    behind: npt.NDArray[Any] = quotes[(quotes > 0) & (values[np.maximum(quotes - 1, 0)] == ord("\\"))]
    if not len(behind):
        return behind
    slashes = np.flatnonzero(values == ord("\\"))
    is_start = np.ones(len(slashes), bool)
    is_start[1:] = np.diff(slashes) != 1
    run_start = np.maximum.accumulate(np.where(is_start, np.arange(len(slashes)), 0))
    last = np.searchsorted(slashes, behind - 1)
    escaped: npt.NDArray[Any] = behind[(last - run_start[last] + 1) % 2 == 1]
    return escaped
