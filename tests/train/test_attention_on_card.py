"""Our attention kernel against the textbook's formula in float64, on a card: values, gradients, bits, sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastcollate.train.cuda.attention import cells_for_our_kernel, our_kernel

pytestmark = pytest.mark.cuda

# Bounds; a call may have cells behind the last of them.
BOUNDS = {
    "one": ([0, 300], 300),
    "short ones": ([0, 1, 2, 3, 5, 8, 70, 71, 135, 200], 200),
    "empty ones": ([0, 0, 64, 64, 64, 128, 130, 130], 130),
    "at the blocks": ([0, 32, 64, 128, 192, 256], 256),
    "beside the blocks": ([0, 31, 65, 127, 193, 255, 257], 257),
    "long and short": ([0, 500, 503, 1030], 1030),
    "cells behind": ([0, 40, 90], 150),
    "nothing but cells": ([0], 77),
    "one cell": ([0, 1], 1),
}


def textbook(qkv: Tensor, bounds: Sequence[int]) -> Tensor:
    """Softmax of scaled products with earlier cells of the segment, in float64 on the CPU."""
    parts = []
    for start, end in pairwise([*bounds, len(qkv)]):
        query, key, value = qkv[start:end].permute(1, 2, 0, 3)
        scores = query @ key.transpose(1, 2) * qkv.shape[-1] ** -0.5
        later = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        parts.append((scores.masked_fill(later, -torch.inf).softmax(-1) @ value).transpose(0, 1))
    return torch.cat(parts)


def both(qkv: Tensor, bounds: Sequence[int], grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of our kernel."""
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    own = qkv.detach().clone().requires_grad_()
    x = own.flatten(1)[None]
    cells = cells_for_our_kernel(cu_seqlens, x, qkv.shape[-1], 0.0)
    assert cells is not None
    mixed = our_kernel(own, cells)
    mixed.backward(grad)
    assert own.grad is not None
    return mixed.detach(), own.grad


@pytest.mark.parametrize(
    ("name", "size", "dtype"),
    [(name, 64, torch.bfloat16) for name in BOUNDS]
    + [("long and short", size, torch.bfloat16) for size in (16, 32, 128)]
    + [("long and short", 64, torch.float16)],
)
def test_values_and_gradients_are_the_textbook_s(name: str, size: int, dtype: torch.dtype) -> None:
    bounds, num_cells = BOUNDS[name]
    torch.manual_seed(0)
    qkv = torch.randn(num_cells, 3, 3, size, device="cuda", dtype=dtype)
    grad = torch.randn(num_cells, 3, size, device="cuda", dtype=dtype)
    mixed, gradient = both(qkv, bounds, grad)
    wide = qkv.cpu().double().requires_grad_()
    expected = textbook(wide, bounds)
    expected.backward(grad.cpu().double())
    assert wide.grad is not None
    pairs = [(mixed, expected), *((gradient[:, part], wide.grad[:, part]) for part in range(3))]
    for found, wanted in pairs:
        error = (found.cpu().double() - wanted).norm() / wanted.norm().clamp_min(1)
        assert error < (0.01 if dtype == torch.bfloat16 else 0.002), float(error)


def test_a_segment_does_not_see_the_others_and_the_bits_are_the_same_again() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(1000, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(1000, 2, 64, device="cuda", dtype=torch.bfloat16)
    bounds = [0, 130, 437, 900, 1000]
    mixed, gradient = both(qkv, bounds, grad)
    again = both(qkv, bounds, grad)
    assert torch.equal(mixed, again[0])
    assert torch.equal(gradient, again[1])
    qkv[:437] = torch.randn_like(qkv[:437]) * 9
    grad[900:] = torch.randn_like(grad[900:]) * 9
    mixed_2, gradient_2 = both(qkv, bounds, grad)
    assert torch.equal(mixed[437:], mixed_2[437:])
    assert torch.equal(gradient[437:900], gradient_2[437:900])


def test_places_beyond_2_to_the_31_are_found() -> None:
    num_cells, size = 1 << 20, 64
    qkv = torch.randn(num_cells, 3, 12, size, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    grad = torch.randn(num_cells, 12, size, device="cuda", dtype=torch.bfloat16)
    bounds = list(range(0, num_cells + 1, 1024))
    mixed, gradient = both(qkv, bounds, grad)
    for part in (slice(0, 2048), slice(num_cells - 2048, num_cells)):
        expected, expected_gradient = both(qkv[part], [0, 1024, 2048], grad[part])
        assert torch.equal(mixed[part], expected)
        assert torch.equal(gradient[part], expected_gradient)


def test_rows_of_one_length_are_segments_too() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(4, 100, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
    cells = cells_for_our_kernel(None, qkv.flatten(2), 64, 0.0)
    assert cells is not None
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    found = our_kernel(qkv.flatten(0, 1), cells).view(4, 100, 2, 64)
    assert (found - expected).float().norm() < 0.01 * expected.float().norm()


def test_what_the_kernel_cannot_do_is_left_to_pytorch() -> None:
    x = torch.zeros(1, 8, 96, device="cuda", dtype=torch.bfloat16)
    assert cells_for_our_kernel(None, x, 32, 0.0) is not None
    for other, size, dropout in ((x.float(), 32, 0.0), (x, 24, 0.0), (x, 32, 0.1), (x.cpu(), 32, 0.0)):
        assert cells_for_our_kernel(None, other, size, dropout) is None
