"""Faults that only a card shows, in the loader; those that make sense without one run on the CPU too."""

from __future__ import annotations

import gc
import itertools
import threading
import warnings
from typing import Any

import pytest
import torch

from fastcollate.load import prefetch as prefetch_room
from fastcollate.load.cuda import ToCuda
from fastcollate.load.loader import BatchLoader
from tests.helpers import make_store
from tests.load.test_transfer import OPTIONS, ROWS, expected_batches, rows_of, same

NEEDS_CARD = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CARD)]
PACKED: dict[str, Any] = {"policy": "packed", "batch_size": 2, "capacity": 256, "max_length": 200, "seed": 4}
BUCKETED: dict[str, Any] = {**OPTIONS, "policy": "bucketed"}


def on_host(batches: Any) -> list[list[torch.Tensor]]:
    return [[tensor.cpu().clone() for tensor in batch] for batch in batches]


def all_same(found: Any, expected: Any) -> bool:
    return all(same(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prefetch", range(9))
@pytest.mark.parametrize("options", [BUCKETED, PACKED], ids=["bucketed", "packed"])
def test_any_prefetch_gives_the_same_batches(device: str, prefetch: int, options: dict[str, Any]) -> None:
    expected = on_host(BatchLoader(make_store(ROWS), prefetch=0, **options))
    loader = BatchLoader(make_store(ROWS), device=device, prefetch=prefetch, **options)
    for _ in range(2):
        assert all_same(on_host(loader), expected)
        loader.set_epoch(0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_stays_while_ten_more_come(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch_room, "GROUP_CELLS", 2000)
    expected = expected_batches(**OPTIONS)
    batches = iter(BatchLoader(make_store(ROWS), device=device, prefetch=3, **OPTIONS))
    for number in range(0, 44, 11):
        kept = next(batches)
        for _ in range(10):
            next(batches)
        assert same(kept, expected[number])


@pytest.mark.parametrize("device", DEVICES)
def test_two_loaders_at_once_do_not_meet(device: str) -> None:
    first, second = (
        BatchLoader(make_store(ROWS), device=device, **OPTIONS),
        BatchLoader(make_store(ROWS), device=device, **{**OPTIONS, "seed": 9}),
    )
    pairs = [on_host(pair) for pair in zip(first, second, strict=True)]
    assert all_same([a for a, _ in pairs], expected_batches(**OPTIONS))
    assert all_same([b for _, b in pairs], expected_batches(**{**OPTIONS, "seed": 9}))


@pytest.mark.parametrize("device", DEVICES)
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


@pytest.mark.parametrize("device", DEVICES)
def test_an_error_in_mid_copy_leaves_nothing_behind(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch_room, "GROUP_CELLS", 2000)
    loader = BatchLoader(make_store(ROWS), device=device, prefetch=4, **OPTIONS)
    on_host(loader)  # what is allocated once, is
    before = held(device)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            fail_at_the_sixth(loader)
        gc.collect()
        assert held(device) == before
    loader.load_state_dict(BatchLoader(make_store(ROWS), **OPTIONS).state_dict())
    assert all_same(on_host(loader), expected_batches(**OPTIONS))


def fail_at_the_sixth(loader: BatchLoader) -> None:
    for number, _ in enumerate(loader):
        1 / (5 - number)


def held(device: str) -> int:
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    return int(torch.cuda.memory_allocated())


class TestOnCard:
    pytestmark = NEEDS_CARD

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

    @pytest.mark.parametrize("options", [BUCKETED, PACKED], ids=["bucketed", "packed"])
    def test_memory_is_flat_over_ten_thousand_batches(self, options: dict[str, Any]) -> None:
        store = make_store(rows_of(4000))
        loader = BatchLoader(store, device="cuda", prefetch=4, **{**options, "batch_size": 1})
        batches = itertools.chain.from_iterable(loader for _ in itertools.count())
        for _ in itertools.islice(batches, 2000):
            pass
        torch.cuda.synchronize()
        reserved, most = torch.cuda.memory_reserved(), 0
        for _ in itertools.islice(batches, 10_000):
            most = max(most, torch.cuda.memory_allocated())
        assert most < 64 << 20
        assert torch.cuda.memory_reserved() <= reserved

    def test_the_loader_waits_for_nothing_on_the_card(self) -> None:
        loader = BatchLoader(make_store(ROWS), device="cuda", prefetch=3, **PACKED)
        batches = iter(loader)
        next(batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                rest = list(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(rest) > 5

    def test_the_buffers_of_a_loader_are_recycled(self) -> None:
        loader = BatchLoader(make_store(ROWS), device="cuda", prefetch=2, **BUCKETED)
        seen: set[int] = set()
        own = loader._own_transfer()
        assert isinstance(own, ToCuda)
        for _ in range(4):
            for _ in loader:
                seen |= {slot.host.data_ptr() for slot in own._free}
        assert 1 <= len(seen) <= 16
