"""Training on a mix: loss and trained tokens of each source, summed over ranks, as each row alone would have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcollate import MixedStore
from fastcollate.errors import InputError
from fastcollate.store.store import TokenStore
from fastcollate.train import loop
from fastcollate.train.model import CONFIGS, GPT2, GPT2Config
from fastcollate.train.options import TrainOptions
from fastcollate.train.ranks import Ranks
from fastcollate.train.step import make_loader, split_mix
from tests.forks import Forks
from tests.helpers import metrics, run_cli, write_store

TINY = {"name": "gpt2", "fingerprint": "00", "vocab_size": 300, "pad_token_id": 299}
SMALL = GPT2Config(num_layers=1, num_heads=2, width=16, vocab_size=300, context_length=64)
TABLE = {0: {"one": 3.0, "two": 1.0}, 5: {"one": 0.0, "two": 1.0}}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenStore]:
    folder, random = tmp_path_factory.mktemp("mixed"), np.random.default_rng(4)
    found = {}
    for name, count in (("one", 80), ("two", 50)):
        lengths = random.integers(4, 40, count).tolist()
        rows = [([3, n - 3], random.integers(0, 299, n).tolist()) for n in lengths]
        found[name] = write_store(folder / name, rows, shard_rows=50, tokenizer=TINY)
    (folder / "mix.json").write_text(
        json.dumps(
            {"stores": {name: name for name in found}, "weights": {str(step): line for step, line in TABLE.items()}}
        )
    )
    return found


@pytest.mark.parametrize(
    "values",
    [
        {"policy": "shuffled"},
        {"policy": "packed", "capacity": 64, "batch_size": 2},
        {"accumulate": 2, "mask_prompt": True},
    ],
    ids=str,
)
def test_the_loss_of_each_source_is_that_of_its_rows(
    stores: dict[str, TokenStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    """At step 1, of the model as it starts, row by row; and in every step sums and counts add up."""
    monkeypatch.setattr("fastcollate.train.model.CONFIGS", {**CONFIGS, "tiny": SMALL})
    values = {"batch_size": 8, "max_steps": 4, **values}
    options = TrainOptions(
        out=tmp_path / "run", device="cpu", sample_tokens=0, eval_every=2, tensorboard=False, warmup=2, **values
    )
    mix = MixedStore(stores, weights=TABLE, step_rows=values["batch_size"] * values.get("accumulate", 1))
    started: list[GPT2] = []
    make = loop.files.make_model

    def noted(*args: Any) -> GPT2:
        model = make(*args)
        started.append(GPT2(model.config))
        started[0].load_state_dict(model.state_dict())
        return model

    monkeypatch.setattr(loop.files, "make_model", noted)
    loop.train(mix, options, progress=False)
    lines = metrics(tmp_path / "run")
    assert len(lines) == 4
    for line in lines:
        parts = line["sources"].values()
        total = sum(part["trained_tokens"] for part in parts)
        mean = sum((part["loss"] or 0) * part["trained_tokens"] for part in parts) / total
        assert mean == pytest.approx(line["loss"], rel=1e-6)
    training, _ = split_mix(mix, options)
    loader = make_loader(training, options, Ranks(0, 1, torch.device("cpu"), None), None, 64, width=16, balance=True)
    sums, counts = dict.fromkeys(mix.names, 0.0), dict.fromkeys(mix.names, 0)
    for _, batch in zip(range(options.accumulate), loader, strict=False):
        inputs, targets = batch.inputs.flatten(), batch.targets.flatten()
        width = batch.inputs.shape[1]
        bounds = batch[-1].tolist() if len(batch) > 2 else list(range(0, len(inputs) + 1, width))
        assert batch.sources is not None
        for source, start, stop in zip(batch.sources.tolist(), bounds[:-1], bounds[1:], strict=True):
            if source >= 0:
                with torch.no_grad():
                    logits = started[0](inputs[None, start:stop])[0].double()
                losses = torch.nn.functional.cross_entropy(logits, targets[start:stop], reduction="sum")
                sums[mix.names[source]] += float(losses)
                counts[mix.names[source]] += int((targets[start:stop] != -100).sum())
    for name, part in lines[0]["sources"].items():
        assert part["trained_tokens"] == counts[name]
        assert part["loss"] == pytest.approx(sums[name] / counts[name], rel=1e-5)


@pytest.mark.slow
def test_two_ranks_tell_the_same_of_each_source_and_a_run_goes_on(
    stores: dict[str, TokenStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forks: Forks
) -> None:
    mix = stores["one"].path.parent / "mix.json"
    common = ["--mix", mix, "--policy", "shuffled", "--batch-size", 8, "--device", "cpu", "--no-tensorboard"]
    common += ["--schedule", "constant", "--sample-tokens", 0, "--eval-every", 0]
    assert run_cli(monkeypatch, "train", "--out", tmp_path / "one", *common, "--max-steps", 6) == 0
    for steps in (3, 6):
        two = ["train", "--out", tmp_path / "two", *common, "--max-steps", steps, "--resume"]
        forks.run("-m fastcollate", *two, cwd=tmp_path, num_ranks=2).check_returncode()
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 6
    for own, other in zip(one, two, strict=True):
        for name in stores:
            part, same = own["sources"][name], other["sources"][name]
            assert part["trained_tokens"] == same["trained_tokens"]
            assert part["loss"] == (None if same["loss"] is None else pytest.approx(same["loss"], rel=1e-4))
    assert one[5]["sources"]["one"] == {"loss": None, "trained_tokens": 0}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "no mix"),
        ('{"stores": {"one": "one"}, "wieghts": 1}', "wieghts"),
        ('{"stores": {"one": "nowhere"}}', "no finished token store"),
        ('{"stores": {"one": "one"}, "weights": {"x": {"one": 1}}}', "no mix"),
    ],
)
def test_a_file_that_is_no_mix_is_told(
    stores: dict[str, TokenStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], content: str, told: str,
) -> None:  # fmt: skip
    path = stores["one"].path.parent / "other.json"
    path.write_text(content)
    assert run_cli(monkeypatch, "train", "--mix", path, "--out", tmp_path / "run", "--max-steps", 1) == 1
    assert told in capsys.readouterr().err


def test_a_part_of_a_store_is_refused(stores: dict[str, TokenStore], tmp_path: Path) -> None:
    mix = MixedStore(stores, rows={"one": range(20)})
    with pytest.raises(InputError, match="leave rows out"):
        loop.train(mix, TrainOptions(out=tmp_path / "run", device="cpu", max_steps=1), progress=False)


@pytest.mark.parametrize("packing", ["concatenate", "crop"])
def test_packs_without_padding_fill_the_steps(
    stores: dict[str, TokenStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    monkeypatch.setattr("fastcollate.train.model.CONFIGS", {**CONFIGS, "tiny": SMALL})
    options = TrainOptions(
        out=tmp_path / "run", device="cpu", sample_tokens=0, eval_every=0, tensorboard=False, policy="packed",
        packing=packing, capacity=32, batch_size=4, max_steps=3, mask_boundaries=False,
    )  # fmt: skip
    loop.train(stores["one"], options, progress=False)
    useful = sorted(line["useful_tokens"] for line in metrics(tmp_path / "run"))
    assert useful[1:] == [4 * 32] * 2  # the epoch's last pack may be short
    assert useful[0] > 3 * 32
