"""The collator against Hugging Face's own, and real runs of Trainer and SFTTrainer; nothing is downloaded."""

from __future__ import annotations

import itertools
import os
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch

from fastcollate import StoreDataset
from fastcollate.errors import InputError
from fastcollate.integrations import checks
from fastcollate.integrations.checks import check_tokenizer
from fastcollate.integrations.huggingface import (
    BucketedTrainerMixin,
    DataCollator,
    lengths_of,
    open_dataset,
    store_from_dataset,
)
from fastcollate.integrations.pytorch import BucketBatchSampler
from fastcollate.store.store import TokenStore
from fastcollate.text.tokenizer import load_tokenizer
from tests.helpers import random_rows, store_of_rows

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

VOCAB = 100
EOS = VOCAB - 1
ROWS, SPANS = random_rows(60, vocab_size=VOCAB)
FEATURES = [
    {
        "input_ids": [*row, EOS],
        "labels": [-100] * spans[0] + row[spans[0] :] + [EOS],
        "attention_mask": [1] * (len(row) + 1),
    }
    for row, spans in zip(ROWS, SPANS, strict=True)
]
PLAIN = [
    {"input_ids": f["input_ids"], "labels": f["input_ids"], "attention_mask": f["attention_mask"]} for f in FEATURES
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return store_of_rows(tmp_path_factory.mktemp("hf") / "store", ROWS, SPANS, vocab_size=VOCAB)


def make_tokenizer(num_words: int = VOCAB) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(num_words - 1)} | {"</s>": num_words - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def make_model(vocab_size: int = VOCAB) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=128, n_embd=16, n_layer=1, n_head=2, bos_token_id=EOS, eos_token_id=EOS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name], value), name
        else:
            assert type(found[name]) is type(value), name
            assert found[name] == value, name


CHOICES = [[0], [3, 1, 4, 1, 5], list(range(60))]


@pytest.mark.parametrize("rows", CHOICES, ids=len)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("step", [None, 8])
def test_padded_equals_data_collator_for_seq2seq(store: TokenStore, rows: list[int], masked: bool, step: Any) -> None:
    features = [(FEATURES if masked else PLAIN)[i] for i in rows]
    theirs = transformers.DataCollatorForSeq2Seq(make_tokenizer(), pad_to_multiple_of=step)
    wanted = dict(theirs([dict(feature) for feature in features]))
    wanted["labels"][:, 0] = -100  # no target, and not to be counted
    dataset = StoreDataset(store, mask_prompt=masked)
    ours = DataCollator(pad_to_multiple_of=step, pad_token_id=EOS)
    same(ours(dataset.__getitems__(rows)), wanted)
    same(ours([dataset[i] for i in rows]), wanted)
    same(ours(features), wanted)


@pytest.mark.parametrize("rows", CHOICES, ids=len)
@pytest.mark.parametrize("masked", [False, True])
def test_flattened_equals_data_collator_with_flattening(store: TokenStore, rows: list[int], masked: bool) -> None:
    features = [{key: (FEATURES if masked else PLAIN)[i][key] for key in ("input_ids", "labels")} for i in rows]
    wanted = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(features)
    ours = DataCollator("flattened")
    same(ours(StoreDataset(store, mask_prompt=masked).__getitems__(rows)), wanted)
    same(ours(features), wanted)


@pytest.mark.parametrize("rows", CHOICES, ids=len)
@pytest.mark.parametrize("multiple", [1, 16, 1000])
def test_flattened_shapes_that_stand_still(store: TokenStore, rows: list[int], multiple: int) -> None:
    features: list[dict[str, Any]] = [{key: FEATURES[i][key] for key in ("input_ids", "labels")} for i in rows]
    missing = -sum(len(feature["input_ids"]) for feature in features) % multiple
    padding = [{"input_ids": [EOS] * missing, "labels": [-100] * missing}] if missing else []
    theirs = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    wanted = theirs(features + padding)
    dataset = StoreDataset(store, mask_prompt=True)
    same(DataCollator("flattened", pad_to_multiple_of=multiple)(dataset.__getitems__(rows)), wanted)
    bounds, num_rows = wanted["cu_seq_lens_q"], len(rows) + bool(missing)
    wanted["cu_seq_lens_q"] = wanted["cu_seq_lens_k"] = torch.cat([bounds, bounds[-1:].expand(90 - num_rows)])
    ours = DataCollator("flattened", pad_token_id=EOS, pad_to_multiple_of=multiple, max_segments=90)
    same(ours(dataset.__getitems__(rows)), wanted)
    same(ours(features), wanted)
    own = StoreDataset(store, mask_prompt=True, pad_to_multiple_of=multiple, max_segments=90)  # said once, there
    same(DataCollator("flattened")(own.__getitems__(rows)), wanted)
    plain = DataCollator(pad_to_multiple_of=multiple)(dataset.__getitems__(rows))
    same(DataCollator()(own.__getitems__(rows)), plain)
    assert plain["input_ids"].shape[1] % multiple == 0
    if num_rows > 1:
        with pytest.raises(InputError, match=f"{num_rows} rows .* more than max_segments={num_rows - 1}"):
            DataCollator("flattened", pad_to_multiple_of=multiple, max_segments=num_rows - 1)(
                dataset.__getitems__(rows)
            )


