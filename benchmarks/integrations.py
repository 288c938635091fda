"""What each recipe of `docs/recipes.md` gives: time per epoch of the data path, and padding, before and after.

Before is the usual loop: ready-made Python lists, shuffled, padded by the usual collate. After is the recipe. Both
over GSM8K, batch 8, in one process; contenders take turns.

    python -m benchmarks.integrations
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import torch
import transformers
from torch.utils.data import DataLoader

from benchmarks.harness import interleave, medians, save
from benchmarks.integrations_trainer import DATA, PadOnly, as_dataset, make_model
from fastcollate import BucketBatchSampler, StoreDataset, TokenStore, prepare
from fastcollate.collate.reference import custom_collate_with_masking_fn
from fastcollate.integrations.huggingface import BucketedTrainerMixin, DataCollator
from fastcollate.integrations.lightning import StoreBatches

BATCH = 8
RECIPES = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
Batches = Callable[[], Iterable[Any]]


class Bucketed(BucketedTrainerMixin, transformers.Trainer):  # type: ignore[misc]
    pass


def trainer_batches(kind: Any, data: Any, collator: Any, path: str) -> Batches:
    args = transformers.TrainingArguments(
        path, per_device_train_batch_size=BATCH, report_to=[], use_cpu=True, disable_tqdm=True
    )
    loader = kind(make_model(50257), args, train_dataset=data, data_collator=collator).get_train_dataloader()
    return lambda: loader


def contenders(store: TokenStore, path: str) -> dict[str, tuple[Batches, Batches]]:
    """Before and after of each recipe."""
    pairs = [(int(row.spans[0]), row.input_ids.tolist()) for row in store]
    plain = DataLoader(pairs, batch_size=BATCH, shuffle=True, collate_fn=custom_collate_with_masking_fn)
    dataset = StoreDataset(store, mask_prompt=True)
    bucketed = BucketBatchSampler(dataset, batch_size=BATCH)
    ours = DataLoader(dataset, batch_sampler=bucketed, collate_fn=dataset.collate)
    module = StoreBatches(dataset, BucketBatchSampler(dataset, batch_size=BATCH))
    features = as_dataset(store)
    theirs = transformers.DataCollatorForSeq2Seq(PadOnly(store.pad_token_id))
    own = trainer_batches(transformers.Trainer, features, theirs, path)
    return {
        "DataLoader": (lambda: plain, lambda: ours),
        "Trainer": (own, trainer_batches(Bucketed, dataset, DataCollator(), path)),
        "SFTTrainer (own data set)": (
            own,
            trainer_batches(Bucketed, features, DataCollator(pad_token_id=store.pad_token_id), path),
        ),
        "Lightning": (lambda: plain, lambda: module),
    }


def drain(batches: Batches) -> None:
    for _ in batches():
        pass


def padding(batches: Batches, num_tokens: int) -> float:
    cells = sum((b["input_ids"] if hasattr(b, "keys") else b[0]).numel() for b in batches())
    return round(1 - num_tokens / cells, 4)


def check(store: TokenStore) -> None:
    """One epoch of the sampler through the kernel against the chapter's collate."""
    dataset = StoreDataset(store, mask_prompt=True)
    for rows in BucketBatchSampler(dataset, batch_size=BATCH):
        pairs = [(int(store[i].spans[0]), store[i].input_ids.tolist()) for i in rows]
        expected = custom_collate_with_masking_fn(pairs)
        found = dataset.collate(dataset.__getitems__(rows))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def lines_changed() -> dict[str, int]:
    """`# new` lines of each recipe, by its heading."""
    sections = re.split(r"^## ", RECIPES.read_text(), flags=re.M)[1:]
    return {section.splitlines()[0]: len(re.findall(r"# new$", section, re.M)) for section in sections}


def main() -> None:
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as path:
        prepare(DATA, f"{path}/store", fields={"instruction": "question", "output": "answer"})
        store = TokenStore(f"{path}/store")
        check(store)
        both = contenders(store, path)
        runs = {
            f"{name}/{which}": partial(drain, batches)
            for name, pair in both.items()
            for which, batches in zip(("before", "after"), pair, strict=True)
        }
        seconds = medians(interleave(runs, repeats=3))
        table = {}
        for name, (before, after) in both.items():
            tokens = store.num_tokens + (len(store) if "Trainer" in name else 0)  # theirs count the end-of-text
            old, new = seconds[f"{name}/before"], seconds[f"{name}/after"]
            table[name] = {
                "seconds_per_epoch_before": round(old, 4),
                "seconds_per_epoch_after": round(new, 4),
                "times_faster": round(old / new, 1),
                "padding_before": padding(before, tokens),
                "padding_after": padding(after, tokens),
            }
    result = {"records": "gsm8k_train.jsonl", "batch_size": BATCH, "lines_changed": lines_changed(), "recipes": table}
    print(result)
    save("integrations", result)


if __name__ == "__main__":
    main()
