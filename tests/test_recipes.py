"""The recipes change at most ten lines each; `test_docs.py` runs them."""

from __future__ import annotations

from pathlib import Path

from test_docs import blocks

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"


def test_each_recipe_changes_at_most_ten_lines() -> None:
    recipes = [text for _, language, text in blocks(PAGE) if language == "python"]
    assert len(recipes) >= 7
    for text in recipes:
        changed = [line for line in text.splitlines() if line.endswith("# new")]
        assert 1 <= len(changed) <= 10, text
        assert all("# new" in line for line in text.splitlines() if "fastcollate" in line), text
