"""Plans that count what padding to a multiple adds: widths under `max_tokens`, and rows of packs under `cp_size`."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcollate import BucketBatchSampler, pack_lengths, plan_epoch
from fastcollate.errors import InputError

lengths_of_rows = st.lists(st.integers(0, 60), min_size=1, max_size=120)


def up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


@given(lengths_of_rows, st.integers(1, 40), st.sampled_from(["bucketed", "shuffled", "sequential"]), st.integers(1, 3))
def test_max_tokens_counts_the_padding(lengths: list[int], multiple: int, policy: str, world_size: int) -> None:
    most = up(max(*lengths, 1), multiple) + 50
    options: dict[str, Any] = {"policy": policy, "max_tokens": most, "tail": "uneven", "world_size": world_size}
    seen: list[int] = []
    for rank in range(world_size):
        batches = [rows.tolist() for rows in plan_epoch(lengths, rank=rank, pad_to_multiple_of=multiple, **options)]
        assert all(len(rows) * up(max(lengths[row] for row in rows), multiple) <= most for rows in batches)
        seen += [row for rows in batches for row in rows]
        plain = [rows.tolist() for rows in plan_epoch(lengths, rank=rank, **options)]
        assert plain == [rows.tolist() for rows in plan_epoch(lengths, rank=rank, pad_to_multiple_of=1, **options)]
    assert sorted(seen) == list(range(len(lengths)))


@given(lengths_of_rows, st.integers(1, 40), st.integers(1, 9))
def test_rows_by_number_lie_as_without(lengths: list[int], multiple: int, batch_size: int) -> None:
    padded = plan_epoch(lengths, batch_size=batch_size, pad_to_multiple_of=multiple)
    assert [a.tolist() for a in padded] == [b.tolist() for b in plan_epoch(lengths, batch_size=batch_size)]


@pytest.mark.parametrize("multiple", [1, 16, 64])
def test_the_largest_step_is_the_one_of_most_padded_cells(multiple: int) -> None:
    lengths = np.random.default_rng(multiple).integers(1, 60, 500)
    plan = list(plan_epoch(lengths, max_tokens=300, pad_to_multiple_of=multiple, longest_first=True))
    cells = [len(rows) * up(int(lengths[rows].max()), multiple) for rows in plan]
    assert cells[0] == max(cells)


def test_a_row_that_only_its_padding_makes_too_long() -> None:
    for use in (plan_epoch, BucketBatchSampler):
        make: Any = use
        assert len(list(make([30, 40], max_tokens=48, pad_to_multiple_of=16))) == 2
        with pytest.raises(InputError, match=r"row 1 has 40 tokens \(padded to a multiple of 16\), more than max_tok"):
            list(make([30, 40], max_tokens=47, pad_to_multiple_of=16))


@given(
    lengths_of_rows, st.integers(1, 5), st.sampled_from(["truncate", "split", "drop"]),
    st.one_of(st.none(), st.integers(1, 50)), st.integers(0, 5),
)  # fmt: skip
def test_padded_rows_fit_their_pack(
    lengths: list[int], cp_size: int, long_rows: str, limit: int | None, more: int
) -> None:
    capacity = up(30, 2 * cp_size) + more * 2 * cp_size
    plan = plan_epoch(
        lengths, policy="packed", batch_size=1, capacity=capacity, cp_size=cp_size, max_length=limit,
        long_rows=long_rows, window=1000, tail="uneven",
    )  # fmt: skip
    most = min(limit or capacity, capacity)
    seen, cells = [], []
    packs = plan.packs(0).packs
    for start, stop in pairwise(packs.bounds.tolist()):
        rows = packs.rows[start:stop].tolist()
        firsts = packs.starts[start:stop].tolist() if len(packs.starts) else [0] * len(rows)
        parts = [min(lengths[row] - first, most) for row, first in zip(rows, firsts, strict=True)]
        assert sum(up(part, 2 * cp_size) for part in parts) <= capacity
        cells += [up(part, 2 * cp_size) for part in parts]
        seen += rows
    wanted = range(len(lengths)) if long_rows != "drop" else [i for i, n in enumerate(lengths) if n <= most]
    assert sorted(set(seen)) == list(wanted)
    assert len(seen) == len(set(seen)) or long_rows == "split"
    assert packs.num_packs == pack_lengths(cells, capacity).num_bins


def test_sizes_that_do_not_divide() -> None:
    packed: dict[str, Any] = {"policy": "packed", "batch_size": 1}
    with pytest.raises(
        InputError, match=r"capacity=100 is no multiple of 48, .*=16 and cp_size=3 .* give capacity=144"
    ):
        plan_epoch([1], **packed, capacity=100, pad_to_multiple_of=16, cp_size=3)
    with pytest.raises(InputError, match=r"capacity=30 is no multiple of 4, .*=None and cp_size=2"):
        plan_epoch([1], **packed, max_length=30, cp_size=2)
    assert plan_epoch([1], **packed, max_length=30, capacity=32, cp_size=2).capacity == 32
    with pytest.raises(InputError, match=r"^cp_size=2: for policy='packed' only"):
        plan_epoch([1], batch_size=1, cp_size=2)
    for name in ("pad_to_multiple_of", "cp_size"):
        for value in (0, -1, 1.5, True, 1 << 25):
            options: Any = {**packed, "capacity": 64, name: value}
            with pytest.raises(InputError, match=name):
                plan_epoch([1], **options)


def test_a_state_from_before_these_options_goes_on() -> None:
    sampler = BucketBatchSampler([9, 1, 8, 2], batch_size=2)
    sampler.set_position(0, 1)
    state = json.loads(json.dumps(sampler.state_dict()))
    rest = list(sampler)
    newer = ("pad_to_multiple_of", "cp_size", "balance", "accumulation", "cost")
    older = {name: value for name, value in state.items() if name not in newer} | {"version": 3}
    again = BucketBatchSampler([9, 1, 8, 2], batch_size=2)
    again.load_state_dict(older)
    assert list(again) == rest
    with pytest.raises(InputError, match="has pad_to_multiple_of=None, this sampler 8"):
        BucketBatchSampler([9, 1, 8, 2], batch_size=2, pad_to_multiple_of=8).load_state_dict(older)
