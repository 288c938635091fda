"""Loops over memory at an address, a vector at a time: tokens copied into wider cells, and cells filled.

Of a plain loop over two arrays a compiler makes one that first asks whether they overlap, and that has single items
left over at its end: for a short row this takes as long as the row itself. Here a vector is `STRIDE` items, which LLVM
takes apart into what the processor has; a count need not be a multiple of it, and a negative one is none.

Sizes are bytes an item, given at run time: tokens are unsigned of 2 or 4, or int64; cells are int32 or int64.
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
    _TOKENS = {2: np.uint16, 4: np.uint32, 8: np.int64}
    _CELLS = {4: np.int32, 8: np.int64}

    def copy_tokens(source: int, target: int, count: int, token_size: int, cell_size: int) -> None:
        """Copy `count` tokens from an address to cells at another."""
        cell = _CELLS[int(cell_size)]
        view(target, count, cell)[:] = view(source, count, _TOKENS[int(token_size)]).astype(cell)

    def copy_and_find(source: int, target: int, count: int, token_size: int, wanted: int) -> int:
        """The same into int64 cells; returns 1 where one of the tokens is `wanted`, else 0."""
        copy_tokens(source, target, count, token_size, 8)
        return int((view(target, count, np.int64) == wanted).any())

    def fill_cells(target: int, count: int, cell_size: int, value: int) -> None:
        """Write `value` to `count` cells at an address."""
        view(target, count, _CELLS[int(cell_size)])[:] = value

else:
    from llvmlite import ir  # type: ignore[import-untyped]

    _INT64 = ir.IntType(64)

    def _lanes(integer: Any, count: int) -> Any:
        """The type of `count` integers at once."""
        return integer if count == 1 else ir.VectorType(integer, count)

    def _place(builder: Any, address: Any, index: Any, integer: Any, lanes: int) -> Any:
        """A pointer to items `index` and on, of those at an address."""
        offset = builder.mul(index, _INT64(integer.width // 8))
        return builder.inttoptr(builder.add(address, offset), _lanes(integer, lanes).as_pointer())

    def _resized(builder: Any, value: Any, own: Any, new: Any, lanes: int) -> Any:
        """Unsigned integers of the type `own` as those of the type `new`."""
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
        count = builder.select(builder.icmp_signed("<", count, _INT64(0)), _INT64(0), count)
        whole = builder.and_(count, _INT64(-STRIDE))
        for start, stop, lanes in ((_INT64(0), whole, STRIDE), (whole, count, 1)):
            with cgutils.for_range_slice(builder, start, stop, _INT64(lanes), intp=_INT64) as (index, _):
                do(index, lanes)

    def _for_size(builder: Any, size: Any, sizes: tuple[int, ...], write: Any) -> None:
        """Have `write(integer)` write the code for each size of an integer; the last one is taken for any other."""
        if len(sizes) == 1:
            write(ir.IntType(8 * sizes[0]))
            return
        with builder.if_else(builder.icmp_signed("==", size, _INT64(sizes[0]))) as (then, otherwise):
            with then:
                write(ir.IntType(8 * sizes[0]))
            with otherwise:
                _for_size(builder, size, sizes[1:], write)

    def _copy(builder: Any, source: Any, target: Any, token: Any, cell: Any, index: Any, lanes: int) -> Any:
        """Copy so many items; returns them, as cells."""
        tokens = builder.load(_place(builder, source, index, token, lanes), align=1)
        cells = _resized(builder, tokens, token, cell, lanes)
        builder.store(cells, _place(builder, target, index, cell, lanes), align=1)
        return cells

    @intrinsic  # type: ignore[untyped-decorator]
    def copy_tokens(_: Any, source: Any, target: Any, count: Any, token_size: Any, cell_size: Any) -> Any:
        """Copy `count` tokens from an address to cells at another."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, target, count, token_size, cell_size = args

            def write(token: Any, cell: Any) -> None:
                _for_each(
                    builder, count, lambda index, lanes: _copy(builder, source, target, token, cell, index, lanes)
                )

            _for_size(
                builder, cell_size, (8, 4),
                lambda cell: _for_size(builder, token_size, (2, 4, 8), lambda token: write(token, cell)),
            )  # fmt: skip
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def copy_and_find(_: Any, source: Any, target: Any, count: Any, token_size: Any, wanted: Any) -> Any:
        """The same into int64 cells; returns 1 where one of the tokens is `wanted`, else 0."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, target, count, token_size, wanted = args
            found = {
                lanes: cgutils.alloca_once_value(builder, ir.Constant(_lanes(ir.IntType(1), lanes), None))
                for lanes in (STRIDE, 1)
            }

            def write(token: Any) -> None:
                def do(index: Any, lanes: int) -> None:
                    cells = _copy(builder, source, target, token, _INT64, index, lanes)
                    same = builder.icmp_unsigned("==", cells, _repeated(builder, wanted, lanes))
                    builder.store(builder.or_(builder.load(found[lanes]), same), found[lanes])

                _for_each(builder, count, do)

            _for_size(builder, token_size, (2, 4, 8), write)
            mask = builder.bitcast(builder.load(found[STRIDE]), ir.IntType(STRIDE))
            in_vectors = builder.icmp_unsigned("!=", mask, ir.IntType(STRIDE)(0))
            return builder.zext(builder.or_(in_vectors, builder.load(found[1])), _INT64)

        return types.int64(*[types.int64] * 5), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def fill_cells(_: Any, target: Any, count: Any, cell_size: Any, value: Any) -> Any:
        """Write `value` to `count` cells at an address."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            target, count, cell_size, value = args

            def write(cell: Any) -> None:
                def do(index: Any, lanes: int) -> None:
                    one = _resized(builder, value, _INT64, cell, 1)
                    builder.store(_repeated(builder, one, lanes), _place(builder, target, index, cell, lanes), align=1)

                _for_each(builder, count, do)

            _for_size(builder, cell_size, (8, 4), write)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen
