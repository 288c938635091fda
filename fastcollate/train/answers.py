"""Text from a model, and the answers of a trained one to a split of a store."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcollate.errors import InputError, integer
from fastcollate.options import local_path
from fastcollate.progress import progress_bar
from fastcollate.store import Example, TokenStore, files
from fastcollate.text import BadRecordError, Rendered, Template, Tokenizer, load_template, load_tokenizer
from fastcollate.train.files import load_model
from fastcollate.train.model import GPT2, KeyValueCache
from fastcollate.train.options import AnswerOptions
from fastcollate.train.ranks import choose_device

_PROMPT_LINES, _ANSWER_LINES = 4, 5  # at most, of a sample printed during training


@torch.inference_mode()
def generate(
    model: GPT2,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 256,
    top_k: int | None = None,
    temperature: float = 0.0,
    stop_at: int | Collection[int] | None = 50256,
    generator: torch.Generator | None = None,
) -> list[int]:
    """How a model in evaluation mode continues a prompt: the new token ids.

    Of a prompt too long for the context the end is used; the answer ends where the context does, or before a token of
    `stop_at`. What is drawn is as `AnswerOptions` says, by `generator`, on the model's device.

    Example:
        >>> generate(model, [1, 2, 3], max_new_tokens=4, stop_at=None)
        [..., ..., ..., ...]
    """
    _check(model, prompt, max_new_tokens, top_k, temperature)
    context, stops = model.config.context_length, {stop_at} if isinstance(stop_at, int) else set(stop_at or ())
    prompt = prompt[-max(1, context - max_new_tokens) :]
    device = model.wte.weight.device
    cache = KeyValueCache(model.config, min(context, len(prompt) + max_new_tokens), like=model.head_weight)
    ids = torch.tensor([list(prompt)], device=device)
    answer: list[int] = []
    while True:
        logits = torch.nn.functional.linear(model.hidden(ids, cache=cache)[:, -1], model.head_weight)[0]
        token = _choose(logits, top_k, temperature, generator)
        if token in stops:
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
    integer("max_new_tokens", max_new_tokens, 1)
    integer("top_k", 1 if top_k is None else top_k, 1)
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


class _Asked(NamedTuple):
    """A question: the tokens before an answer, those of the record's own answer, and what ends one."""

    prompt: list[int]
    answer: list[int]
    stops: set[int]


