"""The chunked head against the plain one."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from fastcollate.train import loss
from fastcollate.train.loss import cell_losses, scaled_loss, trained_cells
from tests.helpers import DEVICES


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(hidden @ weight.T, targets, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 7, 64, None])
def test_loss_and_gradients_equal_the_plain_way(chunk: int | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(301, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(301, (40,))
    targets[torch.rand(40) < 0.4] = -100
    expected = plain(hidden, weight, targets) / 17
    expected_grads = torch.autograd.grad(expected, (hidden, weight))
    cells, labels = trained_cells(targets)
    found = scaled_loss(hidden[cells], weight, labels, 1 / 17, chunk=chunk)
    grads = torch.autograd.grad(found, (hidden, weight))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        cell_losses(hidden[cells], weight, labels, chunk=chunk).sum() / 17, expected.detach(), rtol=0, atol=1e-12
    )


def test_a_factor_behind_the_loss_reaches_the_gradients() -> None:
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    hidden, labels = torch.randn(5, 4, dtype=torch.float64), torch.randint(11, (5,))
    (scaled_loss(hidden, weight, labels, 1.0) * 3).backward()
    (expected,) = torch.autograd.grad(plain(hidden, weight, labels) * 3, weight)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected, rtol=0, atol=1e-12)


def test_no_cell_is_no_loss_and_no_gradient() -> None:
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    cells, labels = trained_cells(torch.full((2, 3), -100))
    found = scaled_loss(hidden[cells], weight, labels, 1.0)
    found.backward()
    assert (found.item(), len(cells)) == (0.0, 0)
    assert weight.grad is not None
    assert not weight.grad.any()
    assert cell_losses(hidden[cells], weight, labels).shape == (0,)


def test_bfloat16_is_near() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 32, requires_grad=True), (torch.randn(301, 32) / 6).requires_grad_()
    labels = torch.randint(301, (50,))
    expected = plain(hidden, weight, labels) / 50
    (expected_grad,) = torch.autograd.grad(expected, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scaled_loss(hidden, weight, labels, 1 / 50)
    found.backward()
    assert weight.grad is not None
    assert found.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(weight.grad, expected_grad, rtol=0.1, atol=0.002)


def test_extreme_logits_stay_finite() -> None:
    hidden, weight = torch.tensor([[200.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]], requires_grad=True)
    found = scaled_loss(hidden, weight, torch.tensor([1]), 1.0)
    assert found.item() == 400.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "num_columns"), [(101, 128), (50257, 50304)])
def test_logits_become_their_gradient(device: str, dtype: torch.dtype, vocab_size: int, num_columns: int) -> None:
    """On a card by the kernel; what is beyond the vocabulary has no gradient, whatever it held."""
    torch.manual_seed(0)
    logits, labels = (3 * torch.randn(30, num_columns)).to(dtype), torch.randint(vocab_size, (30,))
    logits[:, vocab_size:] = 50.0
    logits[7] *= 30  # far apart
    wanted = logits.double()[:, :vocab_size].softmax(1)
    wanted[torch.arange(30), labels] -= 1
    expected = cross_entropy(logits.double()[:, :vocab_size], labels, reduction="sum")
    found = logits.to(device)
    total = -loss._to_gradient(found, labels.to(device), vocab_size).sum()
    torch.testing.assert_close(total.cpu().double(), expected, rtol=1e-5, atol=0)
    # To the last digit of 16 bits, also where a label's probability is near 1.
    of_vocabulary = found.cpu().double()[:, :vocab_size]
    torch.testing.assert_close(of_vocabulary, wanted, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=2e-7)
    assert not found[:, vocab_size:].any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_sure_label_keeps_its_gradient_in_16_bits(device: str) -> None:
    logits = torch.tensor([[9.0, 0.0]], dtype=torch.bfloat16, device=device)
    loss._to_gradient(logits, torch.tensor([0], device=device), 2)
    assert logits[0, 0].item() == pytest.approx(-1.234e-4, rel=0.01)  # its probability is 1.0 in 16 bits


@pytest.mark.parametrize(("num_cells", "chunk"), [(0, 5), (1, 5), (5, 5), (6, 5), (100, 7)])
def test_chunks_are_even_and_miss_no_cell(num_cells: int, chunk: int) -> None:
    parts = [range(num_cells)[part] for part in loss._parts(num_cells, chunk)]
    assert [cell for part in parts for cell in part] == list(range(num_cells))
    sizes = [len(part) for part in parts]
    assert max(sizes, default=0) <= chunk
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
