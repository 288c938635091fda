"""Arithmetic of a model's step, a card's peak, what a profile says, and where results go."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.harness import commit, save_part
from fastcollate.train.model import GPT2, GPT2Config

# Dense bfloat16 peaks from the makers' data sheets, in TFLOP/s.
PEAKS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L40": 181, "L4": 121,
    "RTX 4090": 165,
}  # fmt: skip


def peak_of(card: str) -> float | None:
    """The card's peak in FLOP/s, `None` for a card that is not in the list; names are whole words, `L4` is no `L40`."""
    return next((tflops * 1e12 for name, tflops in PEAKS.items() if re.search(rf"\b{name}\b", card)), None)


def flops_per_token(config: GPT2Config, mean_context: float, trained_share: float = 1.0) -> float:
    """Forward and backward of one useful token: 6 a matrix parameter, and causal attention over its row.

    Args:
        config: the model.
        mean_context: cells that a token attends to, on average over useful tokens.
        trained_share: of the useful tokens; the others need no head.
    """
    matrices = 12 * config.num_layers * config.width**2 + trained_share * config.vocab_size * config.width
    return 6 * matrices + 12 * config.num_layers * config.width * mean_context


def nanogpt_flops_per_token(config: GPT2Config) -> float:
    """What nanoGPT counts for a row as long as the context, as if attention were not causal: 6 N + 12 L W T.

    N is every parameter but the position embedding.
    """
    with torch.device("meta"):
        num_parameters = sum(p.numel() for name, p in GPT2(config).named_parameters() if name != "wpe.weight")
    return 6 * num_parameters + 12 * config.num_layers * config.width * config.context_length


BETWEEN_KERNELS_US = 10.0  # one ends and the next begins, copies or not


def profiled(events: list[tuple[str, float, float]], steps: int) -> dict[str, Any]:
    """Sums of what ran on the card, a step. A copy is hidden where kernels run, or one follows another at once.

    Args:
        events: name, start and end in microseconds, each kernel and copy once.
        steps: in how many.
    """
    copies = [(start, end) for name, start, end in events if "memcpy htod" in name.lower()]
    kernels = [event for event in events if not event[0].lower().startswith("mem")]
    busy = merge([(start, end) for _, start, end in kernels])
    working = merge(busy, BETWEEN_KERNELS_US)
    copied = sum(end - start for start, end in copies)
    hidden = sum(max(0.0, min(end, e) - max(start, s)) for start, end in copies for s, e in working)
    computed = sum(e - s for s, e in busy)
    by_name: Counter[str] = Counter()
    for name, start, end in kernels:
        by_name[name[:80]] += end - start  # type: ignore[assignment]
    return {
        "h2d_us_per_step": round(copied / steps, 1),
        "h2d_hidden_share": round(hidden / copied, 4) if copied else None,
        "gpu_busy_us_per_step": round(computed / steps, 1),
        "gpu_idle_share": round(1 - computed / (busy[-1][1] - busy[0][0]), 4) if busy else None,
        "top_kernels": [{"name": name, "us_per_step": round(us / steps, 1)} for name, us in by_name.most_common(10)],
    }


def merge(spans: list[tuple[float, float]], gap: float = 0.0) -> list[tuple[float, float]]:
    """Spans that overlap, or lie at most so far apart, as one."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def events_of(profiler: torch.profiler.profile) -> list[tuple[str, float, float]]:
    """What `profiled` takes: kernels and copies, without the user's annotations, which cover them a second time."""
    on_card = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [(e.name, e.time_range.start, e.time_range.end) for e in on_card if not e.is_user_annotation]


def without_first_step(events: list[tuple[str, float, float]], steps: int) -> list[tuple[str, float, float]]:
    """What began after the first of so many even steps: before it the card had nothing to do that could hide a copy."""
    if not events:
        return []
    first, last = min(start for _, start, _ in events), max(end for _, _, end in events)
    return [event for event in events if event[1] >= first + (last - first) / steps]


def driver() -> str | None:
    """The driver's version; `None` where nobody tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None  # errors too go to stdout


def save_step(name: str, result: Mapping[str, Any]) -> None:
    """Into `bench_results/gpu.json`; what other steps have written stays. A run that is cut off keeps what is done."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    where = {"card": card, "driver": driver(), "cuda": torch.version.cuda, "torch": torch.__version__}
    where["commit"] = commit()
    save_part("gpu", name, {**where, **result})
