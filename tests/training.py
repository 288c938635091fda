"""Stores to train on, for tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stores import Row, write_store

from fastcollate.reference import format_input
from fastcollate.sample import sample_records
from fastcollate.store import TokenStore
from fastcollate.tokenizer import load_tokenizer


def sample_rows(num_records: int) -> list[Row]:
    """The built-in sample, tokenized as the chapter does: `(spans, ids)`."""
    tokenizer = load_tokenizer()
    rows: list[Row] = []
    for record in sample_records(num_records):
        prompt = format_input(record)
        ids = tokenizer.encode(f"{prompt}\n\n### Response:\n{record['output']}")
        num_prompt = len(tokenizer.encode(prompt))
        rows.append(([num_prompt, len(ids) - num_prompt], ids))
    return rows


def sample_store(path: Path, num_records: int) -> TokenStore:
    """A store of the built-in sample."""
    return write_store(path, sample_rows(num_records), shard_rows=1000)


def losses(run: Path) -> list[float | None]:
    """A run's losses, a step each."""
    return [step["loss"] for step in metrics(run)]


def metrics(run: Path) -> list[dict[str, Any]]:
    """A run's `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
