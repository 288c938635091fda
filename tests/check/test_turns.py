"""Turns of a stored chat are told by what the store's template writes, whatever else its texts hold."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastcollate import TokenStore, prepare
from fastcollate.check import print_row, view_row
from fastcollate.check.chat.turns import Turn, turns_of
from fastcollate.text import load_tokenizer
from tests.helpers import run_cli

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


class Style(NamedTuple):
    """How a template writes turns: what a text begins with, and each turn's heading and end."""

    begin: str
    user: str
    assistant: str
    end_of_user: str
    end: str
    answers: str = "assistant"


STYLES = {
    "ChatML": Style("", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n", "<|im_end|>\n"),
    "Llama 3": Style("<bos>", "<|s|>user<|e|>\n\n", "<|s|>assistant<|e|>\n\n", "<|im_end|>", "<|im_end|>"),
    "Gemma": Style("<bos>", "<|s|>user\n", "<|s|>model\n", "<|e|>\n", "<|e|>\n", "model"),
    "Mistral": Style("<bos>", "[INST] ", "[/INST] ", "", "<|im_end|>"),
    "DeepSeek": Style("<bos>", "<|User|>", "<|Assistant|>", "", "<|im_end|>"),
    "no tokens": Style("", "USER: ", "ASSISTANT: ", "\n", "<|im_end|>\n"),
}
SPECIAL = sorted(
    {"<|im_start|>", "<|im_end|>", "<bos>", "<|s|>", "<|e|>", "[INST]", "[/INST]", "<|User|>", "<|Assistant|>"}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=made.pre_tokenizer.alphabet()
    )
    made.train_from_iterator(["user assistant question the of number USER: ASSISTANT:"] * 9, trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<bos>"
    ).save_pretrained(path)
    return path


def source_of(style: Style) -> str:
    heading = "{% if m.role == 'assistant' %}ANSWER{% elif m.role == 'user' %}USER{% else %}OTHER{% endif %}"
    end = "{% if m.role == 'user' %}END_U{% else %}END{% endif %}"
    text = f"BEGIN{{% for m in messages %}}{heading}{{{{ m.content }}}}{end}{{% endfor %}}"
    other = style.user.replace("user", "{{ m.role }}") if "user" in style.user else style.user
    places = [("BEGIN", style.begin), ("ANSWER", style.assistant), ("USER", style.user), ("OTHER", other)]
    for name, written in [*places, ("END_U", style.end_of_user), ("END", style.end)]:
        text = text.replace(name, "{{ " + json.dumps(written) + " }}" if "{{" not in written else written, 1)
    return text


def chats(style: Style, has_tokens: bool) -> list[list[dict[str, str]]]:
    draw = random.Random(style.user)
    texts = ["", "a", "\n\nb ", "naïve 日本 👍🏽", "user", "assistant\n", "question of the number " * 9]
    texts += [style.user + "x", style.assistant, style.end + style.user] if has_tokens else []
    roles = ["user", "assistant"] * 4
    others = ["system", "tool"] if style.assistant == style.user.replace("user", style.answers) else []
    found = []
    for _ in range(40):
        turns = roles[: draw.randrange(1, 9)]
        if others and draw.random() < 0.5:
            turns.insert(0, "system")
            turns += draw.choice([[], ["tool", "assistant"]])
        found.append([{"role": role, "content": draw.choice(texts)} for role in turns])
        found[-1].append({"role": "assistant", "content": "end"})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", STYLES)
def test_the_turns_of_a_row_are_those_of_its_record(folder: Path, tmp_path: Path, name: str) -> None:
    style = STYLES[name]
    (tmp_path / "t.jinja").write_text(source_of(style))
    made = chats(style, has_tokens=name != "no tokens")
    prepare(
        [{"messages": chat} for chat in made], tmp_path / "store", tokenizer=str(folder),
        template=str(tmp_path / "t.jinja"), special_text="encode", end="in_row", on_error="raise", workers=1,
    )  # fmt: skip
    store, tokenizer = TokenStore(tmp_path / "store"), load_tokenizer(str(tmp_path / "store"))
    assert len(store) == len(made)
    for row, chat in enumerate(made):
        wanted, text = ["beginning"] * bool(style.begin), style.begin
        for turn in chat:
            heading = {"user": style.user, "assistant": style.assistant}.get(turn["role"])
            text += (heading or style.user.replace("user", turn["role"])) + turn["content"]
            text += style.end_of_user if turn["role"] == "user" else style.end
            wanted.append(style.answers if turn["role"] == "assistant" else turn["role"])
        found = turns_of(store, row, tokenizer)
        assert [turn.role for turn in found] == wanted
        ids = store[row].input_ids.tolist()
        assert [turn.start for turn in found] == [0, *[turn.stop for turn in found[:-1]]]
        assert found[-1].stop == len(ids)
        assert tokenizer.decode(ids) == text
        said = [tokenizer.decode(ids[turn.start : turn.stop]) for turn in found[bool(style.begin) :]]
        assert all(turn["content"].strip() in piece for turn, piece in zip(chat, said, strict=True))


def test_rows_of_other_stores_are_prompts_and_responses(tmp_path: Path) -> None:
    prepare([{"instruction": "Add.", "output": "3"}, {"instruction": "x", "output": ""}], tmp_path / "store")
    store = TokenStore(tmp_path / "store")
    spans = store[0].spans.tolist()
    assert turns_of(store, 0, None) == [Turn("prompt", 0, spans[0]), Turn("response", spans[0], sum(spans))]
    (tmp_path / "t.jinja").write_text("{{ a }}.\n{% generation %}{{ b }}.{% endgeneration %}\n{{ a }}")
    prepare([{"a": "one", "b": "two"}], tmp_path / "other", template=str(tmp_path / "t.jinja"))
    other = TokenStore(tmp_path / "other")
    assert [turn.role for turn in turns_of(other, 0, load_tokenizer("gpt2"))] == ["prompt", "response", "prompt"]
    assert turns_of(other, 0, None)[-1].stop == len(other[0].input_ids)


def test_a_chat_without_a_template_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [("system", "s"), ("user", "u u"), ("assistant", "a"), ("user", "\n\nv"), ("assistant", "")]
    chat = [{"role": role, "content": content} for role, content in turns]
    prepare([{"messages": chat}], tmp_path / "store")
    view = view_row(TokenStore(tmp_path / "store"), 0)
    assert [turn.role for turn in view.turns] == [role for role, _ in turns]
    assert print_row(TokenStore(tmp_path / "store"), view) == ""
    shown = capsys.readouterr().out
    assert "assistant" in shown
    assert "<|endoftext|>  " in shown  # bare: a token; in quotation marks: text
    assert "'<|endoftext|>'" not in shown


def test_the_command_shows_turns(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.jinja").write_text(source_of(STYLES["ChatML"]))
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "number"}]
    prepare([{"messages": chat}], tmp_path / "store", tokenizer=str(folder), template=str(tmp_path / "t.jinja"))
    capsys.readouterr()
    assert run_cli(monkeypatch, "inspect", tmp_path / "store", "--row", "0", "--mask-prompt", "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [turn["role"] for turn in found["turns"]] == ["user", "assistant"]
    assert "trained" not in found["kinds"][: found["turns"][1]["start"]]
    assert run_cli(monkeypatch, "inspect", tmp_path / "store", "--row", "0", "--mask-prompt") == 0
    lines = capsys.readouterr().out.splitlines()
    user, answer = (
        next(line.split() for line in lines if line.split()[:1] == [role]) for role in ("user", "assistant")
    )
    assert user[2] == "0"
    assert int(answer[2]) > 0
    assert any("<|im_end|>   " in line for line in lines)
