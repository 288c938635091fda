"""What threads share while they run compiled code: numbers in memory, read and changed in one step, and locks.

Every step is seen by all threads in one order (sequentially consistent). The locks are those that the interpreter
offers to C code (`PyThread_*`), which need no interpreter: a thread in a `nogil` kernel can sleep on one, and wake
another. Under `NUMBA_DISABLE_JIT=1` the same in plain Python.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

_free_lock = ctypes.pythonapi.PyThread_free_lock
_free_lock.argtypes, _free_lock.restype = [ctypes.c_void_p], None


def new_lock() -> int:
    """A lock that is held, as a number for `acquire_lock` and `release_lock`; anybody may release it."""
    allocate, acquire = ctypes.pythonapi.PyThread_allocate_lock, ctypes.pythonapi.PyThread_acquire_lock
    allocate.restype, acquire.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int]
    lock = allocate()
    if not lock:
        raise MemoryError("no memory for a lock")
    acquire(lock, 1)
    return int(lock)


def free_lock(lock: int) -> None:
    """Give a lock's memory back; nobody may use it any more."""
    _free_lock(lock)


if config.DISABLE_JIT:
    _step = threading.Lock()
    _acquire = ctypes.CDLL(None).PyThread_acquire_lock_timed  # by this way without the interpreter's lock
    _acquire.argtypes = [ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int]
    _release = ctypes.pythonapi.PyThread_release_lock
    _release.argtypes, _release.restype = [ctypes.c_void_p], None

    def load(address: int) -> int:
        """The int64 at an address."""
        return ctypes.c_int64.from_address(int(address)).value

    def store(address: int, value: int) -> None:
        """Write an int64 to an address."""
        with _step:
            ctypes.c_int64.from_address(int(address)).value = int(value)

    def swap(address: int, old: int, new: int) -> bool:
        """Write `new` where `old` is; whether it was."""
        with _step:
            cell = ctypes.c_int64.from_address(int(address))
            if cell.value != old:
                return False
            cell.value = int(new)
            return True

    def add(address: int, value: int) -> None:
        """Add to the int64 at an address."""
        with _step:
            ctypes.c_int64.from_address(int(address)).value += int(value)

    def acquire_lock(lock: int, microseconds: int) -> None:
        """Wait for a lock, at most so long; -1 waits for ever."""
        _acquire(int(lock), int(microseconds), 0)

    def release_lock(lock: int) -> None:
        """Let whoever waits for a lock have it."""
        _release(int(lock))

else:
    _ORDER = "seq_cst"

    def _cell(builder: Any, address: Any) -> Any:
        from llvmlite import ir  # type: ignore[import-untyped]

        return builder.inttoptr(address, ir.IntType(64).as_pointer())

    @intrinsic  # type: ignore[untyped-decorator]
    def load(_: Any, address: Any) -> Any:
        """The int64 at an address."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load_atomic(_cell(builder, args[0]), _ORDER, 8)

        return types.int64(types.int64), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def store(_: Any, address: Any, value: Any) -> Any:
        """Write an int64 to an address."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store_atomic(args[1], _cell(builder, args[0]), _ORDER, 8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def swap(_: Any, address: Any, old: Any, new: Any) -> Any:
        """Write `new` where `old` is; whether it was."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pair = builder.cmpxchg(_cell(builder, args[0]), args[1], args[2], _ORDER, _ORDER)
            return builder.extract_value(pair, 1)

        return types.boolean(types.int64, types.int64, types.int64), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def add(_: Any, address: Any, value: Any) -> Any:
        """Add to the int64 at an address."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.atomic_rmw("add", _cell(builder, args[0]), args[1], _ORDER)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def acquire_lock(_: Any, lock: Any, microseconds: Any) -> Any:
        """Wait for a lock, at most so long; -1 waits for ever."""
        from llvmlite import ir

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            number = ir.IntType(32)
            function = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(number, [cgutils.voidptr_t, args[1].type, number]),
                "PyThread_acquire_lock_timed",
            )
            builder.call(function, [builder.inttoptr(args[0], cgutils.voidptr_t), args[1], number(0)])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def release_lock(_: Any, lock: Any) -> Any:
        """Let whoever waits for a lock have it."""
        from llvmlite import ir

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t]), "PyThread_release_lock"
            )
            builder.call(function, [builder.inttoptr(args[0], cgutils.voidptr_t)])
            return context.get_dummy_value()

        return types.void(types.int64), codegen
