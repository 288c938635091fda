"""Rows that hold their own end under Hugging Face: exactly the ids in, exactly the ids and labels out."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcollate import BatchLoader, StoreDataset, TokenStore
from fastcollate.check import verify
from fastcollate.check.counts import tokenizer_of
from fastcollate.errors import InputError
from fastcollate.integrations.checks import check_tokenizer
from fastcollate.integrations.huggingface import (
    BucketedTrainerMixin,
    DataCollator,
    lengths_of,
    open_dataset,
    store_from_dataset,
)
from fastcollate.integrations.pytorch import BucketBatchSampler
from fastcollate.train import MaskOptions
from tests.integrations import chats
from tests.integrations.test_huggingface import VOCAB, bucketed_trainer, make_tokenizer, same

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

EOS, PAD, IGNORE = VOCAB - 1, 0, -100
Features = list[dict[str, list[int]]]


def tokenizer_with_two_ids() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "w0"
    return tokenizer


def some_features(count: int = 60, seed: int = 0) -> Features:
    """Rows with the end-of-text nowhere, in the middle, at the end, or both, and any masks."""
    chance = random.Random(seed)
    features = []
    for _ in range(count):
        ids = [chance.choice([EOS, PAD, chance.randint(1, EOS)]) for _ in range(chance.randint(2, 30))]
        trained = [chance.random() < 0.6 for _ in ids]
        labels = [token if flag else IGNORE for token, flag in zip(ids, trained, strict=True)]
        features.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    return features


FEATURES = some_features()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    table = datasets.Dataset.from_list([{k: f[k] for k in ("input_ids", "labels")} for f in FEATURES])
    return store_from_dataset(table, tmp_path_factory.mktemp("rows") / "store", tokenizer_with_two_ids())


def test_a_store_of_ready_ids_holds_exactly_these(store: TokenStore, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert (store.end, store.pad_token_id, store.end_token_id) == ("in_row", PAD, EOS)
    assert [row.input_ids.tolist() for row in store] == [f["input_ids"] for f in FEATURES]
    opened = open_dataset(store)
    assert opened["input_ids"][:] == [f["input_ids"] for f in FEATURES]
    assert opened["labels"][:] == [f["labels"] for f in FEATURES]
    assert verify(store, MaskOptions(mask_prompt=True), progress=False).ok


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 1, 2, 7, 20, 100])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("step", [None, 8])
def test_padded_is_the_ids_and_labels(store: TokenStore, limit: int | None, side: str, step: int | None) -> None:
    cut = slice(None) if limit is None else slice(limit) if side == "right" else slice(-limit, None)
    features = [{key: values[cut] for key, values in feature.items()} for feature in FEATURES]
    wanted = dict(transformers.DataCollatorForSeq2Seq(tokenizer_with_two_ids(), pad_to_multiple_of=step)(features))
    wanted["labels"][:, 0] = IGNORE
    dataset = StoreDataset(store, mask_prompt=True, max_length=limit, truncation=side, ignore_index=5)
    same(DataCollator(pad_to_multiple_of=step)(dataset.__getitems__(range(60))), wanted)
    same(DataCollator(pad_token_id=PAD, pad_to_multiple_of=step)(features), wanted)


def test_flattened_and_packed_are_the_ids_and_labels(store: TokenStore) -> None:
    dataset = StoreDataset(store, mask_prompt=True)
    assert lengths_of(dataset).tolist() == [len(f["input_ids"]) for f in FEATURES]
    theirs = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    for rows in BucketBatchSampler(lengths_of(dataset), policy="packed", batch_size=2, capacity=64):
        features = [{key: FEATURES[i][key] for key in ("input_ids", "labels")} for i in rows]
        same(DataCollator("flattened")(dataset.__getitems__(rows)), theirs(features))
        same(DataCollator("flattened")(features), theirs(features))


def test_masks_are_all_honoured(tmp_path: Path) -> None:
    chance = random.Random(5)
    rows = [
        {
            "input_ids": f["input_ids"],
            "completion_mask": [chance.randint(0, 1) for _ in f["input_ids"]],
            "assistant_masks": [chance.randint(0, 1) for _ in f["input_ids"]],
        }
        for f in FEATURES
    ]
    for names in (["completion_mask"], ["assistant_masks"], ["completion_mask", "assistant_masks"]):
        kept = [{name: row[name] for name in ("input_ids", *names)} for row in rows]
        wanted = [
            [t if all(bits) else IGNORE for t, *bits in zip(row["input_ids"], *(row[n] for n in names), strict=True)]
            for row in rows
        ]
        made = store_from_dataset(datasets.Dataset.from_list(kept), tmp_path / "-".join(names), make_tokenizer())
        for batch in (
            DataCollator()(StoreDataset(made, mask_prompt=True).__getitems__(range(60))), DataCollator()(kept)
        ):  # fmt: skip
            labels = [line[: len(own)].tolist() for line, own in zip(batch["labels"], wanted, strict=True)]
            assert [line[1:] for line in labels] == [own[1:] for own in wanted]
    both = [{**f, "assistant_masks": [0] * len(f["input_ids"])} for f in FEATURES]
    assert (DataCollator()(both)["labels"] == IGNORE).all()


def test_packs_of_trl_do_not_see_each_other(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    table = datasets.Dataset.from_list([{k: f[k] for k in ("input_ids", "labels")} for f in FEATURES])
    packed = trl.pack_dataset(table, 64, "bfd")
    features = packed.to_list()
    assert any(len(pack["seq_lengths"]) > 1 for pack in features)
    alone = [
        {name: pack[name][start : start + length] for name in ("input_ids", "labels")}
        for pack in features
        for start, length in zip(np.cumsum([0, *pack["seq_lengths"]]), pack["seq_lengths"], strict=False)
    ]
    collator = DataCollator("flattened")
    same(collator(features), collator(alone))
    theirs = trl.trainer.sft_trainer.DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)(features)
    found = collator(features)
    for name, value in theirs.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name
    by_positions = [
        {
            **{name: pack[name] for name in ("input_ids", "labels")},
            "position_ids": [place for length in pack["seq_lengths"] for place in range(length)],
        }
        for pack in features
    ]
    same(collator(by_positions), collator(alone))
    for packs in (features, by_positions):
        with pytest.raises(InputError, match=r"with packs \(seq_lengths, .*: a pack's sequences would see each other"):
            DataCollator()(packs)
    with pytest.raises(InputError, match="they must add up"):
        collator([{**features[0], "seq_lengths": [1, 2]}])
    made = store_from_dataset(packed, tmp_path / "store", tokenizer_with_two_ids())
    assert [row.input_ids.tolist() for row in made] == [row["input_ids"] for row in alone]
    assert open_dataset(made)["labels"][:] == [row["labels"] for row in alone]


@pytest.mark.slow
@pytest.mark.parametrize("rule", [chats.by_torchtitan, chats.by_axolotl, chats.by_transformers])
def test_labels_by_others_rules(tmp_path: Path, rule: Callable[[Any, chats.Chat], dict[str, list[int]]]) -> None:
    """2,000 rows as torchtitan, axolotl and `transformers` label them: ids and labels of every row, in every batch."""
    tokenizer = chats.byte_tokenizer()
    turns = 1 if rule is chats.by_torchtitan else 4
    rows = [rule(tokenizer, chat) for chat in chats.make_chats(2000, most_turns=turns)]
    made = store_from_dataset(datasets.Dataset.from_list(rows), tmp_path / "store", tokenizer)
    wanted = [
        row["labels"] if "labels" in row else [t if m else IGNORE for t, m in zip(*row.values(), strict=True)]
        for row in rows
    ]
    assert sum(labels.count(tokenizer.eos_token_id) for labels in wanted) >= 2000
    loader = BatchLoader(made, batch_size=16, mask_prompt=True, seed=3)
    sampler = BucketBatchSampler(made, batch_size=16, seed=3)
    count = 0
    for numbers, (inputs, targets) in zip(sampler, loader, strict=True):
        for number, own_inputs, own_targets in zip(numbers, inputs.tolist(), targets.tolist(), strict=True):
            ids, labels = rows[number]["input_ids"], wanted[number]
            rest = len(own_inputs) - len(ids) + 1
            assert own_inputs == ids[:-1] + [tokenizer.pad_token_id] * rest
            assert own_targets == labels[1:] + [IGNORE] * rest
            count += 1
    assert count == 2000


def test_wrong_data_sets_are_refused(tmp_path: Path) -> None:
    def make(row: dict[str, Any], **options: Any) -> TokenStore:
        return store_from_dataset(datasets.Dataset.from_list([row]), tmp_path / "store", make_tokenizer(), **options)

    with pytest.raises(InputError, match=r"row 0: 'labels' is 3 where the id is 2: shifted by one already\?"):
        make({"input_ids": [1, 2, 3], "labels": [-100, 3, 4]})
    with pytest.raises(InputError, match="column 'loss_weights' may say what is trained, and is not known"):
        make({"input_ids": [1, 2, 3], "loss_weights": [0, 1, 1]})
    with pytest.raises(InputError, match="row 0: 3 ids, but 2 values in 'assistant_masks'"):
        make({"input_ids": [1, 2, 3], "assistant_masks": [0, 1]})
    with pytest.raises(InputError, match=r"row 0: 3 ids, but 4 are counted by 'seq_lengths'"):
        make({"input_ids": [1, 2, 3], "seq_lengths": [2, 2]})
    with pytest.raises(InputError, match="end='never': choose one of 'auto', 'append', 'in_row'"):
        make({"input_ids": [1, 2, 3]}, end="never")


def test_a_store_of_ready_ids_decodes_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chats.byte_tokenizer()
    rows = [chats.by_transformers(tokenizer, chat) for chat in chats.make_chats(20)]
    made = store_from_dataset(datasets.Dataset.from_list(rows), tmp_path / "store", tokenizer)
    assert "tokenizer.json" in made.manifest["tokenizer"]["files"]
    monkeypatch.chdir(tmp_path)
    own, problem = tokenizer_of(TokenStore("store"))
    assert (problem, own is not None) == ("", True)
    for row in made:
        assert own is not None
        assert own.decode(row.input_ids.tolist()) == tokenizer.decode(row.input_ids)
    check_tokenizer(made, tokenizer)


def test_rows_of_one_id_make_no_batch_of_a_trainer(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[5], [6, 7], [8]]})
    made = store_from_dataset(rows, tmp_path / "store", make_tokenizer())
    batches = list(bucketed_trainer(StoreDataset(made), tmp_path / "run").get_train_dataloader())
    assert [batch["input_ids"].tolist() for batch in batches] == [[[6, 7]]]


@pytest.mark.parametrize(
    ("features", "problem"),
    [
        ([{"input_ids": [5, 6, 7], "assistant_mask": [0, 0, 1]}], "column 'assistant_mask' may say what is trained"),
        ([{"input_ids": [5, 6, 7], "loss_weights": [0, 0, 1]}], "column 'loss_weights' may say what is trained"),
        ([{"input_ids": [5, 6, 7], "spans": [2, 1]}], "they are a store's"),
        ([{"input_ids": [5]}, {"input_ids": [5, 6], "completion_mask": [0, 1]}], "row 1 of the batch has"),
        (
            [{"input_ids": [5, 6, 7], "loss_mask": [0, 1]}, {"input_ids": [5, 6], "loss_mask": [0, 1, 1]}],
            "row 0 of the batch: 3 ids, but 2 values in 'loss_mask'",
        ),
        ([{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0], "seq_lengths": [1, 2]}], "they must add up"),
    ],
)
def test_what_may_say_what_is_trained_is_never_passed_over(features: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        DataCollator("flattened", pad_token_id=0)(features)
    masked = {"input_ids": [5, 6, 7], "loss_mask": [0, 0, 1], "attention_mask": [1, 1, 1], "seq_lengths": [1, 2]}
    assert DataCollator("flattened", pad_token_id=0)([masked])["labels"].tolist() == [[-100, -100, 7]]


def test_a_trainer_keeps_the_masks_that_our_collator_reads(tmp_path: Path) -> None:
    """Its own way drops columns that no model takes: a data set's masks, and then everything is trained."""
    rows = datasets.Dataset.from_dict(
        {"input_ids": [[5, 6, 7]] * 4, "completion_mask": [[0, 0, 1]] * 4, "note": ["x"] * 4}
    )

    class Bucketed(BucketedTrainerMixin, transformers.Trainer):  # type: ignore[misc]
        pass

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9))
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    collator = DataCollator(pad_token_id=0)
    trainer = Bucketed(model, arguments, train_dataset=rows, data_collator=collator)
    assert next(iter(trainer.get_train_dataloader()))["labels"].tolist() == [[-100, -100, 7]] * 4


def test_a_tokenizer_with_other_added_tokens_is_refused(tmp_path: Path) -> None:
    """Of one vocabulary and size, as the tokenizers of a base model and of its chat model are."""
    store = store_from_dataset(
        datasets.Dataset.from_dict({"input_ids": [[1, 2]]}), tmp_path / "s", chats.byte_tokenizer()
    )
    check_tokenizer(store, chats.byte_tokenizer())
    content = chats.byte_tokenizer().backend_tokenizer.to_str().replace("<|turn|>", "<|role|>")
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_object=chats.byte_tokenizer().backend_tokenizer.from_str(content)
    )
    assert len(other) == store.vocab_size
    with pytest.raises(InputError, match="encodes differently"):
        check_tokenizer(store, other)
