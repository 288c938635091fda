"""Chats from records to a store, by the template that comes with the tokenizer, and the proof of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastcollate.check.chat.rows import ChatRows
from fastcollate.check.reference_check import verify
from fastcollate.errors import InputError
from fastcollate.ingest.job import prepare
from fastcollate.store.store import TokenStore
from fastcollate.text.templates import load_template
from fastcollate.text.tokenizer import load_tokenizer

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("jinja2")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)
BARE = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "").replace("content", "content[1:]")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["hello there"] * 9, tokenizers.trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    )
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|end|>")
    theirs.chat_template = TEMPLATE
    theirs.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def records(count: int) -> list[dict[str, Any]]:
    turns = [
        ("system", "Be kind"),
        ("user", " hé {}\n"),
        ("assistant", "there {} "),
        ("user", "x"),
        ("assistant", "{}"),
    ]
    return [
        {"messages": [{"role": role, "content": text.format(number)} for role, text in turns]}
        for number in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_store_of_chats_is_what_transformers_gives_and_verify_proves_it(tmp_path: Path, folder: Path) -> None:
    rows = records(40)
    source = write(tmp_path / "a.jsonl", rows)
    report = prepare(source, tmp_path / "s", tokenizer=str(folder))
    assert report.template.startswith("tokenizer (records hold messages")
    store = TokenStore(tmp_path / "s")
    assert store.end == "in_row"
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for row, record in zip(store, rows, strict=True):
        wanted = theirs.apply_chat_template(record["messages"], return_dict=True, return_assistant_tokens_mask=True)
        assert row.input_ids.tolist() == wanted["input_ids"]
        mask = [number % 2 for number, span in enumerate(row.spans.tolist()) for _ in range(span)]
        assert mask == wanted["assistant_masks"]
    found = verify(store, sources=[str(source)], progress=False)
    assert found.ok
    assert found.records == 40
    rows[7]["messages"][1]["content"] = "other"
    changed = verify(store, sources=[str(write(tmp_path / "b.jsonl", rows))], progress=False)
    assert changed.num_problems == 2
    assert "row 7: " in changed.problems[0]
    assert "tokenizers gives" in changed.problems[0]
    assert "apply_chat_template gives" in changed.problems[1]


def test_a_mask_that_is_not_the_template_s_is_found(tmp_path: Path, folder: Path) -> None:
    rows = records(2)
    prepare(write(tmp_path / "a.jsonl", rows), tmp_path / "s", tokenizer=str(folder), train_on="last")
    store = TokenStore(tmp_path / "s")
    assert verify(store, sources=[str(tmp_path / "a.jsonl")], progress=False).ok
    template = load_template("tokenizer", {}, load_tokenizer(str(folder)))
    problems = list(ChatRows(store, template).differences(0, rows[0]))
    assert len(problems) == 2
    assert all("not trained, by " in problem for problem in problems)


def test_a_template_that_hides_what_is_trained_stops_the_job(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "bare.jinja").write_text(BARE)
    source = write(tmp_path / "a.jsonl", records(1500))
    for on_error, message in (
        ("raise", "record 0: what the assistant says cannot be told"),
        ("skip", "of the first 1000"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            prepare(
                source,
                tmp_path / "s",
                tokenizer=str(folder),
                template=str(tmp_path / "bare.jinja"),
                on_error=on_error,
            )
        assert "give a template that has {% generation %}" in str(caught.value)


def test_a_tokenizer_without_a_template_takes_chatml_and_says_so(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", records(3))
    report = prepare(source, tmp_path / "s")
    assert report.template.startswith("chat (records hold messages; the tokenizer comes with no chat template")
    assert TokenStore(tmp_path / "s").end == "append"


def test_today_s_date_is_asked_for(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ strftime_now('%Y') }}" + TEMPLATE)
    source = write(tmp_path / "a.jsonl", records(3))
    with pytest.raises(InputError, match=r"^template .*writes today's date"):
        prepare(source, tmp_path / "s", tokenizer=str(folder), template=str(tmp_path / "t.jinja"))
    prepare(source, tmp_path / "s", tokenizer=str(folder), template=str(tmp_path / "t.jinja"), date="2026-01-31")
    store = TokenStore(tmp_path / "s")
    assert load_tokenizer(str(folder)).decode(store[0].input_ids).startswith("2026<|system|>")
    assert verify(store, sources=[str(source)], progress=False).ok
