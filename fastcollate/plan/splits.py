"""Which rows of a store are for training, validation and testing: by hash, so that appended records move nobody."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError, integer, shown
from fastcollate.plan.options import Int64Array
from fastcollate.store import Example

_HASH_BYTES = 8


Key = str | Sequence[object] | npt.NDArray[Any] | Callable[[Any], object]


def split_rows(
    store: Sequence[Example] | Any,
    proportions: Mapping[str, float],
    *,
    key: Key = "row",
    seed: int = 0,
) -> dict[str, Int64Array]:
    """Deal a store's rows among splits.

    A row's split follows from a hash (BLAKE2b) of its key alone: it stays where it is when records are appended,
    removed or reordered, and rows of one key (duplicates, say) never straddle two splits. The shares are therefore met
    on average, not to the row: of 10,000 rows a split of 10% gets 1,000, give or take 60.

    Args:
        store: a `TokenStore`, or any sequence of rows.
        proportions: each split's share, such as `{"train": 0.85, "val": 0.05, "test": 0.1}`; they sum to 1. Making
            the last share larger at the cost of the one before moves the fewest rows.
        key: what is hashed: `"row"`, all tokens; `"prompt"`, the first prompt's tokens, so that two answers to one
            question stay together; one value a row, such as a column of problem numbers; or a function of an `Example`.
        seed: another seed deals differently.

    Returns:
        The row numbers of each split, int64, ascending; together each row once.

    Raises:
        InputError: shares that are negative or do not sum to 1, an unknown key, or a number of keys that is not the
            number of rows.

    Example:
        >>> from fastcollate import TokenStore, split_rows
        >>> rows = split_rows(TokenStore("store"), {"train": 0.9, "val": 0.1}, key="prompt")
        >>> {name: len(part) for name, part in rows.items()}
        {'train': 550, 'val': 50}
    """
    edges, seed = _edges(proportions), integer("seed", seed)
    num_rows = len(store)
    hashes = np.fromiter((_hash(data, seed) for data in _key_bytes(store, key)), np.uint64, num_rows)
    chosen = np.searchsorted(edges, hashes, side="right")
    if getattr(store, "kind", "rows") == "pairs":
        chosen[1::2] = chosen[::2]  # both rows of a pair, by the chosen one
    return {name: np.flatnonzero(chosen == index).astype(np.int64) for index, name in enumerate(proportions)}


def _edges(proportions: Mapping[str, float]) -> npt.NDArray[np.uint64]:
    """Where each split but the last ends on the circle of 64-bit hashes."""
    shares = list(proportions.values())
    if not shares or any(not 0 <= share <= 1 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise InputError(f"proportions={dict(proportions)}: give each split's share, 0 to 1, with a sum of 1")
    edges = [min(round(sum(shares[: index + 1]) * 2**64), 2**64 - 1) for index in range(len(shares) - 1)]
    return np.array(edges, np.uint64)


def _hash(data: bytes, seed: int) -> int:
    salt = (seed & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(data, digest_size=_HASH_BYTES, salt=salt).digest(), "little")


def _key_bytes(store: Any, key: Key) -> Iterable[bytes]:
    if isinstance(key, str):
        if key == "row":
            return (_token_bytes(row.input_ids) for row in store)
        if key == "prompt":
            return (_token_bytes(row.input_ids[: int(row.spans[0]) if len(row.spans) else 0]) for row in store)
        raise InputError(f"key={shown(key)}: choose 'row' or 'prompt', or give one value a row, or a function of a row")
    if callable(key):
        return (_value_bytes(key(row)) for row in store)
    if len(key) != len(store):
        raise InputError(f"{len(key)} keys for {len(store)} rows: give one a row (source_row says which record it is)")
    return (_value_bytes(value) for value in key)


def _token_bytes(tokens: npt.NDArray[Any]) -> bytes:
    """The same for a store of uint16 and of uint32."""
    return tokens.astype("<u4").tobytes()


def _value_bytes(value: object) -> bytes:
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, (str, int, bytes)):
        raise InputError(f"the key {shown(value)} is a {type(value).__name__}: give a string or an integer a row")
    return value if isinstance(value, bytes) else f"{type(value).__name__}:{value}".encode("utf-8", "surrogatepass")
