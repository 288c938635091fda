"""Documents without padding: every pack as plain Python has it, each token once, the least is cropped."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcollate import BatchLoader
from fastcollate.errors import InputError
from fastcollate.plan.plan import plan_epoch
from fastcollate.store import layout
from tests.helpers import make_store

PAD = END = 50256
Pack = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def documents(lengths: list[int]) -> list[list[int]]:
    """Each begins with its own id, so that a token is known by what it is."""
    return [
        [number % 50000 if place == 0 else (7 * number + place) % 50000 for place in range(n)]
        for number, n in enumerate(lengths)
    ]


def pack_of(parts: list[tuple[list[int], int, int]], capacity: int, *, masked: bool) -> Pack:
    """Inputs, targets, positions and segment ends of parts `(document, first, stop)` in a pack."""
    inputs: list[int] = []
    targets: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    for document, first, stop in parts:
        inputs += document[first:stop]
        targets += [*document, END][first + 1 : stop + 1]
        positions += range(stop - first)
        ends.append(len(inputs))
    if not masked:
        positions, ends = list(range(len(inputs))), [len(inputs)] if inputs else []
    unused = capacity - len(inputs)
    return (
        (*inputs, *[PAD] * unused), (*targets, *[-100] * unused), (*positions, *range(unused)),
        (*ends, *([capacity] if unused else [])),
    )  # fmt: skip


def concatenated(docs: list[list[int]], order: list[int], sizes: list[int]) -> list[list[tuple[list[int], int, int]]]:
    """The stream of documents token by token, cut into packs of these sizes."""
    stream = [(number, place) for number in order for place in range(len(docs[number]))]
    packs = []
    for size in sizes:
        tokens, stream = stream[:size], stream[size:]
        parts: list[tuple[list[int], int, int]] = []
        for number, place in tokens:
            if parts and parts[-1][0] is docs[number] and place:
                parts[-1] = (docs[number], parts[-1][1], place + 1)
            else:
                parts.append((docs[number], place, place + 1))
        packs.append(parts)
    assert not stream
    return packs


def cropped(docs: list[list[int]], order: list[int], capacity: int) -> list[list[tuple[list[int], int, int]]]:
    """The longest that fits, of those the first in order; where none does, the head of the shortest."""
    left = [docs[number] for number in order if docs[number]]
    packs = []
    while left:
        room, parts = capacity, []
        while room and left:
            fitting = [document for document in left if len(document) <= room]
            shortest = min(left, key=lambda one: min(len(one), capacity + 1))
            document = max(fitting, key=len) if fitting else shortest
            stop = min(len(document), room)
            parts.append((document, 0, stop))
            room -= stop
            left = [other for other in left if other is not document]
        packs.append(parts)
    return packs


def packs_of(loader: BatchLoader, capacity: int) -> list[Pack]:
    found = []
    for batch in loader:
        bounds = batch.cu_seqlens.numpy()
        for place, cells in enumerate(zip(*(tensor.tolist() for tensor in batch[:3]), strict=True)):
            own = bounds[(bounds > place * capacity) & (bounds <= (place + 1) * capacity)] - place * capacity
            found.append((*map(tuple, cells), tuple(own.tolist())))
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 12), st.integers(0, 90)), min_size=1, max_size=60), st.integers(1, 33),
    st.integers(1, 3), st.booleans(), st.sampled_from(["concatenate", "crop"]),
)  # fmt: skip
def test_every_pack_is_that_of_plain_python(
    lengths: list[int], capacity: int, batch_size: int, masked: bool, packing: str
) -> None:
    if not sum(lengths):
        return
    docs = documents(lengths)
    options: dict[str, Any] = {"policy": "packed", "packing": packing, "capacity": capacity, "batch_size": batch_size}
    plan = plan_epoch(np.array(lengths), seed=5, **options)
    order = plan.rows_of_parts(0)[0].tolist()
    if packing == "concatenate":
        full, rest = divmod(sum(lengths), capacity)
        wanted = concatenated(docs, order, [capacity] * full + [rest] * (rest > 0))
    else:
        wanted = cropped(docs, order, capacity)
    loader = BatchLoader(make_store(docs), seed=5, prefetch=0, mode="positional", mask_boundaries=masked, **options)
    found = packs_of(loader, capacity)
    assert Counter(found) == Counter(pack_of(parts, capacity, masked=masked) for parts in wanted)
    placed = sum(stop - first for parts in wanted for _, first, stop in parts)
    assert (loader.stats.real_cells, loader.stats.trained_tokens) == (placed, placed)
    assert loader.stats.cut_tokens == sum(lengths) - placed
    assert placed == sum(lengths) or packing == "crop"


@pytest.mark.parametrize("packing", ["concatenate", "crop"])
@pytest.mark.parametrize("tail", ["repeat", "uneven"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_over_windows_and_ranks_each_token_is_there_once(world_size: int, tail: str, packing: str) -> None:
    """Of 500 documents, some far longer than a pack, in windows of 60; all ranks have as many batches.

    Of cropped ones the head of each is there once, or where the last packs hold fewer documents than there are ranks,
    which `tail="repeat"` says, that of some documents once more.
    """
    random = np.random.default_rng(world_size)
    lengths = np.where(random.random(500) < 0.1, random.integers(50, 400, 500), random.integers(0, 40, 500))
    options: dict[str, Any] = {
        "policy": "packed",
        "packing": packing,
        "capacity": 32,
        "batch_size": 2,
        "window": 60,
    }
    seen: Counter[tuple[int, int]] = Counter()
    counts, short = [], 0
    for rank in range(world_size):
        plan = plan_epoch(lengths, world_size=world_size, rank=rank, tail=tail, seed=2, **options)
        counts.append(len(plan))
        for window in range(plan.num_windows):
            packs = plan.packs(window).packs
            for first, stop in zip(packs.bounds[:-1].tolist(), packs.bounds[1:].tolist(), strict=True):
                size = 0
                for row, part in zip(packs.rows[first:stop].tolist(), packs.starts[first:stop].tolist(), strict=True):
                    start = part & layout.FIRST_TOKEN
                    count = part >> layout.COUNT_AT & layout.MOST_TOKENS or int(lengths[row])
                    seen.update((row, place) for place in range(start, start + count))
                    size += count
                assert size <= 32
                short += size < 32
    if packing == "crop" and tail == "repeat":
        repeated = {row for (row, _), times in seen.items() if times > 1}
        assert sum(seen[row, 0] - 1 for row in repeated) < world_size
        assert all(seen[row, place] == seen[row, 0] for row, place in seen)
        seen = Counter(seen.keys())
    kept = lengths if packing == "concatenate" else np.bincount([row for row, _ in seen], minlength=500)
    assert seen == Counter((row, place) for row, n in enumerate(kept.tolist()) for place in range(n))
    assert all((kept > 0) == (lengths > 0))
    assert max(counts) - min(counts) <= (tail == "uneven")
    assert packing == "crop" or short <= plan.num_windows * 2 * world_size


def buffered(lengths: list[int], capacity: int, buffer: int = 1000) -> int:
    """Tokens left out by the same rule over a buffer that is filled up, as nanochat's loader has it."""
    waiting, place, lost = sorted(lengths[:buffer]), buffer, 0
    while waiting:
        room = capacity
        while room and waiting:
            fitting = [i for i, length in enumerate(waiting) if length <= room]
            length = waiting.pop(fitting[-1] if fitting else 0)
            lost += max(length - room, 0)
            room -= min(length, room)
            if place < len(lengths):
                waiting = sorted([*waiting, lengths[place]])
                place += 1
    return lost