@pytest.mark.parametrize("layout", ["store", "features"])
def test_a_packed_batch_is_flattened_as_theirs(store: TokenStore, layout: str) -> None:
    dataset = StoreDataset(store, mask_prompt=True)
    sampler = BucketBatchSampler(lengths_of(dataset), policy="packed", batch_size=2, capacity=64)
    theirs = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    seen = []
    for rows in sampler:
        features = [{key: FEATURES[i][key] for key in ("input_ids", "labels")} for i in rows]
        batch = dataset.__getitems__(rows) if layout == "store" else features
        found = DataCollator("flattened")(batch)
        same(found, theirs(features))
        assert found["input_ids"].shape[1] <= 2 * 64
        seen += rows
    assert sorted(set(seen)) == list(range(60))
    split, two = {"long_rows": "split", "capacity": 20}, {"cp_size": 2}
    for options, layout in (({}, "padded"), (split, "flattened"), (two, "flattened")):
        sizes: dict[str, Any] = {"batch_size": 1, "capacity": 64, **options}
        rows = next(iter(BucketBatchSampler(lengths_of(dataset), policy="packed", **sizes)))
        dataset = StoreDataset(store, mask_prompt=True, cp_size=sizes.get("cp_size"))
        with pytest.raises(InputError, match="with packed rows"):
            DataCollator(layout)(dataset.__getitems__(rows))


def test_a_pack_that_its_rows_ends_make_too_long_is_refused(store: TokenStore) -> None:
    """A sampler over a store counts the cells of shifted inputs; here each row has one more, its end."""
    dataset = StoreDataset(store)
    options: dict[str, Any] = {"policy": "packed", "batch_size": 2, "capacity": 64}
    collate, by_store = DataCollator("flattened"), BucketBatchSampler(dataset, **options)
    with pytest.raises(InputError, match=r"capacity=64.*BucketBatchSampler\(lengths_of\(dataset\)"):
        [collate(dataset.__getitems__(rows)) for rows in by_store]
    for rows in BucketBatchSampler(lengths_of(dataset), **options):
        batch = DataCollator("flattened")(dataset.__getitems__(rows))
        assert batch["input_ids"].shape[1] <= 2 * 64
        packs = rows.bounds  # type: ignore[attr-defined]
        assert max(sum(len(ROWS[row]) + 1 for row in rows[a:b]) for a, b in itertools.pairwise(packs)) <= 64


@pytest.mark.parametrize("limit", [1, 2, 7, 20, 61, 100])
@pytest.mark.parametrize("side", ["right", "left"])
def test_max_length_counts_columns_of_input_ids(store: TokenStore, limit: int, side: str) -> None:
    cut = slice(limit) if side == "right" else slice(-limit, None)
    features = [{key: values[cut] for key, values in feature.items()} for feature in FEATURES]
    wanted = dict(transformers.DataCollatorForSeq2Seq(make_tokenizer())(features))
    found = DataCollator()(
        StoreDataset(store, mask_prompt=True, max_length=limit, truncation=side).__getitems__(range(60))
    )
    wanted["labels"][:, 0] = -100
    same(found, wanted)


