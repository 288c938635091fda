"""How kernels are compiled, and what Numba lacks: memory at an address, and asking for it ahead.

Every kernel is `nogil`, cached on disk, free of `fastmath`, and runs as plain Python too under `NUMBA_DISABLE_JIT=1`.
A kernel's cached machine code is renewed when its own file changes, not when this one does (nor is that of
`pack_kernels.py` when `kernels.py` changes): touch it, or delete `__pycache__`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import carray, njit, types
from numba.core import config
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile without the GIL and keep the machine code on disk."""
    try:
        return cast("F", njit(cache=True, nogil=True)(function))
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written
        return cast("F", njit(nogil=True)(function))


if config.DISABLE_JIT:

    def view(address: int, count: int, dtype: Any) -> Any:
        """Memory at an address as an array; the caller keeps it alive."""
        if count <= 0:
            return np.empty(0, dtype)
        raw = (ctypes.c_char * (int(count) * np.dtype(dtype).itemsize)).from_address(int(address))
        return np.frombuffer(raw, dtype)

    def prefetch(address: int) -> None:
        """Nothing to do: a hint to the processor."""

else:

    @intrinsic  # type: ignore[untyped-decorator]
    def _pointer(_: Any, address: Any, dtype: Any) -> Any:
        """An address as a C pointer to `dtype`."""
        pointer = types.CPointer(dtype.dtype)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(pointer))

        return pointer(types.int64, dtype), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def prefetch(_: Any, address: Any) -> Any:
        """Ask the processor to fetch the cache line at an address, which need not be valid."""
        from llvmlite import ir  # type: ignore[import-untyped]

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
            function = builder.module.declare_intrinsic(
                "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, word, word, word])
            )
            builder.call(function, [builder.inttoptr(args[0], byte), word(0), word(3), word(1)])
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    @kernel
    def view(address: int, count: int, dtype: Any) -> Any:
        """Memory at an address as an array; the caller keeps it alive."""
        return carray(_pointer(address, dtype), (count,), dtype)
