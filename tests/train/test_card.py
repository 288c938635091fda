"""What can be tested of the GPU half without a card: choices, warnings, and how a profile is counted."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.gpu import figures as gpu
from fastcollate.errors import InputError
from fastcollate.train.cuda import attention as room
from fastcollate.train.cuda.compiler import _compiles, triton_compiles
from fastcollate.train.loss import Readback
from fastcollate.train.options import TrainOptions
from fastcollate.train.ranks import choose_device, join_ranks


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_cards")
def test_each_rank_takes_its_own_card_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [choose_device("auto", rank).index for rank in range(2)] == [0, 1]
    assert choose_device("cuda:1", 0).index == 1
    for rank in (2, 3):
        with pytest.raises(InputError, match=f"rank {rank} of this machine has no card of its own, there are 2"):
            choose_device("cuda", rank)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="cuda:1: all ranks would share that card"):
        join_ranks("cuda:1")


def test_the_precision_is_the_device_s_or_the_run_s() -> None:
    auto = TrainOptions()
    assert [auto.with_precision(kind).precision for kind in ("cpu", "cuda")] == ["float32", "bfloat16"]
    assert auto.with_precision("cuda", {"precision": "float32"}).precision == "float32"
    assert TrainOptions(precision="bfloat16").with_precision("cpu").precision == "bfloat16"


def windowed(query: Any, *_: Any, window_size: tuple[int, int] = (-1, -1)) -> Any:
    return "window", window_size


def flagged(query: Any, *_: Any, is_causal: bool = False, return_aux: Any = None) -> Any:
    return "flag", is_causal


def neither(query: Any, *_: Any) -> Any:
    raise AssertionError


def test_either_way_of_pytorch_to_be_causal_is_taken() -> None:
    for attention, expected in ((windowed, ("window", (-1, 0))), (flagged, ("flag", True))):
        causal = room.causal_varlen(attention)
        assert causal is not None
        assert causal(1, 2, 3) == expected
    assert room.causal_varlen(neither) is None


def test_the_reason_for_a_slow_attention_has_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "VARLEN_ATTENTION", windowed)
    assert room.why_segments_one_by_one(torch.bfloat16, 0.0) is None
    assert "--precision bfloat16" in str(room.why_segments_one_by_one(torch.float32, 0.0))
    assert "--dropout 0" in str(room.why_segments_one_by_one(torch.bfloat16, 0.1))
    monkeypatch.setattr(room, "VARLEN_ATTENTION", None)
    assert "2.10 and later" in str(room.why_segments_one_by_one(torch.float16, 0.0))


@pytest.mark.parametrize("package", [True, False])
@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
def test_flash_attention_3_is_lent_to_a_run_where_it_is_there(
    package: bool, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", done.append, raising=False)
    undo = lambda: done.append("undone")  # noqa: E731
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", undo, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda _: "found" if package else None)
    monkeypatch.setattr(room, "triton_compiles", lambda _: True)
    with room.fastest_attention(torch.device("cuda", 0)) as name:
        there = package and capability == (9, 0)
        assert (name, done) == (("FlashAttention 3", ["FA3"]) if there else ("ours", []))
    assert done == (["FA3", "undone"] if there else [])
    with room.fastest_attention(torch.device("cpu")) as name:
        assert name == "as PyTorch comes"


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler. Please specify via CC"), ValueError()])
def test_without_a_compiler_pytorch_s_own_kernels_are_taken(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object) -> None:
        raise error

    name = "fastcollate.train.cuda.cross_entropy"
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(to_gradient=cannot))
    _compiles.cache_clear()
    try:
        with pytest.warns(
            RuntimeWarning, match=r"slower: Triton compiles nothing for cpu \(.+\); it needs a C compiler"
        ):
            assert not triton_compiles(torch.device("cpu"))
        monkeypatch.setitem(sys.modules, name, None)  # not installed
        _compiles.cache_clear()
        assert not triton_compiles(torch.device("cpu"))
    finally:
        _compiles.cache_clear()


def test_whether_triton_compiles_is_a_constant_to_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def answer(device: torch.device) -> bool:
        asked.append(device)
        return True

    monkeypatch.setattr("fastcollate.train.cuda.compiler._compiles", answer)
    compiled = torch.compile(lambda x: x + triton_compiles(x.device), backend="eager", fullgraph=True)
    assert [int(compiled(torch.tensor(n))) for n in (1, 2, 3)] == [2, 3, 4]
    assert asked == [torch.device("cpu")]


def test_a_number_is_read_back() -> None:
    value = torch.tensor(2.5, requires_grad=True)
    found = Readback(value * 2)
    assert found.read() == 5.0


@pytest.mark.cuda
def test_a_number_is_read_back_without_waiting_for_what_follows() -> None:
    found = Readback(torch.full((), 3.0, device="cuda"))
    torch.cuda._sleep(2_000_000_000)  # about a second of work behind it
    last = torch.cuda.Event()
    last.record()
    assert found.read() == 3.0
    assert not last.query()


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362), ("NVIDIA L40", 181), ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA A1000", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_a_card_is_found_by_whole_words(card: str, peak: int | None) -> None:
    assert gpu.peak_of(card) == (None if peak is None else peak * 1e12)


def test_a_profile_counts_each_kernel_once() -> None:
    events = [("gemm", 0.0, 10.0), ("gemm", 30.0, 40.0), ("add", 5.0, 12.0), ("Memcpy HtoD", 8.0, 14.0),
              ("Memset", 50.0, 60.0)]  # fmt: skip
    assert gpu.profiled(events, steps=2) == {
        "h2d_us_per_step": 3.0,
        "h2d_hidden_share": round(4 / 6, 4),
        "gpu_busy_us_per_step": 11.0,
        "gpu_idle_share": round(1 - 22 / 40, 4),
        "top_kernels": [{"name": "gemm", "us_per_step": 10.0}, {"name": "add", "us_per_step": 3.5}],
    }
    one_behind_the_other = [*events[:1], ("gemm", 14.0, 20.0), *events[2:]]
    assert gpu.profiled(one_behind_the_other, steps=2)["h2d_hidden_share"] == 1.0


def test_results_are_saved_where_there_is_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    gpu.save_step("dense", {"failed": "cut off"})
    gpu.save_step("t0", {"seconds": 1})
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert saved["dense"]["failed"] == "cut off"
    assert (saved["t0"]["seconds"], saved["t0"]["driver"], saved["machine"]["commit"]) == (1, None, "")
