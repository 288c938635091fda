"""`--engine ray` on a cluster without a shared disk: bytes, memory of each process, a node that dies, one that is late.

Run as `python -m benchmarks.remote_ray [MEGABYTES]`; writes `bench_results/remote_ray.json`. A head that works not and
nodes of one processor each are begun by `ray start`, each in a folder of its own; the storage is SeaweedFS behind a
proxy that adds 20 ms to each request. The records lie in a folder that only the driver is told of.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil

from benchmarks.harness import save_part
from benchmarks.prepare_data import write_short
from benchmarks.remote_write import ENVIRONMENT, LATENCY_S, MAIN, command, local_hash, make_bucket, remote_hash
from benchmarks.seaweed import Seaweed
from benchmarks.slow_proxy import SlowProxy

PORT = 23_790 + os.getpid() % 5000
URL = "s3://bucket/store"
STORE_MEMORY = 400_000_000  # bytes of each node's object store: of blocks that wait or are at work


class Node:
    """A node that `ray start --block` runs; `shards` are the folders in which its workers were seen to make one."""

    def __init__(self, folder: Path, name: str, *options: str) -> None:
        self.name, self.folder = name, folder / name
        self.shards: set[str] = set()
        (self.folder / "tmp").mkdir(parents=True)
        ray = str(Path(sys.executable).with_name("ray"))
        memory = f"--object-store-memory={STORE_MEMORY}"
        self.process = subprocess.Popen(
            [ray, "start", "--block", "--disable-usage-stats", f"--temp-dir={self.folder}", memory, *options],
            cwd=self.folder,
            env={**os.environ, "TMPDIR": str(self.folder / "tmp"), "RAY_worker_niceness": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def look(self) -> None:
        self.shards |= {path.name for path in (self.folder / "tmp").glob("fastcollate-*")}

    def kill(self) -> None:
        """Kill all its processes at once, as a machine that fails would."""
        with_children = [psutil.Process(self.process.pid)]
        with_children += with_children[0].children(recursive=True)
        for process in with_children:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.Error:
                continue
        self.process.wait()


class Watch(threading.Thread):
    """The most that each process of a tree has in memory, by what it is: workers, and the driver itself."""

    def __init__(self, driver: int, nodes: list[Node]) -> None:
        super().__init__(daemon=True)
        self.driver, self.nodes, self.ended = driver, nodes, threading.Event()
        self.most: dict[tuple[str, int], Counter[str]] = {}

    def run(self) -> None:
        while not self.ended.wait(0.05):
            self._look(psutil.Process(self.driver), "driver")
            for node in self.nodes:
                node.look()
                if node.process.poll() is None:
                    for process in psutil.Process(node.process.pid).children(recursive=True):
                        self._look(process, node.name)

    def _look(self, process: psutil.Process, whose: str) -> None:
        try:
            if whose != "driver" and "store_shard" not in " ".join(process.cmdline()):
                return
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except (psutil.Error, OSError):
            return
        found = {line.split(":")[0]: int(line.split()[1]) / 1e3 for line in lines if line.startswith(("VmRSS", "Rss"))}
        most = self.most.setdefault((whose, process.pid), Counter())
        for key, value in found.items():
            most[key] = max(most[key], value)


def cluster(root: Path, megabytes: int) -> dict[str, object]:
    source, local = root / "short.jsonl", root / "local"
    write_short(source, megabytes * 1_000_000)
    subprocess.run(command(source, local), check=True, stdout=subprocess.DEVNULL)
    expected = local_hash(local)
    notes: Counter[str] = Counter()

    def note(method: str, path: str) -> None:
        if method == "PUT" and "/.job/" in path and not path.endswith("job.json"):
            notes[path] += 1

    with Seaweed(root / "weed") as server, SlowProxy(server.address, latency_s=LATENCY_S, faults=note) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = f"http://{proxy.address}"
        make_bucket()
        head = Node(root, "head", "--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false")
        join = (f"--address=127.0.0.1:{PORT}", "--num-cpus=1")
        time.sleep(10)
        nodes = [Node(root, "a", *join), Node(root, "b", *join)]
        time.sleep(5)
        arguments = [sys.executable, "-c", MAIN, "prepare", str(source), URL, "--engine", "ray", "--json"]
        started = time.perf_counter()
        driver = subprocess.Popen(
            arguments, env={**os.environ, "RAY_ADDRESS": f"127.0.0.1:{PORT}"}, stdout=subprocess.DEVNULL
        )
        watch = Watch(driver.pid, nodes)
        watch.start()
        events: dict[str, int] = {}
        while driver.poll() is None:
            time.sleep(0.05)
            if len(notes) >= 1 and len(nodes) == 2:
                events["notes_when_c_joined"] = len(notes)
                nodes.append(Node(root, "c", *join))
            if len(nodes) == 3 and len(nodes[2].shards) >= 1 and nodes[0].process.poll() is None:
                events["notes_when_a_was_killed"] = len(notes)
                nodes[0].kill()
        seconds = time.perf_counter() - started
        watch.ended.set()
        watch.join()
        for node in [*nodes[1:], head]:
            node.kill()
        assert driver.returncode == 0
        assert {"notes_when_c_joined", "notes_when_a_was_killed"} <= {*events}, events
        assert remote_hash(URL) == expected, "the store differs from the local one"
    return {
        **events,
        "num_shards": len(notes),
        "notes_written": sum(notes.values()),
        "shards_begun": {node.name: len(node.shards) for node in nodes},
        "seconds": round(seconds, 1),
        "most_megabytes": [
            {"whose": whose, **{k: round(v) for k, v in m.items()}} for (whose, _), m in watch.most.items()
        ],
    }


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 640
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        found = cluster(Path(folder), megabytes)
    print(found)
    save_part(
        "remote_ray",
        "nodes",
        {
            "what": "`fastcollate prepare --engine ray` of short records to SeaweedFS behind a proxy that waits 20 ms "
            "before each request, on a cluster of `ray start` nodes of one processor, each in a folder of its own: a "
            "and b are there, c joins late, a is killed (-9, all its processes). Every object equals the local "
            "store's file. Memory: of each process that makes shards, and of the driver, the most seen twenty times a "
            "second; VmRSS counts the pages of Ray's shared store (RssShmem) too",
            "source_megabytes": megabytes,
            **found,
            "identical": True,
        },
    )


if __name__ == "__main__":
    main()
