"""Loss and trained tokens of each source of a mix in a real Trainer's log: as the model gives them row by row."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastcollate import MixedStore, StoreDataset
from fastcollate.errors import InputError
from fastcollate.integrations.huggingface import BucketedTrainerMixin, DataCollator
from fastcollate.store.store import TokenStore
from tests.forks import Forks
from tests.helpers import store_of_rows
from tests.integrations.test_huggingface import VOCAB, arguments, make_model

transformers = pytest.importorskip("transformers")
from fastcollate.integrations.huggingface import LossBySource  # noqa: E402


class Bucketed(BucketedTrainerMixin, transformers.Trainer):
    pass


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> MixedStore:
    """Chats that hold their end and instructions; some rows without a label."""
    folder, random, stores = tmp_path_factory.mktemp("mix"), np.random.default_rng(5), {}
    for name, end in (("chat", "in_row"), ("code", "append")):
        lengths = [0, 1, *random.integers(2, 30, 40).tolist()]
        rows = [random.integers(1, VOCAB - 1, n).tolist() for n in lengths]
        spans = [[prompt := int(random.integers(0, n + 1)), n - prompt] for n in lengths]
        stores[name] = store_of_rows(folder / name, rows, spans, vocab_size=VOCAB, end=end)
    return MixedStore(stores, weights={"chat": 3, "code": 1}, num_rows=96)


def trainer_of(mix: MixedStore, out: Path, layout: str = "padded", **options: Any) -> Any:
    batching = options.pop("batching", {})
    kind = type("Mine", (Bucketed,), {"batching": batching})
    callbacks = options.pop("callbacks", None) or [LossBySource()]
    dataset = StoreDataset(mix, mask_prompt=True, max_length=20)
    later = {name: options.pop(name) for name in ("learning_rate", "logging_steps") if name in options}
    args = arguments(out, **options)
    for name, value in later.items():
        setattr(args, name, value)
    return kind(make_model(), args, train_dataset=dataset, data_collator=DataCollator(layout), callbacks=callbacks)


def lines_of(trainer: Any) -> list[dict[str, Any]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def by_hand(mix: MixedStore, model: Any, rows: list[int]) -> dict[str, tuple[float, int]]:
    """Each source's sum of losses and trained tokens, a row at a time."""
    found = dict.fromkeys(mix.names, (0.0, 0))
    for row in rows:
        name = mix.names[int(mix.source_of([row])[0])]
        example, ends = mix[row], mix.stores[int(mix.source_of([row])[0])].end == "append"
        ids = (example.input_ids.tolist() + [VOCAB - 1] * ends)[:20]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = range(max(int(example.spans[0]), 1), len(ids))
        loss = -sum(float(log_probs[place - 1, ids[place]]) for place in places)
        found[name] = found[name][0] + loss, found[name][1] + len(places)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("layout", ["padded", "flattened"])
def test_a_line_has_the_loss_of_each_source(mix: MixedStore, tmp_path: Path, layout: str, accumulate: int) -> None:
    args: dict[str, Any] = {"gradient_accumulation_steps": accumulate, "max_steps": 4, "learning_rate": 0.0}
    batching = {"policy": "packed", "capacity": 50, "batch_size": 2} if layout == "flattened" else {}
    trainer = trainer_of(mix, tmp_path, layout, batching=batching, **args)
    sampler = trainer.get_train_dataloader().batch_sampler
    steps = [rows for rows, _ in zip(sampler, range(4 * accumulate), strict=False)]
    model = make_model().eval()
    trainer.train()
    lines = lines_of(trainer)
    assert len(lines) == 4
    for number, line in enumerate(lines):
        rows = [row for batch in steps[number * accumulate : (number + 1) * accumulate] for row in batch]
        wanted = by_hand(mix, model, rows)
        assert sum(count for _, count in wanted.values()) > 0
        for name, (loss, count) in wanted.items():
            assert line[f"trained_tokens/{name}"] == count
            assert line.get(f"loss/{name}", 0) == pytest.approx(loss / max(count, 1), abs=1e-5)
        whole = sum(loss for loss, _ in wanted.values()) / sum(count for _, count in wanted.values())
        assert line["loss"] == pytest.approx(whole, abs=2e-4)  # the Trainer rounds
    totals = {name: sum(line[f"trained_tokens/{name}"] for line in lines) for name in mix.names}
    assert trainer.callback_handler.callbacks[0].totals == totals


