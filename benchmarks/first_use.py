"""With an empty cache of kernels: the first `collate_fn`, and a loader's first batch, imports excluded.

    python -m benchmarks.first_use --baseline CHECKOUT    # beside an older checkout's code, by turns

Each is a process of its own with a cache folder of its own, five times; medians. The store is of each checkout's own
making, from the same records.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import save

ROUNDS = 5
PREPARE = "import sys; from fastcollate import prepare; prepare([sys.argv[1]], sys.argv[2])"
ALL_MODULES = """
import importlib, pkgutil, sys, time, warnings
warnings.simplefilter("ignore")
import fastcollate
for module in pkgutil.walk_packages(fastcollate.__path__, "fastcollate."):
    try:
        importlib.import_module(module.name)
    except (ImportError, SystemExit):
        pass  # an extra that is not installed
"""
FIRST = {
    "collate_fn": ALL_MODULES + """
from fastcollate import collate_fn
start = time.perf_counter()
collate_fn([[1, 2, 3], [4, 5]])
print(time.perf_counter() - start)
""",
    "loader": ALL_MODULES + """
from fastcollate import BatchLoader, TokenStore
store = TokenStore(sys.argv[1])
start = time.perf_counter()
next(iter(BatchLoader(store, batch_size=8)))
print(time.perf_counter() - start)
""",
}  # fmt: skip


def run(checkout: Path, folder: Path, code: str, *arguments: str) -> str:
    """What a process prints that runs `code` over a checkout, with the cache of kernels in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "NUMBA_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--baseline", type=Path, required=True, metavar="CHECKOUT")
    checkouts = {"fastcollate": Path(__file__).resolve().parent.parent, "baseline": parser.parse_args().baseline}
    seconds: dict[str, dict[str, list[float]]] = {what: {name: [] for name in checkouts} for what in FIRST}
    with tempfile.TemporaryDirectory() as scratch:
        records = Path(scratch) / "records.json"
        records.write_text(
            json.dumps([{"instruction": f"Add {n}", "input": "", "output": "1 " * n} for n in range(64)])
        )
        stores = {name: Path(scratch) / name for name in checkouts}
        for name, checkout in checkouts.items():
            run(checkout, Path(scratch), PREPARE, str(records), str(stores[name]))
        for _ in range(ROUNDS):
            for what, code in FIRST.items():
                for name, checkout in checkouts.items():
                    with tempfile.TemporaryDirectory() as cache:
                        seconds[what][name].append(float(run(checkout, Path(cache), code, str(stores[name]))))
    result = {}
    for what, found in seconds.items():
        medians = {name: statistics.median(times) for name, times in found.items()}
        share = round(medians["fastcollate"] / medians["baseline"], 3)
        result[what] = {"seconds": found, "median_seconds": medians, "share_of_the_baseline": share}
        print(what, medians, share)
    save("first_use", result)


if __name__ == "__main__":
    main()