def test_a_padding_of_its_own_and_other_dtypes(store: TokenStore) -> None:
    found = DataCollator(pad_token_id=7)(StoreDataset(store, mask_prompt=True).__getitems__([3, 1]))
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "w7"
    same(found, dict(transformers.DataCollatorForSeq2Seq(tokenizer)([FEATURES[3], FEATURES[1]])))
    arrays = [{key: np.array(value) for key, value in FEATURES[i].items()} for i in (3, 1)]
    same(DataCollator(pad_token_id=7)(arrays), found)
    masks = [
        {
            "input_ids": FEATURES[i]["input_ids"],
            "completion_mask": [int(label != -100) for label in FEATURES[i]["labels"]],
        }
        for i in (3, 1)
    ]
    same(DataCollator(pad_token_id=7)(masks), found)


def test_no_attention_across_rows_of_the_flattened_form(store: TokenStore) -> None:
    model = make_model().eval()
    model.config.use_cache = False  # as Trainer sets it; with a cache, transformers takes the row for one text
    dataset = StoreDataset(store, mask_prompt=True)
    rows = dataset.__getitems__([4, 9, 2])
    padded, flattened = DataCollator()(rows), DataCollator("flattened")(rows)
    with torch.no_grad():
        logits = model(**{k: v for k, v in padded.items() if k != "labels"}).logits
        flat = model(**{k: v for k, v in flattened.items() if k != "labels"}).logits
        losses = [float(model(**batch).loss) for batch in (padded, flattened)]
    assert torch.allclose(flat[0], logits[padded["attention_mask"].bool()], atol=1e-5)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def arguments(path: Path, kind: Any = transformers.TrainingArguments, **options: Any) -> Any:
    return kind(
        output_dir=str(path), per_device_train_batch_size=4, max_steps=options.pop("max_steps", 10), logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, learning_rate=1e-2, **options,
    )  # fmt: skip


def losses(trainer: Any, **options: Any) -> list[float]:
    trainer.train(**options)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def table(features: list[dict[str, Any]]) -> Any:
    return datasets.Dataset.from_list([{k: f[k] for k in ("input_ids", "labels")} for f in features])


@pytest.mark.slow
def test_trainer_gives_the_same_losses_in_the_same_order(store: TokenStore, tmp_path: Path) -> None:
    theirs = transformers.DataCollatorForSeq2Seq(make_tokenizer())
    wanted = losses(
        transformers.Trainer(make_model(), arguments(tmp_path), data_collator=theirs, train_dataset=table(FEATURES))
    )
    assert wanted[0] > wanted[-1]
    ours = {"data_collator": DataCollator(tokenizer=None), "train_dataset": StoreDataset(store, mask_prompt=True)}
    assert losses(transformers.Trainer(make_model(), arguments(tmp_path), **ours)) == pytest.approx(wanted, abs=1e-6)
    ours["train_dataset"] = table(FEATURES)
    assert losses(transformers.Trainer(make_model(), arguments(tmp_path), **ours)) == pytest.approx(wanted, abs=1e-6)


class Bucketed(BucketedTrainerMixin, transformers.Trainer):  # type: ignore[misc, name-defined]
    pass


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_bucketed_trainer_runs_the_plan_and_resumes(store: TokenStore, tmp_path: Path, workers: int) -> None:
    dataset = StoreDataset(store, mask_prompt=True)
    seen: list[Any] = []

    class Watching(DataCollator):
        def __call__(self, features: Any, return_tensors: str = "pt") -> dict[str, Any]:
            seen.append(list(features.numbers))
            return super().__call__(features, return_tensors)

    def trainer(path: Path, **options: Any) -> Any:
        args = arguments(path, max_steps=20, dataloader_num_workers=workers, seed=5, **options)
        return Bucketed(make_model(), args, data_collator=Watching(), train_dataset=dataset)

    wanted = losses(trainer(tmp_path / "whole"))
    if workers == 0:
        sampler = BucketBatchSampler(lengths_of(dataset), batch_size=4, seed=5)
        assert seen[:20] == [*sampler, *sampler][:20]
    stopped = trainer(tmp_path / "stopped")
    stopped.args.set_save(strategy="steps", steps=6)
    stopped.add_callback(StopAt(6))
    losses(stopped)
    resumed = losses(trainer(tmp_path / "stopped"), resume_from_checkpoint=True)
    assert resumed == pytest.approx(wanted, abs=1e-6)


