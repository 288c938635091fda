"""Packing: the packer alone, and plan and fill with the tokens in place, beside TRL's `pack_dataset`.

Run as `python -m benchmarks.packing [--rows N] [--trl-rows N]`; writes `bench_results/packing.json`. Every contender
packs the same rows to 1,024 tokens and is checked first: each row once, token for token, and no pack overfull.

TRL gives packed `input_ids` and `seq_lengths` as an Arrow table in memory. Ours is an epoch of `BatchLoader`: tensors
of inputs, targets, positions and segment bounds, which TRL leaves to its collator.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.harness import interleave, medians, save
from benchmarks.synthetic import LENGTHS, NUM_ROWS, PAD, make_lengths, make_store
from fastcollate.load.loader import BatchLoader
from fastcollate.plan.packing import pack_lengths
from fastcollate.plan.plan import plan_epoch
from fastcollate.store.store import TokenStore

CAPACITY = 1024
BATCH = 64  # packs


def loader(store: TokenStore, prefetch: int) -> BatchLoader:
    return BatchLoader(
        store, policy="packed", batch_size=BATCH, capacity=CAPACITY, mode="positional", prefetch=prefetch, tail="uneven"
    )


def drain(batches: BatchLoader) -> int:
    batches.set_epoch(0)
    count = 0
    for _ in batches:
        count += 1
    return count


def our_rows(batches: BatchLoader) -> Iterator[bytes]:
    """The rows in an epoch's batches; positions, targets and bounds must say the same as the inputs."""
    for batch in batches:
        inputs, targets, positions = (tensor.flatten().numpy() for tensor in batch[:3])
        bounds = batch.cu_seqlens.numpy()  # type: ignore[union-attr]
        assert bounds[0] == 0
        assert bounds[-1] == inputs.size
        for start, stop in pairwise(bounds.tolist()):
            assert start // CAPACITY == (stop - 1) // CAPACITY, "a row crosses from one pack to the next"
            assert (positions[start:stop] == np.arange(stop - start)).all()
            if (targets[start:stop] == -100).all():
                assert (inputs[start:stop] == PAD).all()
                continue
            assert (targets[start : stop - 1] == inputs[start + 1 : stop]).all()
            assert targets[stop - 1] == PAD
            yield inputs[start:stop].astype(np.uint16).tobytes()


def trl_rows(packed: Any) -> Iterator[bytes]:
    """The rows in TRL's packs."""
    for pack in packed.with_format("numpy"):
        ids, sizes = np.asarray(pack["input_ids"]), np.asarray(pack["seq_lengths"])
        assert len(ids) == sizes.sum() <= CAPACITY
        for row in np.split(ids, np.cumsum(sizes)[:-1]):
            yield row.astype(np.uint16).tobytes()


def as_dataset(store: TokenStore, num_rows: int) -> Any:
    """The same rows as a `datasets.Dataset` in memory."""
    import datasets

    rows = [store[i].input_ids for i in range(num_rows)]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows).astype(np.int32)))
    return datasets.Dataset(datasets.table.InMemoryTable(pa.table({"input_ids": column})))


def trl_packer(dataset: Any, batch_size: int) -> Callable[[], Any]:
    from trl import pack_dataset

    options = {"batch_size": batch_size, "keep_in_memory": True, "load_from_cache_file": False}
    return lambda: pack_dataset(dataset, CAPACITY, strategy="bfd", map_kwargs=options)


def pack_speed(num_rows: int) -> dict[str, Any]:
    """The packer alone, on lengths in memory."""
    lengths = make_lengths(num_rows).astype(np.uint16)
    bins, num_bins = pack_lengths(lengths, CAPACITY)
    assert np.bincount(bins, lengths, num_bins).max() <= CAPACITY
    assert len(bins) == num_rows
    plan = plan_epoch(lengths, policy="packed", batch_size=BATCH, capacity=CAPACITY)
    num_packs = sum(plan.packs(index).packs.num_packs for index in range(plan.num_windows))
    times = medians(
        interleave(
            {
                "pack_lengths": lambda: pack_lengths(lengths, CAPACITY),
                "plan_epoch": lambda: [plan.packs(index) for index in range(plan.num_windows)],
            },
            repeats=15,
        )
    )
    return {
        "rows": num_rows,
        "million_rows_per_s": {name: round(num_rows / seconds / 1e6, 1) for name, seconds in times.items()},
        "cells_used": {
            "pack_lengths": round(float(lengths.sum()) / (num_bins * CAPACITY), 5),
            "plan_epoch": round(float(lengths.sum()) / (num_packs * CAPACITY), 5),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=NUM_ROWS)
    parser.add_argument("--trl-rows", type=int, default=NUM_ROWS)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", options.rows)
        num_trl = min(options.trl_rows, options.rows)
        dataset = as_dataset(store, num_trl)
        ours = {"one thread": loader(store, 0), "threads ahead": loader(store, 3)}
        theirs = {f"TRL, map batches of {size:,}": trl_packer(dataset, size) for size in (1000, num_trl)}
        rows = Counter(store[i].input_ids.tobytes() for i in range(options.rows))
        used = {}
        for name, batches in ours.items():
            assert Counter(our_rows(batches)) == rows, name
            stats = batches.stats
            used[name] = stats.real_cells / (stats.real_cells + stats.padded_cells)
        few = Counter(store[i].input_ids.tobytes() for i in range(num_trl))
        for name, pack in theirs.items():
            packed = pack()
            assert Counter(trl_rows(packed)) == few, name
            used[name] = int(store.lengths[:num_trl].sum()) / (len(packed) * CAPACITY)
        contenders = {name: lambda batches=batches: drain(batches) for name, batches in ours.items()}
        seconds = medians(interleave({**contenders, **theirs}, repeats=options.repeats))
    rates = {name: (num_trl if name in theirs else options.rows) / median for name, median in seconds.items()}
    best = max(rates[name] for name in theirs)
    result = {
        "lengths": LENGTHS,
        "packs": {"capacity": CAPACITY, "packs_a_batch": BATCH},
        "checked": "each row once, token for token; no pack overfull; targets and positions restart with each row",
        "packer": pack_speed(options.rows),
        "materialised": {
            name: {
                "rows": num_trl if name in theirs else options.rows,
                "seconds": round(seconds[name], 4),
                "rows_per_s": round(rate),
                "cells_used": round(used[name], 5),
                "times_the_faster_trl": round(rate / best, 1),
            }
            for name, rate in rates.items()
        },
    }
    print(result)
    save("packing", result)


if __name__ == "__main__":
    main()
