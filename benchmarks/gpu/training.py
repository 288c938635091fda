"""The steps of `python -m benchmarks.gpu` that train: dense rows, T0-like lengths, chats, the loop, ingredients."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.gpu.contenders import Contender, Scale, chapter, measure, ours
from benchmarks.gpu.figures import nanogpt_flops_per_token, peak_of
from benchmarks.harness import RESULTS
from benchmarks.train_throughput import random_rows, t0_like
from fastcollate.store.store import TokenStore
from fastcollate.train.loop import train
from fastcollate.train.loss import _in_product_type
from fastcollate.train.options import TrainOptions

T0 = "log-normal lengths, median 146, mean 278 before they are cut at 1,024; every token trained"
DENSE = "rows of exactly 1,024 tokens; every token trained"
CHAT = "log-normal lengths, median 700, mean 1,400 before they are cut at 8,192; the second half of a row trained"


WITHOUT_OUR_ATTENTION = ("fastcollate.train.cuda.attention.triton_compiles", lambda device: False)
WITHOUT_OUR_LOSS = ("fastcollate.train.loss.triton_compiles", lambda device: False)


def compare(
    store: TokenStore, scale: Scale, contenders: dict[str, Callable[[], Contender]], *without: tuple[str, Any]
) -> dict[str, Any]:
    """Each contender's figures, parts of the step replaced; one that fails does not cost the others theirs."""
    found: dict[str, Any] = {}
    for name, make in contenders.items():
        try:
            with ExitStack() as stack:
                for target, replacement in without:
                    stack.enter_context(mock.patch(target, replacement))
                found[name] = measure(make, store, scale)
        except (RuntimeError, ValueError, TypeError) as error:
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        print(name, found[name], flush=True)
        torch.compiler.reset()
    return found


def dense(folder: Path, scale: Scale) -> dict[str, Any]:
    """What llm.c's 468,000 tokens a second on an H100 are of."""
    store = random_rows(folder / "dense", np.full(4096, scale.config.context_length))
    contenders = {
        "padded_compiled": partial(ours, store, scale, "bucketed", compile=True),
        "packed_compiled": partial(ours, store, scale, "packed", compile=True),
        "packed": partial(ours, store, scale, "packed"),
    }
    found = compare(store, scale, contenders)
    of_pytorch = {"padded_compiled_with_pytorch_s_attention": contenders["padded_compiled"]}  # cuDNN's on an H100
    found |= compare(store, scale, of_pytorch, WITHOUT_OUR_ATTENTION)
    peak = peak_of(torch.cuda.get_device_name()) if scale.device.type == "cuda" else None
    for row in found.values():
        if peak and "failed" not in row:
            row["mfu_nanogpt"] = round(row["useful_tokens_per_s"] * nanogpt_flops_per_token(scale.config) / peak, 4)
    return {"data": DENSE, "cells_per_step": scale.cells, "contenders": found}


def t0(folder: Path, scale: Scale) -> dict[str, Any]:
    """Instruction data as it is: the chapter's loop against ours."""
    store = t0_like(folder / "t0", 40_000 if scale.device.type == "cuda" else 400)
    of_many_shapes = {
        "chapter": partial(chapter, store, scale),
        "chapter_tuned": partial(chapter, store, scale, tuned=True),
        "bucketed": partial(ours, store, scale, "bucketed"),
    }
    of_one_shape = {
        "packed": partial(ours, store, scale, "packed"),
        "packed_compiled": partial(ours, store, scale, "packed", compile=True),
    }
    # PyTorch's allocator knows a shape's memory only after it has seen it: those need a longer warm-up to be fair to.
    found = compare(store, scale._replace(warmup=5 * scale.warmup), of_many_shapes)
    found |= compare(store, scale, of_one_shape)
    return {"data": T0, "cells_per_step": scale.cells, **ratios(found, _dense_flops(scale)), "contenders": found}


def ratios(found: dict[str, Any], dense_tflops: float | None) -> dict[str, Any]:
    """How many times the chapter's loop, and the share of the dense rows' model FLOPs a second."""
    best = found["packed_compiled"]
    if "failed" in best:
        return {}
    times = {
        f"times_{name}": round(best["useful_tokens_per_s"] / found[name]["useful_tokens_per_s"], 2)
        for name in ("chapter", "chapter_tuned")
        if "failed" not in found[name]
    }
    share = round(best["model_tflops_per_s"] / dense_tflops, 3) if dense_tflops else None
    return {**times, "share_of_dense_flops": share}


