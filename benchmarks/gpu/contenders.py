"""Ways to train GPT-2 in bfloat16: streams of batches with a step each, and what is measured of one."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.gpu.figures import events_of, flops_per_token, peak_of, profiled, without_first_step
from benchmarks.train_throughput import loaded
from fastcollate.collate.reference import custom_collate_fn
from fastcollate.load.loader import BatchLoader
from fastcollate.store.store import TokenStore
from fastcollate.train.cuda.attention import fastest_attention
from fastcollate.train.model import CONFIGS, GPT2, GPT2Config
from fastcollate.train.options import TrainOptions
from fastcollate.train.ranks import Ranks, num_compilations
from fastcollate.train.step import MicroBatch, Stepper, make_optimizer

RATE = 1e-4
CHAPTER_ROWS = 4000  # which its loop keeps in memory


class Scale(NamedTuple):
    """How much is measured, and on what; a test takes a tiny one on the CPU."""

    device: torch.device = torch.device("cuda", 0)
    config: GPT2Config = CONFIGS["124M"]
    cells: int = 64 * 1024  # of a step of ours
    warmup: int = 6
    rounds: int = 5
    steps: int = 8
    profiled: int = 12  # a copy to the device serves several batches
    workers: int = 8  # of the tuned loop

    def sync(self) -> None:
        """Wait for the card."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Contender:
    """A stream of batches, a step, and the count of useful tokens."""

    def __init__(
        self,
        batches: Iterator[Any],
        step: Callable[[Any], torch.Tensor],
        useful: Callable[[Any], Any],
        trained_share: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.batches, self.step, self.useful, self.trained_share = batches, step, useful, trained_share

    def run(self, steps: int, scale: Scale) -> tuple[int, float, float, float]:
        """Useful tokens, seconds, seconds waited for data, last loss."""
        scale.sync()
        start, waited = time.perf_counter(), 0.0
        useful: Any = 0
        loss = torch.zeros(())
        for _ in range(steps):
            before = time.perf_counter()
            batch = next(self.batches)
            waited += time.perf_counter() - before
            loss = self.step(batch)
            useful += self.useful(batch)
        scale.sync()
        seconds = time.perf_counter() - start
        return int(useful), seconds, waited, float(loss)


def chapter(store: TokenStore, scale: Scale, *, tuned: bool = False) -> Contender:
    """The chapter's loop, its model in bfloat16: rows in memory, reference collate, the head on every cell.

    As it stands: 8 rows, collated by the main process onto the card, AdamW as PyTorch makes it. `tuned`, what a careful
    user does: 32 rows, collated by worker processes into pinned memory, copied without waiting, fused AdamW.
    """
    rows = [row.input_ids.tolist() for row in itertools.islice(store, CHAPTER_ROWS)]
    model = GPT2(scale.config).to(scale.device)
    parameters = model.parameters()
    optimizer = make_optimizer(model, 0.1) if tuned else torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.1)
    for group in optimizer.param_groups:
        group["lr"] = RATE

    def step(batch: Any) -> torch.Tensor:
        inputs, targets = (part.to(scale.device, non_blocking=True) for part in batch)
        optimizer.zero_grad()
        with torch.autocast(scale.device.type, dtype=torch.bfloat16):
            logits = model(inputs).flatten(0, 1)
            loss = cross_entropy(logits, targets.flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    longest = scale.config.context_length
    there = torch.device("cpu") if tuned else scale.device
    collate: Callable[[Any], Any] = lambda part: custom_collate_fn(part, allowed_max_length=longest, device=there)  # noqa: E731
    workers: dict[str, Any] = {}
    if tuned and scale.workers:
        workers = {"num_workers": scale.workers, "pin_memory": scale.device.type == "cuda", "persistent_workers": True}
    loader: DataLoader[Any] = DataLoader(
        rows,  # type: ignore[arg-type]  # a list does
        batch_size=32 if tuned else 8, shuffle=True, drop_last=True, collate_fn=collate, **workers,
    )  # fmt: skip
    # A padding cell is the end-of-text, which no row here holds. The count stays where the batch is.
    return Contender((batch for _ in range(9999) for batch in loader), step, lambda b: (b[0] != 50256).sum())


def ours(store: TokenStore, scale: Scale, policy: str, **options: Any) -> Contender:
    """`BatchLoader` and the head on trained cells; `options` of the loader, and `compile`."""
    chosen = TrainOptions(precision="bfloat16", device=scale.device.type, compile=options.pop("compile", False))
    stepper = Stepper(GPT2(scale.config).to(scale.device), chosen, Ranks(0, 1, scale.device, None))
    loader = BatchLoader(
        store, policy=policy, max_tokens=scale.cells, max_length=scale.config.context_length, device=scale.device,
        **options,
    )  # fmt: skip

    def step(batch: MicroBatch) -> torch.Tensor:
        return stepper.step([batch], batch.num_trained, RATE)

    def trained_share() -> float:
        return loader.stats.trained_tokens / loader.stats.real_cells

    return Contender(loaded(loader), step, lambda batch: batch.num_useful, trained_share)


def mean_context(store: TokenStore) -> float:
    """Cells that a token attends to, over all tokens."""
    lengths = store.lengths.astype(np.float64)
    return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())


def measure(make: Callable[[], Contender], store: TokenStore, scale: Scale) -> dict[str, Any]:
    """Rates, waiting, memory and a profile of one contender, from fresh weights."""
    torch.manual_seed(0)
    gc.collect()
    on_card = scale.device.type == "cuda"
    if on_card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before, start = num_compilations(), time.perf_counter()
    with fastest_attention(scale.device) as attention:
        contender = make()
        contender.run(1, scale)
        first = time.perf_counter() - start
        contender.run(scale.warmup, scale)
        rounds = [contender.run(scale.steps, scale) for _ in range(scale.rounds)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA] if on_card else None) as profiler:
            contender.run(scale.profiled + 1, scale)
    rates = [useful / seconds for useful, seconds, _, _ in rounds]
    rate = statistics.median(rates)
    flops = flops_per_token(scale.config, mean_context(store), contender.trained_share())
    peak = peak_of(torch.cuda.get_device_name()) if on_card else None
    return {
        "useful_tokens_per_s": round(rate),
        "by_round": [round(r) for r in rates],
        "ms_per_step": round(1e3 * statistics.median(s for _, s, _, _ in rounds) / scale.steps, 2),
        "model_tflops_per_s": round(rate * flops / 1e12, 1),
        "mfu": round(rate * flops / peak, 4) if peak else None,
        "wait_share": round(statistics.median(waited / seconds for _, seconds, waited, _ in rounds), 5),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_card else None,
        "first_step_s": round(first, 1),
        "compilations": num_compilations() - before,
        "attention": attention,
        "last_loss": round(rounds[-1][3], 4),
        **profiled(without_first_step(events_of(profiler), scale.profiled + 1), scale.profiled),
    }
