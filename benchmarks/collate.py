"""Row numbers in, two int64 tensors out: the compiled collate beside the reference, a NumPy row loop and a plain fill.

The reference gets ready-made Python lists. The NumPy loops read the same memory map: one allocates each batch, as a
plain loop does, the other writes into recycled buffers. The fill writes the same number of output bytes into a
recycled buffer with `ndarray.fill`, reads nothing and makes no tensors: a floor. Drop-in is `collate_fn` on lists.

    python -m benchmarks.collate [--baseline CHECKOUT]    # an older checkout's code as one more contender
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.baseline import Baseline, write_rows
from benchmarks.harness import interleave, medians, save
from benchmarks.synthetic import IGNORE, LENGTHS, NUM_ROWS, PAD, make_store
from fastcollate import TokenStore, collate_fn, plan_epoch
from fastcollate.collate.collator import Collator
from fastcollate.collate.reference import custom_collate_fn
from fastcollate.load.buffers import HostPool

SAMPLES = {8: 500, 64: 60, 512: 8}  # batches that the reference is timed on, evenly spread over the epoch
POLICIES = {"random": "shuffled", "bucketed": "bucketed"}
DROP_IN_ROWS = 32_768
REPEATS = 15
PROCESSES = "baseline", "fastcollate, beside it"
Rows = npt.NDArray[np.int64]
Take = Callable[[int], npt.NDArray[np.int64]]


class NumpyLoop:
    """A plain NumPy row loop over the store's memory map."""

    def __init__(self, store: TokenStore, take: Take | None = None) -> None:
        (shard,) = store.shards
        self.ids, self.offsets, self.take = shard.input_ids, shard.offsets, take

    def __call__(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        begins, ends = self.offsets[rows], self.offsets[rows + 1]
        shape = len(rows), int((ends - begins).max())
        if self.take is None:
            inputs, targets = np.full(shape, PAD), np.full(shape, IGNORE)
        else:
            out = self.take(2 * shape[0] * shape[1])
            inputs, targets = out[: 2 * shape[0] * shape[1]].reshape(2, *shape)
            inputs.fill(PAD)
            targets.fill(IGNORE)
        for i, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
            ids, length = self.ids[begin:end], end - begin
            inputs[i, :length] = ids
            targets[i, : length - 1] = ids[1:]
            targets[i, length - 1] = PAD
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def over(collate: Callable[[Any], object], batches: Sequence[Any]) -> Callable[[], None]:
    """A contender: every batch in turn, each dropped before the next."""

    def run() -> None:
        for batch in batches:
            collate(batch)

    return run


def fill(widths: Sequence[int], num_rows: int) -> Callable[[], None]:
    """A contender: fill as many output bytes, in one recycled buffer."""
    buffer = np.zeros(2 * num_rows * max(widths), np.int64)
    cells = [num_rows * width for width in widths]
    views = [(buffer[:count], buffer[count : 2 * count]) for count in cells]

    def run() -> None:
        for inputs, targets in views:
            inputs.fill(PAD)
            targets.fill(IGNORE)

    return run


def check(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> None:
    """Values and dtypes, bit for bit."""
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype == torch.int64
        assert torch.equal(a, b)


def median_ratio(old: Sequence[float], new: Sequence[float]) -> float:
    """The median of the ratios of neighbours in time: a slow half minute hits both."""
    return round(statistics.median(b / a for a, b in zip(old, new, strict=True)), 3)


def compare(store: TokenStore, batch_size: int, order: str, both: Sequence[Baseline]) -> dict[str, Any]:
    """One batch size in one order of rows: microseconds a batch and ratios.

    `both`, an older checkout's process and one of today's code (none without a checkout), are timed on lists of the
    same rows: what fresh memory costs depends on a process's past.
    """
    plan = plan_epoch(store.lengths, batch_size=batch_size, policy=POLICIES[order], drop_last=True)
    batches = [np.ascontiguousarray(rows) for rows in plan]
    sample = batches[:: len(batches) // SAMPLES[batch_size]]
    lists = [[store[int(i)].input_ids.tolist() for i in rows] for rows in sample]
    collator, pool = Collator(store.shards), HostPool()
    plain, recycled = NumpyLoop(store), NumpyLoop(store, HostPool().take)
    for rows, as_lists in zip(sample, lists, strict=True):
        expected = custom_collate_fn(as_lists)
        for found in (collator(rows, pool.take), collator(rows), plain(rows), recycled(rows), collate_fn(as_lists)):
            check(expected, found)
    widths = [int(store.lengths[rows].max()) for rows in batches]
    contenders = {
        "fastcollate": (over(lambda rows: collator(rows, pool.take), batches), batches),
        "numpy loop": (over(plain, batches), batches),
        "numpy loop, recycled buffers": (over(recycled, batches), batches),
        "fill": (fill(widths, batch_size), batches),
        "reference": (over(custom_collate_fn, lists), lists),
        "drop-in collate_fn": (over(collate_fn, lists), lists),
    }
    for name, process in zip(PROCESSES, both, strict=False):
        contenders[name] = partial(process.ask, "collate", order=order, batch_size=batch_size), batches
    for name, process in zip(PROCESSES, both, strict=False):
        ask = partial(process.ask, "drop_in", count=DROP_IN_ROWS // batch_size, batch_size=batch_size)
        contenders[f"{name}, drop-in"] = ask, range(DROP_IN_ROWS // batch_size)
    seconds = interleave({name: run for name, (run, _) in contenders.items()}, repeats=REPEATS)
    micros = {name: 1e6 * time / len(contenders[name][1]) for name, time in medians(seconds).items()}
    ours = micros["fastcollate"]
    old = {}
    if both:
        old["times_the_baseline_takes"] = median_ratio(*(seconds[name] for name in PROCESSES))
        drop_ins = (seconds[f"{name}, drop-in"] for name in PROCESSES)
        old["drop_in_times_the_baseline_takes"] = median_ratio(*drop_ins)
    return {
        "batch_size": batch_size,
        "order": order,
        **old,
        "mean_width": round(float(np.mean(widths)), 1),
        "mean_width_of_sample": round(float(np.mean([len(max(rows, key=len)) for rows in lists])), 1),
        "microseconds_per_batch": {name: round(value, 2) for name, value in micros.items()},
        "times_the_reference": round(micros["reference"] / ours, 1),
        "times_the_numpy_loop": round(micros["numpy loop"] / ours, 2),
        "times_the_numpy_loop_recycled": round(micros["numpy loop, recycled buffers"] / ours, 2),
        "times_a_fill_takes": round(ours / micros["fill"], 2),
        "drop_in_times_the_reference": round(micros["reference"] / micros["drop-in collate_fn"], 1),
    }


def main(checkout: Path | None) -> None:
    with tempfile.TemporaryDirectory() as path:
        store = make_store(Path(path) / "store")
        write_rows(store, Path(path))
        both = [Baseline(code, Path(path)) for code in (checkout, Path(__file__).parents[1])] if checkout else []
        results = []
        for batch_size in SAMPLES:
            for order in POLICIES:
                results.append(compare(store, batch_size, order, both))
                print(results[-1], flush=True)
        for process in both:
            process.close()
    save("collate", {"num_rows": NUM_ROWS, "lengths": LENGTHS, "ids": "uint16", "repeats": REPEATS, "cases": results})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--baseline", type=Path, help="a checkout whose code is measured too")
    main(parser.parse_args().baseline)
