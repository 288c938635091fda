"""Useful tokens a second of a training step on the CPU: the chapter's loop against bucketed and packed batches.

Run as `python -m benchmarks.train_throughput [t0_like gsm8k gsm8k_masked]`; writes
`bench_results/train_throughput.json` and keeps there what it does not measure anew. One model and one precision for
all. Each contender has a process of its own, because how the C library hands out memory belongs to the loop that is
measured; they take turns, a few steps each, while the others wait. `chapter` is the chapter's loop as it stands;
`chapter_tuned` has the two things that any loop could have, AdamW's fused form and recycled memory.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import DataLoader

from benchmarks.harness import RESULTS, save
from fastcollate.collate.collator import Collator
from fastcollate.collate.reference import custom_collate_fn, custom_collate_with_masking_fn
from fastcollate.ingest.job import prepare
from fastcollate.load.loader import BatchLoader
from fastcollate.plan.plan import plan_epoch
from fastcollate.store.manifest import StoreIdentity, sources_of, write_manifest
from fastcollate.store.shards import ShardColumns, shard_name, write_shard
from fastcollate.store.store import TokenStore
from fastcollate.train.model import GPT2, GPT2Config
from fastcollate.train.options import TrainOptions
from fastcollate.train.ranks import Ranks, recycle_freed_memory
from fastcollate.train.step import MicroBatch, Stepper, as_micro_batch, make_optimizer

MODEL = GPT2Config(num_layers=4, num_heads=4, width=128)
BATCH = 8
PACKED_IS = "packs of 1,024 cells, about as many tokens a step"
RATE = 1e-4
ROUNDS = 5
STEPS = {"t0_like": 2, "gsm8k": 6, "gsm8k_masked": 6}
CONTENDERS = ("chapter", "chapter_tuned", "bucketed", "packed")
GSM8K = Path(__file__).resolve().parents[2] / "shared/data/gsm8k_train.jsonl"
ALONE = Ranks(0, 1, torch.device("cpu"), None)


class Timed(NamedTuple):
    loss: float
    useful: int
    cells: int
    wait_s: float
    step_s: float


def t0_like(path: Path, num_rows: int = 4000) -> TokenStore:
    """Log-normal lengths: median 146, mean 278 before they are cut at 1,024."""
    spread = np.sqrt(2 * np.log(278 / 146))
    lengths = np.exp(np.random.default_rng(0).normal(np.log(146), spread, num_rows)).astype(np.int64)
    return random_rows(path, lengths.clip(2, 1024))


def random_rows(path: Path, lengths: np.ndarray) -> TokenStore:
    """A store of random tokens; the first half of a row is its prompt."""
    random = np.random.default_rng(1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    prompts = lengths // 2
    columns = ShardColumns(
        random.integers(0, 50256, offsets[-1]).astype(np.uint16),
        offsets,
        np.stack([prompts, lengths - prompts], 1).reshape(-1).astype(np.uint32),
        np.arange(len(lengths) + 1) * 2,
        np.arange(len(lengths), dtype=np.uint64),
    )
    path.mkdir()
    tokenizer = {"name": "gpt2", "fingerprint": "synthetic", "vocab_size": 50257}
    tokenizer |= {"pad_token_id": 50256, "end_token_id": 50256, "files": []}
    identity = StoreIdentity(sources_of(["random rows"], len(lengths)), tokenizer, {"name": "alpaca"}, {})
    write_manifest(path, identity, [write_shard(path, shard_name(0), columns)])
    return TokenStore(path)


def new_model() -> GPT2:
    torch.manual_seed(0)
    return GPT2(MODEL)


def chapter_collate(rows: list[Any], mask_prompt: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if mask_prompt:
        return custom_collate_with_masking_fn(rows, allowed_max_length=1024)
    return custom_collate_fn([ids for _, ids in rows], allowed_max_length=1024)


def chapter(
    store: TokenStore, mask_prompt: bool, tuned: bool
) -> tuple[list[Any], Callable[[Any], float], Iterator[Any]]:
    """The chapter's rows in memory, its step, and its loader."""
    rows = [(int(row.spans[0]), row.input_ids.tolist()) for row in store]
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    if tuned:
        recycle_freed_memory()
        optimizer = make_optimizer(model, 0.1)
        for group in optimizer.param_groups:
            group["lr"] = RATE

    def step(batch: Any) -> float:
        inputs, targets = batch
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    loader: DataLoader[Any] = DataLoader(
        rows,  # type: ignore[arg-type]  # a list does
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda part: chapter_collate(part, mask_prompt),
    )
    return rows, step, (batch for _ in range(99) for batch in loader)


