"""Anonymous memory (`RssAnon`) of a process that iterates a loader, above one with the same imports that does nothing.

The same imports are all modules that the loader's process has at its end: Numba imports most of its own, and what
other packages register with it (awkward, where gigatoken is installed), when the first kernel runs. How much that is
stands in the result as well.

The stores are of 0.5, 2 and 10 GB: one generated shard of 500 MB under several names (hard links), so that the disk
holds it once; to a process each is a file of its own, mapped and read for itself.

    python -m benchmarks.memory
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import save
from benchmarks.synthetic import GPT2, LENGTHS, PAD, make_lengths
from fastcollate.store.manifest import StoreIdentity, sources_of, write_manifest
from fastcollate.store.shards import ShardColumns, ShardInfo, shard_name, write_shard
from fastcollate.store.store import TokenStore

SHARD_BYTES = 500_000_000
SHARDS = (1, 4, 20)
BATCH_SIZES = (8, 64, 512)
POLICIES = ("bucketed",)
SECONDS = 2
REPEATS = 2
LIMIT_MB = 60

PROCESS = """
import json, sys, time
import contextlib, importlib
import fastcollate.load.loader, fastcollate.load.prefetch, fastcollate.store.store
def rss(name):
    for line in open("/proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / 1e6
seconds, path, batch_size, policy = float(sys.argv[1]), *sys.argv[2:5]
for name in json.load(sys.stdin):
    with contextlib.suppress(Exception):  # made at run time, or for another system
        importlib.import_module(name)
found = {"batches": 0, "rows": 0, "anon_mb": rss("RssAnon")}
if path:
    store = fastcollate.TokenStore(path)
    loader = fastcollate.BatchLoader(store, batch_size=int(batch_size), policy=policy)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for batch in loader:
            found["batches"] += 1
            if found["batches"] % 20 == 0:
                found["anon_mb"] = max(found["anon_mb"], rss("RssAnon"))
                if time.monotonic() > end:
                    break
    found["rows"] = loader.stats.rows
    found["bytes_mapped"] = sum(shard.input_ids.nbytes + shard.offsets.nbytes for shard in store.shards)
found["modules"] = sorted(sys.modules)
print(json.dumps(found))
"""


def make_shard(folder: Path) -> ShardInfo:
    """A shard of about `SHARD_BYTES`."""
    lengths = make_lengths(SHARD_BYTES // 230)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    num_rows = len(lengths)
    columns = ShardColumns(
        np.random.default_rng(1).integers(0, PAD, offsets[-1], np.uint16),
        offsets,
        np.stack([np.zeros_like(lengths), lengths], 1).astype(np.uint32).ravel(),
        np.arange(0, 2 * num_rows + 1, 2, dtype=np.int64),
        np.arange(num_rows, dtype=np.uint64),
    )
    return write_shard(folder, shard_name(0), columns)


def linked_store(path: Path, shard: ShardInfo, num_shards: int) -> TokenStore:
    """A store whose shards are one file."""
    path.mkdir()
    infos = [replace(shard, name=shard_name(number)) for number in range(num_shards)]
    for info in infos:
        os.link(path.parent / shard.name, path / info.name)
    sources = sources_of(["made by a benchmark"], sum(info.num_rows for info in infos))
    write_manifest(path, StoreIdentity(sources, GPT2, {"name": "alpaca"}, {}), infos)
    return TokenStore(path)


def run(*arguments: object, modules: Sequence[str] = ()) -> dict[str, Any]:
    """One process's figures; it imports these modules first."""
    command = [sys.executable, "-c", PROCESS, str(SECONDS), *map(str, arguments)]
    done = subprocess.run(command, input=json.dumps(modules), check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    stores: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        shard = make_shard(Path(folder))
        paths = {count: Path(folder) / f"of{count}" for count in SHARDS}
        sizes = {}
        for count, path in paths.items():
            store = linked_store(path, shard, count)
            sizes[count] = {"bytes": sum(file.stat().st_size for file in path.iterdir()), "rows": len(store)}
        modules = run(paths[SHARDS[0]], 64, POLICIES[0])["modules"]
        idle = [run("", 0, "", modules=modules)["anon_mb"] for _ in range(REPEATS)]
        base = statistics.median(idle)
        explicit = statistics.median(run("", 0, "")["anon_mb"] for _ in range(REPEATS))
        for count, path in paths.items():
            for policy in POLICIES if count == SHARDS[-1] else POLICIES[:1]:
                for batch_size in BATCH_SIZES if count == SHARDS[-1] else (64,):
                    found = run(path, batch_size, policy)
                    del found["modules"]
                    assert found["rows"] > 0
                    above = round(found["anon_mb"] - base, 1)
                    case = {"policy": policy, "batch_size": batch_size, "above_idle_mb": above, **found}
                    stores.append({"gigabytes": round(sizes[count]["bytes"] / 1e9, 2), **sizes[count], **case})
                    print(f"{sizes[count]['bytes'] / 1e9:.1f} GB, {policy}, batch {batch_size}: {above} MB above idle")
    save(
        "memory",
        {
            "what": "RssAnon of a process that iterates a loader at its defaults, above one with the same imports",
            "lengths": LENGTHS,
            "seconds_of_each_run": SECONDS,
            "idle_anon_mb": idle,
            "of_which_modules_imported_on_first_use_mb": round(base - explicit, 1),
            "limit_mb": LIMIT_MB,
            "within_limit": all(case["above_idle_mb"] <= LIMIT_MB for case in stores),
            "runs": stores,
        },
    )


if __name__ == "__main__":
    main()
