"""An older checkout's code as a contender: `Baseline(checkout, folder)` runs it in a process of its own.

Run as `PYTHON baseline.py FOLDER`, with the checkout on PYTHONPATH, this answers each line of JSON on standard input.
It imports nothing of `benchmarks` but `spin.py`, and reads rows from `FOLDER/ids.npy` and `FOLDER/offsets.npy`, since
the store's format may differ. It knows the layout of files before and after they were moved into folders.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

SHUFFLED = {"shuffled": "shuffled", "random": "shuffled", "bucketed": "bucketed"}


class Baseline:
    """The older code's process."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder)], env=environment, cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, do: str, **options: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"do": do, **options}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the baseline's process ended while it was asked to {do} {options}")
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate()


def write_rows(store: Any, folder: Path) -> None:
    """The store's rows as the other processes read them."""
    (shard,) = store.shards
    np.save(folder / "ids.npy", shard.input_ids)
    np.save(folder / "offsets.npy", shard.offsets)


def read_store(folder: Path) -> Any:
    ids, offsets = np.load(folder / "ids.npy", mmap_mode="r"), np.load(folder / "offsets.npy")
    lengths = np.diff(offsets)
    spans = np.stack([np.zeros_like(lengths), lengths], 1).astype(np.uint32).ravel()
    span_offsets = np.arange(0, 2 * len(lengths) + 1, 2)
    shard = SimpleNamespace(input_ids=ids, offsets=offsets, spans=spans, span_offsets=span_offsets)
    return SimpleNamespace(shards=[shard], lengths=lengths.astype(np.uint16))


def make_turns(folder: Path) -> dict[str, Callable[..., Any]]:
    """What the process answers: each gives seconds."""
    from spin import stalls  # type: ignore[import-not-found]  # beside this file, when it is run

    from fastcollate import BatchLoader, collate_fn, plan_epoch

    try:
        from fastcollate.collate.collator import Collator
        from fastcollate.load.buffers import HostPool
    except ImportError:
        from fastcollate.transfer import HostPool  # type: ignore[import-not-found, no-redef]

        from fastcollate.collate import Collator  # type: ignore[attr-defined, no-redef]
    store = read_store(folder)
    made: dict[Any, Any] = {}

    def collate(batch_size: int, order: str) -> int:
        """Collates each batch of an epoch, as `benchmarks/collate.py` does."""
        if (batch_size, order) not in made:
            plan = plan_epoch(store.lengths, batch_size=batch_size, policy=SHUFFLED[order], drop_last=True)
            batches = [np.ascontiguousarray(rows) for rows in plan]
            made[batch_size, order] = Collator(store.shards), HostPool(), batches
        collator, pool, batches = made[batch_size, order]
        for rows in batches:
            collator(rows, pool.take)
        return len(batches)

    def loader(batch_size: int, policy: str) -> float:
        """Seconds a batch of an epoch."""
        own = BatchLoader(store, policy=policy, batch_size=batch_size, drop_last=True)
        start = time.perf_counter()
        count = sum(1 for _ in own)
        return (time.perf_counter() - start) / count

    def waiting(batch_size: int, steps: int, turns: int) -> Any:
        own = BatchLoader(store, policy="shuffled", batch_size=batch_size)
        return stalls(chain.from_iterable(own for _ in range(1 + steps // len(own))), steps, turns)

    def drop_in(batch_size: int, count: int) -> int:
        if ("lists", batch_size) not in made:
            ids, offsets = store.shards[0].input_ids, store.shards[0].offsets
            rows = [ids[offsets[i] : offsets[i + 1]].tolist() for i in range(batch_size * count)]
            made["lists", batch_size] = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        for rows in made["lists", batch_size]:
            collate_fn(rows)
        return count

    return {"collate": collate, "loader": loader, "waiting": waiting, "drop_in": drop_in}


def main() -> None:
    turns = make_turns(Path(sys.argv[1]))
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(turns[request.pop("do")](**request)), flush=True)


if __name__ == "__main__":
    main()
