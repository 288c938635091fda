"""Generation: greedy, drawn, stopped, and refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from fastcollate import TokenStore, prepare
from fastcollate.errors import InputError
from fastcollate.sources import sample_records
from fastcollate.text import load_tokenizer
from fastcollate.train import AnswerOptions, TrainOptions, answer, train
from fastcollate.train.answers import _template_of, generate
from fastcollate.train.model import CONFIGS, GPT2, GPT2Config

CONFIG = GPT2Config(num_layers=2, num_heads=2, width=16, vocab_size=50, context_length=24, tie_weights=False)


@pytest.fixture(scope="module")
def model() -> GPT2:
    torch.manual_seed(0)
    model = GPT2(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_greedy_equals_the_plain_loop(model: GPT2) -> None:
    ids = [3, 1, 4]
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert len(set(ids[3:])) > 1
    assert generate(model, [3, 1, 4], max_new_tokens=12, stop_at=None) == ids[3:]


def test_it_stops_at_the_end_token_and_at_the_context(model: GPT2) -> None:
    answer = generate(model, [3, 1, 4], max_new_tokens=10, stop_at=None)
    stop = next(token for token in answer if answer.index(token) > 0)
    assert generate(model, [3, 1, 4], max_new_tokens=10, stop_at=stop) == answer[: answer.index(stop)]
    assert len(generate(model, [1] * 24, max_new_tokens=10, stop_at=None)) == 10
    assert len(generate(model, [1] * 100, max_new_tokens=100, stop_at=None)) == 24


@pytest.mark.slow
def test_top_k_and_temperature_draw_from_the_right_distribution(model: GPT2) -> None:
    with torch.no_grad():
        logits = model(torch.tensor([[7, 8]]))[0, -1]
    best = logits.topk(3)
    expected = torch.softmax(best.values / 2.0, 0)
    generator = torch.Generator().manual_seed(5)
    drawn = Counter(
        generate(model, [7, 8], max_new_tokens=1, top_k=3, temperature=2.0, stop_at=None, generator=generator)[0]
        for _ in range(600)
    )
    assert set(drawn) == set(best.indices.tolist())
    for token, share in zip(best.indices.tolist(), expected.tolist(), strict=True):
        assert abs(drawn[token] / 600 - share) < 0.08


def test_a_seed_repeats_an_answer(model: GPT2) -> None:
    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return generate(model, [1], max_new_tokens=15, temperature=3.0, stop_at=None, generator=generator)

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        ([50], {}, "token 50, the model knows 50"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0: give at least 1"),
        ([1], {"top_k": 0}, "top_k=0: give at least 1"),
        ([1], {"temperature": -1.0}, "temperature -1.0"),
    ],
)
def test_wrong_options_are_refused(model: GPT2, prompt: list[int], options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(model, prompt, **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_ready_ids_without_a_chat_template_take_a_whole_prompt() -> None:
    with pytest.raises(
        InputError, match=r"rows are ready ids, and tokenizer 'gpt2' comes with no chat template: .*--raw"
    ):
        _template_of({"template": "tokenized"}, Path(), load_tokenizer("gpt2"))


@pytest.mark.slow
@pytest.mark.parametrize("mask_heading", [False, True])
def test_a_heading_that_was_masked_stands_in_the_question(
    mask_heading: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = GPT2Config(num_layers=1, num_heads=2, width=8, vocab_size=50257, context_length=256)
    monkeypatch.setattr("fastcollate.train.model.CONFIGS", {**CONFIGS, "tiny": small})
    prepare(sample_records(40), tmp_path / "store", mask_heading=mask_heading)
    options = TrainOptions(out=tmp_path / "run", max_steps=1, eval_every=0, sample_tokens=0, device="cpu")
    train(TokenStore(tmp_path / "store"), options, progress=False)
    found = answer(tmp_path / "run", "Hi", options=AnswerOptions(max_new_tokens=1, device="cpu"))
    assert found["prompt"].endswith("Hi" + "\n\n### Response:\n" * mask_heading)
