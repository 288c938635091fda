"""kill -9 at random moments of `fastcollate prepare`, resumed each time: the bytes of an undisturbed run?

Run as `python -m benchmarks.prepare_kill [KILLS]`; writes `bench_results/prepare_kill.json`.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import save
from benchmarks.kill import kill_many_times, store_hash
from benchmarks.prepare_data import write_short
from fastcollate.store.manifest import verify_checksums

SEED = 4
MEGABYTES = 64


def command(source: Path, store: Path) -> list[str]:
    return [sys.executable, "-m", "fastcollate", "prepare", str(source), str(store), "--workers", "2", "--json"]


def main() -> None:
    num_kills = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source, plain, killed = root / "short.jsonl", root / "plain", root / "killed"
        write_short(source, MEGABYTES * 1_000_000)
        for _ in range(2):  # the first run compiles
            shutil.rmtree(plain, ignore_errors=True)
            start = time.perf_counter()
            subprocess.run(command(source, plain), check=True, stdout=subprocess.DEVNULL)
        total_s = time.perf_counter() - start
        expected = store_hash(plain)
        journal, rounds = killed / ".journal", []

        def finished() -> None:
            rounds.append(store_hash(killed))
            assert rounds[-1] == expected, "the resumed store differs"
            shutil.rmtree(killed)

        def progress() -> int:
            return journal.read_bytes().count(b'"line": "unit"') if journal.exists() else 0

        kills = kill_many_times(
            command(source, killed),
            num_kills,
            dice=random.Random(SEED),
            delays_s=(total_s / 4, 1.25 * total_s),
            progress=progress,
            finished=finished,
        )
        subprocess.run(command(source, killed), check=True, stdout=subprocess.DEVNULL)
        problems = verify_checksums(killed)
        finished()
    save(
        "prepare_kill",
        {
            "what": "kill -9 at random moments of one `fastcollate prepare` job with two workers, resumed each time; "
            "whenever it comes to its end, the hash of all files is compared with an undisturbed run's, and the job "
            "begins again",
            "kills": len(kills),
            "seed": SEED,
            "megabytes": MEGABYTES,
            "undisturbed_s": round(total_s, 2),
            "units_at_each_kill": kills,
            "kills_with_finished_units": sum(map(bool, kills)),
            "finished_stores_compared": len(rounds),
            "all_identical": set(rounds) == {expected},
            "checksum_problems": problems,
            "sha256": expected,
        },
    )


if __name__ == "__main__":
    main()
