"""What `docs/ranks.md` hands to other projects is what they ask for; `test_docs.py` runs the page as it stands."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_docs import blocks

from fastcollate import BatchLoader
from fastcollate.store.store import TokenStore
from fastcollate.testing import assert_resumes, rows_of
from tests.forks import Forks
from tests.helpers import sample_store

PAGE = Path(__file__).resolve().parent.parent / "docs" / "ranks.md"
NUM_ROWS = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    sample_store(folder / "store", NUM_ROWS)
    return folder


def recipe(word: str) -> str:
    (text,) = [text for _, _, text in blocks(PAGE) if word in text]
    return text


def names_of(word: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What a recipe that ran has defined."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(recipe(word), word, "exec"), names)
    return SimpleNamespace(**{name: value for name, value in names.items() if not name.startswith("__")}, all=names)


@pytest.mark.slow
def test_fsdp_goes_on_with_another_number_of_ranks(folder: Path, tmp_path: Path, forks: Forks) -> None:
    """Three steps on two ranks and three on one have the losses of six on one."""
    found = []
    for numbers in ((2, 1), (1, 1)):
        out = tmp_path / str(numbers)
        out.mkdir()
        (out / "store").symlink_to(folder / "store")
        text = ""
        for number in numbers:
            result = forks.run(recipe("fully_shard"), cwd=out, num_ranks=number)
            assert result.returncode == 0, result.stderr[-3000:]
            text += result.stdout
        found.append([float(loss) for loss in re.findall(r"loss ([\d.]+)", text)])
    assert len(found[0]) == 6
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert len(set(found[0])) == 6


@pytest.mark.slow
def test_torchtitan_gets_batches_without_end_and_resumes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = names_of("StoreDataLoader", folder, monkeypatch).StoreDataLoader

    def make_loader(rank: int, num_ranks: int) -> Any:
        options = {"num_tokens_per_batch": 1024 // num_ranks, "max_context_length": 512, "tokenizer": None}
        return made(made.Config(store="store"), dp_rank=rank, dp_world_size=num_ranks, **options)

    class OneEpoch:
        """As many batches as an epoch has."""

        def __init__(self, rank: int, num_ranks: int) -> None:
            self._made = make_loader(rank, num_ranks)
            self.state_dict, self._is_new = self._made.state_dict, True

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self._made.load_state_dict({})  # as of a checkpoint without a loader
            self._made.load_state_dict(state)
            self._done = state["next_batch"]

        _done = 0

        def __iter__(self) -> Any:
            for inputs, labels in islice(self._made, len(self._made.loader) - self._done):
                assert set(inputs) == {"input", "positions"}
                yield inputs["input"], labels, inputs["positions"]

    def rows_in_packs(batch: Any) -> Any:
        inputs, labels, positions = (part.flatten() for part in batch)
        bounds = [*(positions == 0).nonzero().flatten().tolist(), len(inputs)]
        return rows_of({"input_ids": inputs, "labels": labels, "cu_seq_lens_q": torch.tensor(bounds)})

    assert_resumes(OneEpoch, world_sizes=(1, 2), every=7, rows_of=rows_in_packs, num_rows=NUM_ROWS)
    loader = make_loader(0, 1)
    assert len(list(islice(loader, 3 * len(loader.loader)))) == 3 * len(loader.loader)
    assert loader.loader.epoch == 2


@pytest.mark.slow
def test_nanochats_loop_gets_what_it_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """int32 and int64 of one shape, -1 where nothing is trained; an epoch that ends with its last batch, told by three
    globals."""
    made = names_of("sft_data_generator", folder, monkeypatch)
    for wanted in (-1, 5):
        made.all.update(last_step=False, approx_progress=0.0, current_epoch=1)
        batches, progress = [], [0.0]
        generator = made.sft_data_generator(wanted)
        while not made.all["last_step"]:
            inputs, targets = next(generator)
            assert (inputs.dtype, targets.dtype) == (torch.int32, torch.int64)
            assert inputs.shape == targets.shape == (2, 512)
            assert int(targets.min()) == -1
            assert int(inputs.min()) >= 0
            batches.append((inputs, targets))
            progress.append(made.all["approx_progress"])
        assert progress == sorted(set(progress))
        assert progress[-1] == 1.0
        assert made.all["current_epoch"] == 1
        loader = BatchLoader("store", policy="packed", batch_size=2, capacity=512, mask_prompt=True, mode="positional")
        assert len(batches) == (5 if wanted > 0 else len(loader))
        for (inputs, targets), batch in zip(batches, loader, strict=False):
            assert torch.equal(inputs.long(), batch.inputs)
            assert torch.equal(targets.masked_fill(targets == -1, -100), batch.targets)
        if wanted < 0:
            next(generator)
            assert made.all["current_epoch"] == 2


@dataclass
class PackedSeqParams:
    """Megatron's fields that a batch decides."""

    qkv_format: str
    cu_seqlens_q: torch.Tensor
    cu_seqlens_kv: torch.Tensor
    cu_seqlens_q_padded: torch.Tensor
    cu_seqlens_kv_padded: torch.Tensor
    max_seqlen_q: int
    max_seqlen_kv: int


def test_megatrons_parameters_bound_each_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = names_of("PackedSeqParams", folder, monkeypatch)
    params = PackedSeqParams(**made.thd)
    assert params.qkv_format == "thd"
    for field in fields(PackedSeqParams):
        value = getattr(params, field.name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == torch.int32
            assert value[0] == 0
    lengths, padded = params.cu_seqlens_q.diff(), params.cu_seqlens_q_padded.diff()
    assert bool((lengths <= padded).all())
    assert bool((padded % 4 == 0).all())
    assert type(params.max_seqlen_q) is int
    assert params.max_seqlen_q == params.max_seqlen_kv == int(padded.max())
    store = TokenStore(folder / "store")
    rows = {tuple(row.input_ids.tolist()) for row in store}
    inputs = made.batch.inputs.flatten()
    starts = params.cu_seqlens_q_padded.tolist()
    found = [tuple(inputs[a : a + n].tolist()) for a, n in zip(starts, lengths.tolist(), strict=False) if n]
    assert len(found) > 1
    assert set(found) <= rows
