"""`python -m benchmarks.first_answers`: what a stranger's first run answers, three seeds, from no compiled kernel on.

`fastcollate train --out runs/first` as it stands, kernels not yet compiled, then `fastcollate generate` for the first
ten questions of each of two kinds in the split that the run kept back. No question stands twice in the sample.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import save
from fastcollate.sources.sample import PAST_TENSE, QUESTION
from fastcollate.train import TrainOptions, answer
from fastcollate.train.step import split_rows

SEEDS, QUESTIONS = (123, 1, 2), 10  # the first seed is the command's own
Record = dict[str, str]


def train(out: Path, seed: int) -> float:
    """The command in a process of its own; its seconds, compilation included."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(out.parent / f"kernels-{seed}")}
    command = [sys.executable, "-m", "fastcollate", "train", "--out", str(out)]
    start = time.perf_counter()
    subprocess.run([*command, *(["--seed", str(seed)] if seed != SEEDS[0] else [])], check=True, env=environment)
    return time.perf_counter() - start


def unseen(out: Path, kind: str) -> list[Record]:
    """The first questions of a kind in the test split, none of which the run was trained on."""
    records = [json.loads(line) for line in (out / "sample.jsonl").read_text().splitlines()]
    rows = split_rows(len(records), TrainOptions())
    trained = {(records[row]["instruction"], records[row]["input"]) for row in rows["train"]}
    found = [records[row] for row in rows["test"] if records[row]["instruction"] == kind][:QUESTIONS]
    assert len(found) == QUESTIONS
    assert not any((record["instruction"], record["input"]) in trained for record in found)
    return found


def ask(out: Path, record: Record) -> Record:
    """A question and what the run's model answers."""
    found = answer(out, record["instruction"], record["input"])["model_response"]
    return {**record, "answer": found}


def main() -> None:
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            out = Path(folder, str(seed))
            seconds = train(out, seed)
            asked = {kind: [ask(out, record) for record in unseen(out, kind)] for kind in (PAST_TENSE, QUESTION)}
            exact = {kind: sum(one["answer"] == one["output"] for one in some) for kind, some in asked.items()}
            print(f"seed {seed}: {seconds:.0f} s, {exact}", flush=True)
            runs.append({"seed": seed, "seconds": round(seconds, 1), "exact": exact, "asked": asked})
    medians = {kind: statistics.median(run["exact"][kind] for run in runs) for kind in (PAST_TENSE, QUESTION)}
    save(
        "first_answers",
        {
            "what": "`fastcollate train --out runs/first` without compiled kernels, then `fastcollate generate`: exact "
            f"answers to {QUESTIONS} questions of a kind from the split that was kept back",
            "seconds": statistics.median(run["seconds"] for run in runs),
            "exact": medians,
            "runs": runs,
        },
    )
    assert min(medians.values()) >= 8


if __name__ == "__main__":
    main()
