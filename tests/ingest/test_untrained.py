"""A store that trains nothing is refused, one that trains little is warned of."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest

from fastcollate.check.counts import inspect_store
from fastcollate.errors import InputError
from fastcollate.ingest.job import prepare
from fastcollate.store.store import TokenStore
from fastcollate.train.options import MaskOptions

TURN = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Ho"}


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def jinja(tmp_path: Path, source: str) -> str:
    pytest.importorskip("jinja2")
    (tmp_path / "t.jinja").write_text(source)
    return str(tmp_path / "t.jinja")


@pytest.mark.slow
def test_a_template_without_marks(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"q": "x", "a": "y"}] * 5)
    with pytest.raises(InputError, match=r"5 of 5 rows train nothing: .*between \{% generation %\} and"):
        prepare(source, tmp_path / "s", template=jinja(tmp_path, "{{ q }} {{ a }}"))
    assert not (tmp_path / "s" / "manifest.json").exists()
    template = jinja(tmp_path, "{{ q }} {% generation %}{{ a }}{% endgeneration %}")
    assert prepare(source, tmp_path / "s2", template=template).num_rows == 5


def test_chats_without_an_answer(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"messages": [TURN]}] * 3)
    with pytest.raises(InputError, match=r"a\.jsonl: 3 of 3 rows train nothing: .*give each record a response"):
        prepare(source, tmp_path / "s", template="chat")


def test_a_limit_that_cuts_every_response_away(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"instruction": "x", "output": "y"}] * 4)
    with pytest.raises(InputError, match=r"4 of 4 rows train nothing within max_length=10: raise the limit"):
        prepare(source, tmp_path / "s", max_length=10, long_prompt="keep")


@pytest.mark.parametrize(("untrained", "warned"), [(0, False), (2, False), (3, True)])
def test_more_than_half(tmp_path: Path, untrained: int, warned: bool) -> None:
    records = [{"messages": [TURN]}] * untrained + [{"messages": [TURN, ANSWER]}] * (4 - untrained)
    source = write(tmp_path / "a.jsonl", records)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = prepare(source, tmp_path / "s", template="chat")
    found = [str(warning.message) for warning in caught if "train nothing" in str(warning.message)]
    assert [message.startswith("3 of 4 rows train nothing: ") for message in found] == [True] * warned
    assert report.summary["untrained_rows"] == untrained


@pytest.mark.parametrize("max_length", [None, 1, 2, 4])
@pytest.mark.parametrize("end", ["append", "in_row"])
def test_rows_that_train_nothing_are_those_of_which_a_batch_trains_nothing(
    tmp_path: Path, end: str, max_length: int | None
) -> None:
    """Whatever of a row is trained: nothing, its first id alone, which is no target, or what a limit cuts away."""
    chance = random.Random(7)
    masks = [[chance.random() < 0.25 for _ in range(chance.randint(1, 7))] for _ in range(400)]
    masks += [[True], [True, False], [False] * 6 + [True], [False, True]]
    records = [{"input_ids": [5] * len(mask), "loss_mask": [int(x) for x in mask]} for mask in masks]
    source = write(tmp_path / "a.jsonl", records)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options: Any = {"end": end, "max_length": max_length, "long_prompt": "keep"}
        report = prepare(source, tmp_path / "s", template="tokenized", tokenizer="gpt2", **options)
    masked = MaskOptions(mask_prompt=True, max_length=max_length, mode="positional")
    found = inspect_store(TokenStore(tmp_path / "s"), masked, progress=False).rows_without_trained
    assert report.summary["untrained_rows"] == found
    assert 0 < found < len(masks)
