"""Which tokens of a chat are trained: a short run of `tests/fuzz_chats.py`, and answers that end within a character."""

from __future__ import annotations

import json
import os
import sys
from itertools import chain
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from fastcollate.ingest.job import prepare
from fastcollate.store.store import TokenStore
from tests.fuzz_chats import JINJA, KINDS, make_tokenizer, run, trained_of

SEED = int(os.environ.get("FUZZ_SEED", "1"))


@pytest.mark.slow
def test_ids_and_masks_are_the_oracle_s() -> None:
    counts = run(int(os.environ.get("FUZZ_CHATS", "1500")), SEED)
    assert counts["boundaries"] > counts["records"]


@pytest.mark.parametrize("end", ["😀", "語", "ё", "日本語", "x😀😀"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_trained_to_its_last_character(tmp_path: Path, kind: str, end: str) -> None:
    """All tokens of the last character are, also where the tokenizer gives each of them all of it as its place."""
    tokenizers = pytest.importorskip("tokenizers")
    path = make_tokenizer(kind, tmp_path / "tokenizer.json")
    template, source = tmp_path / "bare.jinja", tmp_path / "a.jsonl"
    template.write_text(JINJA["bare"])
    texts = ["Add 1\x01", "the word" + end, "\x01and x\x01", end]  # nothing joins with a character never seen
    turns = [{"role": ["user", "assistant"][i % 2], "content": text} for i, text in enumerate(texts)]
    source.write_text(json.dumps({"messages": turns}))
    prepare(source, tmp_path / "s", template=str(template), tokenizer=path)
    [row] = TokenStore(tmp_path / "s")
    loaded = tokenizers.Tokenizer.from_file(path)
    pieces = [loaded.encode(text, add_special_tokens=False).ids for text in texts]
    assert row.input_ids.tolist() == list(chain.from_iterable(pieces))
    wanted = [is_answer for i, piece in enumerate(pieces) for is_answer in [i % 2 == 1] * len(piece)]
    assert trained_of(row.spans.tolist(), len(row.input_ids)) == wanted
