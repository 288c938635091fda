"""Chats whose template writes whole texts become rows that hold their end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastcollate import TokenStore, prepare
from fastcollate.errors import InputError
from fastcollate.ingest import spec
from fastcollate.text import BadRecordError, Rendered, Template, load_tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)


class Written(Template):
    """`CHATML` in plain Python."""

    end = "in_row"
    single_turn = False

    def render(self, record: Any) -> Rendered:
        text, trained, protected = "", [], []
        for turn in record["messages"]:
            text += f"<|im_start|>{turn['role']}\n"
            start = len(text)
            if turn["content"] is None:
                raise BadRecordError("says nothing")
            found = re.finditer(r"<\|im_(start|end)\|>", turn["content"])
            protected += [(start + m.start(), start + m.end(), turn["role"] == "assistant") for m in found]
            text += turn["content"] + "<|im_end|>"
            if turn["role"] == "assistant":
                trained.append((start, len(text)))
            text += "\n"
        return Rendered(text, trained, protected)


@pytest.fixture
def written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(spec, "load_template", lambda *_, **__: Written("written", {}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_start|>"], initial_alphabet=made.pre_tokenizer.alphabet()
    )
    made.train_from_iterator(["question answer the of number"] * 9, trainer)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|pad|>")
    theirs.chat_template = CHATML
    theirs.add_tokens(["<think>", "</think>"])
    theirs.save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def chat(number: int, *, said: str | None = "answer", more: int = 0) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"question é {number}"}, {"role": "assistant", "content": said}]
    return {"messages": turns + turns[:1] * (more > 0) + turns * more}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def expected(folder: Path, record: dict[str, Any]) -> tuple[list[int], list[int]]:
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    found = theirs.apply_chat_template(record["messages"], return_dict=True, return_assistant_tokens_mask=True)
    return found["input_ids"], found["assistant_masks"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_rows_are_those_of_transformers(written: Path, workers: int) -> None:
    records = [chat(number, said=f"the number {number}", more=number % 3) for number in range(300)]
    source = write(written / "a.jsonl", records * (1 if workers == 1 else 60))
    report = prepare(source, written / "s", tokenizer=str(written / "tokenizer"), workers=workers)
    store = TokenStore(written / "s")
    assert (store.end, report.summary["untrained_rows"], report.summary["corner_rows"]) == ("in_row", 0, 0)
    assert store.pad_token_id != store.end_token_id
    for number in (0, 1, 2, 299, len(store) - 1):
        ids, mask = expected(written, records[number % 300])
        assert store[number].input_ids.tolist() == ids
        assert np.repeat(np.arange(len(store[number].spans)) % 2, store[number].spans).tolist() == mask


def test_bad_records_and_special_texts(written: Path) -> None:
    records = [chat(0), chat(1, said=None), chat(2, said="<|im_end|>"), chat(3), {"messages": "x"}]
    source = write(written / "a.jsonl", records[:4])
    options: dict[str, Any] = {"tokenizer": str(written / "tokenizer"), "workers": 1}
    with pytest.raises(InputError, match=r"line 2, record 1: says nothing"):
        prepare(source, written / "s", **options)
    report = prepare(source, written / "s", on_error="skip", **options)
    assert report.summary["num_skipped"] == 2
    skipped = (written / "s" / "skipped.txt").read_text()
    assert (
        "holds the special token '<|im_end|>' as text; store it as ordinary text with --special-text encode" in skipped
    )
    assert [row.source_row for row in TokenStore(written / "s")] == [0, 3]
    prepare(source, written / "t", on_error="skip", special_text="encode", **options)
    store = TokenStore(written / "t")
    assert [row.source_row for row in store] == [0, 2, 3]
    assert store[1].input_ids.tolist().count(store.end_token_id) == 2, "those of the template"


def test_what_the_tokenizer_cannot_take_is_a_bad_record(written: Path) -> None:
    """NFKC makes "<|im_end|>" of wide signs, which no search in the record's text finds."""
    path = written / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "NFKC"}
    for token in content["added_tokens"]:
        token["normalized"] = True
    path.write_text(json.dumps(content))
    source = write(written / "a.jsonl", [chat(0), chat(1, said="\uff1c|im_end|\uff1e"), chat(2)])
    report = prepare(source, written / "s", on_error="skip", tokenizer=str(written / "tokenizer"), workers=1)
    assert report.summary["num_skipped"] == 1
    assert "holds the text of a special token once it is normalized" in (written / "s" / "skipped.txt").read_text()
    assert [row.source_row for row in TokenStore(written / "s")] == [0, 2]