def collated(store: TokenStore, rows: np.ndarray, mask_prompt: bool) -> MicroBatch:
    inputs, targets = Collator(store.shards, max_length=1024, mask_prompt=mask_prompt)(rows)
    useful = int(np.minimum(store.lengths[rows].astype(np.int64), 1024).sum())
    return MicroBatch(inputs, targets, None, None, useful, int((targets != -100).sum()))


def fast_step(stepper: Stepper) -> Callable[[MicroBatch], float]:
    return lambda batch: stepper.step([batch], batch.num_trained, RATE).item()


def stepper() -> Stepper:
    return Stepper(new_model(), TrainOptions(clip=0.0, warmup=0, device="cpu"), ALONE)


def bucketed(store: TokenStore, mask_prompt: bool) -> Iterator[MicroBatch]:
    loader = BatchLoader(store, policy="bucketed", batch_size=BATCH, max_length=1024, mask_prompt=mask_prompt)
    return loaded(loader)


def loaded(loader: BatchLoader) -> Iterator[MicroBatch]:
    while True:
        yield from map(as_micro_batch, loader)


def without_padding(batch: MicroBatch, pad_token_id: int) -> MicroBatch:
    """A padded batch's rows end to end, as one pack without unused cells.

    Padding is told by its token, which no row of a prepared store holds; where the counts say otherwise (a row that
    ends in that token, an empty row), the batch stays as it is.
    """
    if batch.cu_seqlens is not None:
        return batch
    columns = torch.arange(batch.inputs.shape[1], device=batch.inputs.device)
    lengths = ((batch.inputs != pad_token_id) * (columns + 1)).amax(1)
    held = columns < lengths[:, None]
    targets = batch.targets[held]
    if len(targets) != batch.num_useful or int((targets != -100).sum()) != batch.num_trained:
        return batch
    bounds = pad(lengths[lengths > 0].cumsum(0), (1, 0)).to(torch.int32)
    positions = columns.expand_as(held)[held]
    return batch._replace(
        inputs=batch.inputs[held][None], targets=targets[None], position_ids=positions[None], cu_seqlens=bounds
    )


def packed(store: TokenStore, mask_prompt: bool) -> Iterator[MicroBatch]:
    """Packs of 1,024 cells, about as many tokens a step as `BATCH` rows have."""
    packs = max(1, round(BATCH * store.num_tokens / len(store) / 1024))
    loader = BatchLoader(store, policy="packed", batch_size=packs, max_length=1024, mask_prompt=mask_prompt)
    return loaded(loader)


def same_losses(store: TokenStore, mask_prompt: bool) -> dict[str, Any]:
    """Two steps on the same rows from the same weights: the losses of each way."""
    plan = list(plan_epoch(store.lengths, batch_size=BATCH, policy="shuffled", seed=1, max_length=1024))[:2]
    rows, step, _ = chapter(store, mask_prompt, tuned=True)
    found: dict[str, list[float]] = {
        "chapter": [step(chapter_collate([rows[r] for r in p], mask_prompt)) for p in plan]
    }
    padded, flat = fast_step(stepper()), fast_step(stepper())
    found["padded"], found["packed"] = [], []
    for part in plan:
        batch = collated(store, part, mask_prompt)
        end_to_end = without_padding(batch, store.pad_token_id)
        assert end_to_end.inputs.numel() == batch.num_useful
        found["padded"].append(padded(batch))
        found["packed"].append(flat(end_to_end))
    worst = max(abs(a - b) for name in ("padded", "packed") for a, b in zip(found["chapter"], found[name], strict=True))
    assert worst < 1e-4, found
    return {"losses": found, "largest_difference": worst}


