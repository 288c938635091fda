"""The built-in sample: the same records on every machine, true answers, varied lengths."""

from __future__ import annotations

import hashlib
import json
import re
import statistics

from fastcollate.sources.sample import PAST_TENSE, QUESTION, sample_records


def test_records_are_pinned() -> None:
    text = json.dumps(sample_records(), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "624ed51afa309301"


def test_a_shorter_sample_is_the_beginning_of_a_longer_one() -> None:
    assert sample_records(50) == sample_records(500)[:50]
    assert sample_records(50, seed=1) != sample_records(50)


def test_records_are_whole_and_varied() -> None:
    records = sample_records()
    assert len(records) == 3000
    assert all(set(r) == {"instruction", "input", "output"} and r["instruction"] and r["output"] for r in records)
    lengths = [len(r["instruction"]) + len(r["input"]) + len(r["output"]) for r in records]
    assert min(lengths) < 50
    assert max(lengths) > 4 * statistics.median(lengths)


def test_no_question_stands_twice() -> None:
    asked = [(record["instruction"], record["input"]) for record in sample_records()]
    assert len(set(asked)) == len(asked)
    kept_back = [instruction for instruction, _ in asked[2550:2850]]  # the test split of a first run
    assert min(kept_back.count(PAST_TENSE), kept_back.count(QUESTION)) >= 10


def test_answers_are_true() -> None:
    checked = 0
    for record in sample_records():
        question, text, answer = record["instruction"], record["input"], record["output"]
        if sum_ := re.fullmatch(r"(\d+) \+ (\d+) = (\d+)", answer):
            assert int(sum_[1]) + int(sum_[2]) == int(sum_[3])
        elif question.startswith("Sort the words"):
            assert answer.split(", ") == sorted(text.split(", "))
        elif question.startswith("How many coins"):
            total = sum(map(int, re.findall(r"for (\d+) coins", text)))
            assert f"spends {total} coins" in answer
        elif question.startswith("Spell"):
            assert answer.replace("-", "").lower() == question.split("'")[1]
        elif question == PAST_TENSE:
            assert re.sub("s( |$)", r"ed\1", text.split(" ", 2)[1]) == answer.split(" ", 2)[1]
            assert text.split()[2:] == answer.split()[2:]
        elif question == QUESTION:
            name, verb, place = text.rstrip(".").split(" ", 2)
            assert answer == f"Does {name} {verb.removesuffix('s')} {place}?"
        else:
            continue
        checked += 1
    assert checked > 2000
