"""Answers of a model that was trained on chats: the prompt is what the template writes before an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastcollate import TokenStore, prepare
from fastcollate.errors import InputError
from fastcollate.train import AnswerOptions, TrainOptions, answer, answer_split, train
from fastcollate.train.answers import _asked_by
from fastcollate.train.model import CONFIGS, GPT2Config
from tests.helpers import run_cli
from tests.integrations import chats

datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")

CHATS = chats.make_chats(40, most_turns=2, seed=4)
SHORT = AnswerOptions(max_new_tokens=4, device="cpu")
WAYS = ["tokenizer", "ready ids", "jinja file", "chatml"]


@pytest.fixture(params=WAYS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> TokenStore:
    tokenizer, path = chats.byte_tokenizer(), tmp_path / "store"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    records = tmp_path / "chats.jsonl"
    records.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    if request.param == "ready ids":
        from fastcollate.integrations.huggingface import store_from_dataset

        rows = datasets.Dataset.from_list([chats.by_transformers(tokenizer, chat) for chat in CHATS])
        return store_from_dataset(rows, path, tokenizer)
    template = {"tokenizer": "auto", "jinja file": str(tmp_path / "mine.jinja"), "chatml": "chat"}[request.param]
    (tmp_path / "mine.jinja").write_text(chats.TEMPLATE)
    prepare(str(records), path, template=template, tokenizer=str(tmp_path / "tokenizer"))
    (tmp_path / "mine.jinja").unlink()  # a store knows its template
    return TokenStore(path)


@pytest.fixture
def run(store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small = GPT2Config(num_layers=1, num_heads=2, width=16, vocab_size=store.vocab_size, context_length=1024)
    monkeypatch.setattr("fastcollate.train.model.CONFIGS", {**CONFIGS, "tiny": small})
    options = TrainOptions(
        out=tmp_path / "run", max_steps=2, eval_every=0, sample_tokens=5, tensorboard=False, device="cpu",
        mask_prompt=True, max_length=1024,
    )  # fmt: skip
    train(store, options, progress=False)
    return options.out


@pytest.mark.slow
def test_a_question_stands_as_the_template_writes_it(store: TokenStore, run: Path) -> None:
    found = answer(run, "What is <|end|> & naïve?", "An input.", SHORT)
    turns = [{"role": "user", "content": "What is <|end|> & naïve?\n\nAn input."}]
    if store.end == "append":
        wanted = "<|im_start|>user\nWhat is <|end|> & naïve?\n\nAn input.<|im_end|>\n<|im_start|>assistant\n"
    else:
        wanted = chats.byte_tokenizer().apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert found["prompt"] == wanted
    assert answer(run, "raw", options=SHORT, raw=True)["prompt"] == "raw"


@pytest.mark.slow
def test_the_records_own_answers_are_told_from_prompts(store: TokenStore, run: Path) -> None:
    found = answer_split(run, SHORT, split="train", progress=False)
    answers = json.loads(Path(found["out"]).read_text())
    assert len(answers) == found["rows"] == 34
    for given, chat in zip(answers, CHATS, strict=False):
        assert given["output"] == chat[-1]["content"].strip()
        assert given["prompt"].endswith("assistant\n")
        assert chat[-2]["content"] in given["prompt"]


def test_an_answer_ends_with_its_turn(store: TokenStore) -> None:
    from fastcollate.text import load_tokenizer

    tokenizer: Any = load_tokenizer(store.tokenizer_name)
    asked = _asked_by(store[0], store, tokenizer)
    ends = {tokenizer.decode([token]) for token in asked.stops}
    assert ends == {chats.END}
    if store.end == "in_row":
        assert asked.prompt + asked.answer == store[0].input_ids[: len(asked.prompt) + len(asked.answer)].tolist()


@pytest.mark.slow
def test_the_command_line(
    run: Path, store: TokenStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--checkpoint", run, "--max-new-tokens", 3, "--device", "cpu", "--json"]
    assert run_cli(monkeypatch, "generate", *common, "--prompt", "Add 1 and 2.") == 0
    assert json.loads(capsys.readouterr().out)["prompt"].endswith("assistant\n")
    assert run_cli(monkeypatch, "evaluate", *common, "--limit", 2) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2


def test_a_template_that_makes_no_prompt_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = GPT2Config(num_layers=1, num_heads=2, width=16, context_length=64)
    monkeypatch.setattr("fastcollate.train.model.CONFIGS", {**CONFIGS, "tiny": small})
    records = [{"text": f"a text of number {i}"} for i in range(20)]
    prepare(records, tmp_path / "store", template="text")
    options = TrainOptions(out=tmp_path / "run", max_steps=1, eval_every=0, sample_tokens=0, tensorboard=False)
    train(tmp_path / "store", options, progress=False)
    with pytest.raises(InputError, match=r"template 'text': .*write the whole prompt, with --raw"):
        answer(tmp_path / "run", "Hi")
