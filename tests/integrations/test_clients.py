"""The templates of `docs/clients.md` give the rows of the projects' rules, which stand here in our words.

A tokenizer of bytes: nothing joins across the pieces that a project tokenizes one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastcollate import BatchLoader, TokenStore, prepare
from fastcollate.check import verify
from tests.integrations import chats

pytest.importorskip("transformers")
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "clients.md").read_text()
NAMES = ("torchtune", "llama_factory", "nanochat", "alpaca")
TEMPLATES = dict(zip(NAMES, re.findall(r"```jinja\n(.*?)```", PAGE, re.S), strict=True))
TOKENS = {
    "torchtune": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
    "llama_factory": ("<|begin|>", "<|im_end|>", "<|im_start|>"),
    "nanochat": (
        "<|bos|>", "<|assistant_end|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|python_start|>",
        "<|python_end|>", "<|output_start|>", "<|output_end|>",
    ),
    "alpaca": ("<s>", "</s>"),
}  # fmt: skip
Pieces = Iterator[tuple[str, bool]]


def torchtune(record: dict[str, Any]) -> Pieces:
    """Of a turn that is trained all tokens are, its heading's too; texts are stripped; what ends the row is masked."""
    yield "<|begin_of_text|>", False
    for turn in record["messages"]:
        heading = f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n"
        yield heading + turn["content"].strip() + "<|eot_id|>", turn["role"] == "assistant"
    yield "<|end_of_text|>", False


def llama_factory(record: dict[str, Any]) -> Pieces:
    """Of the assistant the text, the end of turn and the line break behind it are trained, and not the heading."""
    for turn in record["messages"]:
        yield f"<|im_start|>{turn['role']}\n", False
        yield turn["content"] + "<|im_end|>\n", turn["role"] == "assistant"


def nanochat(record: dict[str, Any]) -> Pieces:
    """A system turn is the first question's beginning; what Python gives back is masked, what calls it is trained."""
    system, turns = "", record["messages"]
    if turns[0]["role"] == "system":
        system, turns = turns[0]["content"] + "\n\n", turns[1:]
    yield "<|bos|>", False
    for number, turn in enumerate(turns):
        if turn["role"] == "user":
            yield "<|user_start|>" + system * (number == 0) + turn["content"] + "<|user_end|>", False
            continue
        yield "<|assistant_start|>", False
        content = turn["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            name = {"python": "python", "python_output": "output"}.get(part["type"])
            text = f"<|{name}_start|>{part['text']}<|{name}_end|>" if name else part["text"]
            yield text, name != "output"
        yield "<|assistant_end|>", True


def alpaca(record: dict[str, Any]) -> Pieces:
    """The answer and the end of text behind it are trained; the text begins otherwise where there is an input."""
    more = ", paired with an input that provides further context" if record.get("input") else ""
    yield (
        f"<s>Below is an instruction that describes a task{more}. Write a response that appropriately completes ",
        False,
    )
    yield f"the request.\n\n### Instruction:\n{record['instruction']}\n\n", False
    yield (f"### Input:\n{record['input']}\n\n" if more else "") + "### Response:\n", False
    yield record["output"] + "</s>", True


def in_parts(number: int, record: dict[str, Any]) -> dict[str, Any]:
    """Every third chat with answers of several parts."""
    if number % 3:
        return record
    parts = [("text", "It is "), ("python", "4 + 4"), ("python_output", "8"), ("text", "."), ("python", "1")]
    said = [{"type": kind, "text": text} for kind, text in parts[: 1 + number % 5]]
    turns = [{**turn, "content": said} if turn["role"] == "assistant" else turn for turn in record["messages"]]
    return {"messages": turns}


def records_for(name: str) -> list[dict[str, Any]]:
    made = [{"messages": chat} for chat in chats.make_chats(300)]
    if name == "nanochat":
        return [in_parts(number, record) for number, record in enumerate(made)]
    if name == "alpaca":
        texts = [[turn["content"] for turn in record["messages"]] for record in made]
        return [{"instruction": t[0], "output": t[1], **({"input": t[2]} if len(t) > 2 else {})} for t in texts]
    return made


@pytest.mark.slow
@pytest.mark.parametrize("rule", [torchtune, llama_factory, nanochat, alpaca])
def test_rows_are_the_project_s(rule: Callable[[dict[str, Any]], Pieces], tmp_path: Path) -> None:
    name = rule.__name__
    begin, end, *more = TOKENS[name]
    tokenizer = chats.byte_tokenizer(*more, begin=begin, end=end, template=None)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "t.jinja").write_text(TEMPLATES[name])
    records = records_for(name)
    given = {"tokenizer": str(tmp_path / "tokenizer"), "template": str(tmp_path / "t.jinja"), "end": "in_row"}
    source = tmp_path / "records.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    report = prepare(source, tmp_path / "store", **given)  # type: ignore[arg-type]
    store = TokenStore(tmp_path / "store")
    assert (store.end, report.summary["num_skipped"], report.summary["untrained_rows"]) == ("in_row", 0, 0)
    loader = BatchLoader(store, policy="sequential", batch_size=1, mask_prompt=True)
    for record, (inputs, targets) in zip(records, loader, strict=True):
        ids, labels = [], []
        for text, is_trained in rule(record):
            piece = tokenizer.encode(text, add_special_tokens=False)
            ids += piece
            labels += piece if is_trained else [-100] * len(piece)
        assert (inputs[0].tolist(), targets[0].tolist()) == (ids[:-1], labels[1:])
    assert verify(store, sources=[str(source)], progress=False).ok
