"""Many short runs of `train` on 2 to 4 gloo ranks: do all of them end, with the losses and rows of one process?

A rank that counts its epoch as over a step early gathers while the others reduce, and none of them ever ends. Row
counts, batch sizes, policies, accumulations and limits are drawn at random; a run that takes longer than a minute
counts as hung. Run as `python -m benchmarks.train_hang [RUNS]`; writes `bench_results/train_hang.json`.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import save

SEED = 17
WORLD_SIZES = (2, 3, 4)
LIMIT_S = 60.0  # a run takes about a second
TOLERANCE = 1e-5


def draw_case(dice: random.Random, number: int) -> dict[str, Any]:
    """One run: how many ranks, how many rows, and the options of `train`."""
    world_size = WORLD_SIZES[number % len(WORLD_SIZES)]
    a_rank = dice.randint(1, 3)
    values: dict[str, Any] = {
        "policy": dice.choice(["sequential", "shuffled", "bucketed", "packed"]),
        "batch_size": a_rank * world_size,
        "accumulate": dice.randint(1, 3),
        "mask_prompt": dice.random() < 0.5,
        "eval_every": dice.choice([0, 3]),
        "checkpoint_every": dice.choice([0, 2]),
        "train_share": dice.choice([1.0, 0.9]),
        "test_share": 0.0,
        "seed": number,
    }
    if values["policy"] == "packed":
        values["capacity"] = 64
    limit = dice.choice(["epochs", "max_steps", "both"])
    if limit != "max_steps":
        values["epochs"] = dice.randint(1, 2)
    if limit != "epochs":
        values["max_steps"] = dice.randint(1, 30)
    # two whole batches of all ranks at least, and any remainder
    num_rows = dice.randint(2 * values["batch_size"] + 2, 60)
    return {"number": number, "world_size": world_size, "num_rows": num_rows, "values": values}


# -------------------------------------------------------------------------------------------------------- one rank


def run_cases(folder: Path, cases: Sequence[dict[str, Any]]) -> None:
    """What each rank does: the cases one after the other, and a file for each that has ended."""
    import fastcollate.train.model as model
    from fastcollate.train.loop import train
    from fastcollate.train.options import TrainOptions
    from fastcollate.train.ranks import join_ranks
    from fastcollate.train.step import MicroBatch, Stepper

    tiny = model.GPT2Config(num_layers=1, num_heads=2, width=16, vocab_size=300, context_length=64)
    model.CONFIGS = {**model.CONFIGS, "tiny": tiny}
    ranks = join_ranks("cpu")
    seen: list[list[int]] = []
    step = Stepper.step

    def noted_step(self: Stepper, batches: Sequence[MicroBatch], *args: Any) -> Any:
        for batch in batches:
            seen.extend(rows_of(batch))
        return step(self, batches, *args)

    Stepper.step = noted_step  # type: ignore[method-assign]
    for case in cases:
        seen.clear()
        out = folder / f"run-{case['number']}-on-{ranks.world_size}"
        options = TrainOptions(out=out, device="cpu", tensorboard=False, sample_tokens=0, **case["values"])
        report = train(folder / f"store-{case['num_rows']}", options, ranks=ranks, progress=False)
        done = {"steps": report.steps, "rows": seen}
        (folder / f"{out.name}-rank-{ranks.rank}.json").write_text(json.dumps(done))
    ranks.close()


def rows_of(batch: Any) -> list[list[int]]:
    """The rows that a micro-batch holds, each by its first two tokens."""
    if not batch.num_useful:
        return []
    if batch.cu_seqlens is None:
        found: list[list[int]] = batch.inputs[:, :2].tolist()
        return found
    cells = batch.inputs.flatten()
    starts = batch.cu_seqlens[:-1].tolist()
    pairs = [cells[start : start + 2].tolist() for start in starts]
    return [pair for pair in pairs if pair[0] < 20]  # unused cells at a pack's end hold the padding id


# ------------------------------------------------------------------------------------------------- all ranks together


def launch(folder: Path, world_size: int, numbers: Sequence[int]) -> str | None:
    """Run cases on so many ranks; `None`, or why they did not all end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "benchmarks.train_hang", "--as-a-rank", str(folder), json.dumps(list(numbers))]
    processes = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "OMP_NUM_THREADS": "1"})
        for rank in range(world_size)
    ]
    ended, since = -1, time.monotonic() + 2 * LIMIT_S  # more for the start
    try:
        while any(process.poll() is None for process in processes):
            found = len(list(folder.glob(f"run-*-on-{world_size}-rank-*.json")))
            if found != ended:
                ended, since = found, max(since, time.monotonic())
            if time.monotonic() - since > LIMIT_S:
                return f"{world_size} ranks: nothing ended for {LIMIT_S:.0f} s after {found} files"
            if any(process.poll() for process in processes):
                return f"{world_size} ranks: a rank failed after {found} files"
            time.sleep(0.1)
        return None
    finally:
        for process in processes:
            process.kill()
            process.wait()


