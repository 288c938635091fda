"""Text from a model, and the answers of a trained one to a split of a store."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcollate.errors import InputError
from fastcollate.store import Example, TokenStore, files
from fastcollate.text import load_template, load_tokenizer
from fastcollate.train.files import Checkpoint, load_model
from fastcollate.train.model import GPT2, KeyValueCache
from fastcollate.train.options import AnswerOptions
from fastcollate.train.ranks import choose_device


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

    Example:
        >>> generate(model, [1, 2, 3], max_new_tokens=4, stop_at=None)
        [..., ..., ..., ...]
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
    """A row's tokens up to its last response, and that response (the whole row where no token is a prompt's).

    Example:
        >>> prompt, response = prompt_and_answer(store[0])
        >>> len(prompt) + len(response) == len(store[0].input_ids)
        True
    """
    ids, spans = example.input_ids.tolist(), example.spans.tolist()
    last_response = spans[-1] if len(spans) % 2 == 0 else 0
    cut = len(ids) - last_response
    return ids[:cut], ids[cut:]


def continue_prompt(model: GPT2, store: TokenStore, row: int, max_new_tokens: int) -> str:
    """A row's prompt as text, and how the model continues it.

    Example:
        >>> print(continue_prompt(model, store, 0, max_new_tokens=40))
        Below is an instruction that describes a task. ...
    """
    prompt, _ = prompt_and_answer(store[row])
    stop_at = store.pad_token_id
    answer = generate(model, prompt or [stop_at], max_new_tokens=max_new_tokens, stop_at=stop_at)
    return load_tokenizer(store.tokenizer_name).decode([*prompt, *answer])


_HEADINGS = {"alpaca": "### Response:", "phi3": "<|assistant|>:"}


def clean_response(text: str, template: str) -> str:
    """A response without the template's heading, which the store counts to the response, not to the prompt.

    Example:
        >>> clean_response("\\n\\n### Response:\\nAn apple.", "alpaca")
        'An apple.'
    """
    return text.strip().removeprefix(_HEADINGS.get(template, "")).strip()


def answer(
    checkpoint: Path, prompt: str, text: str = "", options: AnswerOptions | None = None, *, raw: bool = False
) -> dict[str, Any]:
    """Answer one instruction with the model of a run.

    Args:
        checkpoint: the run's directory, or a checkpoint file in it.
        prompt: the instruction.
        text: its input, if it has one.
        options: length, randomness, device.
        raw: use the prompt as it is, without the run's template, and leave the answer as it is.

    Returns:
        `prompt`, `model_response` and `tokens`.

    Example:
        >>> found = answer(Path("runs/first"), "Add 1 and 2.", options=AnswerOptions(max_new_tokens=4))
        >>> list(found)
        ['prompt', 'model_response', 'tokens']
    """
    options = options or AnswerOptions()
    device = choose_device(options.device)
    model, saved = load_model(checkpoint, device)
    tokenizer = load_tokenizer(saved.data["tokenizer"])
    template = saved.data["template"]
    if not raw:
        prompt = load_template(template).parts({"instruction": prompt, "input": text, "output": "-"})[0]
    generator = torch.Generator(device).manual_seed(options.seed)
    ids = generate(
        model, tokenizer.encode(prompt), stop_at=tokenizer.pad_token_id, generator=generator, **options.drawing()
    )
    response = tokenizer.decode(ids)
    response = response if raw else clean_response(response, template)
    return {"prompt": prompt, "model_response": response, "tokens": len(ids)}


def open_split(
    checkpoint: Checkpoint, directory: Path, *, store: Path | None = None, split: str = "test", limit: int | None = None
) -> tuple[TokenStore, range]:
    """The store of a run and the rows of one of its splits.

    Args:
        checkpoint: of the run.
        directory: where the checkpoint lies.
        store: the store, if it is no longer where it was.
        split: `train`, `test` or `validation`.
        limit: at most so many rows.

    Raises:
        InputError: no such split, an empty one, or another store than the run's.

    Example:
        >>> opened, rows = open_split(load_checkpoint(Path("runs/first")), Path("runs/first"), split="test", limit=3)
        >>> rows
        range(510, 513)
    """
    splits = checkpoint.data["splits"]
    if split not in splits:
        raise InputError(f"--split {split}: choose one of {', '.join(splits)}")
    opened = TokenStore(store or directory / checkpoint.data["store"])
    if opened.fingerprint != checkpoint.data["fingerprint"]:
        raise InputError(f"{opened.path}: not the store that the run was trained on; give that with --store")
    rows = range(*splits[split])[:limit]
    if not rows:
        raise InputError(f"--split {split}: the run left no row for it; choose another split, or train with more rows")
    return opened, rows


def write_answers(
    path: Path,
    model: GPT2,
    store: TokenStore,
    rows: range,
    *,
    seed: int = 0,
    on_row: Callable[[], None] = lambda: None,
    **options: Any,
) -> dict[str, int]:
    """Answer rows one after the other and write a JSON array.

    Each object has `row` (the record's position in the sources), `prompt`, `output` (the record's own response) and
    `model_response`, the last two without the heading of the response.

    Args:
        path: the file to write, atomically.
        model: in evaluation mode.
        store: where the rows are.
        rows: which of them.
        seed: for each row's draws, together with the row's number.
        on_row: called after each row.
        options: as `generate` takes them.

    Returns:
        `rows`, and `exact`: how many answers equal the record's own.

    Example:
        >>> write_answers(Path("answers.json"), model, store, range(2), max_new_tokens=4)
        {'rows': 2, 'exact': 0}
    """
    tokenizer = load_tokenizer(store.tokenizer_name)
    template = str(store.manifest["template"].get("name", ""))
    answers = []
    for row in rows:
        example = store[row]
        prompt, output = prompt_and_answer(example)
        generator = torch.Generator(model.wte.weight.device).manual_seed(seed * 1_000_003 + row)
        response = generate(
            model, prompt or [store.pad_token_id], stop_at=store.pad_token_id, generator=generator, **options
        )
        answers.append(
            {
                "row": example.source_row,
                "prompt": tokenizer.decode(prompt),
                "output": clean_response(tokenizer.decode(output), template),
                "model_response": clean_response(tokenizer.decode(response), template),
            }
        )
        on_row()
    files.write_file(path, [json.dumps(answers, indent=2, ensure_ascii=False)])
    return {"rows": len(answers), "exact": sum(a["output"] == a["model_response"] for a in answers)}
