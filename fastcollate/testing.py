"""For tests of your own pipeline: stop it, resume it, also with other numbers of ranks, and see that no row is lost."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch

from fastcollate.errors import InputError, integer

MakeLoader = Callable[[int, int], Any]
RowsOf = Callable[[Any], Iterable[Hashable]]


def assert_resumes(
    make_loader: MakeLoader,
    *,
    world_sizes: Sequence[int] = (1, 2),
    every: int = 1,
    num_rows: int | None = None,
    pad_token_id: int | None = None,
    rows_of: RowsOf | None = None,
) -> None:
    """Assert that a loader, stopped anywhere and resumed with any number of ranks, gives each row once, bit for bit.

    For each number of ranks the epoch runs whole. Then it is stopped behind each `every`-th batch, and new loaders, as
    many as each of the numbers of ranks asks for, load what `state_dict` said, pickled: each its own rank's where there
    are as many ranks, else the first one's. They must give, bit for bit, what the whole run of as many ranks gives from
    there on, and before it the same rows.

    Args:
        make_loader: gives a new loader, or sampler, from `rank` and `num_ranks`. It has `__iter__`, `state_dict` and
            `load_state_dict`. All ranks' batches of a step together must hold the same rows whatever their number: with
            `BatchLoader`, `batch_size=8 // num_ranks`, say, and `tail="uneven"` or `drop_last=True`, since else some
            rows come twice.
        world_sizes: the numbers of ranks.
        every: stop behind each so many-th batch.
        num_rows: rows of an epoch; by default as many as the first number of ranks gives.
        pad_token_id: see `rows_of`.
        rows_of: what a batch holds, row for row, to be told apart and counted; by default the function of this name.

    Raises:
        AssertionError: a row was lost or came twice, or a batch differs; it says where.

    Example:
        >>> from fastcollate import BatchLoader
        >>> from fastcollate.testing import assert_resumes
        >>> def make_loader(rank, num_ranks):
        ...     batch_size = 64 // num_ranks
        ...     return BatchLoader("store", batch_size=batch_size, tail="uneven", rank=rank, world_size=num_ranks)
        >>> assert_resumes(make_loader, world_sizes=(1, 2, 4), every=3, num_rows=600)
    """
    every = integer("every", every, 1)
    sizes = [integer("world_sizes", size, 1) for size in world_sizes]
    if not sizes:
        raise InputError("world_sizes=(): give at least one number of ranks")
    rows_of = rows_of or partial(globals()["rows_of"], pad_token_id=pad_token_id)
    whole = {size: [list(make_loader(rank, size)) for rank in range(size)] for size in sizes}
    rows = {size: _rows_by_step(batches, rows_of) for size, batches in whole.items()}
    _check_whole(rows, num_rows)
    for stopped in sizes:
        num_steps = max(map(len, whole[stopped]))
        for stop in [*range(0, num_steps, every), num_steps]:
            states = _states_behind(make_loader, stopped, stop)
            for resumed in sizes:
                where = f"stopped behind batch {stop} on {stopped} ranks, resumed on {resumed}"
                _check_rows(sum(rows[stopped][:stop], Counter()), sum(rows[resumed][:stop], Counter()), where)
                for rank, batches in enumerate(whole[resumed]):
                    loader = make_loader(rank, resumed)
                    loader.load_state_dict(pickle.loads(states[rank if resumed == stopped else 0]))
                    _check_batches(loader, batches[stop:], f"{where}: rank {rank}, batch {{}}", stop)


def rows_of(batch: Any, *, pad_token_id: int | None = None, ignore_index: int = -100) -> Iterator[Hashable]:
    """The rows of a batch, each as something to compare and count, whatever its padding.

    Args:
        batch: row numbers, such as a batch sampler gives; inputs and targets; a `PackedBatch`; or a mapping with
            `input_ids` and `labels` (and `cu_seq_lens_q`, where rows lie end to end).
        pad_token_id: with it rows are told apart by all of their tokens; else up to their last trained target, so that
            rows without one look the same, and within packs are not seen.
        ignore_index: the target that is not trained.

    Example:
        >>> from fastcollate import collate_fn
        >>> from fastcollate.testing import rows_of
        >>> alone, wide = collate_fn([[5, 6]]), collate_fn([[5, 6], [1, 2, 3, 4]])
        >>> list(rows_of(alone)) == list(rows_of(wide))[:1]
        True
        >>> list(rows_of([7, 3]))
        [7, 3]
    """
    if isinstance(batch, Mapping):
        inputs, targets, bounds = batch["input_ids"], batch["labels"], batch.get("cu_seq_lens_q")
    elif isinstance(batch, Sequence) and len(batch) and isinstance(batch[0], (int, np.integer)):
        yield from map(int, batch)
        return
    else:
        inputs, targets = batch[0], batch[1]
        bounds = getattr(batch, "cu_seqlens_padded", getattr(batch, "cu_seqlens", None))
    inputs, targets = (torch.as_tensor(part).cpu() for part in (inputs, targets))
    packed = bounds is not None
    if bounds is not None:
        cuts = torch.as_tensor(bounds).cpu()[1:-1].tolist()
        inputs, targets = (part.flatten().tensor_split(cuts) for part in (inputs, targets))
    pairs = zip(inputs, targets, strict=True)
    for row, labels in pairs:
        used = (labels != ignore_index) | (False if pad_token_id is None else row != pad_token_id)
        end = int(used.nonzero().max()) + 1 if bool(used.any()) else 0
        if end or not packed:
            yield row.numpy()[:end].tobytes(), labels.numpy()[:end].tobytes()


def _rows_by_step(ranks: Sequence[Sequence[Any]], rows_of: RowsOf) -> list[Counter[Hashable]]:
    """Each step's rows, of all ranks together."""
    steps = zip_longest(*ranks)
    return [Counter(row for batch in step if batch is not None for row in rows_of(batch)) for step in steps]


