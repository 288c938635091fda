"""The template `document`: a text with the token that begins texts before it, as a store of documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from fastcollate import BatchLoader, MixedStore, TokenStore, prepare
from fastcollate.errors import InputError
from fastcollate.text import load_tokenizer
from tests.helpers import run_cli

TEXTS = ["Once there was a cat.", "", "A line.\nAnother — 🙂", "the the the " * 40]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def test_rows_are_the_texts_ids_behind_an_end_of_text(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(records, tmp_path / "store", template="document", on_error="skip", workers=1, progress=False)
    store = TokenStore(tmp_path / "store")
    assert (store.kind, store.end, store.manifest["template"]["name"]) == ("documents", "append", "document")
    encode = load_tokenizer("gpt2").encode
    assert [row.input_ids.tolist() for row in store] == [[50256, *encode(text)] for text in TEXTS if text]
    assert [row.spans.tolist() for row in store] == [[0, len(row.input_ids)] for row in store]
    assert [row.source_row for row in store] == [0, 2, 3]
    assert run_cli(monkeypatch, "verify", tmp_path / "store", records) == 0
    assert "all identical" in capsys.readouterr().out
    other = tmp_path / "other.jsonl"
    other.write_text(records.read_text().replace("Another", "An other"))
    assert run_cli(monkeypatch, "verify", tmp_path / "store", other) == 1


def test_a_batch_is_trained_whole_whatever_the_mask(records: Path, tmp_path: Path) -> None:
    prepare(records, tmp_path / "store", template="document", on_error="skip", workers=1, progress=False)
    options: dict[str, Any] = {"policy": "packed", "packing": "concatenate", "capacity": 16, "batch_size": 2}
    for mask_prompt in (False, True):
        loader = BatchLoader(tmp_path / "store", mask_prompt=mask_prompt, **options)
        for batch in loader:
            assert batch.targets.shape == (2, 16) or len(batch.targets) == 1
        store = TokenStore(tmp_path / "store")
        assert loader.stats.trained_tokens == loader.stats.real_cells == store.num_tokens


@pytest.mark.parametrize("names", [("asked", "documents"), ("documents", "asked")])
def test_documents_mix_with_instructions(records: Path, tmp_path: Path, names: tuple[str, str]) -> None:
    """Whichever comes first, documents are trained whole where prompts are masked: targets are told by position."""
    prepare(records, tmp_path / "store", template="document", on_error="skip", workers=1, progress=False)
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"instruction": f"Add {i}.", "output": str(i)}) + "\n" for i in range(9)))
    prepare(asked, tmp_path / "asked", workers=1, progress=False)
    folders = {"asked": tmp_path / "asked", "documents": tmp_path / "store"}
    mix = MixedStore({name: TokenStore(folders[name]) for name in names})
    loader = BatchLoader(mix, policy="packed", capacity=64, long_rows="split", batch_size=2)
    for _ in loader:
        pass
    padded = BatchLoader(mix, batch_size=2, mask_prompt=True)
    documents, asked_rows = TokenStore(folders["documents"]), TokenStore(folders["asked"])
    wanted = {"documents": documents.num_tokens, "asked": sum(int(row.spans[1]) + 1 for row in asked_rows)}
    assert sum(int((batch.targets != -100).sum()) for batch in padded) == sum(wanted.values())
    assert padded.stats.trained_by_source == wanted
    assert loader.source_rows["asked"] == 9
    assert loader.stats.trained_by_source["documents"] == TokenStore(tmp_path / "store").num_tokens


def test_of_a_tokenizer_whose_texts_begin_with_a_token_it_is_that(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=made.pre_tokenizer.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(["there was a cat"] * 9, trainer)
    begin = ("<|im_start|>", made.token_to_id("<|im_start|>"))
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[begin])
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>").save_pretrained(tmp_path)
    records = [{"text": text} for text in TEXTS if text]
    options: dict[str, Any] = {"template": "document", "tokenizer": str(tmp_path), "workers": 1}
    assert prepare(records, tmp_path / "s", **options).template == "document"
    store = TokenStore(tmp_path / "s")
    assert [row.input_ids.tolist() for row in store] == [made.encode(text).ids for text in TEXTS if text]
    assert {row.input_ids[0] for row in store} == {begin[1]} != {store.end_token_id}


def test_what_has_no_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"content": "a"}\n')
    with pytest.raises(InputError, match="no field 'text'"):
        prepare(path, tmp_path / "store", template="document", progress=False)
    prepare(path, tmp_path / "store", template="document", fields={"text": "content"}, progress=False)
    assert len(TokenStore(tmp_path / "store")) == 1
