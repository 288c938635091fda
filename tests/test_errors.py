"""Messages: whatever a user's value is, what says so is short; a file that is not there comes with a remedy."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastcollate import errors, pack_lengths, plan_epoch, split_rows
from fastcollate.collate.collator import Collator
from fastcollate.errors import LONGEST_MESSAGE, InputError, SourceReadError, choice, integer, nearest, shown
from fastcollate.integrations.pytorch import BucketBatchSampler
from fastcollate.sources import find_sources
from fastcollate.text import BadRecordError, load_template, load_tokenizer
from fastcollate.text.chat.turns import read_chat
from fastcollate.train import TrainOptions
from tests.helpers import make_shards


class Silent:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def deep(kind: Callable[[Any], Any]) -> Any:
    value: Any = 0
    for _ in range(100_000):
        value = kind(value)
    return value


VALUES = {
    "list": deep(lambda value: [value]), "dict": deep(lambda value: {"a": value}), "tuple": deep(lambda v: (v,)),
    "wide": [[[["x" * 90] * 50] * 50] * 50] * 50, "text": "x" * 10**6, "bytes": b"x" * 10**6, "number": 10**5000,
    "silent": Silent(), "array": np.zeros((50, 50, 50)), "strange": "\x00\n" * 10**5,
}  # fmt: skip


def refused_state(value: Any) -> None:
    sampler = BucketBatchSampler([1] * 8, batch_size=2)
    sampler.load_state_dict({**sampler.state_dict(), "rows": value})


def turn(value: dict[str, Any]) -> object:
    made = json_like({"role": "assistant", "content": "x", **value})
    return read_chat({"messages": [made]}, {})


def json_like(value: Any) -> Any:
    """An array as a list, as records are read."""
    if type(value) is dict and len(value) > 1:
        return {key: json_like(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


TAKERS: dict[str, Callable[[Any], object]] = {
    "integer": lambda value: integer("size", value, 1, 5),
    "choice": lambda value: choice("word", value, ("a", "b")),
    "policy": lambda value: plan_epoch([1], batch_size=1, policy=value),
    "drop_last": lambda value: plan_epoch([1], batch_size=1, drop_last=value),
    "batch_size": lambda value: plan_epoch([1], batch_size=value),
    "capacity": lambda value: pack_lengths([1], value),
    "key of a row": lambda value: split_rows([1, 2], {"a": 1.0}, key=lambda row: [value]),
    "state": refused_state,
    "state itself": lambda value: BucketBatchSampler([1] * 8, batch_size=2).load_state_dict(
        {**BucketBatchSampler([1] * 8, batch_size=2).state_dict(), "version": value}
    ),
    "sources": lambda value: find_sources([[value]]),
    "split": lambda value: find_sources(["README.md"], split=value),
    "rows of a batch": lambda value: Collator(make_shards([[1]]))([[value], 1]),
    "backend": lambda value: load_tokenizer("gpt2", value),
    "weight of a turn": lambda value: turn({"weight": value}),
    "train of a turn": lambda value: turn({"train": value}),
    "role of a turn": lambda value: turn({"role": value}),
    "part of a content": lambda value: turn({"content": [{"type": json_like(value)}]}),
    "call": lambda value: turn({"role": "function_call", "content": value}),
    "tools": lambda value: read_chat({"prompt": "x", "completion": "y", "tools": [value, 5]}, {}),
    "system": lambda value: read_chat({"prompt": "x", "completion": "y", "system": [value]}, {}),
    "history": lambda value: read_chat({"question": "x", "answer": "y", "history": [value]}, {}),
    "name of a field": lambda value: load_template("alpaca").parts({f"{shown(value)}{'x' * 10**6}": 1}),
    "answer": lambda value: load_template("alpaca").parts({"instruction": "x", "output": [value]}),
    "schedule": lambda value: TrainOptions(schedule=value),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_a_value_of_any_kind_is_refused_in_a_short_message(take: Callable[[Any], object], value: Any) -> None:
    with pytest.raises((InputError, BadRecordError)) as caught:
        take(value)
    assert len(str(caught.value)) <= LONGEST_MESSAGE


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_what_is_shown_of_a_value_is_short(value: Any) -> None:
    assert 1 <= len(shown(value)) <= 200


def test_what_is_short_is_shown_as_it_is() -> None:
    for value in ("a", 5, None, 0.5, [1, 2, "x"], {"a": (1, [2])}, True, np.float32(2)):
        assert shown(value) == repr(value)
    assert shown("x" * 500).startswith("'xxx")
    assert shown(10**5000) == "<int>"


def test_the_middle_of_a_long_message_is_left_out_and_its_ends_stay() -> None:
    whole = "p" * (LONGEST_MESSAGE - 1) + "."
    assert str(InputError(whole)) == whole
    for kind in (InputError, SourceReadError):
        error = pickle.loads(pickle.dumps(kind(f"place: {'x' * 10**6}; remedy")))
        assert type(error) is kind
        assert len(str(error)) <= LONGEST_MESSAGE
        assert str(error).startswith("place: xx")
        assert str(error).endswith("xx; remedy")


def test_a_file_that_is_not_there_comes_with_the_name_most_like_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")
    for given, wanted in (
        ("data/trian.jsonl", "did you mean data/train.jsonl?"),
        ("dta/train.jsonl", "did you mean data?"),
        (str(tmp_path / "data" / "train.json"), f"did you mean {tmp_path}/data/train.jsonl?"),
        ("zzz/q.csv", f"{tmp_path} holds no zzz: check the path"),
        ("data/q.csv", f"{tmp_path}/data holds no q.csv: check the path"),
    ):
        assert nearest(given).startswith(wanted)
        with pytest.raises(InputError) as caught:
            find_sources(given)
        assert str(caught.value).startswith(f"{given}: no such file; {wanted}")
    with pytest.raises(InputError, match=r"; to try things: fastcollate sample mine\.jsonl$"):
        find_sources("mine.jsonl")


def test_a_folder_of_very_many_files_is_not_searched_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a1", "a2", "a3"):
        (tmp_path / name).touch()
    monkeypatch.setattr(errors, "MOST_NAMES", 0)
    assert "holds no a4" in nearest(str(tmp_path / "a4"))
