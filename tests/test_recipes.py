"""The recipes change at most ten lines each; `test_docs.py` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_docs import blocks

from tests.forks import Forks
from tests.helpers import write_store

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"


def test_each_recipe_changes_at_most_ten_lines() -> None:
    recipes = [text for _, language, text in blocks(PAGE) if language == "python"]
    assert len(recipes) >= 7
    for text in recipes:
        changed = [line for line in text.splitlines() if line.endswith("# new")]
        assert 1 <= len(changed) <= 10, text
        assert all("# new" in line for line in text.splitlines() if "fastcollate" in line), text


LOOPS = [text for _, language, text in blocks(PAGE) if language == "python" and "cross_entropy" in text]
FINITE = """
import torch
model = model if "model" in vars() else trainer.model
assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
"""


@pytest.mark.slow
@pytest.mark.parametrize("text", LOOPS, ids=["DataLoader", "packed", "Lightning"])
def test_a_batch_without_a_target_ruins_no_model_of_a_recipe(text: str, tmp_path: Path, forks: Forks) -> None:
    """No row of this store has a target when prompts are masked; every batch is one whose mean is NaN."""
    if "lightning" in text:
        pytest.importorskip("lightning")
    write_store(tmp_path / "store", [([9, 0], list(range(n, n + 8))) for n in range(32)], shard_rows=20)
    result = forks.run(text + FINITE, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "nan" not in result.stdout
