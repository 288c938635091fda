"""The recipes of `docs/chats.md`, on generated chats: ids and masks are those of `apply_chat_template`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from test_docs import ROOT, blocks

from benchmarks.chat_exact import chats, templates, theirs_of
from fastcollate import TokenStore
from tests.forks import Forks
from tests.helpers import save_chat_models

PAGE = ROOT / "docs" / "chats.md"
RECIPES = {
    re.findall(r'"(\w+)\.jsonl"', text)[0]: text for _, language, text in blocks(PAGE)
    if language == "python" and ".jsonl" in text
}  # fmt: skip


def plain(record: dict[str, Any]) -> bool:
    """Whether each answer is a text and no more, whose place is told without `{% generation %}`."""
    answers = [turn for turn in record["messages"] if turn["role"] == "assistant"]
    texts = [turn["content"].strip() for turn in answers if {*turn} == {"role", "content"}]
    return len(texts) == len(answers) > 0 and all("<think>" not in text for text in texts)


def thinking(record: dict[str, Any]) -> bool:
    return "tools" not in record and ("reasoning_content" in str(record) or "<think>" in str(record))


def calling(record: dict[str, Any]) -> bool:
    return any("tool_calls" in turn for turn in record["messages"])


KINDS = {
    "chats": ("Llama-3-8B-Instruct", "llama3_training", plain),
    "thoughts": ("Qwen3-8B", "qwen3_training", thinking),
    "calls": ("Qwen3-8B", "qwen3_training", calling),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_chat_models(folder)
    return folder


def some_chats(kind: str, seed: int) -> Iterator[dict[str, Any]]:
    return islice(filter(KINDS[kind][2], chats(4000, seed)), 60)


def test_there_is_a_recipe_for_each_kind() -> None:
    assert RECIPES.keys() == KINDS.keys()
    assert all(len([line for line in text.splitlines() if line]) <= 10 for text in RECIPES.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_masks_of_a_recipe(kind: str, models: Path, tmp_path: Path, forks: Forks) -> None:
    from transformers import AutoTokenizer

    model, template, _ = KINDS[kind]
    records = list(some_chats(kind, seed=11))
    (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / model).symlink_to(models / model)
    result = forks.run(RECIPES[kind], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    source = (templates()[0].parent / f"{template}.jinja").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(models / model)
    [store] = [TokenStore(path.parent) for path in tmp_path.glob("*/manifest.json")]
    assert len(store) == len(records) == 60
    for row, record in zip(store, records, strict=True):
        found = theirs_of(tokenizer, source, record)
        assert found is not None
        mask = [number % 2 for number, span in enumerate(row.spans.tolist()) for _ in range(span)]
        assert (row.input_ids.tolist(), mask) == found


def options_in(column: int, table: str) -> set[str]:
    """The names of options, `name` or `name=...`, in a column of the table with this heading in `docs/clients.md`."""
    text = (ROOT / "docs" / "clients.md").read_text()
    [rows] = [part.splitlines()[2:] for part in text.split("\n\n") if part.startswith(f"| {table}")]
    cells = [row.split("|")[column] for row in rows]
    return {name for cell in cells for name in re.findall(r"`(\w+)(?:=[^`]*)?`", cell)}


def test_the_table_of_trl_s_options_names_options_of_trl() -> None:
    found = options_in(1, "TRL, `SFTConfig`") - {"chat_template_kwargs", "tools"}  # columns
    assert len(found) > 8
    assert found <= pytest.importorskip("trl", minversion="1").SFTConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize("table", ["TRL, `SFTConfig`", "axolotl", "LLaMA-Factory", "torchtune"])
def test_what_options_become_are_options_of_ours(table: str) -> None:
    from fastcollate import BatchLoader, prepare
    from fastcollate.ingest.options import PrepareKeywords
    from fastcollate.load.options import LoaderKeywords

    known = {*PrepareKeywords.__annotations__, *LoaderKeywords.__annotations__}
    known |= {*signature(prepare).parameters, *signature(BatchLoader).parameters}
    fields = {
        "instruction",
        "input",
        "output",
        "history",
        "system",
        "chat_template_kwargs",
        "prompt",
        "chosen",
        "rejected",
    }
    fields |= {"train", "training", "train_on_turn", "weight", "reasoning_content", "thinking", "reasoning"}
    words = {"all", "last", "none", "drop", "raise", "False", "BatchLoader", "DataCollator"}
    found = options_in(2, table)
    assert len(found & known) > 5
    assert found <= known | fields | words