def _check_whole(rows: Mapping[int, list[Counter[Hashable]]], num_rows: int | None) -> None:
    """The epochs of all numbers of ranks have the same rows, and as many as there are."""
    totals = {size: sum(steps, Counter()) for size, steps in rows.items()}
    first, total = next(iter(totals.items()))
    if num_rows is not None and total.total() != num_rows:
        raise AssertionError(f"an epoch on {first} ranks gives {total.total()} rows, and there are {num_rows}")
    for size, found in totals.items():
        _check_rows(found, total, f"an epoch on {size} ranks beside one on {first}")


def _check_rows(found: Counter[Hashable], wanted: Counter[Hashable], where: str) -> None:
    lost, more = (wanted - found).total(), (found - wanted).total()
    if lost or more:
        raise AssertionError(f"{where}: {lost} rows are lost, and {more} come once too often")


def _states_behind(make_loader: MakeLoader, num_ranks: int, stop: int) -> list[bytes]:
    """The ranks' pickled states behind so many batches."""
    states = []
    for rank in range(num_ranks):
        loader = make_loader(rank, num_ranks)
        batches = iter(loader)
        for _ in islice(batches, stop):
            pass
        states.append(pickle.dumps(loader.state_dict()))
    return states


def _check_batches(found: Iterable[Any], wanted: Sequence[Any], where: str, first: int) -> None:
    nothing = object()
    for number, (batch, other) in enumerate(zip_longest(found, wanted, fillvalue=nothing), first):
        if batch is nothing or other is nothing:
            what = "is missing" if batch is nothing else "is one too many"
            raise AssertionError(f"{where.format(number)} {what}")
        if not _is_same(batch, other):
            raise AssertionError(f"{where.format(number)} is not that of a whole run")


def _is_same(one: Any, other: Any) -> bool:
    """Whether two batches are the same in type, dtype and every bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_is_same(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return bool(one == other)