def _dense_flops(scale: Scale) -> float | None:
    """Of the file's dense rows, where they ran on this card."""
    path = RESULTS / "gpu.json"
    if scale.device.type != "cuda" or not path.exists():
        return None
    dense = json.loads(path.read_text()).get("dense", {})
    if dense.get("card") != torch.cuda.get_device_name():
        return None
    rows = dense.get("contenders", {}).values()
    return max((row["model_tflops_per_s"] for row in rows if "failed" not in row), default=None)


def chat(folder: Path, scale: Scale) -> dict[str, Any]:
    """Long rows with masked prompts, in packs of 8,192."""
    longest = 8 * scale.config.context_length
    scale = scale._replace(config=replace(scale.config, context_length=longest))
    random = np.random.default_rng(0)
    spread = np.sqrt(2 * np.log(2))  # the mean is twice the median
    lengths = np.exp(random.normal(np.log(longest * 700 / 8192), spread, 8000)).astype(np.int64).clip(2, longest)
    store = random_rows(folder / "chat", lengths)
    contenders = {"packed_compiled": partial(ours, store, scale, "packed", compile=True, mask_prompt=True)}
    return {"data": CHAT, "cells_per_step": scale.cells, "contenders": compare(store, scale, contenders)}


def ingredients(folder: Path, scale: Scale) -> dict[str, Any]:
    """What each part brings on dense rows, packed: the head's width, the loss in one pass, our attention, compiling."""
    scale = scale._replace(cells=scale.cells // 2, rounds=3)
    store = random_rows(folder / "dense", np.full(1024, scale.config.context_length))
    plain = partial(ours, store, scale, "packed")
    without_width = ("fastcollate.train.loss._in_product_type", _as_wide_as_the_vocabulary)
    found: dict[str, Any] = {}
    for name, make, *without in (
        ("none", plain, WITHOUT_OUR_ATTENTION, WITHOUT_OUR_LOSS, without_width),
        ("head_of_50304_columns", plain, WITHOUT_OUR_ATTENTION, WITHOUT_OUR_LOSS),
        ("and_loss_in_one_pass", plain, WITHOUT_OUR_ATTENTION),
        ("and_our_attention", plain),
        ("and_compiled", partial(plain, compile=True)),
    ):
        found |= compare(store, scale, {name: make}, *without)
    return {"data": DENSE, "cells_per_step": scale.cells, "contenders": found}


def _as_wide_as_the_vocabulary(hidden: torch.Tensor, head_weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with mock.patch.object(torch.Tensor, "is_cuda", False):
        return _in_product_type(hidden, head_weight)


def loop(folder: Path, scale: Scale) -> dict[str, Any]:
    """`fastcollate train` as users run it, on T0-like lengths: what its own log says, without the first ten steps."""
    on_card = scale.device.type == "cuda"
    store = t0_like(folder / "t0", 40_000 if on_card else 400)
    options = TrainOptions(
        out=folder / "run", model="124M" if on_card else "tiny", policy="packed", max_tokens=scale.cells,
        max_length=scale.config.context_length,
        compile=on_card, max_steps=60 if on_card else 12, eval_every=0, sample_tokens=0, tensorboard=False,
        device=scale.device.type, epochs=None, precision="bfloat16",
    )  # fmt: skip
    report = train(store, options, progress=False)
    steps = [json.loads(line) for line in (options.out / "metrics.jsonl").read_text().splitlines()][10:]
    seconds = sum(step["step_s"] for step in steps)
    return {
        "data": T0,
        "cells_per_step": scale.cells,
        "useful_tokens_per_s": round(sum(step["useful_tokens"] for step in steps) / seconds),
        "wait_share": round(sum(step["wait_s"] for step in steps) / seconds, 5),
        "median_step_ms": round(1e3 * statistics.median(step["step_s"] for step in steps), 2),
        "losses": [report.first_loss, report.last_loss],
        "compilations": report.compilations,
    }


STEPS: dict[str, Callable[[Path, Scale], dict[str, Any]]] = {
    "dense": dense, "t0": t0, "chat": chat, "loop": loop, "ingredients": ingredients,
}  # fmt: skip


def run(name: str, scale: Scale) -> dict[str, Any]:
    """A step's result."""
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as folder:
        return STEPS[name](Path(folder), scale)
