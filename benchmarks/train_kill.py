"""kill -9 at random moments of a training run, resumed each time: the losses of an undisturbed run, to the last bit?

Run as `python -m benchmarks.train_kill [KILLS]`; writes `bench_results/train_kill.json`.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import save
from fastcollate.ingest.job import prepare
from fastcollate.sources.sample import sample_records

STEPS = 100
SEED = 20


def command(store: Path, out: Path, steps: int = STEPS) -> list[str]:
    return [
        sys.executable, "-m", "fastcollate", "train", "--store", str(store), "--out", str(out), "--batch-size", "4",
        "--max-steps", str(steps), "--checkpoint-every", "2", "--eval-every", "25", "--dropout", "0.1", "--resume",
        "--json", "--device", "cpu",
    ]  # fmt: skip


def seconds_of(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def losses(out: Path) -> list[float]:
    file = out / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def main() -> None:
    num_kills = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    dice = random.Random(SEED)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = root / "sample.json"
        source.write_text(json.dumps(sample_records(300)))
        prepare([str(source)], root / "store")
        startup_s = seconds_of(command(root / "store", root / "short", steps=1))
        total_s = seconds_of(command(root / "store", root / "plain"))
        step_s = max(total_s - startup_s, 0) / STEPS  # checkpoints and evaluations included
        kills: list[int] = []
        finished = 0
        while len(kills) < num_kills:
            process = subprocess.Popen(
                command(root / "store", root / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            delay = dice.uniform(0.1, startup_s + 8 * step_s)  # while it starts, steps, evaluates, saves
            try:
                process.wait(delay)
                assert process.returncode == 0, process.stderr.read().decode() if process.stderr else ""
                print(f"finished after {len(kills)} kills; from the start again")
                assert losses(root / "killed") == losses(root / "plain")
                shutil.rmtree(root / "killed")
                finished += 1
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                file = root / "killed" / "metrics.jsonl"
                kills.append(file.read_bytes().count(b"\n") if file.exists() else 0)
                print(f"kill {len(kills)} after {delay:.2f} s, {kills[-1]} steps logged", flush=True)
        subprocess.run(command(root / "store", root / "killed"), check=True, stdout=subprocess.DEVNULL)
        expected, found = losses(root / "plain"), losses(root / "killed")
    assert len(expected) == STEPS
    save(
        "train_kill",
        {
            "what": "kill -9 at random moments of `fastcollate train` (tiny GPT-2, dropout 0.1, a checkpoint every 2 "
            "steps), resumed each time; losses compared with an undisturbed run, exactly",
            "kills": len(kills),
            "seed": SEED,
            "steps": STEPS,
            "runs_that_finished_before_the_last_kill": finished,
            "steps_logged_at_each_kill": kills,
            "losses_identical": found == expected,
            "first_loss": found[0],
            "last_loss": found[-1],
        },
    )
    assert found == expected, [i for i, pair in enumerate(zip(found, expected, strict=True), 1) if pair[0] != pair[1]]


if __name__ == "__main__":
    main()
