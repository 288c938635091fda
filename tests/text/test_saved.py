"""What `save_pretrained` writes is read as transformers reads it; everything else is refused with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastcollate import TokenStore, prepare
from fastcollate.check import inspect_store
from fastcollate.check.counts import tokenizer_of
from fastcollate.errors import InputError
from fastcollate.text.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
DEFAULT, TOOLS = "{{ bos_token }}{{ messages }}", "{{ tools }}"


def made(**names: Any) -> Any:
    """A small tokenizer of transformers; "<pad>" and "<new>" are not in its file."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=model.pre_tokenizer.alphabet()
    )
    model.train_from_iterator(["the cat sat on the mat and the hat"] * 5, trainer)
    model.add_tokens([tokenizers.AddedToken("<role>", normalized=False)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names)


def saved(folder: Path, *, chat_template: Any = None, **names: Any) -> Any:
    tokenizer = made(**names)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


NAMES = [
    {"bos_token": "<s>", "eos_token": "</s>"},
    {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    {"eos_token": "<role>", "unk_token": "<new>", "additional_special_tokens": ["<one>", "the"]},
    {"eos_token": tokenizers.AddedToken("</s>", lstrip=True), "mask_token": tokenizers.AddedToken("<m>", rstrip=True)},
]


@pytest.mark.slow
@pytest.mark.parametrize("names", NAMES)
def test_a_folder_is_read_as_transformers_reads_it(names: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(tmp_path, **names)
    ours = load_tokenizer(str(tmp_path))
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.end_token_id == theirs.eos_token_id
    assert ours.pad_token_id == (theirs.pad_token_id if "pad_token" in names else theirs.eos_token_id)
    assert set(ours.special_texts) == set(theirs.get_added_vocab())
    assert ours.vocab_size == len(theirs)
    assert ours.json is not None
    text = f"the cat{''.join(theirs.get_added_vocab())} <s>"
    ids = theirs(text, add_special_tokens=False).input_ids
    assert ours.json.full.exact.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert not {*ours.encode(text)} & {*theirs.get_added_vocab().values()} - {ours.json.loaded.token_to_id("the")}
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).fingerprint == ours.fingerprint


def test_tokens_that_the_configuration_adds_make_another_tokenizer(tmp_path: Path) -> None:
    """A store of the one is not taken for a store of the other, though the vocabularies have one size and one file."""
    found = {}
    for token in ("<a>", "<b>", ""):
        saved(tmp_path / f"of{token}", eos_token="</s>")
        place = tmp_path / f"of{token}" / "tokenizer_config.json"
        config = json.loads(place.read_text())
        place.write_text(json.dumps({**config, **({"extra_special_tokens": [token]} if token else {})}))
        found[token] = load_tokenizer(str(place.parent))
    assert found["<a>"].vocab_size == found["<b>"].vocab_size == found[""].vocab_size + 1
    assert found["<a>"].special_tokens == found["<b>"].special_tokens
    assert len({one.fingerprint for one in found.values()}) == 3
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"text": "the <a> cat"}) + "\n")
    prepare(source, tmp_path / "s", tokenizer=str(tmp_path / "of<b>"))
    with pytest.raises(InputError, match="differs in tokenizer fingerprint"):
        prepare(source, tmp_path / "s", tokenizer=str(tmp_path / "of<a>"))


def test_a_special_tokens_map_counts_as_in_transformers(tmp_path: Path) -> None:
    saved(tmp_path, eos_token="</s>")
    for decoder in (None, {"0": {"content": "<s>", "special": True}}):
        config = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {"added_tokens_decoder": decoder} if decoder else {}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<s>", "pad_token": "<role>"}))
        theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))
        assert ours.special_tokens == theirs.special_tokens_map
        assert ours.end_token_id == theirs.eos_token_id


@pytest.mark.parametrize("as_files", [True, False])
@pytest.mark.parametrize("template", [None, DEFAULT, {"default": DEFAULT, "tool_use": TOOLS}, {"rag": TOOLS}])
def test_chat_templates_come_from_files_or_the_configuration(template: Any, as_files: bool, tmp_path: Path) -> None:
    tokenizer = made(eos_token="</s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path, save_jinja_files=as_files)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template, load_tokenizer(str(tmp_path))
    assert ours.chat_templates == ({"default": theirs} if isinstance(theirs, str) else theirs or {})
    assert ours.chat_template == ours.chat_templates.get("default")


def test_a_store_keeps_what_it_needs_and_is_its_own_tokenizer(tmp_path: Path) -> None:
    saved(tmp_path / "a", chat_template={"default": DEFAULT, "tool_use": TOOLS}, eos_token="</s>")
    saved(tmp_path / "b", chat_template={"default": DEFAULT, "tool_use": TOOLS}, eos_token="</s>")
    source = tmp_path / "rows.jsonl"
    source.write_text('{"instruction": "the cat", "output": "sat"}\n')
    prepare(source, tmp_path / "s", tokenizer=str(tmp_path / "a"))
    assert prepare(source, tmp_path / "s", tokenizer=str(tmp_path / "b")).reused, "a folder's name is not its content"
    assert prepare(source, tmp_path / "s", tokenizer=str(tmp_path / "s")).reused
    with pytest.raises(InputError, match="lies in the folder of the store"):
        prepare(source, tmp_path / "s", tokenizer=str(tmp_path / "s"), overwrite=True)
    for name in "ab":
        (tmp_path / name).rename(tmp_path / f"gone-{name}")
    store = TokenStore(tmp_path / "s")
    again = load_tokenizer(store.tokenizer_name)
    assert again.decode(store[0].input_ids).endswith("### Response:\nsat")
    assert dict(again.chat_templates) == {"default": DEFAULT, "tool_use": TOOLS}
    assert inspect_store(store).num_rows == 1
    assert tokenizer_of(store)[1] == ""
    (store.path / "tokenizer_config.json").write_text("{}")
    assert "not the one the store was made with" in tokenizer_of(store)[1]


def test_what_is_no_tokenizer_json_says_how_to_make_one(tmp_path: Path) -> None:
    for name in ("tokenizer.model", "qwen.tiktoken", "tekken.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        for place in (tmp_path / name, tmp_path / name / name):
            with pytest.raises(InputError, match=r"convert it once with python -c .*, then give"):
                load_tokenizer(str(place))
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("meta-llama/Llama-3.1-8B", r"a hub's name is not looked up; convert it once .*from_pretrained\('meta-llama/"),
        (str(tmp_path / "empty"), r"no tokenizer\.json in this folder; give one that save_pretrained wrote"),
        (str(tmp_path / "none" / "there"), "no such folder or file"),
        (str(tmp_path / "none.json"), "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            load_tokenizer(name)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("special_tokens_map.json", '{"eos_token": {"content": 3}}'),
        ("special_tokens_map.json", "[]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", '{"chat_template": 3}'),
        ("tokenizer_config.json", "{" * 100_000),
        ("chat_template.jinja", "\udcff"),
    ],
)
def test_malformed_files_are_refused_by_name(file: str, content: str, tmp_path: Path) -> None:
    saved(tmp_path, eos_token="</s>")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"(config|map)\.json: cannot be read as a tokenizer's configuration .*; mend"):
        load_tokenizer(str(tmp_path))


@pytest.mark.slow
def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    saved(tmp_path, eos_token="</s>")
    with open(tmp_path / "chat_template.jinja", "wb") as file:
        file.truncate(1 << 29)
    with pytest.raises(InputError, match=r"chat_template\.jinja: has more than 268,435,456 bytes"):
        load_tokenizer(str(tmp_path))
