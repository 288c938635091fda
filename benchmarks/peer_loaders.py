"""litdata and MosaicML Streaming, timed by `benchmarks/loader.py` in an environment of their own, whose pins they need.

    python -m venv .peers-venv
    .peers-venv/bin/pip install torch==2.14.1 torchvision==0.29.1 litdata==0.2.76 mosaicml-streaming==0.13.0

(torch and torchvision go together; the pair above is a CUDA build of about 5.5 GB, any other CPU pair does as well.)
Run as `PYTHON peer_loaders.py FOLDER` this answers, on standard output, each line of JSON on standard input, each in a
fork of its own: Streaming's threads go on when its iterator is gone, and would slow down whoever comes next, itself
included. It imports nothing of fastcollate: rows lie in `FOLDER/ids.npy` and `FOLDER/offsets.npy`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

PAD, IGNORE = 50256, -100
CHUNK_BYTES = 64 << 20


def collate(rows: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """A NumPy row loop: the cheapest collate that these data sets, which yield NumPy arrays, can be given."""
    shape = len(rows), max(map(len, rows))
    inputs, targets = np.full(shape, PAD), np.full(shape, IGNORE)
    for i, row in enumerate(rows):
        length = len(row)
        inputs[i, :length] = row
        targets[i, : length - 1] = row[1:]
        targets[i, length - 1] = PAD
    return torch.from_numpy(inputs), torch.from_numpy(targets)


class NumberOfRow:
    """Reads a row for litdata's writer; a class, so that it can be pickled."""

    def __init__(self, folder: str) -> None:
        self.ids = np.load(f"{folder}/ids.npy", mmap_mode="r")
        self.offsets = np.load(f"{folder}/offsets.npy")

    def __call__(self, number: int) -> Any:
        return np.array(self.ids[self.offsets[number] : self.offsets[number + 1]])


def write_litdata(folder: str) -> None:
    import litdata

    litdata.optimize(
        fn=NumberOfRow(folder),
        inputs=list(range(len(NumberOfRow(folder).offsets) - 1)),
        output_dir=f"{folder}/litdata",
        chunk_bytes=CHUNK_BYTES,
        num_workers=1,
        verbose=False,
    )


def write_streaming(folder: str) -> None:
    from streaming import MDSWriter

    rows = NumberOfRow(folder)
    with MDSWriter(out=f"{folder}/streaming", columns={"ids": "ndarray:uint16"}, size_limit=CHUNK_BYTES) as out:
        for number in range(len(rows.offsets) - 1):
            out.write({"ids": rows(number)})


def collate_fields(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    return collate([row["ids"] for row in rows])


def loader(peer: str, folder: str, batch_size: int, workers: int, shuffle: bool) -> Iterator[Any]:
    if peer == "litdata":
        import litdata

        data = litdata.StreamingDataset(f"{folder}/litdata", shuffle=shuffle)
        return iter(litdata.StreamingDataLoader(data, batch_size=batch_size, num_workers=workers, collate_fn=collate))
    import streaming

    streaming.base.util.clean_stale_shared_memory()
    data = streaming.StreamingDataset(local=f"{folder}/streaming", shuffle=shuffle, batch_size=batch_size)
    return iter(DataLoader(data, batch_size=batch_size, num_workers=workers, collate_fn=collate_fields))


def seconds_per_batch(batches: Iterator[Any], num_batches: int) -> float:
    """From the first batch on: neither side pays for starting its workers."""
    next(batches)
    start = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    return (time.perf_counter() - start) / num_batches


def answer(folder: str, request: dict[str, Any]) -> Any:
    peer, kind = request["peer"], request["do"]
    if kind == "versions":
        return {
            name: importlib.metadata.version(name)
            for name in ("litdata", "mosaicml-streaming", "torch", "torchvision", "numpy")
        }
    if kind == "write":
        {"litdata": write_litdata, "streaming": write_streaming}[peer](folder)
        return "written"
    batches = loader(peer, folder, request["batch_size"], request["workers"], kind == "time")
    if kind == "time":
        return seconds_per_batch(batches, request["num_batches"])
    found = []  # in order, unshuffled: the first batches, for the caller to compare
    for _ in range(request["num_batches"]):
        inputs, targets = next(batches)
        found.append([inputs.tolist(), targets.tolist()])
    return found


def main() -> None:
    folder = sys.argv[1]
    out = os.fdopen(os.dup(1), "w")  # the peers print: what they say must not mix with the answers
    os.dup2(2, 1)
    import litdata  # noqa: F401  (once, not in each fork)
    import streaming  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                print(json.dumps(answer(folder, json.loads(line))), file=out, flush=True)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if os.waitpid(child, 0)[1]:
            sys.exit(1)


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main()
