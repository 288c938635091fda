"""Reading a store from object storage: the first batch, waiting, bytes fetched, the cache's limit, injected faults.

Run as `python -m benchmarks.remote_read [PART ...]`, parts `real`, `small`, `faults`; writes a part each of
`bench_results/remote_read.json`. The storage is SeaweedFS on this machine behind a proxy that adds 20 ms to each
request and passes on 200 MB/s; server, proxy and reader share this machine's cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from benchmarks.harness import save_part
from benchmarks.seaweed import ENVIRONMENT, Seaweed
from benchmarks.slow_proxy import FAULTS, SlowProxy
from fastcollate import BatchLoader, TokenStore
from fastcollate.errors import InputError
from fastcollate.store import manifest as manifests
from fastcollate.store import remote, shards

LATENCY_S, RATE, BATCH, STEP_S, STEPS = 0.02, 200e6, 64, 0.005, 3000
OPTIONS: dict[str, Any] = {"batch_size": BATCH, "order": "shards", "mask_prompt": True}
TOKENIZER = {
    "name": "gpt2", "fingerprint": "00", "vocab_size": 50257, "pad_token_id": 50256, "end_token_id": 50256, "files": [],
}  # fmt: skip


def make_store(folder: Path, num_shards: int, rows: int) -> int:
    """Rows of 8 to 400 random ids; returns the bytes of the shards."""
    folder.mkdir()
    rng, infos = np.random.default_rng(0), []
    for number in range(num_shards):
        lengths = np.clip(rng.lognormal(4.4, 0.6, rows), 8, 400).astype(np.int64)
        prompts = (lengths * rng.random(rows)).astype(np.int64)
        columns = shards.ShardColumns(
            rng.integers(0, 50256, int(lengths.sum()), np.uint16),
            np.cumsum([0, *lengths]),
            np.stack([prompts, lengths - prompts], 1).ravel().astype(np.uint32),
            np.arange(rows + 1) * 2,
            np.arange(rows, dtype=np.uint64) + np.uint64(number * rows),
        )
        infos.append(shards.write_shard(folder, shards.shard_name(number), columns, sync=False))
    sources = manifests.sources_of([folder.name], num_shards * rows)
    manifests.write_manifest(folder, manifests.StoreIdentity(sources, TOKENIZER, {"name": "alpaca"}, {}), infos)
    return sum(info.num_bytes for info in infos)


def read(what: str, url: str, cache: str, limit: str) -> dict[str, Any]:
    """One reader, in a process of its own: `first` batch, `steady` steps, or a whole `epoch`."""
    list(BatchLoader(_tiny(Path(cache).parent / "tiny"), **OPTIONS))  # compiles
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    store = TokenStore(url, cache=cache, cache_limit=limit or None)
    opened = time.perf_counter() - start
    loader = BatchLoader(store, **OPTIONS)
    batches = iter(loader)
    batch = next(batches)
    found: dict[str, Any] = {"opened_s": opened, "first_batch_s": time.perf_counter() - start}
    if what == "first":
        return found
    digest, errors, waited = hashlib.sha256(), Counter[str](), loader.stats.wait_s
    start, count = time.perf_counter(), 0
    while True:
        digest.update(batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes())
        count += 1
        if what == "steady":
            time.sleep(STEP_S)
            if count == STEPS:
                break
        try:
            if (nothing := next(batches, None)) is None:
                break
            batch = nothing
        except InputError as error:  # a clear error; the run goes on where it was
            errors[str(error).split(": ", 2)[-1][:60]] += 1
            state = loader.state_dict()
            loader = BatchLoader(store, **OPTIONS)
            loader.load_state_dict(state)
            batches = iter(loader)
            batch = next(batches)
    took = time.perf_counter() - start
    share = (loader.stats.wait_s - waited) / took
    return {
        **found,
        "seconds": took,
        "wait_share": share,
        "batches": count,
        "errors": errors,
        "digest": digest.hexdigest(),
    }


def _tiny(folder: Path) -> Path:
    if not folder.exists():
        make_store(folder, 2, 200)
    return folder


def reader(what: str, url: str, cache: Path, limit: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.remote_read", "--reader", what, url, str(cache), limit]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


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
    most = 0
    while not until.wait(0.02):
        total = 0
        for path in folder.rglob("shard-*"):
            if ".locks" not in path.parts:
                try:
                    total += path.stat().st_blocks * 512
                except FileNotFoundError:
                    continue
        most = max(most, total)
    return most


def measure(proxy: SlowProxy, root: Path, part: str, num_shards: int, rows: int, *, epochs: bool) -> None:
    size = make_store(root / part, num_shards, rows)
    upload(root / part, proxy)
    url, found = f"s3://bucket/{part}", {"shards": num_shards, "rows": num_shards * rows, "shard_bytes": size}
    firsts = [result(reader("first", url, root / f"{part}-first{turn}")) for turn in range(3)]
    found["first_batch_s"] = sorted(round(one["first_batch_s"], 2) for one in firsts)
    found["opened_s"] = sorted(round(one["opened_s"], 2) for one in firsts)
    print(part, found, flush=True)
    steady = result(reader("steady", url, root / f"{part}-steady"))
    found["steps_of_5_ms"], found["wait_share"] = steady["batches"], round(steady["wait_share"], 4)
    print(part, found, flush=True)
    if epochs:
        limit, until = 17 * size // num_shards, threading.Event()
        threads, most = [], [0]
        threads.append(threading.Thread(target=lambda: most.append(most_in(root / f"{part}-limited", until))))
        threads[0].start()
        try:
            one, received = fetched(proxy, reader("epoch", url, root / f"{part}-limited", str(limit)))
        finally:  # else the thread keeps a run that failed from its end
            until.set()
            threads[0].join()
        digest = local_digest(root / part)
        assert one["digest"] == digest, "a batch differs from the local store's"
        found |= {
            "epoch_rows_per_s": round(num_shards * rows / one["seconds"]), "epoch_bytes_received": received,
            "received_over_store": round(received / size, 4), "cache_limit": limit, "most_in_cache": max(most),
            "identical_to_local": True,
        }  # fmt: skip
    what = "order='shards', batch 64; 20 ms a request, 200 MB/s; each figure a process of its own with an empty cache"
    save_part("remote_read", part, {"what": what, **found})


def local_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for batch in BatchLoader(folder, **OPTIONS):
        digest.update(batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes())
    return digest.hexdigest()


def upload(folder: Path, proxy: SlowProxy) -> None:
    slow = proxy.latency_s, proxy.bytes_per_s
    proxy.latency_s, proxy.bytes_per_s = 0.0, None
    remote.push(folder, f"s3://bucket/{folder.name}")
    proxy.latency_s, proxy.bytes_per_s = slow


def faults(proxy: SlowProxy, root: Path, wanted: int) -> None:
    """Read a store of many small shards, again and again, until so many faults were injected."""
    make_store(root / "faults", 1000, 200)
    upload(root / "faults", proxy)
    expected, dice, kinds = local_digest(root / "faults"), random.Random(5), Counter[str]()
    lock = threading.Lock()

    def choose(method: str, path: str) -> str | None:
        with lock:
            if dice.random() > 0.2 or sum(kinds.values()) >= wanted:
                return None
            kind = dice.choice(FAULTS)
            kinds[kind] += 1
            return kind

    proxy.faults, epochs, errors, seconds, stopped = choose, 0, Counter[str](), [], 0
    while sum(kinds.values()) < wanted:
        start = time.monotonic()
        process = reader("epoch", "s3://bucket/faults", root / f"cache{epochs}-{stopped}")
        out, _ = process.communicate(timeout=900)
        if process.returncode:  # opening failed: a clear error, see standard error
            stopped += 1
            continue
        one = json.loads(out.splitlines()[-1])
        assert one["digest"] == expected, "a wrong row"
        errors.update(one["errors"])
        epochs += 1
        seconds.append(round(time.monotonic() - start, 1))
        print(epochs, kinds, errors, seconds, flush=True)
    proxy.faults = lambda method, path: None
    what = "a fifth of the requests of readers goes wrong; every batch of every epoch is that of the local store"
    save_part("remote_read", "faults", {
        "what": what, "faults": dict(kinds), "epochs": epochs, "wrong_rows": 0, "errors_told": dict(errors),
        "openings_refused": stopped, "seconds_an_epoch": seconds,
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=[])
    parser.add_argument("--megabytes", type=int, default=1000, help="of the stores that are read")
    parser.add_argument("--shards", type=int, default=10_000, help="of the part small")
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--reader", nargs=4)
    given = parser.parse_args()
    if given.reader:
        print(json.dumps(read(*given.reader)))
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
            measure(proxy, root, "real", max(given.megabytes // 36, 1), 36_000_000 // row_bytes, epochs=True)
        if "small" in parts:
            rows = max(given.megabytes * 1_000_000 // given.shards // row_bytes, 1)
            measure(proxy, root, "small", given.shards, rows, epochs=False)
        if "faults" in parts:
            faults(proxy, root, given.faults)


if __name__ == "__main__":
    main()