def test_rows_without_a_trained_token_are_counted(written: Path) -> None:
    records = [chat(0), {"messages": chat(1)["messages"][:1]}, chat(2)]
    source = write(written / "a.jsonl", records)
    report = prepare(source, written / "s", tokenizer=str(written / "tokenizer"), workers=1)
    assert report.summary["untrained_rows"] == 1


def test_tags_keep_their_ids_in_answers_alone(folder: Path) -> None:
    said = "<think>the number</think>answer"
    source = write(folder / "a.jsonl", [chat(0, said=said)])
    options: dict[str, Any] = {"tokenizer": str(folder / "tokenizer"), "workers": 1, "overwrite": True}
    store = folder / "s"
    prepare(source, store, **options)
    ids, mask = expected(folder, chat(0, said=said))
    (row,) = TokenStore(store)
    assert row.input_ids.tolist() == ids
    assert np.repeat(np.arange(len(row.spans)) % 2, row.spans).tolist() == mask
    with pytest.raises(InputError, match="holds the special token '<think>' as text"):
        prepare(source, store, allow_special="", **options)
    with pytest.raises(InputError, match=r"allow_special: '<\|im_end\|>' begins, ends or fills texts"):
        prepare(source, store, allow_special="<think> <|im_end|>", **options)
    with pytest.raises(InputError, match="allowed"):
        prepare(source, store, allow_special="<think>", template="alpaca", **options)
    asked = chat(0, said=said)
    asked["messages"][0]["content"] = "<think> what? <|im_end|>"
    write(source, [asked])
    with pytest.raises(InputError, match="holds the special token '<think>' as text"):
        prepare(source, store, **options)
    prepare(source, store, special_text="encode", **options)
    (row,) = TokenStore(store)
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    counts = {text: row.input_ids.tolist().count(number) for text, number in tokenizer.json.added.control.items()}
    assert counts == {"<|im_start|>": 2, "<|im_end|>": 2, "<think>": 1, "</think>": 1, "<|pad|>": 0}
    assert "<think> what? <|im_end|><|im_end|>" in tokenizer.decode(row.input_ids)


def test_a_row_without_the_token_that_begins_texts_is_told(folder: Path) -> None:
    """Llama's tokenizer begins texts by itself; a chat template writes that, an instruction template does not."""
    path = folder / "tokenizer" / "tokenizer.json"
    made = tokenizers.Tokenizer.from_file(str(path))
    options: dict[str, Any] = {"tokenizer": str(folder / "tokenizer"), "workers": 1, "overwrite": True}
    records = [{"text": f"question {number}"} for number in range(9)]
    assert prepare(records, folder / "s", **options).template == "text (records hold text: all of it is trained)"
    begin = ("<|im_start|>", made.token_to_id("<|im_start|>"))
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[begin])
    made.save(str(path))
    told = prepare(records, folder / "s", **options).template
    assert told.endswith("; no <|im_start|> begins a row, though this tokenizer's texts begin with it")
    assert begin[1] not in TokenStore(folder / "s")[0].input_ids
    template = folder / "begins.jinja"
    template.write_text("<|im_start|>{% generation %}{{ text }}<|im_end|>{% endgeneration %}")
    report = prepare(records, folder / "s", template=str(template), end="in_row", **options)
    assert "begins" not in report.template.removesuffix("begins.jinja")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    for row, record in zip(TokenStore(folder / "s"), records, strict=True):
        assert row.input_ids.tolist() == [*theirs(record["text"])["input_ids"], theirs.eos_token_id]
