"""One loss curve: `fastcollate train` on 1, 2 and 4 ranks, and a run killed three times that went on with others.

    python -m benchmarks.curve [STEPS]

Packs, balanced by cost, four an optimizer step; tiny GPT-2, float32, one process a rank over gloo. Writes
`bench_results/curve.json` (the largest difference from the run on one rank) and draws `docs/images/curve.png`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import RESULTS, save
from fastcollate.ingest.job import prepare
from fastcollate.sources.sample import sample_records

RANKS_AFTER_KILLS = (2, 1, 4, 2)


def start(store: Path, out: Path, ranks: int, steps: int) -> list[subprocess.Popen[bytes]]:
    """The processes of a run, as `torchrun` starts them, which are each killed by their own number."""
    command = [
        sys.executable, "-m", "fastcollate", "train", "--store", str(store), "--out", str(out), "--policy", "packed",
        "--capacity", "512", "--batch-size", "4", "--max-steps", str(steps), "--schedule", "constant",
        "--checkpoint-every", "1", "--eval-every", "0", "--sample-tokens", "0", "--resume", "--json", "--device", "cpu",
    ]  # fmt: skip
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in shared.items()},
                 "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[bytes]]) -> None:
    assert [process.wait() for process in processes] == [0] * len(processes)


def losses(out: Path) -> list[float]:
    file = out / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def kill_after(processes: list[subprocess.Popen[bytes]], out: Path, stop: int) -> int:
    """Kill all of a run's processes once so many steps are logged; returns the steps that were logged then."""
    file = out / "metrics.jsonl"
    while not (file.exists() and file.read_bytes().count(b"\n") >= stop):
        assert processes[0].poll() is None, "it ended before it was to be killed"
        time.sleep(0.05)
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    return file.read_bytes().count(b"\n")


def draw(curves: dict[str, list[float]], kills: list[int]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for (name, values), width in zip(curves.items(), (6.0, 4.0, 2.5, 1.0), strict=True):
        axes.plot(range(1, len(values) + 1), values, label=name, linewidth=width, alpha=0.8)
    for kill in kills:
        axes.axvline(kill, color="0.7", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(RESULTS.parent / "docs" / "images" / "curve.png", dpi=110)


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    curves, kills = {}, []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "sample.json").write_text(json.dumps(sample_records(2000)))
        prepare([str(root / "sample.json")], root / "store")
        for ranks in (1, 2, 4):
            finish(start(root / "store", root / str(ranks), ranks, steps))
            curves[f"{ranks} rank{'s' * (ranks > 1)}"] = losses(root / str(ranks))
        killed = root / "killed"
        for number, ranks in enumerate(RANKS_AFTER_KILLS[:-1], 1):
            run = start(root / "store", killed, ranks, steps)
            kills.append(kill_after(run, killed, steps * number // len(RANKS_AFTER_KILLS)))
        finish(start(root / "store", killed, RANKS_AFTER_KILLS[-1], steps))
        curves["killed three times, from 2 on with 1, 4, 2 ranks"] = losses(killed)
    wanted, *others = curves.values()
    assert all(len(values) == steps for values in curves.values())
    result = {
        "what": "fastcollate train, packs balanced by cost, four an optimizer step, on so many ranks over gloo",
        "steps": steps,
        "ranks_before_and_after_each_kill": list(RANKS_AFTER_KILLS),
        "killed_after_steps": kills,
        "first_and_last_loss": [wanted[0], wanted[-1]],
        "largest_difference": {
            name: max(abs(a - b) for a, b in zip(wanted, values, strict=True))
            for name, values in zip(list(curves)[1:], others, strict=True)
        },
    }
    print(result)
    save("curve", result)
    draw(curves, kills)


if __name__ == "__main__":
    main()
