"""How a batch is filled, in numbers that the kernels read.

**Settings** are int64 `(NUM_SETTINGS,)`, named below.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastcollate.errors import LARGEST_CAPACITY, InputError, choice, integer, shown

_SETTINGS = range(12)
PAD, IGNORE, LIMIT, MASK, REFERENCE, LEFT, END_ID, MULTIPLE, CP_SIZE, MAX_SEGMENTS, ACROSS, STRIDE = _SETTINGS
NUM_SETTINGS = len(_SETTINGS)
NO_LIMIT = 2**62
MASKED = -100  # what the reference writes over prompts, whatever `ignore_index` is

MODES = ("reference", "positional")
TRUNCATIONS = ("right", "left")
ENDS = ("append", "in_row")


def ends_of(end: str | Sequence[str], num_shards: int) -> tuple[str, ...]:
    """How the rows of each shard end, where all end alike, or as given for each."""
    ends = (end,) * num_shards if isinstance(end, str) else tuple(end)
    if len(ends) != num_shards:
        raise InputError(f"{len(ends)} ends of {num_shards} shards: give one for each, or one for all")
    for word in ends:
        choice("end", word, ENDS)
    return ends


def clamped(number: int) -> int:
    """A length as a Python slice takes it: what lies beyond any row is all the same."""
    return min(max(number, -NO_LIMIT), NO_LIMIT)


@functools.lru_cache(maxsize=64)
def make_settings(
    *,
    pad_token_id: int,
    ignore_index: int,
    limit: int | None,
    mask_prompt: bool,
    mode: str,
    truncation: str,
    end_token_id: int | None = None,
    end: str = "append",
    pad_to_multiple_of: int | None = None,
    cp_size: int | None = None,
    max_segments: int | None = None,
    mask_boundaries: bool = True,
    stride: int | None = None,
) -> npt.NDArray[np.int64]:
    """The settings that the kernels read; refuses a word that is not known, and numbers beyond 64 bits."""
    for name, word, known in (("mode", mode, MODES), ("truncation", truncation, TRUNCATIONS), ("end", end, ENDS)):
        choice(name, word, known)
    if end == "in_row" and mode == "reference":
        raise InputError(
            "mode='reference' of rows that hold their own end: the chapter's collate appends one to each row, so it "
            "knows no such rows; leave mode out, or give mode='positional'"
        )
    settings = np.zeros(NUM_SETTINGS, np.int64)
    for name, column, value in (
        ("pad_token_id", PAD, pad_token_id),
        ("end_token_id", END_ID, pad_token_id if end_token_id is None else end_token_id),
        ("ignore_index", IGNORE, ignore_index),
        ("the limit", LIMIT, NO_LIMIT if limit is None else limit),
    ):
        try:
            number = operator.index(value)
            settings[column] = clamped(number) if column == LIMIT else number
        except (OverflowError, TypeError, ValueError) as error:
            raise InputError(f"{name} is {shown(value)}: give an integer of at most 64 bits") from error
    settings[MULTIPLE] = 1  # the others are 0 where they are not asked for
    for name, column, size in (
        ("pad_to_multiple_of", MULTIPLE, pad_to_multiple_of),
        ("cp_size", CP_SIZE, cp_size),
        ("max_segments", MAX_SEGMENTS, max_segments),
        ("stride", STRIDE, stride),
    ):
        if size is not None:
            settings[column] = integer(name, size, 1, LARGEST_CAPACITY)
    settings[MASK] = mask_prompt
    settings[ACROSS] = not mask_boundaries
    if not mask_boundaries and cp_size is not None:
        raise InputError(
            f"mask_boundaries=False with cp_size={cp_size}: there each row is split by itself; leave one out"
        )
    settings[REFERENCE] = mode == "reference"
    settings[LEFT] = truncation == "left"
    settings.flags.writeable = False
    return settings
