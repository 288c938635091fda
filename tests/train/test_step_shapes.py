"""Shapes that a compiled model sees: few widths, one size of packs."""

from __future__ import annotations

import torch

from fastcollate.train.model import GPT2, GPT2Config
from fastcollate.train.step import MicroBatch, fill_packs

MODEL = GPT2Config(num_layers=2, num_heads=2, width=16, vocab_size=101, context_length=64)


def test_empty_packs_and_segments_change_no_loss() -> None:
    torch.manual_seed(0)
    bounds = torch.tensor([0, 7, 20, 33, 40], dtype=torch.int32)
    positions = torch.cat([torch.arange(int(n)) for n in bounds.diff()]).view(2, 20)
    batch = MicroBatch(torch.randint(101, (2, 20)), torch.randint(101, (2, 20)), positions, bounds, 40, 40)
    filled = fill_packs(batch, 4, 16)
    assert [len(part) for part in filled[:4] if part is not None] == [4, 4, 4, 16]
    assert filled.cu_seqlens is not None
    assert filled.cu_seqlens.dtype == torch.int32
    assert filled.cu_seqlens.tolist() == [0, 7, 20, 33, 40, 60, *[80] * 10]
    assert (filled.targets[2:] == -100).all()
    assert torch.equal(filled.targets[:2], batch.targets)
    model = GPT2(MODEL).eval()
    with torch.no_grad():
        before = model.hidden(batch.inputs, batch.position_ids, batch.cu_seqlens)
        after = model.hidden(filled.inputs, filled.position_ids, filled.cu_seqlens)
    assert torch.equal(after[:2], before)


def test_a_batch_of_the_usual_size_stays() -> None:
    bounds = torch.tensor([0, 3, 4], dtype=torch.int32)
    batch = MicroBatch(torch.ones(1, 4).long(), torch.ones(1, 4).long(), torch.arange(4)[None], bounds, 4, 4)
    filled = fill_packs(batch, 1, 3)
    assert all(torch.equal(a, b) for a, b in zip(filled[:4], batch[:4], strict=True) if a is not None and b is not None)
