"""GPT-2 124M in bfloat16 on one GPU: the chapter's loop, bucketed, packed, packed and compiled.

Run as `python -m benchmarks.gpu [CONTENDERS]`; under eight minutes; makes its own data (T0-like lengths); writes
`bench_results/gpu.json` after each contender. Without CUDA it says so and writes nothing.
"""

from __future__ import annotations

import gc
import itertools
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.harness import save
from benchmarks.train_throughput import loaded, t0_like
from fastcollate.collate.batch import PackedBatch
from fastcollate.collate.reference import custom_collate_fn
from fastcollate.load.loader import BatchLoader
from fastcollate.store.store import TokenStore
from fastcollate.train.model import CONFIGS, GPT2
from fastcollate.train.options import TrainOptions
from fastcollate.train.ranks import Ranks, num_compilations
from fastcollate.train.step import MicroBatch, Stepper, make_optimizer

CELLS = 32 * 1024  # a batch of the bucketed and packed contenders
CHAPTER_BATCH = 8
WARMUP, ROUNDS, STEPS = 10, 5, 12
CONTENDER_LIMIT_S = 100.0  # four of them, data and start-up stay under eight minutes
# Dense bfloat16 peaks from the makers' data sheets, in TFLOP/s.
PEAKS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L40": 181, "L4": 121,
    "RTX 4090": 165,
}  # fmt: skip
PROFILED = 24  # steps: a copy to the device serves 5 to 8 batches


def peak_of(card: str) -> float | None:
    """The card's peak in FLOP/s, `None` for a card that is not in the list; names are whole words, `L4` is no `L40`."""
    return next((tflops * 1e12 for name, tflops in PEAKS.items() if re.search(rf"\b{name}\b", card)), None)


def flops_per_token(mean_context: float) -> float:
    """Forward and backward of one useful token: 6 a matrix parameter, and causal attention over its row.

    Args:
        mean_context: cells that a token attends to, on average over useful tokens.
    """
    config = CONFIGS["124M"]
    matrices = 12 * config.num_layers * config.width**2 + config.vocab_size * config.width
    return 6 * matrices + 12 * config.num_layers * config.width * mean_context


def mean_context(store: TokenStore) -> float:
    lengths = store.lengths.astype(np.float64)
    return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())


class Contender:
    """A stream of batches, a step, and the count of useful tokens."""

    def __init__(
        self, batches: Iterator[Any], step: Callable[[Any], torch.Tensor], useful: Callable[[Any], int]
    ) -> None:
        self.batches, self.step, self.useful = batches, step, useful

    def run(self, steps: int) -> tuple[int, float, float, float]:
        """Useful tokens, seconds, seconds waited for data, last loss."""
        torch.cuda.synchronize()
        start, useful, waited = time.perf_counter(), 0, 0.0
        loss = torch.zeros(())
        for _ in range(steps):
            before = time.perf_counter()
            batch = next(self.batches)
            waited += time.perf_counter() - before
            loss = self.step(batch)
            useful += self.useful(batch)
        torch.cuda.synchronize()
        return useful, time.perf_counter() - start, waited, float(loss)


def chapter(store: TokenStore) -> Contender:
    """The chapter's loop: rows in memory, reference collate, `DataLoader`, the head on every cell."""
    rows = [row.input_ids.tolist() for row in itertools.islice(store, 4000)]
    model = GPT2(CONFIGS["124M"]).cuda()
    optimizer = make_optimizer(model, 0.1)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4

    def step(batch: Any) -> torch.Tensor:
        inputs, targets = batch
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    loader = DataLoader(
        rows,
        batch_size=CHAPTER_BATCH,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda part: custom_collate_fn(part, allowed_max_length=1024, device="cuda"),
    )
    # Counted without reading the batch back: a padding cell is the end-of-text, which no row here holds.
    return Contender((b for _ in range(99) for b in loader), step, lambda b: int((b[0] != 50256).sum()))


def fast(store: TokenStore, policy: str, *, compiled: bool = False) -> Contender:
    """`BatchLoader` and the head on trained cells."""
    options = TrainOptions(clip=0.0, precision="bfloat16", device="cuda", compile=compiled)
    stepper = Stepper(GPT2(CONFIGS["124M"]).cuda(), options, Ranks(0, 1, torch.device("cuda", 0), None))
    loader = BatchLoader(store, policy=policy, max_tokens=CELLS, max_length=1024, device="cuda")
    batches = loaded(loader)
    first = next(batches)
    if policy == "packed" and first.cu_seqlens is None:
        raise RuntimeError(f"the loader's packed policy gave no {PackedBatch.__name__}")

    def step(batch: MicroBatch) -> torch.Tensor:
        return stepper.step([batch], batch.num_trained, 1e-4)

    return Contender(itertools.chain([first], batches), step, lambda batch: batch.num_useful)


