"""Faults that only a card shows, in the model and its step; those that make sense without one run on the CPU too."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.train_throughput import loaded, random_rows, without_padding
from fastcollate.load.loader import BatchLoader
from fastcollate.store.store import TokenStore
from fastcollate.train.loop import train
from fastcollate.train.model import CONFIGS, GPT2, GPT2Config
from fastcollate.train.options import TrainOptions
from fastcollate.train.ranks import Ranks, num_compilations
from fastcollate.train.step import MicroBatch, Stepper, empty_batch
from tests.helpers import DEVICES

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
    chosen: dict[str, Any] = {"precision": "bfloat16", "device": device, "clip": 0.0, **options}
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    return Stepper(GPT2(config).to(place), TrainOptions(**chosen), Ranks(0, 1, place, None))


def step_of(own: Stepper, batches: Sequence[MicroBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    """A step's loss, and the gradients as its optimizer saw them."""
    seen: dict[str, torch.Tensor] = {}

    def note(*_: Any) -> None:
        seen.update({name: p.grad.float().cpu().clone() for name, p in own.model.named_parameters()})  # type: ignore[union-attr]

    handle = own.optimizer.register_step_pre_hook(note)
    try:
        return float(own.step(batches, sum(batch.num_trained for batch in batches), 1e-4)), seen
    finally:
        handle.remove()


def assert_near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Gradients in 16 bits, by the norm of each parameter's difference.

    They pass some dozen roundings to 8 bits, of 0.2% each: 1% in matrices, up to 5% in norms and biases, where a sum of
    many cells cancels. One target lost of 800 makes it 7% in a matrix, one bound of a segment off by one 20%.
    """
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = float((found[name] - gradient).norm() / gradient.norm())
        assert error < (0.03 if gradient.ndim > 1 else 0.1), (name, error)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_packed_in_16_bits_is_near_padded_in_32(store: TokenStore, device: str) -> None:
    """The same rows: one batch of a plan, padded, on the CPU, and end to end as segments of one pack on the device."""
    padded, on_cpu = (
        next(batches_of(store, where, "bucketed", batch_size=8, max_tokens=None)) for where in (device, "cpu")
    )
    packed = without_padding(padded, store.pad_token_id)
    assert packed.cu_seqlens is not None
    wide, wanted = step_of(stepper("cpu", precision="float32"), [on_cpu])
    for batch in (padded, packed):
        own = stepper(device)
        assert own.sum_of_losses(batch) == pytest.approx(wide * on_cpu.num_trained, rel=1e-2)
        narrow, found = step_of(own, [batch])
        assert narrow == pytest.approx(wide, rel=1e-2)
        assert_near(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_run_in_two_parts_is_near_the_whole(store: TokenStore, device: str, policy: str, tmp_path: Path) -> None:
    """To the last bit on a CPU; FlashAttention's backward pass adds in any order. A step more makes 25%."""
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
    torch.manual_seed(TrainOptions().seed)
    start = torch.cat([p.detach().flatten() for p in GPT2(CONFIGS["tiny"]).parameters()])
    assert (whole - parts).norm() < 0.05 * (whole - start).norm()


@pytest.fixture
def no_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def losses_of(store: TokenStore, device: str, policy: str, steps: int) -> list[float]:
    own = stepper(device, replace(MODEL, width=64), precision="float32")
    batches = islice(batches_of(store, device, policy, max_tokens=256, mask_prompt=True), steps)
    losses = [own.step([batch], batch.num_trained, 1e-4) for batch in batches]
    return [float(loss) for loss in losses]


@pytest.mark.cuda
class TestOnCard:
    @pytest.mark.usefixtures("no_tf32")
    @pytest.mark.filterwarnings("ignore:packed attention runs segment by segment")
    @pytest.mark.parametrize(("policy", "steps"), [("bucketed", 200), ("packed", 50)])
    def test_losses_are_those_of_the_cpu(self, store: TokenStore, policy: str, steps: int) -> None:
        card, host = (losses_of(store, device, policy, steps) for device in ("cuda", "cpu"))
        assert len(card) == steps
        assert card == pytest.approx(host, rel=1e-4, abs=0)

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

    @pytest.mark.parametrize(("slice_gb", "width"), [(10, 1024), (5, 300)])
    def test_eight_rows_of_the_124m_model_fit_a_slice_of_a_card(
        self, slice_gb: int, width: int, tmp_path: Path
    ) -> None:
        """A seventh of an H100 (MIG) has 10 GB, one of an A100 5 GB; weights, gradients and AdamW's state are 2 GB."""
        rows = random_rows(tmp_path / "store", np.full(16, width))
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(slice_gb * 1e9 / torch.cuda.get_device_properties(0).total_memory)
        try:
            own = stepper("cuda", CONFIGS["124M"])
            for batch in islice(batches_of(rows, "cuda", "bucketed", max_tokens=8 * width, max_length=1024), 2):
                assert batch.inputs.shape == (8, width)
                assert float(own.step([batch], batch.num_trained, 1e-4)) > 0
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert torch.cuda.max_memory_allocated() < 0.8e9 * slice_gb

    @pytest.mark.parametrize("graphs", [False, True], ids=["", "cuda_graphs"])
    def test_compiled_packs_have_one_shape_and_the_same_gradients(self, store: TokenStore, graphs: bool) -> None:
        """Two batches a step: the gradients of the first must outlive the second, also where both are replayed."""
        before = num_compilations()
        plain, compiled = stepper("cuda"), stepper("cuda", compile=True, cuda_graphs=graphs)
        batches = batches_of(store, "cuda", "packed", tail="uneven")
        for pair in islice(zip(batches, batches, strict=True), 25):  # beyond an epoch, whose last batch is smaller
            (loss, found), (expected, wanted) = step_of(compiled, pair), step_of(plain, pair)
            assert loss == pytest.approx(expected, rel=1e-2)
            assert_near(found, wanted)
        assert num_compilations() - before == 1
        torch.compiler.reset()

    def test_a_compiled_run_of_the_loop(self, store: TokenStore, tmp_path: Path) -> None:
        common = TrainOptions(
            out=tmp_path / "plain", model="tiny", policy="packed", max_tokens=512, max_length=128, max_steps=12,
            epochs=None, sample_tokens=8, eval_every=6, eval_batches=2, tensorboard=False, device="cuda",
        )  # fmt: skip
        plain = train(store, common, progress=False)
        compiled = train(store, replace(common, out=tmp_path / "compiled", compile=True), progress=False)
        assert (plain.compilations, compiled.compilations) == (0, 1)
        assert compiled.last_loss == pytest.approx(plain.last_loss, rel=1e-2)
        assert compiled.validation_loss == pytest.approx(plain.validation_loss, rel=1e-2)
        torch.compiler.reset()
