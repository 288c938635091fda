"""A store that is not in memory: batches from a disk, with its pages asked for window by window, and without.

The store has 2 GB in four shards, and is put out of the page cache before each run; every run is a process of its own,
with the kernels loaded. Without asking each page is read when a row on it is first touched, and the system reads ahead
by its own lights. The NumPy row loop reads shuffled rows from the same memory maps, as a plain data set does. Rows'
lengths, which a plan reads first, lie in a file of the store and are cold as well.

    python -m benchmarks.cold
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import save
from benchmarks.memory import make_shard
from benchmarks.synthetic import GPT2, LENGTHS
from fastcollate.store.manifest import StoreIdentity, sources_of, write_manifest
from fastcollate.store.shards import shard_name

NUM_SHARDS = 4
BATCHES = {8: 16_000, 64: 4_000, 512: 1_000}
LOOP_BATCHES = {8: 400, 64: 60, 512: 12}  # of the NumPy loop, as many as take it about half a second
REPEATS = 5

PROCESS = """
import itertools, json, sys, time
import numpy as np
from fastcollate import BatchLoader, TokenStore
from fastcollate.store import pages as read_ahead
how, path, batch_size, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def bytes_read():
    return int(next(line for line in open("/proc/self/io") if line.startswith("read_bytes")).split()[1])
store = TokenStore(path)
if how == "row loop":
    def batches():
        rng = np.random.default_rng(0)
        ends = np.cumsum([len(shard.offsets) - 1 for shard in store.shards])
        while True:
            rows = rng.integers(0, ends[-1], batch_size)
            parts = []
            for row in rows.tolist():
                number = int(np.searchsorted(ends, row, side="right"))
                shard, row = store.shards[number], row - (ends[number - 1] if number else 0)
                parts.append(shard.input_ids[shard.offsets[row] : shard.offsets[row + 1]])
            inputs = np.full((batch_size, max(map(len, parts))), 50256)
            targets = np.full_like(inputs, -100)
            for i, ids in enumerate(parts):
                inputs[i, : len(ids)] = ids
                targets[i, : len(ids) - 1] = ids[1:]
                targets[i, len(ids) - 1] = 50256
            yield inputs, targets
    found = batches()
else:
    if how == "without asking":
        read_ahead._ask = lambda ask, rows: None
    else:  # loads these kernels too, over memory that is warm
        read_ahead.ask_for_items(np.zeros(9, store.lengths.dtype), np.zeros(1, np.uint32))
        table = BatchLoader(store, batch_size=8)._collator.table.array
        read_ahead.ask_for_rows(table, np.zeros(1, np.int64), with_spans=False)
    few = type("Few", (), {"shards": store.shards[:1], "lengths": store.lengths[:2000].copy()})
    for batch in BatchLoader(few, batch_size=batch_size):
        pass
    loader = BatchLoader(store, batch_size=batch_size)
    found = iter(loader)
before = bytes_read()
start = time.perf_counter()
next(found)
first = time.perf_counter() - start
for batch in itertools.islice(found, count - 1):
    pass
seconds = time.perf_counter() - start
result = {"first_batch_ms": 1e3 * first, "microseconds_per_batch": 1e6 * seconds / count,
          "mb_read": (bytes_read() - before) / 1e6}
if how != "row loop":
    stats = loader.stats
    result["received"] = [stats.batches, stats.real_cells, stats.padded_cells, stats.trained_tokens]
print(json.dumps(result))
"""


def make_store(path: Path) -> None:
    """Shards that are files of their own, copies of one."""
    path.mkdir()
    shard = make_shard(path)
    infos = [replace(shard, name=shard_name(number)) for number in range(NUM_SHARDS)]
    for info in infos[1:]:
        shutil.copyfile(path / shard.name, path / info.name)
    sources = sources_of(["made by a benchmark"], sum(info.num_rows for info in infos))
    write_manifest(path, StoreIdentity(sources, GPT2, {"name": "alpaca"}, {}), infos)


def drop_from_cache(path: Path) -> None:
    for file in path.iterdir():
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(how: str, path: Path, batch_size: int, count: int) -> dict[str, Any]:
    drop_from_cache(path)
    command = [sys.executable, "-c", PROCESS, how, str(path), str(batch_size), str(count)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        make_store(path)
        for batch_size, count in BATCHES.items():
            runs: dict[str, list[dict[str, Any]]] = {"asking ahead": [], "without asking": [], "row loop": []}
            for _ in range(REPEATS):
                for how, found in runs.items():
                    found.append(run(how, path, batch_size, LOOP_BATCHES[batch_size] if how == "row loop" else count))
            received = {str(found["received"]) for how in ("asking ahead", "without asking") for found in runs[how]}
            assert len(received) == 1, "asking must not change what is received"
            figures = {
                how: {
                    key: round(statistics.median(one[key] for one in found), 1)
                    for key in ("first_batch_ms", "microseconds_per_batch", "mb_read")
                }
                for how, found in runs.items()
            }
            counts = {"batches": count, "batches_of_the_row_loop": LOOP_BATCHES[batch_size]}
            cases.append({"batch_size": batch_size, **counts, **figures})
            print(cases[-1], flush=True)
        size = sum(file.stat().st_size for file in path.iterdir())
    save("cold", {"lengths": LENGTHS, "store_bytes": size, "policy": "bucketed", "repeats": REPEATS, "cases": cases})


if __name__ == "__main__":
    main()
