"""How kernels are compiled and kept, and what Numba lacks: memory at an address, asking for it ahead.

Every kernel is `nogil`, kept on disk, free of `fastmath`, and runs as plain Python too under `NUMBA_DISABLE_JIT=1`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils, config, event
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])
WILL_NEED: int | None = getattr(mmap, "MADV_WILLNEED", None)  # `madvise` takes it, where a system has that
PACKAGE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------------- compiling and keeping


def kernel(function: F) -> F:
    """Compile without the GIL and keep the machine code on disk.

    Numba renews what it kept of a kernel when the kernel's own file changes. Here it does so too when a file changes
    that this one imports, since constants and other kernels from there are part of the machine code.
    """
    if config.DISABLE_JIT:
        return function
    found = _kept(function)
    if found._cache.cache_path is not None:
        found._cache._cache_file._source_stamp = _stamp(Path(function.__code__.co_filename))
    return cast("F", found)


def part_of_kernel(function: F) -> F:
    """A function that is compiled with each kernel that calls it, where it would take as long again by itself."""
    return cast("F", njit(inline="always")(function))


def _kept(function: Any) -> Any:
    """Compiled, and kept beside its file, or else in the user's cache folder, or else in a temporary one."""
    with contextlib.suppress(RuntimeError):
        return njit(cache=True, nogil=True)(function)
    before, folder = config.CACHE_DIR, Path(tempfile.gettempdir()) / f"fastcollate-kernels-{_user()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
        if folder.is_symlink() or (os.name == "posix" and (state.st_uid, state.st_mode & 0o077) != (_user(), 0)):
            return njit(nogil=True)(function)  # somebody else could put code there
        config.CACHE_DIR = str(folder)
        return njit(cache=True, nogil=True)(function)
    except (OSError, RuntimeError):
        return njit(nogil=True)(function)
    finally:
        config.CACHE_DIR = before


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


@functools.cache
def _stamp(path: Path) -> str:
    """Changes with a file and whatever of this package it imports."""
    files = sorted(_imported(path))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _imported(path: Path, found: frozenset[Path] = frozenset()) -> frozenset[Path]:
    """A file and the files of this package that it imports, and so on."""
    found |= {path}
    imports = re.findall(r"^from fastcollate([\w.]*) import (\([^)]*\)|.*)", path.read_text(encoding="utf-8"), re.M)
    for module, names in imports:
        place = PACKAGE.joinpath(*module.split(".")[1:])
        for one in (place, *(place / name for name in re.findall(r"\w+", names))):
            for file in (one.with_suffix(".py"), one / "__init__.py"):
                if file not in found and file.is_file():
                    found |= _imported(file, found)
    return found


class Compiling(event.Listener):  # type: ignore[misc]
    """What `compiling` gives.

    Attributes:
        seconds: how long kernels have been compiled so far, on any thread.
    """

    def __init__(self, tell: Callable[[], None] | None) -> None:
        self.seconds = 0.0
        self._tell = tell
        self._starts: list[float] = []  # a kernel's parts are compiled within it

    def on_start(self, event: Any) -> None:
        """A kernel, or a part of one, is about to be compiled: neither this process nor the disk has it."""
        if self._tell is not None:
            tell, self._tell = self._tell, None
            tell()
        self._starts.append(time.perf_counter())

    def on_end(self, event: Any) -> None:
        """It is compiled."""
        start = self._starts.pop()
        if not self._starts:
            self.seconds += time.perf_counter() - start


@contextlib.contextmanager
def compiling(tell: Callable[[], None] | None = None) -> Iterator[Compiling]:
    """Watch kernels being compiled within a block: `tell` is called once, before the first one, if there is any.

    It may be called on another thread. What lies in the kernel cache is not compiled.

    Example:
        >>> with compiling(lambda: print("compiling kernels (once)")) as watch:
        ...     batch = next(iter(loader))
        >>> watch.seconds  # to be taken off what was waited
        3.1
    """
    watch = Compiling(tell)
    with event.install_listener("numba:compile", watch):
        yield watch


