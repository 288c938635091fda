"""What every benchmark shares: interleaved timing, medians, and a result file that names versions and machine."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "bench_results"
PACKAGES = (
    "fastcollate", "torch", "numpy", "numba", "pyarrow", "tiktoken", "gigatoken", "transformers", "datasets",
    "tokenizers", "trl", "lightning", "litdata", "mosaicml-streaming",
)  # fmt: skip


def interleave(
    contenders: Mapping[str, Callable[[], object]], *, repeats: int = 7, warmup: int = 1
) -> dict[str, list[float]]:
    """Time each contender `repeats` times in turn, so that a noisy minute hits all of them alike.

    Returns:
        Seconds per call, in order, by name. Quote medians, and ratios only within one call of this function.
    """
    for _ in range(warmup):
        for run in contenders.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            gc.collect()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each contender's times."""
    return {name: statistics.median(times) for name, times in seconds.items()}


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system and versions: what a figure means nothing without."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def commit() -> str:
    """The commit measured: what `GIT_COMMIT` says, as in many CIs, or git; empty where neither is there."""
    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the platform module's word is all there is
    return platform.processor()


def save(name: str, result: Mapping[str, Any]) -> Path:
    """Write `bench_results/NAME.json`: the machine, then `result`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    new = path.with_suffix(".new")  # whoever is killed meanwhile leaves the old file whole
    new.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
    new.replace(path)
    print(f"wrote bench_results/{path.name}")
    return path


def save_part(name: str, part: str, result: Mapping[str, Any]) -> Path:
    """As `save`, one part of the file; what else is in it stays."""
    path = RESULTS / f"{name}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    earlier.pop("machine", None)
    print(json.dumps(result, indent=2))
    return save(name, {**earlier, part: result})