def profile(contender: Contender) -> dict[str, Any]:
    """Some steps under the profiler: kernels, copies to the device, and how much of these compute hides."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        contender.run(PROFILED)
    on_card = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return profiled(
        [(e.name, e.time_range.start, e.time_range.end) for e in on_card if not e.is_user_annotation], PROFILED
    )


def profiled(events: list[tuple[str, float, float]], steps: int) -> dict[str, Any]:
    """Sums of what ran on the card, a step.

    Args:
        events: name, start and end in microseconds, each kernel and copy once.
        steps: in how many.
    """
    copies = [(start, end) for name, start, end in events if "memcpy htod" in name.lower()]
    kernels = [event for event in events if not event[0].lower().startswith("mem")]
    busy = merge([(start, end) for _, start, end in kernels])
    copied = sum(end - start for start, end in copies)
    hidden = sum(max(0.0, min(end, e) - max(start, s)) for start, end in copies for s, e in busy)
    by_name: Counter[str] = Counter()
    for name, start, end in kernels:
        by_name[name[:80]] += end - start  # type: ignore[assignment]
    return {
        "h2d_us_per_step": round(copied / steps, 1),
        "h2d_hidden_share": round(hidden / copied, 4) if copied else None,
        "gpu_busy_us_per_step": round(sum(e - s for s, e in busy) / steps, 1),
        "top_kernels": [{"name": name, "us_per_step": round(us / steps, 1)} for name, us in by_name.most_common(10)],
    }


def merge(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Overlapping spans as one."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def measure(make: Callable[[], Contender], flops: float, peak: float | None) -> dict[str, Any]:
    torch.manual_seed(0)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, start = num_compilations(), time.perf_counter()
    contender = make()
    contender.run(WARMUP)
    rates, waits, loss = [], [], 0.0
    for _ in range(ROUNDS):
        useful, seconds, waited, loss = contender.run(STEPS)
        rates.append(useful / seconds)
        waits.append(waited / seconds)
        if time.perf_counter() - start > CONTENDER_LIMIT_S:
            break
    rate = statistics.median(rates)
    return {
        "useful_tokens_per_s": round(rate),
        "by_round": [round(r) for r in rates],
        "mfu": round(rate * flops / peak, 4) if peak else None,
        "wait_share": round(statistics.median(waits), 5),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "last_loss": round(loss, 4),
        "compilations": num_compilations() - before,
        **profile(contender),
    }


def main() -> None:
    if not torch.cuda.is_available():
        print("skipped: this machine has no CUDA device; nothing was measured and nothing written")
        return
    torch.set_float32_matmul_precision("high")
    card = torch.cuda.get_device_name()
    contenders: dict[str, Callable[[TokenStore], Contender]] = {
        "chapter": chapter,
        "bucketed": lambda store: fast(store, "bucketed"),
        "packed": lambda store: fast(store, "packed"),
        "packed_compiled": lambda store: fast(store, "packed", compiled=True),
    }
    wanted = sys.argv[1:] or list(contenders)
    with tempfile.TemporaryDirectory() as folder:
        store = t0_like(Path(folder) / "t0", 40_000)
        flops = flops_per_token(mean_context(store))
        results: dict[str, Any] = {}
        for name in wanted:
            try:
                results[name] = measure(partial(contenders[name], store), flops, peak_of(card))
            except Exception as error:  # one contender that fails must not cost the others their figures
                results[name] = {"failed": f"{type(error).__name__}: {error}"}
            print(name, results[name], flush=True)
            save_results(card, flops, results)  # a run that is cut off keeps what it has measured


def save_results(card: str, flops: float, results: dict[str, Any]) -> None:
    save(
        "gpu",
        {
            "card": card,
            "model": "GPT-2 124M, bfloat16 autocast, fused AdamW",
            "data": "T0-like lengths: log-normal, median 146, mean 278, cut at 1,024",
            "flops_per_useful_token": flops,
            "peak_flops": peak_of(card),
            "contenders": results,
        },
    )


if __name__ == "__main__":
    main()
