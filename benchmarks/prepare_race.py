"""Jobs that meet on one folder: two at a barrier; a leader killed by `kill -9` and a new job at once.

Run as `python -m benchmarks.prepare_race [TURNS]`; writes `bench_results/prepare_race.json`. Every turn begins with an
empty folder and must end with the files of an undisturbed run, byte for byte, with nothing left beside them, and
without an error in any job that was not killed.
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.harness import save
from benchmarks.kill import store_hash
from benchmarks.prepare_data import write_short
from fastcollate.ingest.job import prepare
from fastcollate.sources import blocks
from fastcollate.store.manifest import verify_checksums

SEED = 6
MEGABYTES = 3
SIZES = blocks.Sizes(block=200_000, shard=1_000_000)  # as many units and shards as 120 MB would have
FORK = multiprocessing.get_context("fork")


def _job(source: Path, store: Path, options: dict[str, Any], gate: Any, answers: Any) -> None:
    if gate is not None:
        gate.wait()
    try:
        answers.put("reused" if prepare(source, store, **options).reused else "made")
    except BaseException:
        answers.put(traceback.format_exc())
        raise


def start(source: Path, store: Path, answers: Any, gate: Any = None, **options: Any) -> BaseProcess:
    """A job in a process of its own, which waits at the gate first."""
    process = FORK.Process(target=_job, args=(source, store, options, gate, answers))
    process.start()
    return process


def race(source: Path, store: Path, num_jobs: int, **options: Any) -> list[str]:
    """Jobs that begin together on an empty folder; what each says."""
    shutil.rmtree(store, ignore_errors=True)
    answers, gate = FORK.SimpleQueue(), FORK.Barrier(num_jobs)
    jobs = [start(source, store, answers, gate, **options) for _ in range(num_jobs)]
    for job in jobs:
        job.join()
    return sorted(answers.get() for _ in jobs)


def kill_and_start(source: Path, store: Path, delay_s: float, *, waits: bool, **options: Any) -> tuple[str, int]:
    """A leader killed after a while and a new job at once, or one that was already waiting; what the new one says.

    Returns:
        Its answer, and how many units the journal held at the kill.
    """
    shutil.rmtree(store, ignore_errors=True)
    silent, answers = FORK.SimpleQueue(), FORK.SimpleQueue()
    leader = start(source, store, silent, **options)
    time.sleep(delay_s / 2)
    second = start(source, store, answers, **options) if waits else None
    time.sleep(delay_s / 2)
    units = _units(store)
    leader.kill()  # SIGKILL, unless it has come to its end
    second = second or start(source, store, answers, **options)
    leader.join()
    second.join()
    return answers.get(), units


def _units(store: Path) -> int:
    try:
        return (store / ".journal").read_bytes().count(b'"line": "unit"')
    except FileNotFoundError:
        return 0


def run_races(source: Path, root: Path, turns: int, **options: Any) -> dict[str, Any]:
    """Turns of two jobs at a barrier; every fourth turn has four jobs."""
    expected, seconds = undisturbed(source, root / "plain", **options)
    answers = []
    for turn in range(turns):
        answers.append(race(source, root / "raced", 4 if turn % 4 == 3 else 2, **options))
        assert set(answers[-1]) <= {"made", "reused"}, answers[-1]
        assert answers[-1].count("made") == 1, answers[-1]
        assert store_hash(root / "raced") == expected, f"turn {turn}"
    assert verify_checksums(root / "raced") == []
    return {"turns": turns, "jobs": sum(map(len, answers)), "undisturbed_s": round(seconds, 3), "all_identical": True,
            "made_once_in_each_turn": True, "errors": 0}  # fmt: skip


def run_kills(source: Path, root: Path, turns: int, seed: int, **options: Any) -> dict[str, Any]:
    """Turns of a killed leader; in every second one the next job is already waiting for the lock."""
    expected, seconds = undisturbed(source, root / "plain", **options)
    dice, found = random.Random(seed), []
    for turn in range(turns):
        delay = dice.uniform(0, 1.1 * seconds)
        found.append(kill_and_start(source, root / "killed", delay, waits=turn % 2 == 1, **options))
        assert found[-1][0] in ("made", "reused"), found[-1][0]
        assert store_hash(root / "killed") == expected, f"turn {turn}"
    assert verify_checksums(root / "killed") == []
    units = [count for _, count in found]
    return {"turns": turns, "seed": seed, "undisturbed_s": round(seconds, 3), "all_identical": True, "errors": 0,
            "units_in_the_journal_at_each_kill": units, "kills_in_the_midst": sum(map(bool, units)),
            "the_next_job_waited_in": turns // 2}  # fmt: skip


def undisturbed(source: Path, store: Path, **options: Any) -> tuple[str, float]:
    """The hash of a job that nobody disturbs, and its seconds."""
    prepare(source, store, overwrite=True, **options)
    started = time.perf_counter()
    [answer] = race(source, store, 1, **options)
    assert answer == "made"
    return store_hash(store), time.perf_counter() - started


def main() -> None:
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    blocks.SIZES = SIZES
    results: dict[str, Any] = {}
    runs: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
        "jobs_at_a_barrier": lambda source, root: run_races(source, root, turns, workers=2),
        "leader_killed_and_a_new_job_at_once": lambda source, root: run_kills(source, root, turns, SEED, workers=2),
    }
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "short.jsonl"
        write_short(source, MEGABYTES * 1_000_000)
        for name, run in runs.items():
            results[name] = run(source, Path(folder))
            print(name, results[name], flush=True)
    sizes = {"megabytes": MEGABYTES, "block_bytes": SIZES.block, "shard_bytes": SIZES.shard, "workers": 2}
    save("prepare_race", {**sizes, **results})


if __name__ == "__main__":
    main()
