"""TRL's collators of preferences against ours, tensor by tensor; real trainers with either, and rows of a store."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from fastcollate import TokenStore, prepare
from fastcollate.errors import InputError
from fastcollate.integrations.preference import PreferenceCollator, preference_dataset
from tests.integrations import chats

trl = pytest.importorskip("trl", minversion="1")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
dpo = pytest.importorskip("trl.trainer.dpo_trainer")
kto = pytest.importorskip("trl.trainer.kto_trainer")
reward = pytest.importorskip("trl.trainer.reward_trainer")

STEPS = 6


def features(kind: str, count: int, chance: random.Random) -> list[dict[str, Any]]:
    def ids(least: int = 0) -> list[int]:
        return [chance.randrange(1, 500) for _ in range(chance.randint(least, 12))]

    found = []
    for number in range(count):
        if kind == "kto":
            feature = {"prompt_ids": ids(), "completion_ids": ids(1), "label": number % 2 == 0}
            feature["KL_completion_ids"] = ids(1)
            feature |= {"ref_logps": chance.random(), "ref_KL_logps": -chance.random()}
        else:
            feature = {"chosen_ids": ids(1), "rejected_ids": ids(1)}
            feature |= {"margin": chance.random()} if kind == "reward" else {"prompt_ids": ids()}
            if kind == "dpo":
                feature |= {"ref_chosen_logps": -chance.random(), "ref_rejected_logps": -chance.random()}
        found.append(feature)
    return found


OPTIONAL = ("KL_completion_ids", "ref_logps", "ref_KL_logps", "margin", "ref_chosen_logps", "ref_rejected_logps")
THEIRS = {
    "dpo": dpo.DataCollatorForPreference,
    "kto": kto.DataCollatorForUnpairedPreference,
    "reward": reward.DataCollatorForPreference,
}


@pytest.mark.parametrize("kind", THEIRS)
def test_a_batch_is_trls_key_by_key(kind: str) -> None:
    chance = random.Random(1)
    for _ in range(200):
        batch = features(kind, chance.randint(1, 5), chance)
        for name in OPTIONAL:
            if chance.random() < 0.5:
                batch = [{key: value for key, value in feature.items() if key != name} for feature in batch]
        options: dict[str, Any] = {"pad_token_id": 0, "pad_to_multiple_of": chance.choice([None, 1, 8])}
        if kind != "reward":
            options["max_length"] = chance.choice([None, 1, 7, 40])
        if kind == "dpo":
            options["truncation_mode"] = chance.choice(["keep_start", "keep_end"])
        wanted, found = THEIRS[kind](**options)(batch), PreferenceCollator(**options)(batch)
        assert [*found] == [*wanted]
        for key, tensor in wanted.items():
            assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
            assert torch.equal(found[key], tensor), key


def test_other_features_and_options_are_refused() -> None:
    collator = PreferenceCollator(pad_token_id=0)
    for batch in ([], [{"input_ids": [1]}], [{"prompt_ids": [1], "chosen_ids": [2]}]):
        with pytest.raises(InputError, match=r"no rows|as TRL's trainers prepare them"):
            collator(batch)
    for options in ({"truncation_mode": "keep_middle"}, {"max_length": 0}, {"pad_to_multiple_of": 0}):
        with pytest.raises(InputError):
            PreferenceCollator(pad_token_id=0, **options)  # type: ignore[arg-type]


def records(count: int = 40) -> list[dict[str, Any]]:
    chance = random.Random(3)
    found = []
    for number in range(count):
        texts = [" ".join(chance.choices(chats.WORDS, k=chance.randint(1, 8))) for _ in range(3)]
        asked = [{"role": "user", "content": texts[0]}]
        answers = [[{"role": "assistant", "content": f"{text} {n}"}] for n, text in enumerate(texts[1:])]
        found.append({"prompt": asked, "chosen": answers[0], "rejected": answers[1], "margin": number / 8})
    return found


def judged(count: int = 40) -> list[dict[str, Any]]:
    return [
        {"prompt": record["prompt"], "completion": record["chosen" if n % 2 else "rejected"], "label": n % 2 == 1}
        for n, record in enumerate(records(count))
    ]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_model(tokenizer: Any, *, is_reward: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, num_labels=1,
    )  # fmt: skip
    if is_reward:
        return transformers.LlamaForSequenceClassification(config)
    return transformers.LlamaForCausalLM(config)


def make_trainer(name: str, path: Path, data: Any, trainer_class: Any = None) -> Any:
    tokenizer = chats.byte_tokenizer()
    args = getattr(trl, f"{name}Config")(
        output_dir=str(path), per_device_train_batch_size=4, max_steps=STEPS, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, bf16=False, learning_rate=1e-2, max_length=200,
    )  # fmt: skip
    is_reward = name == "Reward"
    more = {} if is_reward else {"ref_model": make_model(tokenizer)}
    return (trainer_class or getattr(trl, f"{name}Trainer"))(
        model=make_model(tokenizer, is_reward=is_reward), args=args, train_dataset=data, processing_class=tokenizer,
        **more,
    )  # fmt: skip


def losses(trainer: Any) -> list[float]:
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == STEPS
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPO", "KTO", "Reward"])
def test_a_trainer_learns_the_same_with_either_collator(name: str, tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(judged() if name == "KTO" else records())
    theirs = make_trainer(name, tmp_path / "theirs", data)
    ours = make_trainer(name, tmp_path / "ours", data)
    kept = {} if name == "Reward" else {"max_length": theirs.data_collator.max_length}
    ours.data_collator = PreferenceCollator(pad_token_id=theirs.data_collator.pad_token_id, **kept)
    for found, wanted in zip(ours.get_train_dataloader(), theirs.get_train_dataloader(), strict=True):
        assert [*found] == [*wanted]
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    wanted = losses(theirs)
    assert losses(ours) == pytest.approx(wanted, abs=1e-6)
    assert wanted[0] != wanted[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preference")
    chats.byte_tokenizer().save_pretrained(folder / "tokenizer")
    for name, made in (("pairs", records()), ("answers", judged())):
        prepare(made, folder / name, template="preference", tokenizer=str(folder / "tokenizer"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPO", "Reward"])
def test_a_trainer_learns_the_same_of_a_store(name: str, folder: Path, tmp_path: Path) -> None:
    class Prepared(getattr(trl, f"{name}Trainer")):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    theirs = make_trainer(name, tmp_path / "theirs", datasets.Dataset.from_list(records()))
    rows = preference_dataset(TokenStore(folder / "pairs"), prompts=name == "DPO")
    columns = [*rows.column_names]
    assert rows.to_dict() == {column: theirs.train_dataset[column][:] for column in columns}
    ours = make_trainer(name, tmp_path / "ours", rows, Prepared if name == "DPO" else None)
    ours.data_collator = PreferenceCollator(pad_token_id=theirs.data_collator.pad_token_id)
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-6)


def test_answers_of_a_store_are_those_that_trl_prepares(folder: Path, tmp_path: Path) -> None:
    theirs = make_trainer("KTO", tmp_path, datasets.Dataset.from_list(judged())).train_dataset
    ours = preference_dataset(str(folder / "answers"))
    assert ours.column_names == ["prompt_ids", "completion_ids", "label"]
    assert ours.to_dict() == {name: theirs[name][:] for name in ours.column_names}


def test_a_store_of_rows_is_refused(tmp_path: Path) -> None:
    prepare([{"prompt": "a", "completion": "b"}], tmp_path / "rows")
    with pytest.raises(InputError, match="a store of rows; this makes batches of pairs or answers"):
        preference_dataset(str(tmp_path / "rows"))