@pytest.mark.slow
def test_epochs_draw_by_weight_and_the_model_learns_the_same(mix: MixedStore, tmp_path: Path) -> None:
    trainer = trainer_of(mix, tmp_path, max_steps=24)
    rows = [row for rows in trainer.get_train_dataloader().batch_sampler for row in rows]
    assert mix.count_sources(rows).tolist() == [72, 24]  # those with a label, by weight
    logged: list[dict[str, Any]] = []

    class Reports(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logged.append(dict(logs))

    with_callback = trainer_of(mix, tmp_path, max_steps=6, callbacks=[Reports(), LossBySource()])
    with_callback.train()
    assert "loss/chat" in logged[0]  # though the report comes first
    without = trainer_of(mix, tmp_path, max_steps=6, callbacks=[Reports()])
    without.train()
    assert "loss/chat" not in logged[-2]
    assert [line["loss"] for line in lines_of(without)] == [line["loss"] for line in lines_of(with_callback)]
    summed = trainer_of(mix, tmp_path, max_steps=6, logging_steps=3)
    summed.train()
    single, both = lines_of(with_callback)[:3], lines_of(summed)[0]
    for name in mix.names:
        tokens = sum(line[f"trained_tokens/{name}"] for line in single)
        losses = sum(line.get(f"loss/{name}", 0) * line[f"trained_tokens/{name}"] for line in single)
        assert both[f"trained_tokens/{name}"] == tokens
        assert both[f"loss/{name}"] == pytest.approx(losses / tokens, abs=1e-6)


TWO = """
import json, os, sys
from pathlib import Path
import torch
from fastcollate import MixedStore, StoreDataset, TokenStore
from fastcollate.integrations.huggingface import BucketedTrainerMixin, DataCollator, LossBySource
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

class Bucketed(BucketedTrainerMixin, Trainer):
    pass

mix = MixedStore({name: TokenStore(path) for name, path in json.loads(sys.argv[1]).items()},
                 weights={"chat": 3, "code": 1}, num_rows=96)
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=128, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0,
                                   embd_pdrop=0.0, attn_pdrop=0.0))
world = int(os.environ["WORLD_SIZE"])
args = TrainingArguments("run", per_device_train_batch_size=4 // world, gradient_accumulation_steps=2, max_steps=3,
                         logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
trainer = Bucketed(model, args, train_dataset=StoreDataset(mix, mask_prompt=True, max_length=20),
                   data_collator=DataCollator(), callbacks=[LossBySource()])
trainer.train()
lines = [line for line in trainer.state.log_history if "loss" in line]
Path(f"rank{os.environ['RANK']}.json").write_text(json.dumps(lines))
"""


@pytest.mark.slow
def test_two_ranks_log_what_one_logs(mix: MixedStore, tmp_path: Path, forks: Forks) -> None:
    paths = json.dumps({name: str(store.path) for name, store in zip(mix.names, mix.stores, strict=True)})
    found = {}
    for world in (1, 2):
        (folder := tmp_path / str(world)).mkdir()
        result = forks.run(TWO, paths, cwd=folder, num_ranks=world, environment={"HF_HUB_OFFLINE": "1"})
        assert result.returncode == 0, result.stderr[-3000:]
        found[world] = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]
    assert found[2][0] == found[2][1]
    for one, two in zip(found[1][0], found[2][0], strict=True):
        for name in mix.names:
            assert one[f"trained_tokens/{name}"] == two[f"trained_tokens/{name}"] > 0
            assert one[f"loss/{name}"] == pytest.approx(two[f"loss/{name}"], abs=1e-4)


def test_log_probabilities_as_trl_has_them_tell_the_same_as_logits() -> None:
    """`SFTTrainer` has no logits: its outputs hold the log-probability of each label, 0 where none is trained."""
    logits, labels = torch.randn(3, 7, 20), torch.randint(0, 20, (3, 7))
    labels[torch.rand(3, 7) < 0.4] = -100
    log_probs = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0)).squeeze(2)
    found = []
    for outputs in ({"logits": logits}, {"logits": None, "log_probs": log_probs * (labels[:, 1:] != -100)}):
        callback, state = LossBySource(), SimpleNamespace(log_history=[{"loss": 1.0}])
        callback.connect(["a", "b"], torch.device("cpu"))
        callback.note(labels, torch.tensor([[0], [1], [0]]), SimpleNamespace(**outputs))
        callback.on_log(None, state, None, logs := {"loss": 1.0})
        assert state.log_history == [logs]
        found.append(logs)
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    trained = (labels[:, 1:] != -100).sum(1).tolist()
    assert [found[0]["trained_tokens/a"], found[0]["trained_tokens/b"]] == [trained[0] + trained[2], trained[1]]
    callback.on_log(None, state, None, later := {"eval_loss": 1.0})
    assert later == {"eval_loss": 1.0}


@pytest.mark.slow
def test_a_trainer_that_would_tell_nothing_is_refused(mix: MixedStore, tmp_path: Path) -> None:
    one: TokenStore = mix.stores[0]
    with pytest.raises(InputError, match="LossBySource in a trainer that has no sources to tell"):
        trainer_of(one, tmp_path).train()  # type: ignore[arg-type]
    callback = LossBySource()
    callback.connect(["a"], torch.device("cpu"))
    labels = torch.ones((1, 3), dtype=torch.int64)
    with pytest.raises(InputError, match="needs the model's logits of all cells, and it gave none: switch off"):
        callback.note(labels, torch.zeros((1, 1), dtype=torch.int64), object())
    with pytest.raises(InputError, match="sources=True: for rows of a StoreDataset over a MixedStore"):
        DataCollator(sources=True)([{"input_ids": [1, 2], "labels": [1, 2]}])
