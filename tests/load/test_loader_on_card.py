"""Faults that only a card shows, in the loader; those that make sense without one run on the CPU too."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from typing import Any

import pytest
import torch

from fastcollate.check.counts import packed_batches
from fastcollate.collate.reference import custom_collate_fn, custom_collate_with_masking_fn, put_end_to_end
from fastcollate.errors import InputError
from fastcollate.load import prefetch as prefetch_room
from fastcollate.load.cuda import ToCuda
from fastcollate.load.loader import BatchLoader
from fastcollate.plan.plan import plan_epoch
from tests.helpers import DEVICES, make_store
from tests.load.test_transfer import OPTIONS, POISON, ROWS, expected_batches, rows_of, same

BUCKETED: dict[str, Any] = {**OPTIONS, "policy": "bucketed"}
PACKED: dict[str, Any] = {"policy": "packed", "batch_size": 2, "capacity": 256, "max_length": 100, "seed": 4}
both_policies = pytest.mark.parametrize("options", [BUCKETED, PACKED], ids=["bucketed", "packed"])
on_both = pytest.mark.parametrize("device", DEVICES)


def on_host(batches: Any) -> list[list[torch.Tensor]]:
    return [[tensor.cpu().clone() for tensor in batch] for batch in batches]


def all_same(found: Any, expected: Any) -> bool:
    return all(same(a, b) for a, b in zip(found, expected, strict=True))


def held(device: str) -> int:
    """Bytes of the device's memory that somebody refers to."""
    gc.collect()
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    return int(torch.cuda.memory_allocated())