def contender(name: str, store: TokenStore, mask_prompt: bool) -> Iterator[Timed]:
    """A step at a time of one way to train."""
    useful_of: Callable[[Any], int] = lambda batch: batch.num_useful  # noqa: E731
    if name.startswith("chapter"):
        torch.manual_seed(123)
        _, step, batches = chapter(store, mask_prompt, tuned=name == "chapter_tuned")
        useful_of = lambda batch: _useful(batch[0])  # noqa: E731
    else:
        recycle_freed_memory()  # as `fastcollate train` does
        step, batches = fast_step(stepper()), {"bucketed": bucketed, "packed": packed}[name](store, mask_prompt)
    while True:
        start = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter()
        loss = step(batch)
        end = time.perf_counter()
        yield Timed(loss, useful_of(batch), batch[0].numel(), waited - start, end - start)


def serve(name: str, path: str, mask_prompt: bool) -> None:
    """One contender's process: for each number on standard input, that many steps, their times as a line of JSON."""
    steps = contender(name, TokenStore(path), mask_prompt)
    for line in sys.stdin:
        print(json.dumps([next(steps) for _ in range(int(line))]), flush=True)


def take_turns(store: TokenStore, mask_prompt: bool, steps: int) -> dict[str, list[list[Timed]]]:
    """The steps of each round, by contender; a first round warms up."""
    here = [sys.executable, "-m", "benchmarks.train_throughput", "serve"]
    processes = {
        name: subprocess.Popen(
            [*here, name, str(store.path), str(int(mask_prompt))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name in CONTENDERS
    }  # fmt: skip
    rounds: dict[str, list[list[Timed]]] = {name: [] for name in CONTENDERS}
    try:
        for number in range(ROUNDS + 1):
            for name, process in processes.items():
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(f"{steps if number else 1}\n")
                process.stdin.flush()
                done = [Timed(*values) for values in json.loads(process.stdout.readline())]
                if number:
                    rounds[name].append(done)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return rounds


def compare(name: str, store: TokenStore, mask_prompt: bool) -> dict[str, Any]:
    print(f"{name}, {'responses only' if mask_prompt else 'all tokens'}", flush=True)
    result: dict[str, Any] = {"equal_losses": same_losses(store, mask_prompt), "steps_a_round": STEPS[name]}
    rounds = take_turns(store, mask_prompt, STEPS[name])
    rates = {key: [sum(s.useful for s in r) / sum(s.step_s for s in r) for r in found] for key, found in rounds.items()}
    for key, found in rounds.items():
        every = [step for part in found for step in part]
        result[key] = {
            "useful_tokens_per_s": round(statistics.median(rates[key])),
            "by_round": [round(rate) for rate in rates[key]],
            "useful_tokens_per_s_overall": round(sum(s.useful for s in every) / sum(s.step_s for s in every)),
            "padding_share": round(1 - sum(s.useful for s in every) / sum(s.cells for s in every), 4),
            "wait_share": round(sum(s.wait_s for s in every) / sum(s.step_s for s in every), 5),
            "times_chapter": round(statistics.median(rates[key]) / statistics.median(rates["chapter"]), 2),
        }
        print("  ", key, result[key], flush=True)
    return result


def _useful(inputs: torch.Tensor) -> int:
    """Cells before a row's padding; the rows here hold no end-of-text themselves."""
    return int((inputs != 50256).sum())


def main() -> None:
    wanted = sys.argv[1:] or list(STEPS)
    file = RESULTS / "train_throughput.json"
    results: dict[str, Any] = {
        "model": "GPT-2, 4 layers, 4 heads, width 128, vocabulary 50,257, float32",
        "steps": f"medians of {ROUNDS} rounds in turn; {BATCH} rows a step; packed: {PACKED_IS}",
        "threads": torch.get_num_threads(),
    }
    if file.exists():
        before = json.loads(file.read_text())
        results |= {name: before[name] for name in STEPS if name in before and name not in wanted}
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            if name == "t0_like":
                store = t0_like(Path(folder) / name)
            elif GSM8K.is_file():
                prepare([str(GSM8K)], Path(folder) / name)
                store = TokenStore(Path(folder) / name)
            else:
                print(f"{name}: skipped, needs {GSM8K}")
                continue
            results[name] = compare(name, store, name == "gsm8k_masked")
            save("train_throughput", results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], sys.argv[3], sys.argv[4] == "1")
    else:
        main()
