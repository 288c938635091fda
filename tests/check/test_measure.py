"""`bench`: equal work, a verdict that follows from the times, and what is printed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from fastcollate.check import measure as room
from fastcollate.check.counts import order_of
from fastcollate.check.measure import Verdict, bench
from fastcollate.errors import InputError
from fastcollate.ingest.job import prepare
from fastcollate.store.store import TokenStore
from fastcollate.train import MaskOptions, OrderOptions
from tests.helpers import run_cli, write_store


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    rows = [([2, n % 9 + 1], list(range(n % 9 + 3))) for n in range(60)]
    return write_store(tmp_path / "s", rows, shard_rows=25)


@pytest.fixture
def few_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "WORKERS", (0,))


@pytest.mark.slow
@pytest.mark.usefixtures("few_workers")
def test_the_pipeline_is_measured_beside_the_others(store: TokenStore) -> None:
    report = bench(store, step_ms=0.001, rounds=2, seconds=0.05, progress=False)
    assert [found.name for found in report.contenders] == ["fastcollate", "reference loop", "DataLoader, 0 workers"]
    for found in report.contenders:
        assert found.batches_per_s > 0
        assert found.ms_per_batch == pytest.approx(1000 / found.batches_per_s)
        assert found.wait_share is not None
        assert 0 < found.wait_share < 1
        assert found.data_bound is (found.wait_share > room.DATA_BOUND)
    assert report.contenders[1].data_bound is True  # the reference makes no batch in a microsecond
    assert " beside steps of 0.001 ms the loop waits for data " in report.advice[0]


@pytest.mark.usefixtures("few_workers")
def test_without_a_step_there_is_no_verdict(store: TokenStore) -> None:
    report = bench(store, order=OrderOptions(policy="shuffled"), rounds=1, seconds=0.02, progress=False)
    assert report.contenders[0].data_bound is None
    assert "--step-ms" in report.advice[0]


SHUFFLED = {"policy": "shuffled", "batch_size": 8}


@pytest.mark.slow
@pytest.mark.usefixtures("few_workers")
@pytest.mark.parametrize("masked", [False, True])
def test_packs_are_measured_beside_equal_ones(store: TokenStore, masked: bool) -> None:
    order = order_of(store, MaskOptions(), OrderOptions(policy="packed", batch_size=2, capacity=30))
    room._check_equal(room._contenders(store, MaskOptions(mask_prompt=masked, max_length=25), order))
    packs = OrderOptions(policy="packed", batch_size=2)
    report = bench(store, order=packs, model="tiny", rounds=1, seconds=0.02, progress=False)
    assert report.step_ms is not None
    assert not any("inspect --report" in sentence for sentence in report.advice)


def test_workers_give_the_same_batches(store: TokenStore) -> None:
    sources = room._contenders(store, MaskOptions(), SHUFFLED)
    assert list(sources) == [
        "fastcollate", "reference loop", *(f"DataLoader, {workers} workers" for workers in (0, 1, 2, 4)),
    ]  # fmt: skip
    room._check_equal(sources)


def test_other_batches_are_refused(store: TokenStore) -> None:
    sources = room._contenders(store, MaskOptions(), SHUFFLED)
    wrong = room._contenders(store, MaskOptions(max_length=3), SHUFFLED)
    with pytest.raises(RuntimeError, match="DataLoader gives other batches"):
        room._check_equal({room.REFERENCE: sources[room.REFERENCE], "DataLoader": wrong["DataLoader, 0 workers"]})


def test_an_epoch_of_one_batch_can_be_measured(store: TokenStore) -> None:
    assert room._batches_per_second(lambda: [1], 0.01) > 0


class Slow(Dataset[int]):
    """A row of it takes so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 60

    def __getitem__(self, row: int) -> int:
        time.sleep(self.seconds)
        return row + 1


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "batch_ms", "step_ms"), [(0, 10, 30), (1, 60, 30), (1, 20, 30), (2, 90, 30)])
def test_the_verdict_is_what_a_loop_with_such_steps_waits(workers: int, batch_ms: float, step_ms: float) -> None:
    """Workers overlap with the steps: what they wait is not their batches' time."""

    def source() -> DataLoader[int]:
        return DataLoader(Slow(batch_ms / 1000), batch_size=None, num_workers=workers)

    ready = batch_ms / max(workers, 1)
    wait = ready if workers == 0 else max(0.0, ready - step_ms)
    found = room.wait_share(source, step_ms / 1000, seconds=0.5)
    assert found == pytest.approx(wait / (wait + step_ms), abs=0.08)  # of a sleep, on a machine that does more


