"""`transformers.Trainer` with its own collator and order against ours, on GSM8K with a tiny GPT-2, interleaved.

Three contenders over the same rows: Hugging Face's collator over a `datasets.Dataset`; our collator over the store in
the same random order (its losses must be equal, step by step); our collator over bucketed batches. A tiny model has a
tiny vocabulary: a byte-pair encoding of 2,000 tokens, trained on the records first.

    python -m benchmarks.integrations_trainer
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import tokenizers
import torch
import transformers

from benchmarks.harness import medians, save
from fastcollate import StoreDataset, TokenStore, prepare
from fastcollate.integrations.huggingface import BucketedTrainerMixin, DataCollator

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "gsm8k_train.jsonl"
END_OF_TEXT = "<|endoftext|>"
VOCAB = 2000


class Timed:
    """Counts the seconds spent getting batches, and the tokens that are not padding."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        batches, num_items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self.data_s = getattr(self, "data_s", 0.0) + time.perf_counter() - start
        for batch in batches:
            self.useful = getattr(self, "useful", 0) + int(batch["attention_mask"].sum())
            self.cells = getattr(self, "cells", 0) + batch["attention_mask"].numel()
        return batches, num_items


class Own(Timed, transformers.Trainer):  # type: ignore[misc]
    pass


class Bucketed(Timed, BucketedTrainerMixin, transformers.Trainer):  # type: ignore[misc]
    pass


class PadOnly:
    """The part of a tokenizer that `DataCollatorForSeq2Seq` calls, without a vocabulary file."""

    padding_side = "right"
    deprecation_warnings: ClassVar[dict[str, bool]] = {}

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def pad(self, features: list[dict[str, Any]], return_tensors: str = "pt", **_: Any) -> Any:
        width = max(len(feature["input_ids"]) for feature in features)
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0}
        return transformers.BatchEncoding(
            {
                name: torch.tensor([[*f[name], *[fill] * (width - len(f[name]))] for f in features])
                for name, fill in fills.items()
            }
        )


def make_tokenizer(path: str) -> str:
    """Train a byte-pair encoding on the records; returns its file."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    texts = [text for line in DATA.read_text().splitlines() for text in json.loads(line).values()]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(f"{path}/tokenizer.json")
    return f"{path}/tokenizer.json"


def make_model(vocab_size: int = VOCAB) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocab_size,
        n_embd=128,
        n_layer=2,
        n_head=2,
        n_positions=1024,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def as_dataset(store: TokenStore) -> Any:
    """The same rows as trainer-ready features: end-of-text appended, prompts masked."""
    features = []
    for row in store:
        ids = [*row.input_ids.tolist(), store.pad_token_id]
        prompt = int(row.spans[0])
        features.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "attention_mask": [1] * len(ids)})
    return datasets.Dataset.from_list(features)


def run(name: str, path: str, parts: dict[str, Any], steps: int, batch_size: int) -> dict[str, Any]:
    args = transformers.TrainingArguments(
        output_dir=path, per_device_train_batch_size=batch_size, max_steps=steps, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, seed=1, learning_rate=1e-3,
    )  # fmt: skip
    theirs = transformers.DataCollatorForSeq2Seq(PadOnly(parts["store"].store.pad_token_id))
    contenders = {
        "own": (Own, theirs, parts["dataset"]),
        "our_collator": (Own, DataCollator(), parts["store"]),
        "our_collator_bucketed": (Bucketed, DataCollator(), parts["store"]),
    }
    kind, collator, data = contenders[name]
    trainer = kind(make_model(), args, data_collator=collator, train_dataset=data)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": seconds,
        "useful": trainer.useful,
        "cells": trainer.cells,
        "data_s": trainer.data_s,
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as path:
        fields = {"instruction": "question", "output": "answer"}
        prepare(DATA, f"{path}/store", fields=fields, tokenizer=make_tokenizer(path))
        store = TokenStore(f"{path}/store")
        parts = {"dataset": as_dataset(store), "store": StoreDataset(store, mask_prompt=True)}
        names = ("own", "our_collator", "our_collator_bucketed")
        for name in names:
            run(name, path, parts, 2, options.batch_size)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(options.repeats):
            for name in names:
                runs[name].append(run(name, path, parts, options.steps, options.batch_size))
    pairs = zip(runs["own"], runs["our_collator"], strict=True)
    difference = max(abs(a - b) for x, y in pairs for a, b in zip(x["losses"], y["losses"], strict=True))
    assert difference <= 1e-6, difference
    rate = medians({name: [r["useful"] / r["seconds"] for r in of] for name, of in runs.items()})
    share = medians({name: [r["data_s"] / r["seconds"] for r in of] for name, of in runs.items()})
    result = {
        "records": "gsm8k_train.jsonl", "vocabulary": VOCAB, "batch_size": options.batch_size, "steps": options.steps,
        "repeats": options.repeats, "threads": torch.get_num_threads(),
        "largest_loss_difference_same_order": difference,
        "useful_tokens_per_second": {name: round(value) for name, value in rate.items()},
        "times_own": {name: round(value / rate["own"], 3) for name, value in rate.items()},
        "data_share_of_time": {name: round(value, 5) for name, value in share.items()},
        "padding": {name: round(1 - of[0]["useful"] / of[0]["cells"], 4) for name, of in runs.items()},
        "seconds": {name: [round(r["seconds"], 2) for r in of] for name, of in runs.items()},
    }  # fmt: skip
    print(result)
    save("integrations_trainer", result)


if __name__ == "__main__":
    main()