# ------------------------------------------------------------------------------------------------ memory at an address

if config.DISABLE_JIT:

    def view(address: int, count: int, dtype: Any) -> Any:
        """Memory at an address as an array; the caller keeps it alive."""
        if count <= 0:
            return np.empty(0, dtype)
        raw = (ctypes.c_char * (int(count) * np.dtype(dtype).itemsize)).from_address(int(address))
        return np.frombuffer(raw, dtype)

    def borrow(array: Any) -> Any:
        """The array itself: nothing counts references here."""
        return array

    def prefetch(address: int) -> None:
        """Nothing to do: a hint to the processor."""

    def ask_for(address: int, size: int) -> None:
        """Ask the system for the pages of some memory, which begins with a page; nothing is read here."""
        if WILL_NEED is not None:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(int(address)), ctypes.c_size_t(int(size)), WILL_NEED)

    def load_word(address: int) -> Any:
        """The eight bytes at an address as a number, the first one lowest."""
        return np.uint64(int.from_bytes(ctypes.string_at(int(address), 8), "little"))

    def load_byte(address: int) -> int:
        """The byte at an address."""
        return ctypes.c_uint8.from_address(int(address)).value

    def store_word(address: int, word: Any) -> None:
        """Write eight bytes to an address, the lowest first."""
        ctypes.memmove(int(address), int(word).to_bytes(8, "little"), 8)

    def trailing_zeros(word: Any) -> int:
        """How many bits below the lowest that is set; `word` is not 0."""
        return (int(word) & -int(word)).bit_length() - 1

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

    @intrinsic  # type: ignore[untyped-decorator]
    def ask_for(_: Any, address: Any, size: Any) -> Any:
        """Ask the system for the pages of some memory, which begins with a page; nothing is read here."""
        from llvmlite import ir

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if WILL_NEED is not None:
                number = ir.IntType(32)
                function = cgutils.get_or_insert_function(
                    builder.module,
                    ir.FunctionType(number, [cgutils.voidptr_t, args[1].type, number]),
                    "madvise",
                )
                builder.call(function, [builder.inttoptr(args[0], cgutils.voidptr_t), args[1], number(WILL_NEED)])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    def _as_word(builder: Any, address: Any) -> Any:
        from llvmlite import ir

        return builder.inttoptr(address, ir.IntType(64).as_pointer())

    @intrinsic  # type: ignore[untyped-decorator]
    def load_word(_: Any, address: Any) -> Any:
        """The eight bytes at an address, aligned or not, as a number, the first one lowest."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _in_order(builder, builder.load(_as_word(builder, args[0]), align=1))

        return types.uint64(types.int64), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def load_byte(_: Any, address: Any) -> Any:
        """The byte at an address."""
        from llvmlite import ir

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(builder.inttoptr(args[0], ir.IntType(8).as_pointer()))

        return types.uint8(types.int64), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def store_word(_: Any, address: Any, word: Any) -> Any:
        """Write eight bytes to an address, aligned or not, the lowest first."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(_in_order(builder, args[1]), _as_word(builder, args[0]), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.uint64), codegen

    def _in_order(builder: Any, word: Any) -> Any:
        """A word's bytes as a little-endian machine has them."""
        return word if sys.byteorder == "little" else builder.bswap(word)

    @intrinsic  # type: ignore[untyped-decorator]
    def trailing_zeros(_: Any, word: Any) -> Any:
        """How many bits below the lowest that is set; `word` is not 0."""
        from llvmlite import ir

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

        return types.int64(types.uint64), codegen

    @kernel
    def view(address: int, count: int, dtype: Any) -> Any:
        """Memory at an address as an array; the caller keeps it alive."""
        return carray(_pointer(address, dtype), (count,), dtype)

    @kernel
    def borrow(array: Any) -> Any:
        """A C-contiguous array's memory without its owner, whom the caller keeps alive.

        Numba counts references to the owner, in atomic steps, for each slice and each call that takes the array:
        that took half the time of a loop over short records.
        """
        return carray(_pointer(np.int64(array.ctypes.data), array.dtype), array.shape, array.dtype)
