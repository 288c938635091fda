"""`fastcollate prepare` beside an older checkout's, the whole command by turns: wall time, CPU time, peak memory.

`python -m benchmarks.prepare_baseline CHECKOUT [--megabytes N] [--rounds N]` writes
`bench_results/prepare_baseline.json`. Both make the same rows, or nothing is reported. Memory is measured in rounds of
its own (see `prepare_memory`), since looking at it takes time from the job.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.harness import save
from benchmarks.prepare_data import WRITERS
from benchmarks.prepare_memory import peak, write_random_words

KINDS: dict[str, Callable[[Path, int], object]] = {**WRITERS, "random_words": write_random_words}
CHECKOUT = Path(__file__).resolve().parent.parent


def rows_of(store: Path) -> str:
    """A hash over a store's rows, however they are cut into shards."""
    digests = [hashlib.sha256() for _ in range(3)]
    for path in sorted(store.glob("shard-*.arrow")):
        with pa.memory_map(str(path)) as source:
            batch = pa.ipc.open_file(source).get_batch(0)
            for digest, column in zip(digests, batch.columns[:2], strict=False):
                digest.update(column.values.to_numpy(zero_copy_only=False).tobytes())
            digests[2].update(batch.column(0).value_lengths().to_numpy(zero_copy_only=False).tobytes())
    return " ".join(digest.hexdigest() for digest in digests)


def timed(source: Path, store: Path, checkout: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one job, the start of Python included."""
    shutil.rmtree(store, ignore_errors=True)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "fastcollate", "prepare", str(source), str(store), "--workers", "2", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment, cwd=store.parent)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(source: Path, root: Path, baseline: Path, rounds: int) -> dict[str, Any]:
    checkouts = {"ours": CHECKOUT, "baseline": baseline}
    made: dict[str, str] = {}
    for name, checkout in checkouts.items():  # the first job compiles
        timed(source, root / name, checkout)
        made[name] = rows_of(root / name)
    assert made["ours"] == made["baseline"], "the rows differ"
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in checkouts}
    peaks: dict[str, list[float]] = {name: [] for name in checkouts}
    for _ in range(rounds):
        for name, checkout in checkouts.items():
            times[name].append(timed(source, root / name, checkout))
    for _ in range(max(1, rounds // 2)):
        for name, checkout in checkouts.items():
            shutil.rmtree(root / name)
            peaks[name].append(peak(source, root / name, checkout)["peak_mb"])
    result: dict[str, Any] = {}
    for name in checkouts:
        wall, cpu = (statistics.median(column) for column in zip(*times[name], strict=True))
        result[name] = {
            "wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "peak_mb": round(statistics.median(peaks[name]), 1),
        }  # fmt: skip
        shutil.rmtree(root / name)
    ours, old = result["ours"], result["baseline"]
    return {**result, "times_the_baseline_takes": {key: round(ours[key] / old[key], 3) for key in ours}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("--megabytes", type=int, default=134)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, write in KINDS.items():
            source = Path(folder) / f"{kind}.jsonl"
            write(source, options.megabytes * 1_000_000)
            results[kind] = compare(source, Path(folder), options.baseline.resolve(), options.rounds)
            print(kind, results[kind], flush=True)
            source.unlink()
    save("prepare_baseline", {"megabytes": options.megabytes, "rounds": options.rounds, "runs": results})


if __name__ == "__main__":
    main()