def result_of(folder: Path, number: int, world_size: int) -> tuple[list[float], Counter[tuple[int, ...]], set[int]]:
    """A run's losses, the rows of all its ranks, and the numbers of steps that its ranks have counted."""
    name = f"run-{number}-on-{world_size}"
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    parts = [json.loads((folder / f"{name}-rank-{rank}.json").read_text()) for rank in range(world_size)]
    rows = Counter(tuple(row) for part in parts for row in part["rows"])
    return [json.loads(line)["loss"] for line in lines], rows, {part["steps"] for part in parts}


def compare(folder: Path, case: dict[str, Any]) -> tuple[float, list[str]]:
    """The largest difference of losses from one process, and what else differs."""
    number, values = case["number"], case["values"]
    losses, rows, steps = result_of(folder, number, case["world_size"])
    expected, expected_rows, expected_steps = result_of(folder, number, 1)
    problems = []
    if steps != expected_steps or len(losses) != len(expected):
        return 1.0, [f"run {number}: {steps} steps, {expected_steps} in one process"]
    if rows != expected_rows:
        problems.append(f"run {number}: other rows than in one process")
    if "max_steps" not in values:
        num_rows = max(1, int(case["num_rows"] * values["train_share"]))
        if sorted(rows.values()) != [values["epochs"]] * num_rows:
            problems.append(f"run {number}: not each row once an epoch")
    return max(abs(a - b) for a, b in zip(losses, expected, strict=True)), problems


def main() -> None:
    from tests.helpers import write_store

    num_runs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    dice = random.Random(SEED)
    cases = [draw_case(dice, number) for number in range(num_runs)]
    tokenizer = {"name": "gpt2", "fingerprint": "00", "vocab_size": 300, "pad_token_id": 299}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cases.json").write_text(json.dumps(cases))
        for num_rows in {case["num_rows"] for case in cases}:
            rows = []
            for row in range(num_rows):
                length = dice.randint(4, 40)
                rows.append(([3, length - 3], [row // 20, row % 20, *dice.choices(range(20, 299), k=length - 2)]))
            write_store(folder / f"store-{num_rows}", rows, shard_rows=25, tokenizer=tokenizer)
        start = time.perf_counter()
        problems = [launch(folder, 1, range(num_runs))]
        for world_size in WORLD_SIZES:
            numbers = [case["number"] for case in cases if case["world_size"] == world_size]
            problems.append(launch(folder, world_size, numbers))
            print(f"{world_size} ranks: {len(numbers)} runs, {problems[-1] or 'all ended'}", flush=True)
        assert not any(problems), problems
        found = [compare(folder, case) for case in cases]
    differences = [problem for _, part in found for problem in part]
    largest = max(difference for difference, _ in found)
    save(
        "train_hang",
        {
            "what": "runs of train on 2 to 4 gloo ranks over random row counts, batch sizes, policies, accumulations, "
            "epochs and steps; each against one process: losses, rows, steps",
            "runs": num_runs,
            "seed": SEED,
            "runs_by_world_size": dict(Counter(case["world_size"] for case in cases)),
            "runs_whose_last_batch_has_fewer_rows_than_ranks": sum(map(is_short, cases)),
            "hung_or_failed": 0,
            "largest_difference_of_a_loss": largest,
            "differences": differences,
            "seconds": round(time.perf_counter() - start, 1),
        },
    )
    assert not differences, differences[:5]
    assert largest < TOLERANCE, largest


def is_short(case: dict[str, Any]) -> bool:
    """Whether a rank has no row of an epoch's last batch."""
    rest = int(case["num_rows"] * case["values"]["train_share"]) % case["values"]["batch_size"]
    return case["values"]["policy"] != "packed" and 0 < rest < case["world_size"]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-a-rank"]:
        root = Path(sys.argv[2])
        wanted = set(json.loads(sys.argv[3]))
        run_cases(root, [case for case in json.loads((root / "cases.json").read_text()) if case["number"] in wanted])
    else:
        main()
