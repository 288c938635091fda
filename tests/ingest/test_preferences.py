"""Stores of pairs, and of answers with verdicts: the rows that TRL prepares, whole or not at all, verified."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastcollate import BatchLoader, MixedStore, StoreDataset, TokenStore, prepare
from fastcollate.check import inspect_store, verify
from fastcollate.errors import InputError
from fastcollate.train import MaskOptions, OrderOptions
from tests.helpers import run_cli
from tests.integrations import chats

Record = dict[str, Any]
MERGED = ["naïve sums", "two lines", "leading spaces", "the sum is", "no idea", "it is 12,345", "trailing"]


def small_tokenizer(folder: Path) -> Any:
    """One with merges, so that tokens may join a prompt and its answer; saved with a chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|begin|>", chats.END, "<|pad|>", "<|turn|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(MERGED * 9, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=special[0], eos_token=special[1], pad_token=special[2],
        additional_special_tokens=special[3:],
    )  # fmt: skip
    tokenizer.chat_template = chats.TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def texts(count: int, seed: int = 0) -> list[Record]:
    chance = random.Random(seed)

    def text() -> str:
        return " ".join(chance.choices([*MERGED, *chats.WORDS], k=chance.randint(1, 5)))

    return [{"prompt": text(), "chosen": text() + f" {n}", "rejected": text()} for n in range(count)]


def turns(count: int) -> list[Record]:
    found = []
    for record in texts(count, seed=1):
        asked = [{"role": "user", "content": record["prompt"]}]
        found.append({key: [*asked, {"role": "assistant", "content": record[key]}] for key in ("chosen", "rejected")})
    return found


def with_prompt(records: list[Record]) -> list[Record]:
    return [{"prompt": r["chosen"][:1], "chosen": r["chosen"][1:], "rejected": r["rejected"][1:]} for r in records]


def answers(records: list[Record]) -> list[Record]:
    return [{"prompt": r["prompt"], "completion": r["chosen"], "label": n % 3 > 0} for n, r in enumerate(records)]


def by_trl(name: str, records: list[Record], tokenizer: Any) -> list[Record]:
    """What a trainer of TRL makes of records before its collator sees them."""
    trl = pytest.importorskip("trl", minversion="1")
    datasets = pytest.importorskip("datasets")
    trainer = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False, desirable_weight=1, undesirable_weight=1)
    asked = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    made = datasets.Dataset.from_list(records)
    return list(getattr(trl, name)._prepare_dataset(trainer, made, tokenizer, asked, "train"))


def by_store(store: TokenStore) -> list[tuple[list[int], list[int], int]]:
    """Each row's prompt and answer, an appended end included, and its record."""
    end = [store.end_token_id] * (store.end == "append")
    rows = [(row.input_ids.tolist(), int(row.spans[0]), row.source_row) for row in store]
    return [(ids[:prompt], ids[prompt:] + end, record) for ids, prompt, record in rows]


