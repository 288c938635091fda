"""The drop-in for the chapter's collates: rows of a list, arrays or tensors to batches."""

from __future__ import annotations

import array
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch

from fastcollate.collate import fill as kernels
from fastcollate.collate.batch import Batch
from fastcollate.collate.collator import Int64Array, fits_int64, make_batch
from fastcollate.collate.settings import MASK, clamped, make_settings
from fastcollate.errors import InputError, shown

_TOKENS = {4: np.uint32(0), 8: np.int64(0)}
_ZERO = np.int64(0)
_NO_CELLS: Int64Array = np.array([], np.int64)


class _Rows(NamedTuple):
    """Rows that a caller handed in, as one shard."""

    input_ids: npt.NDArray[Any]
    offsets: Int64Array
    spans: npt.NDArray[Any]
    span_offsets: Int64Array


def collate_fn(
    batch: Sequence[Any],
    pad_token_id: int = 50256,
    ignore_index: int = -100,
    allowed_max_length: int | None = None,
    device: torch.device | str = "cpu",
    *,
    mode: str = "reference",
    pad_to_multiple_of: int | None = None,
) -> Batch:
    """The drop-in for the chapter's `custom_collate_fn` and `custom_collate_with_masking_fn`.

    Works as `DataLoader(..., collate_fn=partial(fastcollate.collate_fn, device=..., allowed_max_length=1024))`, also
    inside worker processes.

    Args:
        batch: rows of token ids without the end-of-text (lists, tuples, integer arrays or tensors, or dicts of them
            as `input_ids`), or pairs of prompt length and row, whose prompts are then masked.
        pad_token_id: appended to each row as end-of-text, and the padding.
        ignore_index: replaces padding in the targets.
        allowed_max_length: columns kept, as a Python slice `[:allowed_max_length]` keeps them; `None` keeps all.
        device: where the tensors go.
        mode: `"reference"` reproduces the chapter's functions bit for bit; `"positional"` tells padding by position,
            always trains the end-of-text, takes a prompt length below 1 for no prompt, and masks prompts with
            `ignore_index`.
        pad_to_multiple_of: padding is added, beyond the limit too, until the width is a multiple of this.

    Returns:
        inputs and targets, int64 `(rows, width)` each.

    Raises:
        InputError: the batch is empty, a row is not made of integers, or an option is wrong.

    Example:
        >>> from fastcollate import collate_fn
        >>> inputs, targets = collate_fn([[5, 6, 7], [8]], allowed_max_length=1024)
        >>> inputs
        tensor([[    5,     6,     7],
                [    8, 50256, 50256]])
        >>> targets
        tensor([[    6,     7, 50256],
                [50256,  -100,  -100]])

        With prompt lengths, only what follows the prompt is trained:

        >>> collate_fn([(2, [5, 6, 7]), (1, [8, 9])]).targets
        tensor([[ -100,     7, 50256],
                [    9, 50256,  -100]])
    """
    if len(batch) == 0:
        raise InputError("the batch has no rows; a data set of length 0, or a sampler that yields nothing")
    if isinstance(batch[0], Mapping):
        batch = [_ids_of(row, index) for index, row in enumerate(batch)]
    pairs = _is_pair(batch[0])
    rows = _read_lists(batch, pairs) or _read_arrays(batch, pairs)
    settings = make_settings(
        pad_token_id=_index(pad_token_id, "pad_token_id"),
        ignore_index=_index(ignore_index, "ignore_index"),
        limit=None if allowed_max_length is None else _index(allowed_max_length, "allowed_max_length"),
        mask_prompt=pairs,
        mode=mode,
        truncation="right",
        pad_to_multiple_of=pad_to_multiple_of,
    )
    inputs, targets = _collate_rows(rows, settings)
    if str(device) != "cpu":
        return Batch(inputs.to(device), targets.to(device))
    return Batch(inputs, targets)


