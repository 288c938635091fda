"""Record files of a wanted size for the prepare benchmarks, made from the records beside the checkout or the sample."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
_NUMBER = re.compile(r"\d+")


def _short_records() -> list[dict[str, str]]:
    path = SHARED / "instruction-data.json"
    if path.is_file():
        return list(json.loads(path.read_text()))
    from fastcollate.sources.sample import sample_records

    return list(sample_records())


def _sentences() -> list[str]:
    path = SHARED / "gsm8k_train.jsonl"
    if not path.is_file():
        return [record["instruction"] + " " + record["output"] for record in _short_records()]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [s for r in records for s in re.split(r"(?<=[.?])\s|\n", r["question"] + " " + r["answer"]) if s]


def _new_numbers(text: str, chance: random.Random) -> str:
    return _NUMBER.sub(lambda match: str(chance.randrange(10 ** len(match.group()))), text)


def write_short(path: Path, num_bytes: int, *, seed: int = 0) -> None:
    """Short instruction records: those of the chapter, each with a word or a number of its own."""
    chance = random.Random(seed)
    records, words = _short_records(), sorted({word for s in _sentences() for word in s.split()})
    size = 0
    with open(path, "w", encoding="utf-8") as file:
        while size < num_bytes:
            record = dict(chance.choice(records))
            record["instruction"] += f" ({chance.choice(words)} {chance.randrange(10**6)})"
            record["output"] = _new_numbers(record["output"], chance) + " " + chance.choice(words)
            size += file.write(json.dumps(record) + "\n")


def write_long(path: Path, num_bytes: int, *, seed: int = 0) -> None:
    """Long texts in the manner of T0: a passage of 20 to 60 sentences and a question, answered in a few."""
    chance = random.Random(seed)
    sentences = _sentences()
    size = 0
    with open(path, "w", encoding="utf-8") as file:
        while size < num_bytes:
            passage = " ".join(chance.choices(sentences, k=chance.randrange(20, 60)))
            record = {
                "instruction": _new_numbers(passage, chance) + "\n\n" + chance.choice(sentences),
                "input": "",
                "output": _new_numbers(" ".join(chance.choices(sentences, k=chance.randrange(1, 6))), chance),
            }
            size += file.write(json.dumps(record) + "\n")


WRITERS = {"short": write_short, "long": write_long}
