"""Peak memory of `fastcollate prepare` on 60 MB and on 2 GB of instruction records, and on random words.

Run as `python -m benchmarks.prepare_memory`; writes `bench_results/prepare_memory.json`. Memory is the proportional
set size (what processes share is counted once) summed over the job's processes, as the kernel tells it 20 times a
second, without pages of files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.harness import save
from benchmarks.prepare_data import write_short

SIZES = {"short": (60, 2000), "random_words": (60, 2000)}  # megabytes


def write_random_words(path: Path, num_bytes: int) -> None:
    """Words that no cache of words has seen: the worst case for one."""
    dice = np.random.default_rng(0)
    size = 0
    with open(path, "w", encoding="utf-8") as file:
        while size < num_bytes:
            letters = dice.integers(ord("a"), ord("z") + 1, 4000, dtype=np.uint8).tobytes().decode()
            words = [letters[i : i + 8] for i in range(0, len(letters), 8)]
            record = {"instruction": " ".join(words[:250]), "input": "", "output": " ".join(words[250:])}
            size += file.write(json.dumps(record) + "\n")


def write_repeated(path: Path, num_bytes: int) -> None:
    """Short records; beyond 60 MB the same ones over again."""
    write_short(path, min(num_bytes, 60_000_000))
    piece = path.read_bytes()
    with open(path, "ab") as file:
        while file.tell() < num_bytes:
            file.write(piece)


WRITERS = {"short": write_repeated, "random_words": write_random_words}


def memory_bytes(process: psutil.Process) -> tuple[int, int]:
    """Proportional set size and number of processes, the process and all below it."""
    total = count = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            with open(f"/proc/{one.pid}/smaps_rollup") as file:
                total += next(int(line.split()[1]) for line in file if line.startswith("Pss:")) * 1024
                count += 1
        except (OSError, StopIteration):
            continue  # it has just ended
    return total, count


def peak(source: Path, store: Path, checkout: Path | None = None) -> dict[str, Any]:
    """Of one job, of this checkout's code or of another's."""
    command = [sys.executable, "-m", "fastcollate", "prepare", str(source), str(store), "--workers", "2", "--json"]
    start = time.perf_counter()
    environment = {**os.environ, **({} if checkout is None else {"PYTHONPATH": str(checkout)})}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=store.parent)
    measured = psutil.Process(process.pid)
    samples: list[int] = []
    most = 0
    while process.poll() is None:
        memory, count = memory_bytes(measured)
        samples.append(memory)
        most = max(most, count)
        time.sleep(0.05)
    assert process.returncode == 0
    half = len(samples) // 2
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "processes": most,
        "samples": len(samples),
        "peak_mb": round(max(samples) / 1e6, 1),
        "peak_first_half_mb": round(max(samples[:half]) / 1e6, 1),
        "peak_second_half_mb": round(max(samples[half:]) / 1e6, 1),
    }


def main() -> None:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for kind, sizes in SIZES.items():
            for megabytes in sizes:
                source = root / "records.jsonl"
                WRITERS[kind](source, megabytes * 1_000_000)
                results[f"{kind}_{megabytes}_mb"] = peak(source, root / "store")
                print(kind, megabytes, results[f"{kind}_{megabytes}_mb"], flush=True)
                shutil.rmtree(root / "store")
    peaks = {name: result["peak_mb"] for name, result in results.items()}
    save("prepare_memory", {"workers": 2, "limit_mb": 600, "under_limit": max(peaks.values()) < 600, "runs": results})


if __name__ == "__main__":
    main()