def _ids_of(row: Any, index: int) -> Any:
    """The ids of a row that is a mapping; refuses what would be passed over in silence."""
    where = f"row {index} of the batch"
    if not isinstance(row, Mapping) or "input_ids" not in row:
        raise InputError(f"{where} holds {shown(row)}: give each row as token ids, or as a dict with 'input_ids'")
    if not all(row.get("attention_mask", ())):
        raise InputError(f"{where}: an attention_mask with zeros; give rows without padding")
    if others := [name for name in row if name not in ("input_ids", "attention_mask")]:
        raise InputError(
            f"{where}: {', '.join(map(repr, others))} would be passed over; give (prompt length, ids) pairs for what "
            "is trained, or use fastcollate.integrations.huggingface.DataCollator, which honours labels"
        )
    return row["input_ids"]


def _collate_rows(rows: _Rows, settings: Int64Array) -> Batch:
    num_rows = len(rows.offsets) - 1
    table = np.array(
        [
            [
                0, 0, num_rows, _address(rows.input_ids), len(rows.input_ids), rows.input_ids.itemsize,
                _address(rows.offsets), _address(rows.spans), len(rows.spans), rows.spans.itemsize,
                _address(rows.span_offsets),
            ]
        ],
        np.int64,
    )  # fmt: skip
    numbers = rows.span_offsets[:num_rows]  # 0, 1, 2, ...
    types = _TOKENS[rows.input_ids.itemsize], _ZERO, _ZERO if settings[MASK] else None
    width, middle, end = kernels.fill_padded(table, settings, numbers, _NO_CELLS, *types)
    out = np.empty(end, np.int64)
    width, middle, end = kernels.fill_padded(table, settings, numbers, out, *types)
    assert width >= 0
    return make_batch(out, out.dtype, num_rows, width, 0, middle)


def _address(array: npt.NDArray[Any]) -> int:
    """What `array.ctypes.data` is, in a third of the time."""
    address: int = array.__array_interface__["data"][0]
    return address


def _is_pair(row: Any) -> bool:
    """Whether a row is `(prompt length, ids)`; a row of two ids has a number in second place."""
    return isinstance(row, (tuple, list)) and len(row) == 2 and hasattr(row[1], "__len__") and _is_scalar(row[0])


def _is_scalar(value: Any) -> bool:
    return isinstance(value, SupportsIndex) and getattr(value, "ndim", 0) == 0


def _read_lists(batch: Sequence[Any], pairs: bool) -> _Rows | None:
    """Rows that are lists of ids, or `None` where some are something else, or beyond 32 bits.

    Three nanoseconds an integer by way of `array.array`, a quarter of what `numpy.array` takes.
    """
    ids, bounds, prompts = array.array("I"), [0], []
    try:
        for row in batch:
            if pairs:
                prompt, row = row
                prompts.append(operator.index(prompt))
            ids.fromlist(row)
            bounds.append(len(ids))
        spans = np.array(prompts, np.int64) if pairs else np.zeros(len(batch), np.int64)
    except (TypeError, ValueError, OverflowError):
        return None
    return _Rows(np.frombuffer(ids, np.uint32), np.array(bounds), spans, np.arange(len(bounds)))


def _read_arrays(batch: Sequence[Any], pairs: bool) -> _Rows:
    """Rows of any kind; slower than `_read_lists`, and says what is wrong with a row that is none."""
    rows = []
    prompts = np.zeros(len(batch), np.int64)
    for index, row in enumerate(batch):
        if pairs != _is_pair(row):
            raise InputError(f"row {index} of the batch: rows and (prompt length, row) pairs cannot be mixed")
        if pairs:
            prompts[index] = clamped(_index(row[0], f"row {index} of the batch: the prompt length"))
            row = row[1]
        rows.append(_as_ids(row, index))
    bounds = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=bounds[1:])
    tokens = np.concatenate(rows, dtype=np.int64, casting="same_kind")
    return _Rows(tokens, bounds, prompts, np.arange(len(bounds)))


def _as_ids(row: Any, index: int) -> npt.NDArray[Any]:
    try:
        array = row.numpy(force=True) if isinstance(row, torch.Tensor) else np.asarray(row)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"row {index} of the batch is not a sequence of token ids: {error}") from error
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int64)
    if array.ndim != 1 or not fits_int64(array):
        raise InputError(
            f"row {index} of the batch is {array.dtype} of shape {array.shape}: give a flat sequence of integer ids"
        )
    return array


def _index(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise InputError(f"{name} is {shown(value)}: give an integer") from error
