"""Records of pairs, and of answers with verdicts: what was asked, the answers, the numbers; what is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest

from fastcollate.cli.data import parse_fields
from fastcollate.errors import InputError
from fastcollate.text.chat.pairs import Preference
from fastcollate.text.record import BadRecordError

Record = dict[str, Any]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(record: Record, **fields: str) -> list[Record]:
    return Preference.of(record, fields).read(record).answers


@pytest.mark.parametrize(
    ("record", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "Sky? ", "chosen": "Blue", "rejected": "Red"}, "Sky? ", "Blue", "Red"),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is", " blue.", " green."),
        ({"chosen": "ab", "rejected": "ac"}, "a", "b", "c"),
        ({"chosen": "abc", "rejected": "abcde"}, "ab", "c", "cde"),
        (
            {"prompt": [user("a")], "chosen": [says("b")], "rejected": [says("c")]},
            [user("a")], [says("b")], [says("c")],
        ),
        ({"prompt": [user("a")], "chosen": "b", "rejected": "c"}, [user("a")], [says("b")], [says("c")]),
        ({"prompt": "a", "chosen": [says("b")], "rejected": [says("c")]}, [user("a")], [says("b")], [says("c")]),
        (
            {"prompt": "a", "chosen": [user("a"), says("b")], "rejected": [user("a"), says("c")]},
            [user("a")], [says("b")], [says("c")],
        ),
        ({"chosen": [user("a"), says("b")], "rejected": [user("a"), says("c")]}, [user("a")], [says("b")], [says("c")]),
        (
            {"chosen": [user("a"), says("b")], "rejected": [user("a"), says("b"), user("c"), says("d")]},
            [user("a")], [says("b")], [says("b"), user("c"), says("d")],
        ),
    ],
)  # fmt: skip
def test_what_was_asked_and_answered(record: Record, prompt: Any, chosen: Any, rejected: Any) -> None:
    assert read(record) == [{"prompt": prompt, "completion": chosen}, {"prompt": prompt, "completion": rejected}]


def test_an_implicit_prompt_is_what_trl_takes() -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    chance = random.Random(0)
    texts = ["a ", " a", "b", " ", "ab"]
    turns = [user("a"), says("a"), user("b"), says("b")]
    compared = 0
    for _ in range(2000):
        for pieces in (texts, turns):
            begin, *ends = ([*chance.choices(pieces, k=chance.randint(1, 3))] for _ in range(3))
            chosen, rejected = (begin + end for end in ends)
            record: Record = {"chosen": chosen, "rejected": rejected}
            if pieces is texts:
                record = {name: "".join(value) for name, value in record.items()}
            if record["chosen"] == record["rejected"]:
                continue
            theirs = data_utils.extract_prompt(record)
            if not theirs["prompt"]:
                with pytest.raises(BadRecordError, match="begin with nothing alike"):
                    read(record)
                continue
            found = read(record)
            assert [found[0]["prompt"], *(answer["completion"] for answer in found)] == [*theirs.values()]
            compared += 1
    assert compared > 1000


def test_the_fields_of_a_template_ask_as_well() -> None:
    record = {"instruction": "Do", "input": "it", "output": "old", "chosen": "yes", "rejected": "no", "id": 7}
    rest = {"instruction": "Do", "input": "it", "id": 7}
    assert read(record) == [{**rest, "output": "yes"}, {**rest, "output": "no"}]
    named = read({**record, "q": "Why?"}, prompt="q", chosen="output", rejected="rejected")
    assert named == [{"input": "it", "id": 7, "prompt": "Why?", "completion": text} for text in ("old", "no")]


def test_numbers_go_with_the_answers() -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 9, "score_rejected": 2.5, "margin": 0.5}
    made = Preference.of(pair, {})
    assert (made.kind, made.columns) == ("pairs", {"score": "float32", "margin": "float32"})
    assert made.read(pair).numbers == {"score": [9, 2.5], "margin": [0.5, 0.5]}
    answer = {"prompt": "p", "completion": "c", "label": True, "score": 3}
    made = Preference.of(answer, {})
    assert (made.kind, made.columns) == ("answers", {"label": "int8", "score": "float32"})
    assert made.read(answer) == ([{"prompt": "p", "completion": "c"}], {"label": [True], "score": [3]})


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Who?", "chosen": "Human: Who? Me: I", "rejected": "Human: Who? Me: you"},
        {"prompt": "q", "chosen": [user("q"), says("a")], "rejected": [user("q"), says("b")]},
        {"prompt": [user("q")], "chosen": [user("q"), says("a")], "rejected": [user("q"), says("b")]},
    ],
)
def test_a_prompt_that_both_answers_repeat_may_be_left_out(record: Record) -> None:
    wanted = Preference.of({"chosen": "ab", "rejected": "ac"}, {}).read({**record, "prompt": None})
    asked = parse_fields(["prompt="])
    assert asked == {"prompt": ""}
    assert Preference.of(record, asked).read(record) == wanted


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("first", "record", "message"),
    [
        (PAIR, {**PAIR, "rejected": None}, "field 'rejected' is null, not text or turns"),
        (PAIR, {**PAIR, "rejected": "a"}, "the same: neither is preferred"),
        (PAIR, {**PAIR, "rejected": [says("b")]}, "one is text and the other a list of turns"),
        (PAIR, {"instruction": "i", "chosen": "a", "rejected": "b"}, "no field 'prompt', which asks"),
        (
            {"question": "q", "chosen": "a", "rejected": "b"},
            {"chosen": "ab", "rejected": "ac"},
            "no field instruction or",
        ),
        (
            {"question": "q", "chosen": "a", "rejected": "b"},
            {"question": "q", "chosen": [says("a")], "rejected": [says("b")]},
            "--field prompt=question",
        ),
        (PAIR, {**PAIR, "prompt": 5}, "the prompt is a number"),
        ({"chosen": "ab", "rejected": "ac"}, {"chosen": "a", "rejected": "b"}, "begin with nothing alike"),
        (PAIR, {"prompt": "p", "chosen": [user("q")], "rejected": [says("b")]}, "do not both begin with"),
        (
            PAIR,
            {"prompt": [user("p")], "chosen": [user("p"), says("a")], "rejected": [says("b")]},
            "which would stand there twice",
        ),
        (PAIR, "text", "not an object but text"),
        (
            {"chosen": "ab", "rejected": "ac"},
            {"prompt": "p", "chosen": "It is", "rejected": "It was"},
            "do not both begin with field 'prompt', .* --field prompt=prompt",
        ),
        (
            {"chosen": "ab", "rejected": "ac"},
            {"question": "p", "chosen": [user("q"), says("a")], "rejected": [user("q"), says("b")]},
            "do not both begin with field 'question', .* --field prompt=question",
        ),
        (PAIR, {**PAIR, "margin": 1}, "field 'margin', which the first record does not have"),
        (PAIR, {**PAIR, "score_chosen": 1, "score_rejected": 0}, "field 'score_chosen', which the first record does"),
        ({**PAIR, "margin": 1}, PAIR, "field 'margin' is null, not a number"),
        ({**PAIR, "margin": 1}, {**PAIR, "margin": float("nan")}, "NaN or infinite, not a number"),
        ({"prompt": "p", "completion": "c", "label": True}, PAIR, "and the first record is none"),
        (
            {"prompt": "p", "completion": "c", "label": True},
            {"prompt": "p", "completion": "c", "label": 2},
            "'label' is 2, not true or false",
        ),
    ],
)
def test_what_can_be_read_in_no_way_or_in_two_is_refused(first: Record, record: Any, message: str) -> None:
    with pytest.raises(BadRecordError, match=message):
        Preference.of(first, {}).read(record)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({"prompt": "p", "completion": "c"}, "not neither"),
        ({**PAIR, "label": True}, "not chosen, label, rejected"),
        ({"prompt": "p", "chosen": "c"}, "not chosen"),
        ({**PAIR, "score_chosen": 1}, "come together"),
        ({**PAIR, "instruction": "i"}, "say which one asks, as"),
    ],
)
def test_a_first_record_that_does_not_say_what_it_is_is_refused(first: Record, message: str) -> None:
    with pytest.raises(InputError, match=rf"{message}.*--field (chosen=NAME|prompt=)"):
        Preference.of(first, {})