def test_a_loop_of_one_batch_and_of_short_epochs() -> None:
    assert room.wait_share(lambda: [1], 0.01, seconds=0.05) < 0.5
    assert room.wait_share(lambda: [1, 2, 3], 0.01, seconds=0.05) < 0.5


def test_the_advice_follows_from_what_was_waited() -> None:
    own, slow = room._judge("fastcollate", 9.0, 0.01), room._judge("reference loop", 3.0, 0.34)
    assert own == Verdict("fastcollate", 9.0, pytest.approx(1000 / 9), 0.01, False)
    assert slow.data_bound is True
    first, second, third = room._advice([own, slow], 40.0, "sequential")
    assert first.startswith("not data-bound: beside steps of 40 ms the loop waits for data 1.0% of its time")
    assert second == "reference loop waits 34% of the loop: with fastcollate that loop is 1.50 times as fast"
    assert "inspect --report" in third
    assert room._advice([slow, own], 40.0, "bucketed") == [
        "data-bound: beside steps of 40 ms the loop waits for data 34.0% of its time; raise the batch size, or let "
        "several ranks load"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"step_ms": 0.0}, {"rounds": 0}, {"seconds": 0.0}, {"model": "no-such"}])
def test_wrong_values(store: TokenStore, options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        bench(store, progress=False, **options)


@pytest.mark.usefixtures("few_workers")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", [SHUFFLED, {"policy": "packed", "batch_size": 2, "capacity": 30}])
def test_masks_by_position_have_contenders_too(tmp_path: Path, masked: bool, order: dict[str, object]) -> None:
    """Also where one row's end belongs to its prompt, and another holds the end's id itself."""
    rows = [([2, n % 9 + 1], list(range(n % 9 + 3))) for n in range(30)]
    rows += [([3, 1, 2], list(range(5))), ([1, 3], [50256, 7, 50256, 8]), ([4], [1, 2, 3, 4])]
    store = write_store(tmp_path / "p", rows, shard_rows=9)
    options = MaskOptions(mask_prompt=masked, mode="positional", max_length=9)
    sources = room._contenders(store, options, order)
    for got, expected in zip(sources[room.PIPELINE](), sources[room.REFERENCE](), strict=True):
        assert all(one.equal(other) for one, other in zip(got, expected, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("few_workers")
@pytest.mark.parametrize("template", ["preference", "document"])
def test_stores_of_other_kinds_are_measured_row_by_row(tmp_path: Path, template: str) -> None:
    records = [{"text": f"a {n}", "prompt": f"a {n}", "chosen": " b" * (n % 5), "rejected": " c"} for n in range(40)]
    kept = [{key: record[key] for key in record if (key == "text") == (template == "document")} for record in records]
    prepare(kept, tmp_path / "s", template=template, progress=False)
    report = bench(TokenStore(tmp_path / "s"), step_ms=5.0, rounds=1, seconds=0.02, progress=False)
    assert len(report.contenders) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("few_workers")
def test_the_command(store: TokenStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(monkeypatch, "bench", store.path, "--model", "tiny", "--rounds", 1, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["step_ms"] > 0
    assert len(printed["contenders"]) == 3
    assert run_cli(monkeypatch, "bench", store.path, "--step-ms", 5, "--rounds", 1) == 0
    out = capsys.readouterr().out
    assert "reference loop" in out
    assert "step: 5.000 ms" in out
