"""What an order by shards costs in randomness, beside Streaming's shuffles of the same shards.

Run with `python -m benchmarks.shard_order`; `--peers PYTHON` is an interpreter with mosaicml-streaming, if this one has
none. Writes `bench_results/shard_order.json`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import save
from fastcollate.plan import plan_epoch
from fastcollate.plan.sharded.order import ShardOrder, Shards

BATCH = 64
STREAMING = """
import sys
import types
import numpy as np
from importlib.metadata import version
from importlib.util import find_spec
place = find_spec("streaming").submodule_search_locations[0]
for package in ("streaming", "streaming.base"):  # its shuffles alone, which need nothing of what the package imports
    sys.modules[package] = types.ModuleType(package)
    sys.modules[package].__path__ = [place + package.removeprefix("streaming").replace(".", "/")]
from streaming.base.shuffle import get_shuffle
name, shards, rows, out = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]
block = max(4_000_000, 1 << 18)
np.save(out, get_shuffle(name, np.full(shards, rows), 1, 7, 0, block))
print(version("mosaicml-streaming"), block)
"""


def measures(order: npt.NDArray[np.int64], shards: int, rows: int) -> dict[str, Any]:
    """How far neighbours in the sources come apart, and how much of a batch is of one shard."""
    where = np.empty(len(order), np.int64)
    where[order] = np.arange(len(order))
    gaps = np.abs(np.diff(where)[np.arange(len(order) - 1) % rows != rows - 1])
    batches = (order // rows)[: len(order) // BATCH * BATCH].reshape(-1, BATCH)[:: max(len(order) // BATCH // 4000, 1)]
    same = [(np.bincount(batch) ** 2).sum() - BATCH for batch in batches]
    places = where.reshape(shards, rows)
    active = np.zeros(len(order) // BATCH + 2, np.int64)
    np.add.at(active, places.min(1) // BATCH, 1)
    np.add.at(active, places.max(1) // BATCH + 1, -1)
    return {
        "neighbours_apart": float(gaps.mean() / len(order)),
        "others_of_its_shard_in_a_batch": float(np.mean(same) / BATCH),
        "shards_at_once": int(np.cumsum(active).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=160)
    parser.add_argument("--rows", type=int, default=100_000, help="of each shard")
    parser.add_argument("--peers", default=sys.executable)
    options = parser.parse_args()
    total = options.shards * options.rows
    starts = np.arange(options.shards + 1) * options.rows
    own = ShardOrder(Shards(starts, np.zeros(options.shards, np.int64)), np.uint64(7)).rows(0, total)
    plan = plan_epoch(np.ones(total, np.uint16), batch_size=BATCH, policy="shuffled", seed=7)
    rows = np.concatenate([plan.window(index).rows for index in range(plan.num_windows)])[:total]
    found = {"order='rows'": rows, "order='shards'": own}
    versions = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("py1e", "py1br", "py1s", "py2s"):
            path = Path(folder) / f"{name}.npy"
            command = [options.peers, "-c", STREAMING, name, str(options.shards), str(options.rows), str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"no Streaming here: {done.stderr.splitlines()[-1:]}", file=sys.stderr)
                break
            versions["mosaicml-streaming"], versions["shuffle_block_size"] = done.stdout.split()[-2:]
            found[f"Streaming {name}"] = np.load(path)
    for order in found.values():
        assert np.array_equal(np.sort(order), np.arange(total)), "not each row once"
    result = {name: measures(order, options.shards, options.rows) for name, order in found.items()}
    for name, line in result.items():
        print(name, line)
    save(
            "shard_order",
            {
                "shards": options.shards, "rows_a_shard": options.rows, "batch": BATCH,
                "peers": versions, "results": result,
            },
        )  # fmt: skip


if __name__ == "__main__":
    main()