FORMS = {
    "texts": ("completion", texts(40), texts(40)),
    "implicit turns": ("tokenizer", turns(40), turns(40)),
    "turns": ("tokenizer", with_prompt(turns(40)), with_prompt(turns(40))),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_those_of_trl(form: str, tmp_path: Path) -> None:
    base, ours, theirs = FORMS[form]
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    report = prepare(ours, tmp_path / "store", template="preference", tokenizer=str(tmp_path / "tokenizer"))
    assert report.template.startswith(f"preference:{base} (records hold chosen and rejected; {base}: ")
    store = TokenStore(tmp_path / "store")
    assert (store.kind, len(store)) == ("pairs", 80)
    expected = []
    for number, row in enumerate(by_trl("DPOTrainer", theirs, tokenizer)):
        expected += [(row["prompt_ids"], row[name], number) for name in ("chosen_ids", "rejected_ids")]
    assert by_store(store) == expected
    mismatches = report.summary["boundary_mismatches"]
    assert mismatches % 2 == 0
    assert (mismatches > 0) == (form == "texts")


@pytest.mark.parametrize("form", ["texts", "turns"])
def test_answers_with_labels_are_those_of_trl(form: str, tmp_path: Path) -> None:
    base, records, _ = FORMS[form]
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    prepare(answers(records), tmp_path / "store", template="preference", tokenizer=str(tmp_path / "tokenizer"))
    store = TokenStore(tmp_path / "store")
    theirs = by_trl("KTOTrainer", answers(records), tokenizer)
    assert (store.kind, store.manifest["template"]["name"]) == ("answers", base)
    assert by_store(store) == [(row["prompt_ids"], row["completion_ids"], n) for n, row in enumerate(theirs)]
    assert store.column("label").dtype == np.int8
    assert store.column("label").tolist() == [int(row["label"]) for row in theirs]


ALIKE: dict[str, tuple[list[Record], dict[str, Any]]] = {
    "stripped": (with_prompt(turns(9)), {}),
    "a key that no template reads": (turns(9), {}),
    "ends": (texts(9), {"special_text": "strip-end"}),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_answers_that_become_the_same_text_are_no_pair(kind: str, tmp_path: Path) -> None:
    base, options = ALIKE[kind]
    records = [dict(record) for record in base]
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    if kind == "stripped":  # as many models' templates do
        tokenizer.chat_template = chats.TEMPLATE.replace("message.content", "message.content | trim")
        tokenizer.save_pretrained(tmp_path / "tokenizer")
    answer = records[4]["chosen"]
    if kind == "ends":
        records[4]["rejected"] = answer + chats.END
    else:
        more = {"content": f" {answer[-1]['content']} "} if kind == "stripped" else {"id": 7}
        records[4]["rejected"] = [*answer[:-1], {**answer[-1], **more}]
    options = {**options, "template": "preference", "tokenizer": str(tmp_path / "tokenizer")}
    with pytest.raises(InputError, match="record 4: chosen and rejected give the same text: neither is preferred"):
        prepare(records, tmp_path / "store", **options)
    prepare(records, tmp_path / "store", **options, on_error="skip")
    store = TokenStore(tmp_path / "store")
    assert [example.source_row for example in store] == [number for number in range(9) if number != 4 for _ in range(2)]


def write(path: Path, records: list[Record]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


KINDS: dict[str, tuple[str, list[Record]]] = {
    "texts": ("preference", [{**record, "margin": n / 3} for n, record in enumerate(texts(30))]),
    "alpaca": ("preference:alpaca", texts(30)),
    "chatml": ("preference:chat", turns(30)),
    "turns": ("preference", with_prompt(turns(30))),
    "answers": ("preference", answers(texts(30))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_is_verified_and_inspected(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template, records = KINDS[kind]
    small_tokenizer(tmp_path / "tokenizer")
    source, folder = write(tmp_path / "records.jsonl", records), tmp_path / "store"
    prepare(str(source), folder, template=template, tokenizer=str(tmp_path / "tokenizer"))
    store = TokenStore(folder)
    options = MaskOptions(mask_prompt=True, mode=None if store.end == "in_row" else "positional")
    for policy in ("bucketed", "packed"):
        order = OrderOptions(policy=policy)
        found = verify(store, options, order, sources=[str(source)], checksums=True, progress=False)
        assert (found.ok, found.records, found.problems) == (True, 30, [])
    assert inspect_store(store, options, progress=False).template.startswith("preference:")
    assert run_cli(monkeypatch, "inspect", folder, "--row", 1) == 0
    changed = write(tmp_path / "other.jsonl", [*records[:3], *records[4:], records[3]])
    assert not verify(store, options, sources=[str(changed)], progress=False).ok


def test_a_changed_number_is_found(tmp_path: Path) -> None:
    records = KINDS["texts"][1]
    prepare(records, tmp_path / "store", template="preference")
    records = [{**record, "margin": record["margin"] + (n == 5)} for n, record in enumerate(records)]
    found = verify(
        TokenStore(tmp_path / "store"), MaskOptions(mode="positional"), progress=False,
        sources=[str(write(tmp_path / "a.jsonl", records))],
    )  # fmt: skip
    assert found.num_problems == 1
    assert found.problems[0].startswith("row 10: margin is [1.6")


@pytest.mark.parametrize("template", ["preference", "preference:chat"])
def test_a_pair_is_stored_whole_or_not_at_all(template: str, tmp_path: Path) -> None:
    records = texts(60) if template == "preference" else with_prompt(turns(60))
    bad: dict[int, Record] = {3: {"rejected": None}, 7: {"margin": "1"}, 9: {"prompt": None}, 20: {"chosen": 5}}
    records = [{**record, "margin": n, **bad.get(n, {})} for n, record in enumerate(records)]
    for number in (30, 31):  # the prompt alone fills the limit, and one special token stands in one answer
        key = "prompt" if number == 30 else "rejected"
        text = "sum " * 400 if number == 30 else "a <|endoftext|> b"
        role = "user" if number == 30 else "assistant"
        records[number][key] = text if template == "preference" else [{"role": role, "content": text}]
    report = prepare(records, tmp_path / "store", template=template, on_error="skip", max_length=300, workers=1)
    store = TokenStore(tmp_path / "store")
    kept = [n for n in range(60) if n not in {*bad, 30, 31}]
    assert report.summary["num_skipped"] == len(bad) + 2
    assert [row.source_row for row in store] == [n for n in kept for _ in range(2)]
    assert store.column("margin").tolist() == [n for n in kept for _ in range(2)]
    listed = (tmp_path / "store" / "skipped.txt").read_text().splitlines()
    assert [line.split("\t")[2] for line in listed[1:]] == [str(n) for n in sorted([*bad, 30, 31])]
    for row in range(0, len(store), 2):
        pair = store[row], store[row + 1]
        prompts = [example.input_ids[: int(example.spans[0])].tolist() for example in pair]
        assert prompts[0] == prompts[1]


def test_the_same_records_give_the_same_store_however_they_are_worked_at(tmp_path: Path) -> None:
    source = write(tmp_path / "records.jsonl", texts(2000))
    reports = [prepare(str(source), tmp_path / f"{n}", template="preference", workers=n) for n in (1, 2)]
    assert reports[0].summary == reports[1].summary
    first, second = (
        {p.name: p.read_bytes() for p in (tmp_path / f"{n}").glob("[ls]*") if p.suffix != ".json"} for n in (1, 2)
    )
    assert first == second
    assert prepare(str(source), tmp_path / "1", template="preference").reused
    with pytest.raises(InputError, match="differs in kind"):
        prepare(str(source), tmp_path / "1", fields={"output": "chosen"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boundary": "exact"}, "boundary='exact'"),
        ({"long_prompt": "cut"}, "long_prompt='cut'"),
        ({"train_on": "last"}, "train_on='last'"),
        ({"template": "preference:text"}, "text knows no prompt"),
        ({"template": "preference:tokenized"}, "tokenized knows no prompt"),
        ({"template": "preference:song"}, "template 'song'"),
        ({"fields": {"chosen": "better"}}, "takes pairs"),
    ],
)
def test_what_does_not_fit_pairs_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        prepare(texts(3), tmp_path / "store", **{"template": "preference", **options})


def test_answers_are_not_served_as_rows_to_learn(tmp_path: Path) -> None:
    prepare(answers(texts(6)), tmp_path / "store", template="preference")
    store = TokenStore(tmp_path / "store")
    for use in (
        lambda: StoreDataset(store),
        lambda: BatchLoader(MixedStore({"a": store.as_rows(), "b": store}), batch_size=1),
    ):
        with pytest.raises(InputError, match="a store of answers"):
            use()
    rows = pickle.loads(pickle.dumps(store.as_rows()))
    assert (rows.kind, pickle.loads(pickle.dumps(store)).kind) == ("rows", "answers")
    assert len([*BatchLoader(rows, batch_size=2)]) == 3