def reference_batches(mask_prompt: bool, prompts: list[int], **options: Any) -> list[tuple[torch.Tensor, ...]]:
    """What the reference makes of an epoch's plan."""
    limit, capacity = options.get("max_length"), options.get("capacity")

    def collated(rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if mask_prompt:
            pairs = [(prompts[row], ROWS[row]) for row in rows]
            return custom_collate_with_masking_fn(pairs, allowed_max_length=limit)
        return custom_collate_fn([ROWS[row] for row in rows], allowed_max_length=limit)

    plan = plan_epoch([len(row) for row in ROWS], **options)
    if capacity is None:
        return [collated(rows) for rows in plan]
    found = []
    for rows, _, bounds in packed_batches(plan):
        alone = [collated([row]) for row in rows]
        packs = [alone[start:stop] for start, stop in itertools.pairwise(bounds.tolist())]
        found.append(put_end_to_end(packs, capacity, limit))
    return found


@on_both
@pytest.mark.parametrize("mask_prompt", [False, True])
@pytest.mark.parametrize("policy", ["sequential", "shuffled", "bucketed", "packed"])
def test_every_batch_equals_the_reference(device: str, policy: str, mask_prompt: bool) -> None:
    options = PACKED if policy == "packed" else {**OPTIONS, "policy": policy}
    prompts = [len(row) // 3 + 1 for row in ROWS]
    store = make_store(ROWS, [[n, len(row) - n] for n, row in zip(prompts, ROWS, strict=True)])
    loader = BatchLoader(store, device=device, mask_prompt=mask_prompt, prefetch=3, num_threads=2, **options)
    for epoch in range(3):
        batches = list(loader)  # each kept while the others come
        assert {tensor.device.type for batch in batches for tensor in batch} == {device}
        assert all_same(batches, reference_batches(mask_prompt, prompts, epoch=epoch, **options))


@pytest.mark.slow
@on_both
def test_narrow_inputs_keep_their_type_and_place(device: str) -> None:
    options = {**PACKED, "inputs_dtype": torch.int32}
    assert all_same(
        BatchLoader(make_store(ROWS), device=device, **options),
        on_host(BatchLoader(make_store(ROWS), prefetch=0, **options)),
    )


@on_both
@pytest.mark.parametrize("prefetch", range(9))
@both_policies
def test_any_prefetch_gives_the_same_batches(device: str, prefetch: int, options: dict[str, Any]) -> None:
    expected = on_host(BatchLoader(make_store(ROWS), prefetch=0, **options))
    loader = BatchLoader(make_store(ROWS), device=device, prefetch=prefetch, **options)
    for _ in range(2):
        assert all_same(on_host(loader), expected)
        loader.set_epoch(0)


@on_both
def test_a_batch_stays_while_ten_more_come(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch_room, "GROUP_CELLS", 2000)
    expected = expected_batches(**OPTIONS)
    batches = iter(BatchLoader(make_store(ROWS), device=device, prefetch=3, **OPTIONS))
    for number in range(0, 44, 11):
        kept = next(batches)
        for _ in range(10):
            next(batches)
        assert same(kept, expected[number])


@on_both
def test_two_loaders_at_once_do_not_meet(device: str) -> None:
    first, second = (BatchLoader(make_store(ROWS), device=device, **{**OPTIONS, "seed": seed}) for seed in (4, 9))
    pairs = [on_host(pair) for pair in zip(first, second, strict=True)]
    assert all_same([a for a, _ in pairs], expected_batches(**{**OPTIONS, "seed": 4}))
    assert all_same([b for _, b in pairs], expected_batches(**{**OPTIONS, "seed": 9}))


@on_both
def test_two_loaders_in_threads_do_not_meet(device: str) -> None:
    found: dict[int, Any] = {}

    def run(seed: int) -> None:
        found[seed] = on_host(BatchLoader(make_store(ROWS), device=device, **{**OPTIONS, "seed": seed}))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for seed in (1, 2):
        assert all_same(found[seed], expected_batches(**{**OPTIONS, "seed": seed}))


@pytest.mark.slow
@on_both
@both_policies
def test_leaving_early_gives_the_memory_back(
    device: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch_room, "GROUP_CELLS", 4000)
    before = held(device)
    loader = BatchLoader(make_store(ROWS), device=device, prefetch=4, **options)
    for steps in (1, 2, 7):
        for _ in itertools.islice(loader, steps):
            pass
        del _
        assert held(device) == before
        loader.set_epoch(0)
    assert all_same(on_host(loader), on_host(BatchLoader(make_store(ROWS), prefetch=0, **options)))
    assert held(device) == before


@pytest.mark.slow
@on_both
def test_an_error_of_the_consumer_leaves_nothing_behind(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch_room, "GROUP_CELLS", 2000)
    loader = BatchLoader(make_store(ROWS), device=device, prefetch=4, **OPTIONS)
    before = held(device)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            fail_at_the_sixth(loader)
        assert held(device) == before
        loader.set_epoch(0)
    assert all_same(on_host(loader), expected_batches(**OPTIONS))


def fail_at_the_sixth(loader: BatchLoader) -> None:
    for number, _ in enumerate(loader):
        1 / (5 - number)


@pytest.mark.slow
@on_both
def test_an_error_of_the_store_leaves_nothing_behind(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch_room, "GROUP_CELLS", 500)  # copies of the groups before it are under way
    options, store = {**OPTIONS, "policy": "sequential"}, make_store(ROWS)
    right, store.shards[0].offsets[60] = store.shards[0].offsets[60], -1
    loader = BatchLoader(store, device=device, prefetch=4, **options)
    before = held(device)
    for _ in range(3):
        assert "row 59" in error_of(loader)
        assert held(device) == before
        loader.set_epoch(0)
    store.shards[0].offsets[60] = right
    assert all_same(on_host(loader), expected_batches(**options))


def error_of(loader: BatchLoader) -> str:
    """The text alone: the error itself holds on to what it passed through."""
    with pytest.raises(InputError) as found:
        list(loader)
    return str(found.value)


@pytest.mark.cuda
class TestOnCard:
    @both_policies
    @pytest.mark.parametrize("stream_of_its_own", [False, True])
    def test_a_slow_consumer_never_sees_a_poisoned_buffer(
        self, stream_of_its_own: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(prefetch_room, "GROUP_CELLS", 4000)
        taken = ToCuda.take

        def take_poisoned(self: ToCuda, num_cells: int) -> Any:
            buffer = taken(self, num_cells)
            buffer.fill(POISON)  # a copy under way would copy this
            time.sleep(0.001)
            return buffer

        monkeypatch.setattr(ToCuda, "take", take_poisoned)
        expected = on_host(BatchLoader(make_store(ROWS), prefetch=0, **options))
        stream = torch.cuda.Stream() if stream_of_its_own else torch.cuda.current_stream()
        loader = BatchLoader(make_store(ROWS), device="cuda", prefetch=4, **options)
        found = []
        with torch.cuda.stream(stream):
            for batch in loader:
                # The stream is far behind the loop: by the time it reads the batch, Python has let go of it, and its
                # memory would long be used for later copies, were it not for `record_stream`.
                torch.cuda._sleep(3_000_000)
                found.append([tensor.clone() for tensor in batch])
                del batch
        torch.cuda.synchronize()
        assert all_same(found, expected)

    def test_buffers_are_pinned_and_copied_on_a_stream_of_their_own(self) -> None:
        loader = BatchLoader(make_store(ROWS), device="cuda", **OPTIONS)
        for _ in loader:
            pass
        own = loader._own_transfer()
        assert isinstance(own, ToCuda)
        assert own._stream != torch.cuda.default_stream()
        assert len(own._free) >= 1
        assert all(slot.host.is_pinned() for slot in own._free)
        assert not own._taken
        assert loader.stats.h2d_bytes == 8 * (loader.stats.real_cells + loader.stats.padded_cells) * 2

    def test_the_buffers_of_a_loader_are_recycled(self) -> None:
        loader = BatchLoader(make_store(ROWS), device="cuda", prefetch=2, **BUCKETED)
        seen: set[int] = set()
        own = loader._own_transfer()
        assert isinstance(own, ToCuda)
        for _ in range(4):
            for _ in loader:
                seen |= {slot.host.data_ptr() for slot in own._free}
        assert 1 <= len(seen) <= 16

    def test_pinning_refused_is_slower_and_right(self, monkeypatch: pytest.MonkeyPatch) -> None:
        empty = torch.empty

        def refuse(*sizes: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
            if pin_memory:
                raise RuntimeError("CUDA error: out of memory")
            return empty(*sizes, **options)

        monkeypatch.setattr(torch, "empty", refuse)
        loader = BatchLoader(make_store(ROWS), device="cuda", prefetch=3, **OPTIONS)
        with pytest.warns(UserWarning, match="could not be pinned"):
            assert all_same(on_host(loader), expected_batches(**OPTIONS))

    @both_policies
    def test_memory_is_flat_over_ten_thousand_batches(self, options: dict[str, Any]) -> None:
        loader = BatchLoader(make_store(rows_of(4000)), device="cuda", prefetch=4, **{**options, "batch_size": 1})
        num_batches = 0
        while num_batches < 2000:
            num_batches += sum(1 for _ in loader)
        allocated, reserved, num_batches = held("cuda"), torch.cuda.memory_reserved(), 0
        while num_batches < 10_000:
            num_batches += sum(1 for _ in loader)
            assert held("cuda") == allocated
        assert torch.cuda.memory_reserved() <= reserved

    @both_policies
    def test_the_loader_waits_for_nothing_on_the_card(self, options: dict[str, Any]) -> None:
        batches = iter(BatchLoader(make_store(ROWS), device="cuda", prefetch=3, **options))
        next(batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            rest = list(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(rest) > 5
