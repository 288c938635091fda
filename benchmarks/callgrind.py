"""Instructions per token of each kernel, counted by callgrind: they do not depend on the machine's load.

One process under callgrind gives every kernel a few turns; one a kernel gives it many: the difference holds neither
Python's start nor loading the compiled code. A vector instruction counts as one. The kernels
are compiled for one processor whatever the machine's, so that the counts compare, and into a cache of their own.

    python -m benchmarks.callgrind            # needs valgrind
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import save
from benchmarks.synthetic import make_lengths

FEW, MANY = 20, 220
PROCESSOR = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+bmi,+bmi2,+fma,+lzcnt,+popcnt,+movbe",
    "PYTHONHASHSEED": "0",
}
NUM_ROWS = 4096
BATCH = 64
Turn = Callable[[], object]


def collator_of(*, mask: bool) -> tuple[Any, Any]:
    """A collator over a shard in memory, and the rows' lengths."""
    from fastcollate.collate.collator import Collator
    from fastcollate.store.shards import ShardColumns

    lengths = make_lengths(NUM_ROWS)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    half = lengths // 2
    spans = np.stack([half, lengths - half], 1).astype(np.uint32).ravel()
    ids = np.random.default_rng(0).integers(0, 50256, offsets[-1]).astype(np.uint16)
    places = np.arange(0, 2 * NUM_ROWS + 1, 2)
    shard = ShardColumns(ids, offsets, spans, places, np.arange(NUM_ROWS, dtype=np.uint64))
    return Collator([shard], mask_prompt=mask), lengths


def padded(mask: bool) -> tuple[Turn, int]:
    from fastcollate.collate import fill as kernels

    collator, lengths = collator_of(mask=mask)
    rows = np.random.default_rng(1).permutation(NUM_ROWS)[:BATCH]
    out = np.empty(4 * BATCH * 1024, np.int64)
    options = collator.table.array, collator.settings, rows, out, *collator._types
    return lambda: kernels.fill_padded(*options), int(lengths[rows].sum())


def packed() -> tuple[Turn, int]:
    from fastcollate.collate import fill as kernels

    collator, lengths = collator_of(mask=False)
    rows = np.arange(BATCH)
    packs, starts = np.array([0, BATCH]), np.empty(0, np.int64)
    capacity = int(lengths[rows].sum())
    out, report = np.empty(8 * capacity, np.int64), np.empty((1, kernels.REPORT_COLUMNS), np.int64)
    batches = np.array([0, 1])

    def turn() -> None:
        assert collator.fill_packed_group(rows, starts, packs, batches, capacity, out, report) == 1

    return turn, capacity


def permute() -> tuple[Turn, int]:
    from fastcollate.plan import kernels as plan_kernels

    out = np.empty(NUM_ROWS, np.int64)
    return lambda: plan_kernels.permuted_rows(0, NUM_ROWS, 1, np.uint64(5), 11, out), NUM_ROWS


def sort() -> tuple[Turn, int]:
    from fastcollate.plan import kernels as plan_kernels

    lengths = make_lengths(NUM_ROWS).astype(np.int32)
    rows, longest = np.arange(NUM_ROWS), int(lengths.max())
    out = np.empty_like(rows), np.empty_like(lengths)
    return lambda: plan_kernels.sort_by_length(rows, lengths, longest, *out), NUM_ROWS


def pack() -> tuple[Turn, int]:
    from fastcollate import pack_lengths

    lengths = make_lengths(NUM_ROWS)
    return lambda: pack_lengths(lengths, 1024), NUM_ROWS


KERNELS: dict[str, tuple[str, Callable[[], tuple[Turn, int]]]] = {
    "fill_padded, 64 rows at random": ("token", lambda: padded(False)),
    "fill_padded, 64 rows at random, prompts masked": ("token", lambda: padded(True)),
    "fill_packed_group, 64 rows": ("token", packed),
    "permuted_rows": ("row", permute),
    "sort_by_length": ("row", sort),
    "pack_lengths at 1,024, Python included": ("row", pack),
}


def run_turns(cache: str, most: str, *before: str) -> None:
    """A process that gives every kernel a few turns, and `most` many; started by the command `before`."""
    command = [*before, sys.executable, "-m", "benchmarks.callgrind", most]
    environment = {**os.environ, **PROCESSOR, "NUMBA_CACHE_DIR": cache}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{' '.join(command)}: status {run.returncode}\n{run.stderr[-2000:]}")


def count(cache: str, most: str) -> int:
    """Instructions of such a process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        run_turns(cache, most, "valgrind", "--tool=callgrind", f"--callgrind-out-file={out}")
        found = re.search(r"^(?:summary|totals): (\d+)", out.read_text(), re.M)
        assert found, out.read_text()[-500:]
        return int(found[1])


def main() -> None:
    if len(sys.argv) == 2:
        for name, (_, make) in KERNELS.items():
            turn, _ = make()
            for _ in range(MANY if name == sys.argv[1] else FEW):
                turn()
        return
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is not installed: `apt-get install valgrind`")
    version = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        run_turns(cache, "none")  # compiled, so that the counted processes only load it
        few = count(cache, "none")
        for name, (unit, make) in KERNELS.items():
            per_unit = (count(cache, name) - few) / (MANY - FEW) / make()[1]
            found[name] = {"unit": unit, "instructions_per_unit": round(per_unit, 3)}
            print(name, found[name], flush=True)
    save("callgrind", {"valgrind": version, "compiled_for": PROCESSOR, "turns": [FEW, MANY], "kernels": found})


if __name__ == "__main__":
    main()
