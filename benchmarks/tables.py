"""The README's tables, from `bench_results/`: `python -m benchmarks.tables` rewrites them, a test holds them equal."""

from __future__ import annotations

import json
import re
from typing import Any

from benchmarks.harness import RESULTS

README = RESULTS.parent / "README.md"
RECIPES = {  # the benchmark's name of a recipe -> its heading in docs/recipes.md
    "DataLoader": "PyTorch: `DataLoader`",
    "Trainer": "Hugging Face: `Trainer`",
    "Lightning": "Lightning",
}


def result(name: str) -> dict[str, Any]:
    """A result file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def recipes_table() -> str:
    """What each recipe gives: lines changed, the data path's time per epoch and the padding, before and after."""
    found = result("integrations")
    lines = [
        "| recipe | lines changed | data path, s per epoch | padding |",
        "|---|---|---|---|",
    ]
    for name, heading in RECIPES.items():
        row = found["recipes"][name]
        lines.append(
            f"| {heading} | {found['lines_changed'][heading]} "
            f"| {row['seconds_per_epoch_before']:.2f} → {row['seconds_per_epoch_after']:.2f} "
            f"| {row['padding_before']:.1%} → {row['padding_after']:.1%} |"
        )
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The page with each marked table made afresh."""
    pattern = r"(<!-- table: recipes -->\n).*?(<!-- end of table -->)"
    return re.sub(pattern, lambda match: match[1] + recipes_table() + "\n" + match[2], text, flags=re.S)


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
