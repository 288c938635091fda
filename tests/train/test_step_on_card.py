"""Faults that only a card shows, in the model and its step; those that make sense without one run on the CPU too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.train_throughput import loaded, random_rows
from fastcollate.load.loader import BatchLoader
from fastcollate.store.store import TokenStore
from fastcollate.train.loop import train
from fastcollate.train.model import CONFIGS, GPT2, GPT2Config
from fastcollate.train.options import TrainOptions
from fastcollate.train.ranks import Ranks, num_compilations
from fastcollate.train.step import MicroBatch, Stepper, empty_batch

NEEDS_CARD = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CARD)]
MODEL = GPT2Config(num_layers=2, num_heads=2, width=128)
POLICIES = ["bucketed", "packed"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    lengths = np.random.default_rng(3).lognormal(3.5, 0.8, 400).astype(np.int64).clip(2, 128)
    return random_rows(tmp_path_factory.mktemp("card") / "store", lengths)


def batches_of(store: TokenStore, device: str, policy: str, **options: Any) -> Iterator[MicroBatch]:
    chosen: dict[str, Any] = {"policy": policy, "max_tokens": 512, "max_length": 128, "device": device, **options}
    return loaded(BatchLoader(store, **chosen))


def stepper(device: str, config: GPT2Config = MODEL, **options: Any) -> Stepper:
    torch.manual_seed(0)
    chosen: dict[str, Any] = {"precision": "bfloat16", "device": device, **options}
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    return Stepper(GPT2(config).to(place), TrainOptions(**chosen), Ranks(0, 1, place, None))


def loss_and_gradients(own: Stepper, batch: MicroBatch) -> tuple[float, dict[str, torch.Tensor]]:
    with own.autocast():
        loss = own._loss(batch, 1 / batch.num_trained)
    loss.backward()
    return float(loss.detach()), {
        name: p.grad.float().cpu() for name, p in own.model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("device", DEVICES)
def test_packed_in_16_bits_is_near_padded_in_32(store: TokenStore, device: str) -> None:
    """The same rows: one batch of a plan, padded, and end to end as segments of one pack."""
    from benchmarks.train_throughput import without_padding

    padded = next(batches_of(store, device, "bucketed", max_tokens=None, batch_size=8))
    packed = without_padding(padded, store.pad_token_id)
    assert packed.cu_seqlens is not None
    wide, wanted = loss_and_gradients(stepper(device, precision="float32"), padded)
    for batch in (padded, packed):
        narrow, found = loss_and_gradients(stepper(device), batch)
        assert narrow == pytest.approx(wide, rel=1e-2)
        for name, gradient in wanted.items():
            assert found[name].isfinite().all()
            error = (found[name] - gradient).norm() / gradient.norm()
            assert error < 0.06, (
                name,
                float(error),
            )  # 16 bits through a few layers; a wrong mask makes it 0.3 and more


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_run_in_two_parts_is_near_the_whole(store: TokenStore, device: str, policy: str, tmp_path: Path) -> None:
    """To the last bit on a CPU; FlashAttention's backward pass adds in any order."""
    common = {
        "model": "tiny", "policy": policy, "max_tokens": 512, "max_length": 128, "device": device, "epochs": None,
        "sample_tokens": 0, "eval_every": 0, "tensorboard": False, "schedule": "constant", "precision": "bfloat16",
    }  # fmt: skip

    def go(name: str, steps: int, **options: Any) -> torch.Tensor:
        train(store, TrainOptions(out=tmp_path / name, max_steps=steps, **common, **options), progress=False)
        saved = torch.load(tmp_path / name / "checkpoint.pt", map_location="cpu", weights_only=True)
        return torch.cat([tensor.flatten().float() for tensor in saved["model"].values()])

    whole = go("whole", 8)
    go("parts", 4)
    parts = go("parts", 8, resume=True)
    if device == "cpu":
        assert torch.equal(whole, parts)
    start = torch.cat([p.detach().flatten() for p in stepper("cpu", CONFIGS["tiny"]).model.parameters()])
    assert (whole - parts).norm() < 0.05 * (whole - start).norm()


class TestOnCard:
    pytestmark = NEEDS_CARD

    @pytest.mark.parametrize("clip", [0.0, 1.0])
    @pytest.mark.parametrize("policy", POLICIES)
    def test_a_step_waits_for_nothing(self, store: TokenStore, policy: str, clip: float) -> None:
        batches, own = batches_of(store, "cuda", policy), stepper("cuda", clip=clip)
        none = empty_batch(torch.device("cuda", 0))
        try:
            for number in range(6):
                if number == 3:
                    torch.cuda.set_sync_debug_mode("error")
                batch = next(batches)
                loss = own.step([batch, none], batch.num_trained, 1e-4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert 0 < float(loss) < 20

    @pytest.mark.parametrize("graphs", [False, True], ids=["", "cuda_graphs"])
    def test_compiled_packs_have_one_shape_and_the_same_losses(self, store: TokenStore, graphs: bool) -> None:
        before = num_compilations()
        losses = []
        for options in ({}, {"compile": True, "cuda_graphs": graphs}):
            own, found = stepper("cuda", **options), []
            batches = batches_of(store, "cuda", "packed", tail="uneven")
            for first, second in zip(*[batches] * 2, strict=True):
                found.append(own.step([first, second], first.num_trained + second.num_trained, 1e-4))
                if len(found) == 25:  # beyond an epoch, whose last batch is smaller
                    break
            losses.append([float(loss) for loss in found])
        assert losses[1] == pytest.approx(losses[0], rel=1e-2), losses
        assert num_compilations() - before == 1
        torch.compiler.reset()

    def test_eight_rows_of_the_124m_model_fit_a_slice_of_a_card(self, tmp_path: Path) -> None:
        """A seventh of an H100 (MIG) has 10 GB."""
        rows = random_rows(tmp_path / "store", np.full(16, 1024))
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(10e9 / total)
        try:
            own = stepper("cuda", CONFIGS["124M"])
            for batch, _ in zip(
                batches_of(rows, "cuda", "bucketed", max_tokens=8192, max_length=1024), "ab", strict=False
            ):
                assert float(own.step([batch], batch.num_trained, 1e-4)) > 0
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()

    def test_a_compiled_run_of_the_loop(self, store: TokenStore, tmp_path: Path) -> None:
        common = TrainOptions(
            out=tmp_path / "plain", model="tiny", policy="packed", max_tokens=512, max_length=128, max_steps=12,
            epochs=None, sample_tokens=8, eval_every=6, eval_batches=2, tensorboard=False, device="cuda",
        )  # fmt: skip
        plain = train(store, common, progress=False)
        compiled = train(store, replace(common, out=tmp_path / "compiled", compile=True), progress=False)
        assert compiled.last_loss == pytest.approx(plain.last_loss, rel=1e-2)
        assert compiled.validation_loss == pytest.approx(plain.validation_loss, rel=1e-2)
        torch.compiler.reset()
