"""Causal attention within segments, on a GPU: one pass over all cells, whatever the lengths.

Blocks of cells run on over the bounds of segments, so that short segments fill them too; every cell is told where its
segment starts and ends. Sums have a fixed order, so that a run gives the same bits again. Tiles, the running maximum
and the recomputed weights are those of FlashAttention 2 (Dao, 2023). Needs Triton, which PyTorch for CUDA brings along.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOWEST = tl.constexpr(-1e30)  # finite: where a whole block is another segment's, nothing must become NaN


@triton.jit
def _tile(base, first, count, num_cells, stride: tl.constexpr, size: tl.constexpr):
    """`(count, size)` of one head, from cell `first` on; zeros behind the last cell."""
    cells = tl.arange(0, count)
    places = base + (first + cells).to(tl.int64)[:, None] * stride + tl.arange(0, size)[None, :]
    return tl.load(places, mask=(first + cells < num_cells)[:, None], other=0.0)


@triton.jit
def _put(base, tile, first, num_cells, stride: tl.constexpr, count: tl.constexpr, size: tl.constexpr):
    cells = tl.arange(0, count)
    places = base + (first + cells).to(tl.int64)[:, None] * stride + tl.arange(0, size)[None, :]
    tl.store(places, tile.to(base.dtype.element_ty), mask=(first + cells < num_cells)[:, None])


@triton.jit
def _key_ranges(starts, first, num_cells, queries: tl.constexpr, keys: tl.constexpr):
    """Keys that a block of queries sees: `[low, a)` and `[b, high)` need a look at each cell, `[a, b)` do not."""
    high = tl.minimum(first + queries, num_cells)
    low = tl.load(starts + first)
    shared = tl.minimum(tl.load(starts + high - 1), first)  # from here on a key belongs to every query
    a = low + tl.cdiv(tl.maximum(shared - low, 0), keys) * keys
    b = a + tl.maximum(first - a, 0) // keys * keys
    return low, a, b, high


@triton.jit
def _mix(
    mixed, total, most, query, base, cells, start, low, high, num_cells, scale,
    heads: tl.constexpr, size: tl.constexpr, keys: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    for first in range(low, high, keys):
        key = _tile(base + heads * size, first, keys, num_cells, 3 * heads * size, size)
        scores = tl.dot(query, key.T) * scale
        if masked:
            others = first + tl.arange(0, keys)
            seen = (others[None, :] <= cells[:, None]) & (others[None, :] >= start[:, None])
            scores = tl.where(seen, scores, _LOWEST)
        new = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        kept = tl.exp2(most - new)
        total = total * kept + tl.sum(weights, 1)
        value = _tile(base + 2 * heads * size, first, keys, num_cells, 3 * heads * size, size)
        mixed = tl.dot(weights.to(value.dtype), value, mixed * kept[:, None])
        most = new
    return mixed, total, most


@triton.jit(do_not_specialize=["num_cells"])  # compiled once, whatever the batch
def _forward_block(
    qkv, starts, out, log_sums, num_cells, scale,
    heads: tl.constexpr, size: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * queries, tl.program_id(1)
    cells = first + tl.arange(0, queries)
    base = qkv + head * size
    query = _tile(base, first, queries, num_cells, 3 * heads * size, size)
    start = tl.load(starts + cells, mask=cells < num_cells, other=0)
    low, a, b, high = _key_ranges(starts, first, num_cells, queries, keys)
    mixed = tl.zeros((queries, size), tl.float32)
    total = tl.zeros((queries,), tl.float32)
    most = tl.full((queries,), _LOWEST, tl.float32)
    mixed, total, most = _mix(
        mixed, total, most, query, base, cells, start, low, a, num_cells, scale, heads, size, keys, True
    )
    mixed, total, most = _mix(
        mixed, total, most, query, base, cells, start, a, b, num_cells, scale, heads, size, keys, False
    )
    mixed, total, most = _mix(
        mixed, total, most, query, base, cells, start, b, high, num_cells, scale, heads, size, keys, True
    )
    _put(out + head * size, mixed / total[:, None], first, num_cells, heads * size, queries, size)
    tl.store(log_sums + head * num_cells + cells, most + tl.log2(total), mask=cells < num_cells)


@triton.jit
def _queries_pass(
    grad_query, query, grad, log_sum, delta, base, cells, start, low, high, num_cells, scale,
    heads: tl.constexpr, size: tl.constexpr, keys: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    for first in range(low, high, keys):
        key = _tile(base + heads * size, first, keys, num_cells, 3 * heads * size, size)
        value = _tile(base + 2 * heads * size, first, keys, num_cells, 3 * heads * size, size)
        weights = tl.exp2(tl.dot(query, key.T) * scale - log_sum[:, None])
        if masked:
            others = first + tl.arange(0, keys)
            seen = (others[None, :] <= cells[:, None]) & (others[None, :] >= start[:, None])
            weights = tl.where(seen, weights, 0.0)
        grad_scores = weights * (tl.dot(grad, value.T) - delta[:, None])
        grad_query = tl.dot(grad_scores.to(key.dtype), key, grad_query)
    return grad_query


@triton.jit(do_not_specialize=["num_cells"])  # compiled once, whatever the batch
def _backward_queries(
    qkv, starts, out, grads, log_sums, deltas, grad_qkv, num_cells, scale, factor,
    heads: tl.constexpr, size: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * queries, tl.program_id(1)
    cells = first + tl.arange(0, queries)
    inside = cells < num_cells
    base = qkv + head * size
    query = _tile(base, first, queries, num_cells, 3 * heads * size, size)
    grad = _tile(grads + head * size, first, queries, num_cells, heads * size, size)
    mixed = _tile(out + head * size, first, queries, num_cells, heads * size, size)
    delta = tl.sum(grad.to(tl.float32) * mixed.to(tl.float32), 1)
    tl.store(deltas + head * num_cells + cells, delta, mask=inside)
    log_sum = tl.load(log_sums + head * num_cells + cells, mask=inside, other=0.0)
    start = tl.load(starts + cells, mask=inside, other=0)
    low, a, b, high = _key_ranges(starts, first, num_cells, queries, keys)
    found = tl.zeros((queries, size), tl.float32)
    found = _queries_pass(
        found, query, grad, log_sum, delta, base, cells, start, low, a, num_cells, scale, heads, size, keys, True
    )
    found = _queries_pass(
        found, query, grad, log_sum, delta, base, cells, start, a, b, num_cells, scale, heads, size, keys, False
    )
    found = _queries_pass(
        found, query, grad, log_sum, delta, base, cells, start, b, high, num_cells, scale, heads, size, keys, True
    )
    _put(grad_qkv + head * size, found * factor, first, num_cells, 3 * heads * size, queries, size)


@triton.jit
def _keys_pass(
    grad_key, grad_value, key, value, base, grads, log_sums, deltas, others, end, low, high, num_cells, scale,
    heads: tl.constexpr, size: tl.constexpr, queries: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    for first in range(low, high, queries):
        cells = first + tl.arange(0, queries)
        query = _tile(base, first, queries, num_cells, 3 * heads * size, size)
        log_sum = tl.load(log_sums + cells, mask=cells < num_cells, other=0.0)
        weights = tl.exp2(tl.dot(key, query.T) * scale - log_sum[None, :])
        if masked:
            seen = (others[:, None] <= cells[None, :]) & (cells[None, :] < end[:, None])
            weights = tl.where(seen, weights, 0.0)
        grad = _tile(grads, first, queries, num_cells, heads * size, size)
        grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value)
        delta = tl.load(deltas + cells, mask=cells < num_cells, other=0.0)
        grad_scores = weights * (tl.dot(value, grad.T) - delta[None, :])
        grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key)
    return grad_key, grad_value


@triton.jit(do_not_specialize=["num_cells"])  # compiled once, whatever the batch
def _backward_keys(
    qkv, ends, grads, log_sums, deltas, grad_qkv, num_cells, scale, factor,
    heads: tl.constexpr, size: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * keys, tl.program_id(1)
    others = first + tl.arange(0, keys)
    base = qkv + head * size
    key = _tile(base + heads * size, first, keys, num_cells, 3 * heads * size, size)
    value = _tile(base + 2 * heads * size, first, keys, num_cells, 3 * heads * size, size)
    end = tl.load(ends + others, mask=others < num_cells, other=0)
    grads += head * size
    log_sums += head * num_cells
    deltas += head * num_cells
    high = tl.load(ends + tl.minimum(first + keys, num_cells) - 1)
    a = first + tl.cdiv(keys, queries) * queries
    b = a + tl.maximum(tl.load(ends + first) - a, 0) // queries * queries  # up to here all keys belong to a query
    of_key = tl.zeros((keys, size), tl.float32)
    of_value = tl.zeros((keys, size), tl.float32)
    of_key, of_value = _keys_pass(
        of_key, of_value, key, value, base, grads, log_sums, deltas, others, end, first, tl.minimum(a, high),
        num_cells, scale, heads, size, queries, True,
    )  # fmt: skip
    of_key, of_value = _keys_pass(
        of_key, of_value, key, value, base, grads, log_sums, deltas, others, end, a, b,
        num_cells, scale, heads, size, queries, False,
    )  # fmt: skip
    of_key, of_value = _keys_pass(
        of_key, of_value, key, value, base, grads, log_sums, deltas, others, end, b, high,
        num_cells, scale, heads, size, queries, True,
    )  # fmt: skip
    grad_qkv += head * size
    _put(grad_qkv + heads * size, of_key * factor, first, num_cells, 3 * heads * size, keys, size)
    _put(grad_qkv + 2 * heads * size, of_value, first, num_cells, 3 * heads * size, keys, size)


class _Tiles(NamedTuple):
    queries: int
    keys: int
    num_warps: int
    num_stages: int


# The fastest of some 25 each on an H100, for instructions, rows of 1,024 and chats of 8,192 alike (docs/notes.md).
_FORWARD = _Tiles(64, 64, num_warps=4, num_stages=3)
_OF_QUERIES = _Tiles(64, 32, num_warps=4, num_stages=3)
_OF_KEYS = _Tiles(32, 64, num_warps=4, num_stages=3)


def _scales(size: int) -> tuple[float, float]:
    """What scores are multiplied by, for powers of two and of e."""
    factor = size**-0.5
    return factor * math.log2(math.e), factor


@torch.library.custom_op("fastcollate::causal_attention", mutates_args=())
def _attend(qkv: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    num_cells, _, heads, size = qkv.shape
    qkv = qkv.contiguous()
    out = qkv.new_empty(num_cells, heads, size)
    log_sums = qkv.new_empty(heads, num_cells, dtype=torch.float32)
    queries, keys, warps, stages = _FORWARD
    _forward_block[(triton.cdiv(num_cells, queries), heads)](
        qkv, starts, out, log_sums, num_cells, _scales(size)[0],
        heads=heads, size=size, queries=queries, keys=keys, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, log_sums


@_attend.register_fake
def _(qkv: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    num_cells, _, heads, size = qkv.shape
    return qkv.new_empty(num_cells, heads, size), qkv.new_empty(heads, num_cells, dtype=torch.float32)


@torch.library.custom_op("fastcollate::causal_attention_gradient", mutates_args=())
def _gradient(grad: Tensor, qkv: Tensor, out: Tensor, log_sums: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    num_cells, _, heads, size = qkv.shape
    qkv, grad = qkv.contiguous(), grad.contiguous()
    found, deltas = torch.empty_like(qkv), torch.empty_like(log_sums)
    scale, factor = _scales(size)
    queries, keys, warps, stages = _OF_QUERIES
    _backward_queries[(triton.cdiv(num_cells, queries), heads)](
        qkv, starts, out, grad, log_sums, deltas, found, num_cells, scale, factor,
        heads=heads, size=size, queries=queries, keys=keys, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    queries, keys, warps, stages = _OF_KEYS
    _backward_keys[(triton.cdiv(num_cells, keys), heads)](
        qkv, ends, grad, log_sums, deltas, found, num_cells, scale, factor,
        heads=heads, size=size, queries=queries, keys=keys, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return found


@_gradient.register_fake
def _(grad: Tensor, qkv: Tensor, out: Tensor, log_sums: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output, *inputs[1:])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return _gradient(grad, *ctx.saved_tensors), None, None


_attend.register_autograd(_backward, setup_context=_save)


def causal_attention(qkv: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Causal attention within each segment, of `(cells, 3, heads, head size)`: `(cells, heads, head size)`.

    `qkv` is float16 or bfloat16, the head size a power of two from 16 to 128. `starts` and `ends`, int32 `(cells,)`,
    say where each cell's segment starts and ends; segments follow each other without a gap.
    """
    mixed: Tensor = _attend(qkv, starts, ends)[0]
    return mixed