class StopAt(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


@pytest.mark.slow
def test_bucketed_trainer_over_a_tokenized_dataset_and_by_tokens(tmp_path: Path) -> None:
    class ByTokens(Bucketed):
        batching: ClassVar[dict[str, Any]] = {"batch_size": None, "max_tokens": 200}

    theirs = transformers.DataCollatorForSeq2Seq(make_tokenizer())
    trainer = ByTokens(make_model(), arguments(tmp_path), data_collator=theirs, train_dataset=table(FEATURES))
    shapes = [batch["input_ids"].shape for batch in trainer.get_train_dataloader()]
    assert all(rows * width <= 200 for rows, width in shapes)
    assert sum(rows for rows, _ in shapes) == 60
    assert len(losses(trainer)) == 10


@pytest.mark.slow
def test_epochs_of_differing_batches_lose_no_row_under_a_trainer(store: TokenStore, tmp_path: Path) -> None:
    dataset = StoreDataset(store, mask_prompt=True)
    seen: list[list[int]] = []

    class Watching(DataCollator):
        def __call__(self, features: Any, return_tensors: str = "pt") -> dict[str, Any]:
            seen.append(list(features.numbers))
            return super().__call__(features, return_tensors)

    class ByTokens(Bucketed):
        batching: ClassVar[dict[str, Any]] = {"batch_size": None, "max_tokens": 150, "window": 16}

    def trainer(path: Path, stop: int = 0) -> Any:
        args = arguments(path, max_steps=-1, num_train_epochs=4, seed=5)
        args.set_save(strategy="steps", steps=stop or 1000)
        made = ByTokens(make_model(), args, data_collator=Watching(), train_dataset=dataset)
        if stop:
            made.add_callback(StopAt(stop))
        return made

    wanted = losses(trainer(tmp_path / "whole"))
    sampler = BucketBatchSampler(lengths_of(dataset), max_tokens=150, window=16, seed=5)
    epochs = [list(sampler) for _ in range(5)]
    length = len(epochs[0])
    assert len({len(batches) for batches in epochs}) > 1
    assert len(wanted) == 4 * length
    stream = [rows for batches in epochs for rows in batches]
    taken = [rows for turn in range(4) for rows in seen[turn * length : (turn + 1) * length]]
    assert taken == stream[: 4 * length]
    losses(trainer(tmp_path / "stopped", stop=length + 2))
    resumed = losses(trainer(tmp_path / "stopped"), resume_from_checkpoint=True)
    assert resumed == pytest.approx(wanted, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_padded_and_flattened_batches_give_one_loss_in_a_trainer(
    store: TokenStore, tmp_path: Path, masked: bool
) -> None:
    """A trainer divides by the number of labels: the first column, which no model trains, is not among them."""
    found = [
        losses(
            transformers.Trainer(
                make_model(), arguments(tmp_path, max_steps=6), data_collator=DataCollator(layout),
                train_dataset=StoreDataset(store, mask_prompt=masked),
            )
        )
        for layout in ("padded", "flattened")
    ]  # fmt: skip
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_the_collator_stays_on_the_cpu_whatever_the_default_device(store: TokenStore) -> None:
    rows = StoreDataset(store, mask_prompt=True, max_length=20, truncation="left").__getitems__([1, 5, 7])
    for layout in ("padded", "flattened"):
        for batch in (rows, FEATURES[:3]):
            wanted = DataCollator(layout)(batch)
            with torch.device("meta"):
                same(DataCollator(layout)(batch), wanted)


def test_lengths_of_a_shuffled_or_chosen_data_set() -> None:
    lengths = np.array([len(feature["input_ids"]) for feature in FEATURES])
    data = table(FEATURES)
    assert lengths_of(data).tolist() == lengths.tolist()
    order = np.random.default_rng(1).permutation(60)
    assert lengths_of(data.select(order)).tolist() == lengths[order].tolist()
    shuffled = data.shuffle(seed=3)
    assert lengths_of(shuffled).tolist() == [len(row) for row in shuffled["input_ids"]]
    assert lengths_of(data.select([])).tolist() == []


@pytest.mark.slow
def test_sft_trainer_with_completion_only_loss_gives_the_same_losses(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(1, VOCAB - 1, count))

    records = [{"prompt": words(rng.integers(2, 9)), "completion": " " + words(rng.integers(1, 20))} for _ in range(40)]
    data = datasets.Dataset.from_list(records)

    def trainer(kind: Any, collator: Any) -> Any:
        args = arguments(tmp_path, trl.SFTConfig, completion_only_loss=True, max_length=None, bf16=False)
        return kind(make_model(), args, data_collator=collator, train_dataset=data, processing_class=make_tokenizer())

    wanted = losses(trainer(trl.SFTTrainer, None))
    found = losses(trainer(trl.SFTTrainer, DataCollator(tokenizer=make_tokenizer())))
    assert found == pytest.approx(wanted, abs=1e-6)

    class BucketedSFT(BucketedTrainerMixin, trl.SFTTrainer):  # type: ignore[misc, name-defined]
        pass

    theirs = losses(trainer(BucketedSFT, None))
    ours = losses(trainer(BucketedSFT, DataCollator(tokenizer=make_tokenizer())))
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert ours != pytest.approx(wanted, abs=1e-6)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads a process's maps as Linux tells them")
def test_datasets_opens_a_store_by_memory_map(store: TokenStore, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    opened = open_dataset(store)
    assert opened.column_names == ["input_ids", "labels", "assistant_masks"]
    wanted = [
        {"input_ids": f["input_ids"], "labels": f["labels"], "assistant_masks": [int(x != -100) for x in f["labels"]]}
        for f in FEATURES
    ]
    assert opened.to_list() == wanted
    (written,) = (tmp_path / "fastcollate").iterdir()
    assert str(written) in Path("/proc/self/maps").read_text()
    stamp = written.stat().st_mtime_ns
    again = pickle.loads(pickle.dumps(open_dataset(store)))
    assert (again.to_list(), written.stat().st_mtime_ns) == (wanted, stamp)
    everything = open_dataset(store.path, mask_prompt=False)
    assert everything["labels"] == everything["input_ids"] == opened["input_ids"]
    assert len(list((tmp_path / "fastcollate").iterdir())) == 2


def test_a_tokenized_dataset_becomes_a_store(tmp_path: Path) -> None:
    chats = [
        {"input_ids": [1, 2, 3, 4, 5, 6, EOS], "labels": [-100, -100, 3, -100, 5, 6, EOS]},
        {"input_ids": [1, 2, 3], "labels": [-100, 2, -100]},
        {"input_ids": [1, 2], "labels": [-100, -100]},
        {"input_ids": [7, EOS], "labels": [7, EOS]},
    ]
    made = store_from_dataset(table(FEATURES + chats), tmp_path / "made", make_tokenizer(), end="append")
    assert [row.input_ids.tolist() for row in made] == [*ROWS, [1, 2, 3, 4, 5, 6], [1, 2, 3], [1, 2], [7]]
    assert [row.spans.tolist() for row in made] == [*SPANS, [2, 1, 1, 2], [1, 1, 2], [3], [0, 1]]
    found = DataCollator(tokenizer=make_tokenizer())(StoreDataset(made, mask_prompt=True).__getitems__([60, 61]))
    assert found["labels"].tolist() == [[-100, -100, 3, -100, 5, 6, EOS], [-100, 2, *[-100] * 5]]
    masks = [
        {"input_ids": f["input_ids"], "completion_mask": [int(label != -100) for label in f["labels"]]}
        for f in FEATURES
    ]
    again = store_from_dataset(datasets.Dataset.from_list(masks), tmp_path / "again", make_tokenizer(), end="append")
    assert [row.spans.tolist() for row in again] == SPANS
    with pytest.raises(InputError, match="a store already"):
        store_from_dataset(table(FEATURES), tmp_path / "again", make_tokenizer())
    with pytest.raises(InputError, match=r"row 0: id .* is beyond the tokenizer's 50: another one has made it"):
        store_from_dataset(table(FEATURES), tmp_path / "small", make_tokenizer(50))


def test_a_tokenizer_of_the_same_size_with_other_ids_is_refused() -> None:
    store = SimpleNamespace(path="store", tokenizer_name="gpt2", vocab_size=50257)
    with pytest.raises(InputError, match="encodes differently"):
        check_tokenizer(store, make_tokenizer(50257))
    encoding = load_tokenizer("gpt2")
    same_ids = SimpleNamespace(encode=lambda text, add_special_tokens: encoding.encode(text))
    check_tokenizer(store, type("Same", (), {"encode": staticmethod(same_ids.encode), "__len__": lambda self: 50257})())


def test_a_mask_that_a_trainer_removes_is_missed(tmp_path: Path) -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=4, n_layer=1, n_head=1))
    rows = datasets.Dataset.from_list([{"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}] * 2)
    for removed in (False, True):
        checks._tell_of_all_trained.cache_clear()
        args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, remove_unused_columns=removed)
        collator = DataCollator(pad_token_id=0)
        trainer = transformers.Trainer(model, args, train_dataset=rows, data_collator=collator)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            batch = next(iter(trainer.get_train_dataloader()))
        assert any("every token is trained" in str(warning.message) for warning in found) == removed
        assert batch["labels"].tolist() == [[-100, 6 if removed else -100, 7]] * 2


@pytest.mark.slow
def test_wrong_use_is_named(store: TokenStore, tmp_path: Path) -> None:
    dataset = StoreDataset(store)
    shifted = [{"input_ids": f["input_ids"], "labels": [*f["input_ids"][1:], -100]} for f in FEATURES]
    with pytest.raises(InputError, match="shifted by one already"):
        DataCollator()(shifted[:4])
    with pytest.raises(InputError, match="shifted already"):
        DataCollator()(dataset.collate(dataset.__getitems__([1, 2])))
    with pytest.raises(InputError, match="tokenize the data set"):
        DataCollator()([{"text": "w1"}])
    with pytest.raises(InputError, match="prepare the store again"):
        DataCollator(tokenizer=make_tokenizer(50))(dataset.__getitems__([1]))
    with pytest.raises(InputError, match="embeds 50 ids"):
        Bucketed(make_model(50), arguments(tmp_path), data_collator=DataCollator(), train_dataset=dataset).train()
    with pytest.raises(InputError, match="data_collator="):
        Bucketed(make_model(), arguments(tmp_path), train_dataset=dataset).train()
    with pytest.raises(InputError, match="both decide the order"):
        Bucketed(
            make_model(),
            arguments(tmp_path, train_sampling_strategy="group_by_length"),
            data_collator=DataCollator(),
            train_dataset=dataset,
        ).train()
    with pytest.raises(InputError, match="column 'input_ids'"):
        lengths_of(datasets.Dataset.from_dict({"text": ["a"]}))
    for options in ({"layout": "packed"}, {"max_segments": 8}, {"pad_to_multiple_of": 0}):
        with pytest.raises(InputError, match=r"layout=|pad_to_multiple_of=0"):
            DataCollator(**options)


def bucketed_trainer(dataset: StoreDataset, out: Path) -> Any:
    class Bucketed(BucketedTrainerMixin, transformers.Trainer):
        pass

    args = transformers.TrainingArguments(
        str(out), per_device_train_batch_size=1, num_train_epochs=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    return Bucketed(make_model(), args, train_dataset=dataset, data_collator=DataCollator())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"mask_prompt": True}, [0, 2, 3]),  # row 1 is all prompt
        ({"mask_prompt": True, "max_length": 5}, [0, 3]),  # row 2's response begins where it is cut
        ({"max_length": 5}, [0, 1, 2, 3]),
        ({}, [0, 1, 2, 3]),
        ({"mask_prompt": True, "max_length": 4, "truncation": "left"}, [0, 2, 3]),
    ],
)
def test_rows_without_a_label_make_no_batch_of_a_trainer(
    tmp_path: Path, options: dict[str, Any], kept: list[int]
) -> None:
    """The loss of a batch of such rows is NaN, and one step of that ruins the model."""
    rows, spans = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [*range(1, 9)], [1, 2]], [[2, 3], [6, 0], [6, 2], [1, 1]]
    store = store_of_rows(tmp_path / "s", rows, spans, vocab_size=VOCAB)
    trainer = bucketed_trainer(StoreDataset(store, **options), tmp_path / "run")
    batches = list(trainer.get_train_dataloader())
    assert all(bool((batch["labels"] != -100).any()) for batch in batches)
    assert len(batches) == len(kept)
    trainer.train()
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters())


def test_a_store_without_any_label_is_refused(tmp_path: Path) -> None:
    store = store_of_rows(tmp_path / "s", [[1, 2, 3]] * 3, [[4, 0]] * 3, vocab_size=VOCAB)
    dataset = StoreDataset(store, mask_prompt=True)
    with pytest.raises(InputError, match=r"no row of .* has a label"):
        bucketed_trainer(dataset, tmp_path / "run").get_train_dataloader()
