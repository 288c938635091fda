"""A real `SFTTrainer` on chats: what TRL prepares by itself against our store, labels and losses; downloads nothing.

It runs as well under the oldest TRL that is supported, see `docs/recipes.md`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from fastcollate import StoreDataset, TokenStore, prepare
from fastcollate.integrations.huggingface import DataCollator, open_dataset, store_from_dataset
from tests.integrations import chats

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

CHATS = chats.make_chats(48, most_turns=2, seed=1)
FORMS = {
    "plain": {},
    "packed": {"packing": True, "packing_strategy": "bfd"},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "padding-free": {"padding_free": True, "max_length": None},
}
STEPS = 6


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    tokenizer = chats.byte_tokenizer()
    rows = datasets.Dataset.from_list([chats.by_transformers(tokenizer, chat) for chat in CHATS])
    return store_from_dataset(rows, tmp_path_factory.mktemp("trl") / "store", tokenizer)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_model(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def make_trainer(path: Path, data: Any, collator: Any = None, **options: Any) -> Any:
    """`collator` takes the place of TRL's own afterwards: given one, it refuses to be padding-free."""
    tokenizer = chats.byte_tokenizer()
    args = trl.SFTConfig(
        **{"max_length": 256, **options}, output_dir=str(path), per_device_train_batch_size=4, max_steps=STEPS,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, bf16=False,
        learning_rate=1e-2,
    )  # fmt: skip
    trainer = trl.SFTTrainer(make_model(tokenizer), args, train_dataset=data, processing_class=tokenizer)
    trainer.data_collator = collator or trainer.data_collator
    return trainer


def losses(trainer: Any) -> list[float]:
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == STEPS
    return found


def same_batches(found: Any, wanted: Any) -> int:
    """All batches of two trainers; returns how many labels they train."""
    trained = 0
    for ours, theirs in zip(found.get_train_dataloader(), wanted.get_train_dataloader(), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(value)), name
        trained += int((theirs["labels"] != -100).sum())
    return trained


def test_prepare_makes_the_rows_that_transformers_tokenizes(store: TokenStore, tmp_path: Path) -> None:
    chats.byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    prepare([{"messages": chat} for chat in CHATS], tmp_path / "store", tokenizer=str(tmp_path / "tokenizer"))
    found = TokenStore(tmp_path / "store")
    assert (found.end, found.pad_token_id, found.end_token_id) == ("in_row", store.pad_token_id, store.end_token_id)
    for name in ("input_ids", "labels"):
        assert open_dataset(found)[name][:] == open_dataset(store)[name][:]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("streams", [False, True])
def test_open_dataset_is_what_sft_trainer_prepares(store: TokenStore, tmp_path: Path, form: str, streams: bool) -> None:
    theirs = datasets.Dataset.from_list([{"messages": chat} for chat in CHATS])
    ours = open_dataset(store)
    if streams:
        theirs, ours = theirs.to_iterable_dataset(), ours.to_iterable_dataset()
    wanted = make_trainer(tmp_path, theirs, assistant_only_loss=True, **FORMS[form])
    found = make_trainer(tmp_path, ours, **FORMS[form])
    rows = [list(trainer.train_dataset) for trainer in (found, wanted)]
    assert [row["input_ids"] for row in rows[0]] == [row["input_ids"] for row in rows[1]]
    trained = same_batches(found, wanted)
    if form in ("plain", "padding-free") and not streams:
        assert trained == sum(
            sum(chats.by_transformers(chats.byte_tokenizer(), chat)["assistant_masks"]) for chat in CHATS
        )
    assert losses(found) == losses(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "padding-free"])
def test_our_collator_in_sft_trainer_gives_its_losses(store: TokenStore, tmp_path: Path, form: str) -> None:
    """Over what TRL prepares, and over rows of the store in TRL's order."""
    collator = DataCollator("flattened" if form == "padding-free" else "padded", tokenizer=chats.byte_tokenizer())
    theirs = datasets.Dataset.from_list([{"messages": chat} for chat in CHATS])
    options = {"assistant_only_loss": True, **FORMS[form]}
    wanted = losses(make_trainer(tmp_path, theirs, **options))
    assert losses(make_trainer(tmp_path, theirs, collator, **options)) == wanted
    trainer = make_trainer(tmp_path, open_dataset(store), collator, **FORMS[form])
    trainer.train_dataset = StoreDataset(store, mask_prompt=True)
    assert losses(trainer) == wanted


@pytest.mark.slow
def test_our_collator_takes_packs_of_sft_trainer(store: TokenStore, tmp_path: Path) -> None:
    options = {"assistant_only_loss": True, **FORMS["packed"]}
    theirs = datasets.Dataset.from_list([{"messages": chat} for chat in CHATS])
    wanted = losses(make_trainer(tmp_path, theirs, **options))
    assert losses(make_trainer(tmp_path, theirs, DataCollator("flattened"), **options)) == wanted
    assert losses(make_trainer(tmp_path, open_dataset(store), DataCollator("flattened"), **FORMS["packed"])) == wanted
