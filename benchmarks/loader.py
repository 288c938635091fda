"""`BatchLoader` beside the peers' loaders, each at its best number of workers: batches of shuffled rows per second.

- A Megatron-style data set: rows read from one memory-mapped file through an index, a NumPy row loop pads them, in
  torch's `DataLoader`; and the bare loop over slices of row numbers, without data set and `DataLoader`.
- `datasets`' table of lists with `transformers`' `DataCollatorForSeq2Seq`, over a `pad` without a tokenizer's checks.
- torch's `DataLoader` over ready-made Python lists with the chapter's collate.
- litdata and MosaicML Streaming, in an environment of their own: see `benchmarks/peer_loaders.py`. Its Python is
  `.peers-venv/bin/python`, or what FASTCOLLATE_PEERS names; without one they are left out, and the result says so.

A peer's best number of workers is found in a short trial; ours is taken as it is. Then all take turns, and each runs
twice in its turn, of which the second counts: what the one before it left in the caches, and its worker processes that
are still ending, would be paid for by the next. A peer is timed from its first batch on, over as many batches as take
it about a second; ours over a whole epoch, thread start and planning included. The consumer does nothing.

    python -m benchmarks.loader [--baseline CHECKOUT]    # an older checkout's code as one more contender
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader, Dataset

from benchmarks import peer_loaders
from benchmarks.baseline import Baseline, write_rows
from benchmarks.collate import NumpyLoop, check
from benchmarks.harness import RESULTS, save
from benchmarks.integrations_trainer import PadOnly
from benchmarks.peer_loaders import seconds_per_batch
from benchmarks.synthetic import LENGTHS, NUM_ROWS, PAD, make_store
from fastcollate import BatchLoader, TokenStore
from fastcollate.collate.reference import custom_collate_fn

BATCH_SIZES = (8, 64, 512)
WORKERS = (0, 1, 2)
REPEATS = 5
PAUSE_S = 1  # before a contender's turn, in which worker processes of the one before it end
SECONDS = 0.7  # that a peer's measured batches should take
OTHERS = ("litdata", "streaming")
Start = Callable[[int, int], Iterator[Any]]  # batch size, workers -> batches of shuffled rows


class MegatronRows(Dataset[Any]):
    """Rows of one memory-mapped file by way of an index."""

    def __init__(self, store: TokenStore) -> None:
        (shard,) = store.shards
        self.ids, self.offsets = shard.input_ids, shard.offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Any:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]


def bare_loop(store: TokenStore) -> Start:
    """No data set and no `DataLoader`: shuffled row numbers in slices, each to the NumPy loop."""
    loop = NumpyLoop(store)

    def start(batch_size: int, workers: int) -> Iterator[Any]:
        order = np.random.default_rng(0).permutation(NUM_ROWS)
        return (loop(order[i : i + batch_size]) for i in range(0, NUM_ROWS - batch_size + 1, batch_size))

    return start


class Peers:
    """The process in the other environment."""

    def __init__(self, folder: Path) -> None:
        python = os.environ.get("FASTCOLLATE_PEERS", str(RESULTS.parent / ".peers-venv" / "bin" / "python"))
        self.missing = not Path(python).exists()
        if not self.missing:
            script = Path(__file__).with_name("peer_loaders.py")
            self._process = subprocess.Popen(
                [python, str(script), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )

    def ask(self, do: str, peer: str = "", **options: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"do": do, "peer": peer, **options}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the peers' process ended while it was asked to {do} {peer}")
        return json.loads(line)

    def close(self) -> None:
        if not self.missing:
            self._process.communicate()


def make_starts(store: TokenStore) -> dict[str, Start]:
    """The peers that run in this process."""
    lists = [row.input_ids.tolist() for row in store]
    ones = [[1] * len(ids) for ids in lists]
    table = datasets.Dataset.from_dict({"input_ids": lists, "labels": lists, "attention_mask": ones})
    seq2seq = transformers.DataCollatorForSeq2Seq(PadOnly(store.pad_token_id))

    def torch_loader(data: Any, collate: Any) -> Start:
        return lambda batch_size, workers: iter(
            DataLoader(data, batch_size=batch_size, shuffle=True, num_workers=workers, collate_fn=collate)
        )

    return {
        "NumPy row loop over the memory map": bare_loop(store),
        "Megatron-style data set + NumPy row loop": torch_loader(MegatronRows(store), peer_loaders.collate),
        "datasets + DataCollatorForSeq2Seq": torch_loader(table, seq2seq),
        "torch DataLoader + reference": torch_loader(lists, custom_collate_fn),
    }


def check_all(store: TokenStore, peers: Peers, starts: dict[str, Start]) -> None:
    """Everyone's batches against the reference, in file order where a peer has one."""
    loop = NumpyLoop(store)
    for batch_size in BATCH_SIZES:
        ours = BatchLoader(store, policy="sequential", batch_size=batch_size, drop_last=True)
        for number, found in zip(range(20), ours, strict=False):
            rows = [store[number * batch_size + i].input_ids.tolist() for i in range(batch_size)]
            check(custom_collate_fn(rows), found)
            check(found, loop(np.arange(number * batch_size, (number + 1) * batch_size)))
    for inputs, _ in (next(start(8, 0)) for name, start in starts.items() if "datasets" not in name):
        assert inputs.shape[0] == 8
    labels = next(starts["datasets + DataCollatorForSeq2Seq"](8, 0))
    assert labels["labels"].shape == labels["input_ids"].shape
    for peer in () if peers.missing else OTHERS:
        found = peers.ask("check", peer, batch_size=8, workers=0, num_batches=20)
        for number, batch in enumerate(found):
            rows = [store[number * 8 + i].input_ids.tolist() for i in range(8)]
            check(custom_collate_fn(rows), [torch.tensor(part) for part in batch])


