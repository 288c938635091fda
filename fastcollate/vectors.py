"""Loops over memory at an address, a vector at a time: tokens copied into wider cells, and cells filled.

Of a plain loop over two arrays a compiler makes one that first asks whether they overlap, and that has single items
left over at its end: for a short row this takes as long as the row itself. Here a vector is `STRIDE` items, which LLVM
takes apart into what the processor has; a count need not be a multiple of it.

Integers are taken for unsigned where they grow, and cut where they shrink.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from fastcollate.jit import view

STRIDE = 8

if config.DISABLE_JIT:

    def copy_tokens(source: int, target: int, count: int, token: Any, cell: Any) -> None:
        """Copy `count` items of dtype `token` from an address to cells of dtype `cell` at another."""
        view(target, count, cell)[:] = view(source, count, token).astype(cell)

    def copy_and_find(source: int, target: int, count: int, token: Any, wanted: int) -> int:
        """The same into int64 cells; returns 1 where one of them is `wanted`, else 0."""
        copy_tokens(source, target, count, token, np.int64)
        return int((view(target, count, np.int64) == wanted).any())

    def fill_cells(target: int, count: int, cell: Any, value: int) -> None:
        """Write `value` to `count` cells of dtype `cell` at an address."""
        view(target, count, cell)[:] = value

else:
    from llvmlite import ir  # type: ignore[import-untyped]

    _INT64 = ir.IntType(64)

    def _integer(dtype: Any) -> Any:
        return ir.IntType(dtype.dtype.bitwidth)

    def _lanes(integer: Any, count: int) -> Any:
        """The type of `count` integers at once."""
        return integer if count == 1 else ir.VectorType(integer, count)

    def _place(builder: Any, address: Any, index: Any, integer: Any, lanes: int) -> Any:
        """A pointer to items `index` and on, of those at an address."""
        offset = builder.mul(index, _INT64(integer.width // 8))
        return builder.inttoptr(builder.add(address, offset), _lanes(integer, lanes).as_pointer())

    def _resized(builder: Any, value: Any, own: Any, new: Any, lanes: int) -> Any:
        """Integers of the type `own` as those of the type `new`."""
        if own.width == new.width:
            return value
        return (builder.zext if own.width < new.width else builder.trunc)(value, _lanes(new, lanes))

    def _repeated(builder: Any, value: Any, lanes: int) -> Any:
        """The same integer in all lanes."""
        if lanes == 1:
            return value
        nothing = ir.Constant(_lanes(value.type, lanes), ir.Undefined)
        zeros = ir.Constant(_lanes(ir.IntType(32), lanes), [0] * lanes)
        return builder.shuffle_vector(builder.insert_element(nothing, value, ir.IntType(32)(0)), nothing, zeros)

    def _for_each(builder: Any, count: Any, do: Any) -> None:
        """Have `do(index, lanes)` write the code for a whole vector, and for one of the items that are left over."""
        whole = builder.and_(count, _INT64(-STRIDE))
        for start, stop, lanes in ((_INT64(0), whole, STRIDE), (whole, count, 1)):
            with cgutils.for_range_slice(builder, start, stop, _INT64(lanes), intp=_INT64) as (index, _):
                do(index, lanes)

    def _copy(builder: Any, source: Any, target: Any, token: Any, cell: Any, index: Any, lanes: int) -> Any:
        """Copy so many items; returns them, as cells."""
        tokens = builder.load(_place(builder, source, index, token, lanes), align=1)
        cells = _resized(builder, tokens, token, cell, lanes)
        builder.store(cells, _place(builder, target, index, cell, lanes), align=1)
        return cells

    @intrinsic  # type: ignore[untyped-decorator]
    def copy_tokens(_: Any, source: Any, target: Any, count: Any, token: Any, cell: Any) -> Any:
        """Copy `count` items of dtype `token` from an address to cells of dtype `cell` at another."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            def do(index: Any, lanes: int) -> None:
                _copy(builder, args[0], args[1], _integer(token), _integer(cell), index, lanes)

            _for_each(builder, args[2], do)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, token, cell), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def copy_and_find(_: Any, source: Any, target: Any, count: Any, token: Any, wanted: Any) -> Any:
        """The same into int64 cells; returns 1 where one of them is `wanted`, else 0."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            found = {
                lanes: cgutils.alloca_once_value(builder, ir.Constant(_lanes(ir.IntType(1), lanes), None))
                for lanes in (STRIDE, 1)
            }

            def do(index: Any, lanes: int) -> None:
                cells = _copy(builder, args[0], args[1], _integer(token), _INT64, index, lanes)
                same = builder.icmp_unsigned("==", cells, _repeated(builder, args[4], lanes))
                builder.store(builder.or_(builder.load(found[lanes]), same), found[lanes])

            _for_each(builder, args[2], do)
            mask = builder.bitcast(builder.load(found[STRIDE]), ir.IntType(STRIDE))
            in_vectors = builder.icmp_unsigned("!=", mask, ir.IntType(STRIDE)(0))
            return builder.zext(builder.or_(in_vectors, builder.load(found[1])), _INT64)

        return types.int64(types.int64, types.int64, types.int64, token, types.int64), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def fill_cells(_: Any, target: Any, count: Any, cell: Any, value: Any) -> Any:
        """Write `value` to `count` cells of dtype `cell` at an address."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            def do(index: Any, lanes: int) -> None:
                one = _resized(builder, args[3], _INT64, _integer(cell), 1)
                at = _place(builder, args[0], index, _integer(cell), lanes)
                builder.store(_repeated(builder, one, lanes), at, align=1)

            _for_each(builder, args[1], do)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, cell, types.int64), codegen