@pytest.mark.parametrize("kind", ["short", "mixed", "long"])
def test_no_more_is_cropped_than_with_a_buffer(kind: str) -> None:
    random = np.random.default_rng(3)
    mean = {"short": 4.0, "mixed": 5.2, "long": 6.5}[kind]
    lengths = (np.exp(random.normal(mean, 1.0, 4000)) + 1).astype(np.int64)
    packs = plan_epoch(lengths, policy="packed", packing="crop", capacity=512, batch_size=1).packs(0).packs
    most = packs.starts >> 36 & (2**25 - 1)
    used = np.where(most > 0, most, lengths[packs.rows])
    assert np.unique(packs.rows).size == len(packs.rows) == 4000
    assert lengths.sum() - used.sum() <= buffered(lengths.tolist(), 512)


@pytest.mark.filterwarnings("ignore:.* rows have no trained target")
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=30), st.integers(1, 20), st.data())
def test_with_a_stride_each_target_is_trained_once_behind_its_context(
    lengths: list[int], limit: int, data: st.DataObject
) -> None:
    """Each part is a row's tokens from a multiple of the stride on; but for the first, only its new tokens count."""
    stride = data.draw(st.integers(1, limit))
    if not sum(lengths):
        return
    docs = documents(lengths)
    options: dict[str, Any] = {"policy": "packed", "capacity": 32, "max_length": limit, "long_rows": "split"}
    wanted = Counter()
    for document in docs:
        starts = [0]
        while document and starts[-1] + limit < len(document):
            starts.append(starts[-1] + stride)
        for start in starts if document else []:
            part = document[start : start + limit]
            targets = [*document, END][start + 1 : start + 1 + limit]
            context = limit - stride if start else 0
            wanted[tuple(part), tuple([-100] * min(context, len(part)) + targets[context:])] += 1
    loader = BatchLoader(make_store(docs), batch_size=2, stride=stride, mode="positional", prefetch=0, **options)
    found = Counter()
    for batch in loader:
        bounds, inputs, targets = batch.cu_seqlens.tolist(), batch.inputs.flatten(), batch.targets.flatten()
        for first, stop in pairwise(bounds):
            part = inputs[first:stop].tolist()
            if part[0] != PAD:
                found[tuple(part), tuple(targets[first:stop].tolist())] += 1
    assert found == wanted
    assert loader.stats.trained_tokens == sum(lengths)


def test_mistakes_are_named() -> None:
    options: dict[str, Any]
    for options, message in (
        ({"packing": "crop"}, "policy='packed'"),
        ({"policy": "packed", "capacity": 8, "packing": "cut"}, "packing"),
        ({"policy": "packed", "capacity": 8, "packing": "crop", "long_rows": "split"}, "leave these out"),
        ({"policy": "packed", "capacity": 8, "packing": "crop", "cp_size": 2}, "leave these out"),
        ({"policy": "packed", "capacity": 8, "packing": "concatenate", "max_length": 4}, "leave these out"),
        ({"stride": 4}, "policy='packed'"),
        ({"policy": "packed", "capacity": 8, "stride": 4}, "long_rows='split'"),
        ({"policy": "packed", "capacity": 8, "stride": 9, "long_rows": "split"}, "at most 8"),
        ({"policy": "packed", "capacity": 8, "stride": 0, "long_rows": "split"}, "stride"),
    ):
        with pytest.raises(InputError, match=message):
            plan_epoch([3, 4], batch_size=1, **options)
    with pytest.raises(InputError, match="mask_boundaries"):
        BatchLoader(make_store([[1]]), batch_size=1, policy="packed", capacity=8, cp_size=2, mask_boundaries=False)
    too_many = np.full(1, 2**31 - 1)
    with pytest.raises(InputError, match="raise the capacity"):
        plan_epoch(too_many, policy="packed", packing="concatenate", capacity=1, batch_size=1).packs(0)
