"""Reading a store from object storage: the first batch, waiting, bytes fetched, the cache's limit, injected faults.

Run as `python -m benchmarks.remote_read [PART ...]`, parts `real`, `small`, `faults`, and `peers` where that is asked
for; writes a part each of `bench_results/remote_read.json`. The storage is SeaweedFS on this machine, behind a proxy
that adds 20 ms to each request and passes on 200 MB/s; server, proxy and reader share this machine's cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import fsspec

from benchmarks.harness import save_part
from benchmarks.remote_faults import inject_faults, through_faults
from benchmarks.remote_peers import BATCH, compare
from benchmarks.remote_stores import OPTIONS, local_digest, make_store, tiny, upload
from benchmarks.seaweed import ENVIRONMENT, Seaweed
from benchmarks.slow_proxy import SlowProxy
from fastcollate import BatchLoader, TokenStore

LATENCY_S, RATE, STEP_S, STEPS = 0.02, 200e6, 0.005, 3000


def read(what: str, url: str, cache: str, limit: str) -> dict[str, Any]:
    """One reader, in a process of its own: `first` batch, `steady` steps, or a whole `epoch`."""
    list(BatchLoader(tiny(Path(cache).parent / "tiny"), **OPTIONS))  # compiles
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    store = TokenStore(url, cache=cache, cache_limit=limit or None)
    opened = time.perf_counter() - start
    loader = BatchLoader(store, **OPTIONS)
    batches = iter(loader)
    batch: Any = next(batches)
    found: dict[str, Any] = {"opened_s": opened, "first_batch_s": time.perf_counter() - start}
    if what == "first":
        return found
    digest, waited = hashlib.sha256(), loader.stats.wait_s
    start, count = time.perf_counter(), 0
    while batch is not None:
        digest.update(batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes())
        count += 1
        if what == "steady":
            time.sleep(STEP_S)
            if count == STEPS:
                break
        batch = next(batches, None)
    took = time.perf_counter() - start
    share = (loader.stats.wait_s - waited) / took
    return {**found, "seconds": took, "wait_share": share, "batches": count, "digest": digest.hexdigest()}


def epoch_of_rows(url: str, cache: str, limit: str) -> dict[str, Any]:
    """An epoch as the peers are timed."""
    warnings.simplefilter("ignore")
    list(BatchLoader(tiny(Path(cache).parent / "tiny"), batch_size=BATCH, order="shards"))  # compiles
    start = time.perf_counter()
    first, rows, trained = 0.0, 0, 0
    store = TokenStore(url, cache=cache, cache_limit=limit or None)
    for inputs, targets in BatchLoader(store, batch_size=BATCH, order="shards"):
        first = first or time.perf_counter() - start
        rows += len(inputs)
        trained += int((targets != -100).sum())
    return {"first_batch_s": first, "seconds": time.perf_counter() - start, "rows": rows, "trained": trained}


def reader(what: str, url: str, cache: Path, limit: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.remote_read", "--reader", what, url, str(cache), limit]
    # with compiled files of the packages, as an installation has them
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate(timeout=1200)
    if process.returncode:
        raise SystemExit("a reader stopped, as it says above")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def fetched(proxy: SlowProxy, process: subprocess.Popen[str]) -> tuple[dict[str, Any], int]:
    before = proxy.counts["received"]
    found = result(process)
    return found, proxy.counts["received"] - before


def most_in(folder: Path, until: threading.Event) -> int:
    """The most bytes of shards, whole or not, that lay there meanwhile."""
    most, pause = 0, 0.02
    while not until.wait(pause):
        start, total = time.perf_counter(), 0
        for path in folder.rglob("shard-*"):
            if ".locks" not in path.parts:
                try:
                    total += path.stat().st_blocks * 512  # what the disk gives, in blocks
                except FileNotFoundError:
                    continue
        most = max(most, total)
        pause = max(0.02, 10 * (time.perf_counter() - start))  # of many files: else this is what is measured
    return most


def measure(proxy: SlowProxy, root: Path, part: str, num_shards: int, rows: int) -> None:
    size = make_store(root / part, num_shards, rows)
    upload(root / part, proxy)
    url = f"s3://bucket/{part}"
    found: dict[str, Any] = {"shards": num_shards, "rows": num_shards * rows, "shard_bytes": size}
    firsts = [result(reader("first", url, root / f"{part}-first{turn}")) for turn in range(6)][1:]
    found["first_batch_s"] = sorted(round(one["first_batch_s"], 2) for one in firsts)
    found["opened_s"] = sorted(round(one["opened_s"], 2) for one in firsts)
    print(part, found, flush=True)
    steady = result(reader("steady", url, root / f"{part}-steady"))
    found["steps_of_5_ms"], found["wait_share"] = steady["batches"], round(steady["wait_share"], 4)
    print(part, found, flush=True)
    found |= limited_epoch(proxy, root, part, size, num_shards, rows)
    what = "order='shards', batch 64; 20 ms a request, 200 MB/s; each figure a process of its own with an empty cache"
    save_part("remote_read", part, {"what": what, **found})


def limited_epoch(proxy: SlowProxy, root: Path, part: str, size: int, num_shards: int, rows: int) -> dict[str, Any]:
    """A whole epoch within a limit of two groups of shards and one more: eight at a time, small ones by their rows."""
    limit = max(17 * size // num_shards, size // 4 if num_shards > 100 else 0)
    until, most = threading.Event(), [0]
    watching = threading.Thread(target=lambda: most.append(most_in(root / f"{part}-limited", until)))
    watching.start()
    try:
        one, received = fetched(proxy, reader("epoch", f"s3://bucket/{part}", root / f"{part}-limited", str(limit)))
    finally:  # else the thread keeps a run that failed from its end
        until.set()
        watching.join()
    if one["digest"] != local_digest(root / part):
        raise SystemExit("a batch differs from the local store's")
    return {
        "epoch_rows_per_s": round(num_shards * rows / one["seconds"]), "epoch_bytes_received": received,
        "received_over_store": round(received / size, 4), "cache_limit": limit, "most_in_cache": max(most),
        "identical_to_local": True,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=[])
    parser.add_argument("--megabytes", type=int, default=1000, help="of the stores that are read")
    parser.add_argument("--shards", type=int, default=10_000, help="of the part small")
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--reader", nargs=4)
    given = parser.parse_args()
    if given.reader:
        what, url, cache, limit = given.reader
        if what == "faults":
            found = through_faults(url, cache)
        else:
            found = epoch_of_rows(url, cache, limit) if what == "rows" else read(what, url, cache, limit)
        print(json.dumps(found))
        return
    parts = given.parts or ["real", "small", "faults"]
    os.environ |= ENVIRONMENT
    row_bytes = 220  # about so many, as the lengths are drawn
    with (
        tempfile.TemporaryDirectory() as folder,
        Seaweed(Path(folder) / "weed") as server,
        SlowProxy(server.address, latency_s=LATENCY_S, bytes_per_s=RATE) as proxy,
    ):
        os.environ["AWS_ENDPOINT_URL"] = f"http://{proxy.address}"
        fsspec.filesystem("s3").mkdir("bucket")
        root = Path(folder)
        if "real" in parts:
            measure(proxy, root, "real", max(given.megabytes // 36, 1), 36_000_000 // row_bytes)
        if "small" in parts:
            rows = max(given.megabytes * 1_000_000 // given.shards // row_bytes, 1)
            measure(proxy, root, "small", given.shards, rows)
        if "peers" in parts:
            compare(proxy, root, 24, given.megabytes * 1_000_000 // 24 // row_bytes)
        if "faults" in parts:
            inject_faults(proxy, root, given.faults)


if __name__ == "__main__":
    main()
