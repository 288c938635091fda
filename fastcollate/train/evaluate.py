"""The answers of a trained model to a split of a store, as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastcollate.errors import InputError
from fastcollate.store.store import TokenStore
from fastcollate.text.tokenizer import load_tokenizer
from fastcollate.train.checkpoint import Checkpoint
from fastcollate.train.generate import clean_response, generate, prompt_and_answer
from fastcollate.train.model import GPT2


def open_split(
    checkpoint: Checkpoint, directory: Path, *, store: Path | None = None, split: str = "test", limit: int | None = None
) -> tuple[TokenStore, range]:
    """The store of a run and the rows of one of its splits.

    Args:
        checkpoint: of the run.
        directory: where the checkpoint lies.
        store: the store, if it is no longer where it was.
        split: `train`, `test` or `validation`.
        limit: at most so many rows.

    Raises:
        InputError: no such split, an empty one, or another store than the run's.
    """
    splits = checkpoint.data["splits"]
    if split not in splits:
        raise InputError(f"--split {split}: choose one of {', '.join(splits)}")
    opened = TokenStore(store or directory / checkpoint.data["store"])
    if opened.fingerprint != checkpoint.data["fingerprint"]:
        raise InputError(f"{opened.path}: not the store that the run was trained on; give that with --store")
    rows = range(*splits[split])[:limit]
    if not rows:
        raise InputError(f"--split {split}: the run left no row for it; choose another split, or train with more rows")
    return opened, rows


def write_answers(
    path: Path,
    model: GPT2,
    store: TokenStore,
    rows: range,
    *,
    seed: int = 0,
    on_row: Callable[[], None] = lambda: None,
    **options: Any,
) -> dict[str, int]:
    """Answer rows one after the other and write a JSON array.

    Each object has `row` (the record's position in the sources), `prompt`, `output` (the record's own response) and
    `model_response`, the last two without the heading of the response.

    Args:
        path: the file to write, atomically.
        model: in evaluation mode.
        store: where the rows are.
        rows: which of them.
        seed: for each row's draws, together with the row's number.
        on_row: called after each row.
        options: as `generate` takes them.

    Returns:
        `rows`, and `exact`: how many answers equal the record's own.
    """
    tokenizer = load_tokenizer(store.tokenizer_name)
    template = str(store.manifest["template"].get("name", ""))
    answers = []
    for row in rows:
        example = store[row]
        prompt, output = prompt_and_answer(example)
        generator = torch.Generator(model.wte.weight.device).manual_seed(seed * 1_000_003 + row)
        response = generate(
            model, prompt or [store.pad_token_id], stop_at=store.pad_token_id, generator=generator, **options
        )
        answers.append(
            {
                "row": example.source_row,
                "prompt": tokenizer.decode(prompt),
                "output": clean_response(tokenizer.decode(output), template),
                "model_response": clean_response(tokenizer.decode(response), template),
            }
        )
        on_row()
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(answers, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return {"rows": len(answers), "exact": sum(a["output"] == a["model_response"] for a in answers)}
