"""Text from a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcollate.errors import InputError
from fastcollate.store.store import Example
from fastcollate.train.model import GPT2, KeyValueCache


@torch.inference_mode()
def generate(
    model: GPT2,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 256,
    top_k: int | None = None,
    temperature: float = 0.0,
    stop_at: int | None = 50256,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Continue a prompt.

    Args:
        model: in evaluation mode.
        prompt: token ids; of a prompt too long for the context the end is used.
        max_new_tokens: at most so many tokens, fewer where the context ends.
        top_k: draw only from the `k` most probable tokens.
        temperature: 0 takes the most probable token; higher is more varied.
        stop_at: the token that ends the answer; it is not returned.
        generator: where randomness comes from, on the model's device.

    Returns:
        the new token ids.

    Raises:
        InputError: an option out of range, or an empty prompt.
    """
    _check(model, prompt, max_new_tokens, top_k, temperature)
    context = model.config.context_length
    prompt = prompt[-max(1, context - max_new_tokens) :]
    device = model.wte.weight.device
    cache = KeyValueCache(model.config, min(context, len(prompt) + max_new_tokens), like=model.head_weight)
    ids = torch.tensor([list(prompt)], device=device)
    answer: list[int] = []
    while True:
        logits = torch.nn.functional.linear(model.hidden(ids, cache=cache)[:, -1], model.head_weight)[0]
        token = _choose(logits, top_k, temperature, generator)
        if token == stop_at:
            return answer
        answer.append(token)
        if len(answer) == max_new_tokens or cache.length == context:
            return answer
        ids = torch.tensor([[token]], device=device)


def _check(model: GPT2, prompt: Sequence[int], max_new_tokens: int, top_k: int | None, temperature: float) -> None:
    if not prompt:
        raise InputError("the prompt is empty; give it at least one word")
    if max(prompt) >= model.config.vocab_size:
        raise InputError(f"the prompt holds token {max(prompt)}, the model knows {model.config.vocab_size} tokens")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens {max_new_tokens}: give 1 or more")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k {top_k}: give 1 or more, or leave it out")
    if temperature < 0:
        raise InputError(f"temperature {temperature}: give 0 (most probable token) or more")


def _choose(logits: Tensor, top_k: int | None, temperature: float, generator: torch.Generator | None) -> int:
    if temperature == 0:
        return int(logits.argmax())
    candidates = None
    if top_k is not None and top_k < len(logits):
        logits, candidates = logits.topk(top_k)
    drawn = torch.multinomial(torch.softmax(logits.float() / temperature, 0), 1, generator=generator)
    return int(drawn if candidates is None else candidates[drawn])


def prompt_and_answer(example: Example) -> tuple[list[int], list[int]]:
    """A row's tokens up to its last response, and that response (the whole row where no token is a prompt's)."""
    ids, spans = example.input_ids.tolist(), example.spans.tolist()
    last_response = spans[-1] if len(spans) % 2 == 0 else 0
    cut = len(ids) - last_response
    return ids[:cut], ids[cut:]


_HEADINGS = {"alpaca": "### Response:", "phi3": "<|assistant|>:"}


def clean_response(text: str, template: str) -> str:
    """A response without the template's heading, which the store counts to the response, not to the prompt."""
    return text.strip().removeprefix(_HEADINGS.get(template, "")).strip()
