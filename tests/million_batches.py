"""Random batches, fast path against reference: `python -m tests.million_batches`, by hand, not part of the test run.

Every batch goes through the drop-in `collate_fn` (lists) and, where its limit is one a store takes, through `Collator`
(rows of three shards); inputs and targets must equal the chapter's collate in value, shape and dtype.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import save
from fastcollate.collate.collator import Collator
from fastcollate.collate.drop_in import collate_fn
from fastcollate.collate.reference import custom_collate_fn, custom_collate_with_masking_fn
from fastcollate.progress import progress_bar
from fastcollate.store.shards import ShardColumns

PAD = 50256
ROWS_PER_ROUND = 600
BATCHES_PER_ROUND = 1000


def random_rows(random: np.random.Generator) -> tuple[list[list[int]], list[int]]:
    """Rows of 0 to 24 tokens with literal end-of-texts among them, and prompt lengths from 0 to length + 1."""
    rows, prompts = [], []
    for _ in range(ROWS_PER_ROUND):
        row = random.integers(0, PAD, random.integers(0, 25))
        row[random.random(len(row)) < random.choice([0, 0, 0.02, 0.3])] = PAD
        rows.append(row.tolist())
        prompts.append(int(random.integers(0, len(row) + 2)))
    return rows, prompts


def as_shards(rows: list[list[int]], prompts: list[int], dtype: Any) -> list[ShardColumns]:
    """The rows in three shards, as a store holds them."""
    shards = []
    for part in np.array_split(np.arange(len(rows)), 3):
        spans = [[prompts[i], len(rows[i]) - prompts[i]] if prompts[i] <= len(rows[i]) else [prompts[i]] for i in part]
        shards.append(
            ShardColumns(
                np.array([token for i in part for token in rows[i]], dtype),
                np.cumsum([0, *(len(rows[i]) for i in part)], dtype=np.int64),
                np.array([count for counts in spans for count in counts], np.uint32),
                np.cumsum([0, *map(len, spans)], dtype=np.int64),
                part.astype(np.uint64),
            )
        )
    return shards


def check(got: Any, expected: Any, what: str) -> int:
    """Compare inputs and targets; returns their cells."""
    for name, one, other in zip(("inputs", "targets"), got, expected, strict=True):
        wanted = other if other.numel() else other.to(torch.int64)  # of empty rows the reference makes float32
        same = one.dtype == wanted.dtype and one.shape == wanted.shape and torch.equal(one, wanted)
        assert same, f"{what}, {name}:\n{one}\nreference:\n{wanted}"
    return int(got[0].numel() * 2)


def run_round(seed: int, first: int, num_batches: int) -> tuple[int, int]:
    """Compare some batches, the same for a seed and a first batch; returns comparisons and cells."""
    torch.set_num_threads(1)
    random = np.random.default_rng([seed, first])
    rows, prompts = random_rows(random)
    shards = as_shards(rows, prompts, random.choice([np.uint16, np.uint32]))
    comparisons = cells = 0
    collators: dict[tuple[bool, int | None], Collator] = {}
    for number in range(first, first + num_batches):
        picked = random.integers(0, len(rows), random.integers(1, 6))
        masked = bool(random.integers(2))
        limit = None if random.random() < 0.4 else int(random.integers(-2, 27))
        what = f"seed {seed}, batch {number}: rows {picked.tolist()}, masked {masked}, limit {limit}"
        if masked:
            batch: Any = [(prompts[i], rows[i]) for i in picked]
            expected = custom_collate_with_masking_fn(batch, allowed_max_length=limit)
        else:
            batch = [rows[i] for i in picked]
            expected = custom_collate_fn(batch, allowed_max_length=limit)
        cells += check(collate_fn(batch, allowed_max_length=limit), expected, f"{what}, collate_fn")
        comparisons += 1
        if limit is None or limit >= 1:
            if (masked, limit) not in collators:
                collators[masked, limit] = Collator(shards, mask_prompt=masked, max_length=limit)
            cells += check(collators[masked, limit](picked), expected, f"{what}, Collator")
            comparisons += 1
    return comparisons, cells


def code_digest() -> str:
    """SHA-256 over the files whose results are compared."""
    folder = Path(__file__).resolve().parent.parent / "fastcollate"
    files = [folder / "jit.py", *sorted((folder / "store").glob("*.py")), *sorted((folder / "collate").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=20260)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    digest = code_digest()  # before anything runs: the code that is compared is the code that was imported
    comparisons = cells = 0
    start = time.perf_counter()
    firsts = range(0, options.batches, BATCHES_PER_ROUND)
    counts = [min(BATCHES_PER_ROUND, options.batches - first) for first in firsts]
    with progress_bar(unit="batches") as progress, ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        task = progress.add_task("compare", total=options.batches)
        rounds = pool.map(run_round, repeat(options.seed), firsts, counts)  # a difference raises here and ends it all
        for count, done in zip(counts, rounds, strict=True):
            comparisons, cells = comparisons + done[0], cells + done[1]
            progress.update(task, advance=count)
    save(
        "million_batches",
        {
            "command": f"python -m tests.million_batches --batches {options.batches} --seed {options.seed}",
            "batches": options.batches,
            "comparisons": comparisons,
            "cells_compared": cells,
            "different": 0,  # the first difference ends the run with its batch
            "sha256_of_kernels_collate_reference": digest,
            "seconds": round(time.perf_counter() - start, 1),
        },
    )


if __name__ == "__main__":
    main()