def _asked_by(example: Example, store: TokenStore, tokenizer: Tokenizer) -> _Asked:
    """A row's tokens up to its last response, and that response (the whole row where no token is a prompt's)."""
    ids, spans = example.input_ids.tolist(), example.spans.tolist()
    if store.end == "append":
        cut = len(ids) - (spans[-1] if len(spans) % 2 == 0 else 0)
        return _Asked(ids[:cut], ids[cut:], {store.end_token_id})
    stop = len(ids) - (spans[-1] if len(spans) % 2 == 1 and len(spans) > 1 else 0)
    start = stop - (spans[len(spans) // 2 * 2 - 1] if len(spans) > 1 else 0)
    response, end = _without_end(ids[start:stop], tokenizer)
    return _Asked(ids[:start], response, {store.end_token_id, *end})


def _without_end(response: list[int], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """A response that a template has closed without the token that ends its turn, and that token, if there is one."""
    for place in reversed(range(len(response))):
        text = tokenizer.decode([response[place]])
        if text in tokenizer.special_texts:
            return response[:place], [response[place]]
        if text.strip():
            break
    return response, []


def continue_prompt(model: GPT2, store: TokenStore, row: int, max_new_tokens: int) -> str:
    """The end of a row's prompt as text, and how the model continues it: a few lines, without empty ones."""
    tokenizer = load_tokenizer(store.tokenizer_name)
    asked = _asked_by(store[row], store, tokenizer)
    prompt = asked.prompt or [store.end_token_id]
    found = generate(model, prompt, max_new_tokens=max_new_tokens, stop_at=asked.stops)
    before, after = (list(filter(str.strip, tokenizer.decode(ids).splitlines())) for ids in (asked.prompt, found))
    return "\n".join([*before[-_PROMPT_LINES:], *after[:_ANSWER_LINES]])


_JINJA = (".jinja", ".j2", ".jinja2")
_HEADINGS = {"alpaca": "### Response:", "phi3": "<|assistant|>:"}


def _without_heading(text: str, template: str) -> str:
    """A response without the template's heading, which the store counts to the response, and without ChatML's end."""
    end = "<|im_end|>" if template == "chat" else ""
    return text.strip().removeprefix(_HEADINGS.get(template, "")).removesuffix(end).strip()


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

    Raises:
        InputError: the run's template makes no prompt of an instruction.

    Example:
        >>> found = answer(Path("runs/first"), "Add 1 and 2.", options=AnswerOptions(max_new_tokens=4))
        >>> list(found)
        ['prompt', 'model_response', 'tokens']
    """
    options = options or AnswerOptions()
    device = choose_device(options.device)
    model, saved = load_model(checkpoint, device)
    tokenizer = load_tokenizer(saved.data["tokenizer"])
    asked, stops = tokenizer.encode(prompt), {tokenizer.end_token_id}
    if not raw:
        beside = checkpoint if checkpoint.is_dir() else checkpoint.parent
        template = _template_of(saved.data, beside, tokenizer)
        try:
            question = template.question(prompt, text)
            prompt = question.text
            asked, more = _encoded(question, template, tokenizer)
        except BadRecordError as error:
            raise InputError(f"template {template.name!r}: {error}; write the whole prompt, with --raw") from error
        stops |= more
    generator = torch.Generator(device).manual_seed(options.seed)
    ids = generate(model, asked, stop_at=stops, generator=generator, **options.drawing())
    response = tokenizer.decode(ids)
    response = response if raw else _without_heading(response, saved.data["template"])
    return {"prompt": prompt, "model_response": response, "tokens": len(ids)}


def _template_of(data: Mapping[str, Any], beside: Path, tokenizer: Tokenizer) -> Template:
    """The template of a run's store; where that was made of ready ids, the tokenizer's own chat template."""
    name = data["template"]
    if name not in ("tokenized", "tokenizer") and not name.endswith(_JINJA):
        return load_template(name, mask_heading=bool(data.get("mask_heading")))
    if name == "tokenized":
        if not tokenizer.chat_template:
            raise InputError(
                f"the run's rows are ready ids, and tokenizer {Path(tokenizer.name).name!r} comes with no chat "
                "template: write the whole prompt, with --raw"
            )
        return load_template("tokenizer", tokenizer=tokenizer)
    return load_template(name, tokenizer=tokenizer, saved=TokenStore(_store_at(beside, data)).manifest["template"])


def _encoded(question: Rendered, template: Template, tokenizer: Tokenizer) -> tuple[list[int], set[int]]:
    """A question's ids, and the token that ends an answer in the template, where it writes one."""
    if template.end == "append":
        return tokenizer.encode(question.text), set()
    chat = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]
    answered = template.render({"messages": chat})
    (asked, _), (ids, spans) = (_chat_ids(one, tokenizer) for one in (question, answered))
    response = ids[: sum(spans[: len(spans) // 2 * 2])]
    return asked, set(_without_end(response, tokenizer)[1])


def _chat_ids(rendered: Rendered, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    encoded = tokenizer.encode_chats([rendered])
    return encoded.ids.tolist(), encoded.spans.tolist()


def answer_split(
    checkpoint: Path,
    options: AnswerOptions | None = None,
    *,
    store: str | Path | None = None,
    split: str = "test",
    limit: int | None = None,
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Answer the rows of one of a run's splits, one after the other, and write a JSON array.

    Each object has `row` (the record's position in the sources), `prompt`, `output` (the record's own response) and
    `model_response`, the last two without the heading of the response.

    Args:
        checkpoint: the run's directory, or a checkpoint file in it.
        options: length, randomness, device.
        store: the store, if it is no longer where it was.
        split: `train`, `test` or `validation`.
        limit: at most so many rows.
        out: the file to write; by default `answers-SPLIT.json` beside the checkpoint.
        progress: show progress.

    Returns:
        `rows`, `exact` (how many answers equal the record's own) and `out`.

    Raises:
        InputError: no such split, an empty one, or another store than the run's.

    Example:
        >>> answer_split(Path("runs/first"), AnswerOptions(max_new_tokens=4), limit=2, progress=False)["rows"]
        2
    """
    options = options or AnswerOptions()
    model, saved = load_model(checkpoint, choose_device(options.device))
    beside = checkpoint if checkpoint.is_dir() else checkpoint.parent
    opened = TokenStore(store or _store_at(beside, saved.data))
    rows = _rows_of(split, saved.data, opened)[:limit]
    path = local_path(out or beside / f"answers-{split}.json")
    tokenizer = load_tokenizer(opened.tokenizer_name)
    with progress_bar(unit="rows", progress=progress) as bar:
        tracked = bar.track(rows, description="answering")
        answers = [_answer_row(model, opened, tokenizer, row, options) for row in tracked]
    files.write_file(path, [json.dumps(answers, indent=2, ensure_ascii=False)])
    return {"rows": len(rows), "exact": sum(a["output"] == a["model_response"] for a in answers), "out": str(path)}


def _store_at(beside: Path, data: Mapping[str, Any]) -> str | Path:
    """The store that a run was trained on: a URL, or a path from the run's directory."""
    name: str = data["store"]
    return name if "://" in name else beside / name


def _rows_of(split: str, data: Mapping[str, Any], store: TokenStore) -> range:
    splits = data["splits"]
    if split not in splits:
        raise InputError(f"--split {split}: choose one of {', '.join(splits)}")
    if store.fingerprint != data["fingerprint"]:
        raise InputError(f"{store.path}: not the store that the run was trained on; give that with --store")
    rows = range(*splits[split])
    if not rows:
        raise InputError(f"--split {split}: the run left no row for it; choose another split, or train with more rows")
    return rows[:: 2 if store.kind == "pairs" else 1]  # a rejected answer is none to be compared with


def _answer_row(
    model: GPT2, store: TokenStore, tokenizer: Tokenizer, row: int, options: AnswerOptions
) -> dict[str, Any]:
    template = str(store.manifest["template"].get("name", ""))
    example = store[row]
    asked = _asked_by(example, store, tokenizer)
    generator = torch.Generator(model.wte.weight.device).manual_seed(options.seed * 1_000_003 + row)
    prompt = asked.prompt or [store.end_token_id]
    response = generate(model, prompt, stop_at=asked.stops, generator=generator, **options.drawing())
    return {
        "row": example.source_row,
        "prompt": tokenizer.decode(asked.prompt),
        "output": _without_heading(tokenizer.decode(asked.answer), template),
        "model_response": _without_heading(tokenizer.decode(response), template),
    }
