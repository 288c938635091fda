"""Generated chats, a tokenizer of bytes with a chat template, and who trains what of them; for tests of adapters."""

from __future__ import annotations

import random
from typing import Any

END = "<|end|>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
WORDS = [
    "sum",
    "naïve",
    "two\n\nlines",
    "12,345",
    " leading",
    "日本",
    "def f():\n    return 1",
    "?",
    "<b>",
    "trailing ",
]
Chat = list[dict[str, str]]


def byte_tokenizer(*more: str, begin: str = "<|begin|>", end: str = END, template: str | None = TEMPLATE) -> Any:
    """A token a byte, and marks, by default those of `TEMPLATE`; the mark that ends a turn is the end-of-text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token="<|pad|>",
        additional_special_tokens=list(more or ["<|turn|>"]),
    )  # fmt: skip
    made.chat_template = template
    return made


def make_chats(count: int, *, most_turns: int = 4, seed: int = 0) -> list[Chat]:
    """Chats of one to so many pairs of turns, some with a system turn, some answers empty."""
    chance = random.Random(seed)

    def text(least: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(least, 6)))

    chats = []
    for _ in range(count):
        chat = [{"role": "system", "content": text(1)}] if chance.random() < 0.3 else []
        for _ in range(chance.randint(1, most_turns)):
            chat += [{"role": "user", "content": text(1)}, {"role": "assistant", "content": text(0)}]
        chats.append(chat)
    return chats


def by_transformers(tokenizer: Any, chat: Chat) -> dict[str, list[int]]:
    """Ids and `assistant_masks` as `transformers` has them."""
    found = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    return {"input_ids": list(found["input_ids"]), "assistant_masks": list(found["assistant_masks"])}


def by_torchtitan(tokenizer: Any, chat: Chat) -> dict[str, list[int]]:
    """torchtitan's rule for one question and one answer, in our words, with labels at their own places.

    The chat's text without line breaks at its end, closed by the end-of-text where it is not; masked is what rendering
    the question alone gives, with the heading of the answer.
    """
    text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids += [] if ids[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]
    question = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    prompt = len(tokenizer.encode(question, add_special_tokens=False))
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def by_axolotl(tokenizer: Any, chat: Chat) -> dict[str, list[int]]:
    """axolotl's rule with `roles_to_train: [assistant]` and `train_on_eos: turn`, in our words.

    Of each turn of the assistant the content and the token that ends the turn are trained, and nothing else: neither
    headings, nor the line break behind an end, nor the ends of others' turns.
    """
    ids, labels = [tokenizer.bos_token_id], [-100]
    for turn in chat:
        heading, content, line = (
            tokenizer.encode(text, add_special_tokens=False)
            for text in (f"<|turn|>{turn['role']}\n", turn["content"] + END, "\n")
        )
        ids += heading + content + line
        is_trained = turn["role"] == "assistant"
        labels += [-100] * len(heading) + (content if is_trained else [-100] * len(content)) + [-100] * len(line)
    return {"input_ids": ids, "labels": labels}