def epoch_seconds_per_batch(loader: BatchLoader) -> float:
    start = time.perf_counter()
    count = sum(1 for _ in loader)
    return (time.perf_counter() - start) / count


def timers(
    store: TokenStore, peers: Peers, starts: dict[str, Start], batch_size: int, baseline: Baseline | None
) -> dict[str, Any]:
    """By contender and workers: a function of a number of batches that gives seconds a batch."""
    found: dict[str, Any] = {}
    for policy in ("shuffled", "bucketed"):
        ours = BatchLoader(store, policy=policy, batch_size=batch_size, drop_last=True)
        found[f"fastcollate, {policy}"] = {0: lambda _, ours=ours: epoch_seconds_per_batch(ours)}
        if baseline is not None:
            options = {"batch_size": batch_size, "policy": policy}
            found[f"baseline, {policy}"] = {0: lambda _, options=options: baseline.ask("loader", **options)}
    for name, start in starts.items():
        found[name] = {
            workers: lambda count, start=start, workers=workers: seconds_per_batch(start(batch_size, workers), count)
            for workers in (WORKERS if "NumPy row loop over" not in name else (0,))
        }
    for peer in () if peers.missing else OTHERS:
        found[peer] = {
            workers: lambda count, peer=peer, workers=workers: peers.ask(
                "time", peer, batch_size=batch_size, workers=workers, num_batches=count
            )
            for workers in WORKERS
        }
    return found


def compare(
    store: TokenStore, peers: Peers, starts: dict[str, Start], batch_size: int, baseline: Baseline | None
) -> dict[str, Any]:
    """Every contender's microseconds a batch at its best number of workers, and how many times ours that is."""
    most = NUM_ROWS // batch_size - 2 - 2 * max(WORKERS)
    trials, table, runs = timers(store, peers, starts, batch_size, baseline), {}, {}
    for name, by_workers in trials.items():
        trial = {workers: min(run(min(most, 40)) for _ in range(2)) for workers, run in by_workers.items()}
        best = min(trial, key=lambda workers: trial[workers])
        count = max(4, min(most, int(SECONDS / trial[best])))
        runs[name] = by_workers[best], count
        table[name] = {
            "trial_microseconds_by_workers": {workers: round(1e6 * value, 1) for workers, value in trial.items()},
            "workers": best,
            "batches": count,
        }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, (run, count) in runs.items():
            time.sleep(PAUSE_S)
            run(count)
            times[name].append(run(count))
    ours = statistics.median(times["fastcollate, shuffled"])
    for name, line in table.items():
        line["microseconds_per_batch"] = round(1e6 * statistics.median(times[name]), 2)
        line["times_ours"] = round(statistics.median(times[name]) / ours, 2)
    return {"batch_size": batch_size, "loaders": table}


def prepare_data(folder: Path) -> TokenStore:
    """The store, and the peers' copies of its rows, made where they are not there yet."""
    store = TokenStore(folder / "store") if (folder / "store").exists() else make_store(folder / "store")
    write_rows(store, folder)
    peers = Peers(folder)
    for peer in () if peers.missing else OTHERS:
        if not (folder / peer).exists():
            peers.ask("write", peer)
    peers.close()
    return store


def main(folder: Path, batch_sizes: Iterable[int], checkout: Path | None) -> None:
    """Measures these batch sizes; the saved results of others are kept."""
    datasets.disable_progress_bars()
    path = RESULTS / "loader.json"
    kept = {case["batch_size"]: case for case in json.loads(path.read_text())["cases"]} if path.exists() else {}
    store = prepare_data(folder)
    assert store.pad_token_id == PAD
    peers, starts = Peers(folder), make_starts(store)
    check_all(store, peers, starts)
    baseline = Baseline(checkout, folder) if checkout else None
    for batch_size in batch_sizes:
        kept[batch_size] = compare(store, peers, starts, batch_size, baseline)
        print(json.dumps(kept[batch_size], indent=1), flush=True)
    missing = "missing: litdata and MosaicML Streaming left out"
    result = {
        "num_rows": NUM_ROWS,
        "lengths": LENGTHS,
        "repeats": REPEATS,
        "other_environment": missing if peers.missing else peers.ask("versions"),
        "cases": [kept[size] for size in sorted(kept)],
    }
    peers.close()
    if baseline is not None:
        baseline.close()
    save("loader", result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("batch_sizes", nargs="*", type=int, default=list(BATCH_SIZES))
    parser.add_argument("--data", type=Path, help="keep the peers' data sets here for the next run")
    parser.add_argument("--baseline", type=Path, help="a checkout whose code is measured too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        main(options.data or Path(name), options.batch_sizes, options.baseline)
