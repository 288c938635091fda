"""Attention over rows of any length in one call: which kernel does it on this machine, and why none may do.

Ours is taken where Triton compiles it, else FlashAttention 2, which comes with PyTorch. FlashAttention 3 is for Hopper
cards, and a package of its own (`flash_attn_interface`): where it is installed, PyTorch is told to use it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastcollate.train.cuda.compiler import triton_compiles

_HOPPER = 9  # the major compute capability of the cards that FlashAttention 3 is for
_NARROW = (torch.float16, torch.bfloat16)
_HEAD_SIZES = (16, 32, 64, 128)
_flash_3 = False  # whether PyTorch was told to take it


def causal_varlen(attention: Callable[..., Any]) -> Callable[..., Any] | None:
    """A variable-length attention of PyTorch made causal, `None` where it offers no way."""
    parameters = inspect.signature(attention).parameters
    if "window_size" in parameters:
        return functools.partial(attention, window_size=(-1, 0))
    if "is_causal" in parameters:  # PyTorch 2.10
        return functools.partial(attention, is_causal=True)
    return None


def _varlen_attention() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return causal_varlen(varlen_attn)


VARLEN_ATTENTION = _varlen_attention()


def cells_for_our_kernel(
    cu_seqlens: Tensor | None, x: Tensor, head_size: int, dropout: float
) -> tuple[Tensor, Tensor] | None:
    """Where each cell's segment starts and ends, for `causal_attention`; `None` where that cannot be taken.

    `x` is `(batch, length, width)`; without `cu_seqlens` each of its rows is a segment. Cells behind the last of the
    bounds are a segment of their own.
    """
    possible = x.is_cuda and x.dtype in _NARROW and not dropout and head_size in _HEAD_SIZES and not _flash_3
    if not possible or not triton_compiles(x.device):
        return None
    num_cells, length = x.shape[0] * x.shape[1], x.shape[1]
    cells = torch.arange(num_cells, dtype=torch.int32, device=x.device)
    if cu_seqlens is None:
        starts = cells - cells % length
        return starts, starts + length
    bounds = torch.cat([cu_seqlens, cu_seqlens.new_full((1,), num_cells)])
    segment = torch.searchsorted(cu_seqlens, cells, right=True)
    return bounds[segment - 1], bounds[segment]


def our_kernel(qkv: Tensor, cells: tuple[Tensor, Tensor]) -> Tensor:
    """Causal attention of `(cells, 3, heads, head size)`, bounds as `cells_for_our_kernel` gives them."""
    from fastcollate.train.cuda.attention_kernel import causal_attention

    return causal_attention(qkv, *cells)


def why_segments_one_by_one(dtype: torch.dtype, dropout: float) -> str | None:
    """Why packed attention on a GPU cannot be one call, with the remedy; `None` where it can."""
    if dtype not in _NARROW:
        return f"it is computed in {str(dtype).removeprefix('torch.')}; use --precision bfloat16"
    if dropout:
        return "the variable-length attention has no dropout; use --dropout 0"
    if VARLEN_ATTENTION is None:
        return f"PyTorch {torch.__version__} has no causal varlen_attn; 2.10 and later have"
    return None


def varlen(qkv: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """Causal attention within each segment, of `(tokens, 3, heads, head size)`: `(tokens, heads, head size)`.

    `qkv` is float16 or bfloat16, on a CUDA device; the arguments behind it are as in `Segments`.
    """
    assert VARLEN_ATTENTION is not None
    query, key, value = qkv.unbind(1)
    mixed: Tensor = VARLEN_ATTENTION(query, key, value, cu_seqlens, cu_seqlens, longest, longest)
    return mixed


@contextlib.contextmanager
def fastest_attention(device: torch.device) -> Iterator[str]:
    """FlashAttention 3 in place of 2 where card, PyTorch and an installed package allow it; said is which it is.

    It holds for the whole process, so it is undone afterwards.
    """
    switch = torch.nn.attention
    possible = (
        device.type == "cuda"
        and hasattr(switch, "activate_flash_attention_impl")
        and importlib.util.find_spec("flash_attn_interface") is not None
        and torch.cuda.get_device_capability(device)[0] == _HOPPER
    )
    if not possible:
        yield "ours" if device.type == "cuda" and triton_compiles(device) else "as PyTorch comes"
        return
    global _flash_3
    _flash_3 = True
    switch.activate_flash_attention_impl("FA3")
    try:
        yield "FlashAttention 3"
    finally:
        _flash_3 = False
        switch.restore_flash_attention_impl()


def steady_attention(device_type: str) -> contextlib.AbstractContextManager[object]:
    """For rows of ever other lengths that are not compiled: no cuDNN, which makes a plan for each new shape.

    On Hopper cards PyTorch takes cuDNN first, whose plans cost more than a quarter of the time of bucketed batches.
    """
    if device_type != "cuda" or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    kinds = torch.nn.attention.SDPBackend
    return torch.nn.attention.sdpa_kernel([kinds.FLASH_ATTENTION, kinds.EFFICIENT_ATTENTION, kinds.MATH])
