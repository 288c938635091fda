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
import pickle
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit, types
from numba.core import cgutils, config, event
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

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
        found._cache._guard_against_spurious_io_errors = _going_on
    return cast("F", found)


@contextlib.contextmanager
def _going_on() -> Iterator[None]:
    """A kernel that cannot be read from the cache, or kept in it, is compiled in each process."""
    try:
        yield
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        _tell_once(str(getattr(error, "strerror", None) or error))


@functools.cache
def _tell_once(reason: str) -> None:
    warnings.warn(
        f"compiled kernels cannot be kept ({reason}): each process compiles them anew, which takes seconds; make "
        "room, or let NUMBA_CACHE_DIR name an empty folder on another disk",
        stacklevel=1,
    )


def part(function: F) -> F:
    """A part of kernels: compiled into each of them, without what a call from Python needs, which is half of the work.

    Into them, since a call hands over each array as seven numbers: that took a seventh of the time of a short row.
    Called from Python it would crash: only kernels and parts may name it (a test looks).
    """
    return cast("F", njit(nogil=True, forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function))


def _kept(function: Any) -> Any:
    """Compiled, and kept beside its file, or else in the user's cache folder, or else in a temporary one."""
    with contextlib.suppress(RuntimeError):
        return njit(cache=True, nogil=True)(function)
    before = config.CACHE_DIR
    try:
        folder = Path(tempfile.gettempdir()) / f"fastcollate-kernels-{_user()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
        if folder.is_symlink() or (os.name == "posix" and (state.st_uid, state.st_mode & 0o077) != (_user(), 0)):
            raise PermissionError  # somebody else could put code there
        config.CACHE_DIR = str(folder)
        return njit(cache=True, nogil=True)(function)
    except (OSError, RuntimeError):
        _tell_once("the package's, the home and the temporary folder cannot be written, or others can write there too")
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
    imports = re.findall(r"^ *from fastcollate([\w.]*) import (\([^)]*\)|.*)", path.read_text(encoding="utf-8"), re.M)
    for module, names in imports:
        place = PACKAGE.joinpath(*module.split(".")[1:])
        for one in (place, *(place / name for name in re.findall(r"\w+", names))):
            for file in (one.with_suffix(".py"), one / "__init__.py"):
                if file not in found and file.is_file():
                    found |= _imported(file, found)
    return found


class Compiling(event.Listener):  # type: ignore[misc]
    """Tells before the first kernel is compiled, where neither this process nor the disk has it, and counts."""

    def __init__(self, tell: Callable[[], None] | None = None) -> None:
        self.seconds = 0.0  # how long kernels have been compiled so far, on any thread
        self._tell = tell
        self._starts: list[float] = []  # a kernel's parts are compiled within it

    def on_start(self, event: Any) -> None:
        """A kernel, or a part of one, is about to be compiled."""
        if self._tell is not None:
            tell, self._tell = self._tell, None
            tell()
        self._starts.append(time.perf_counter())

    def on_end(self, event: Any) -> None:
        """It is compiled."""
        start = self._starts.pop()
        if not self._starts:
            self.seconds += time.perf_counter() - start


COMPILED = Compiling()  # since this process began
event.register("numba:compile", COMPILED)


def clock() -> float:
    """Seconds, by a clock that is put back by what compiling took, so that waiting for that is not counted."""
    return time.perf_counter() - COMPILED.seconds


@contextlib.contextmanager
def compiling(tell: Callable[[], None]) -> Iterator[Compiling]:
    """Within a block `tell` is called once, before the first kernel is compiled, if one is; maybe on another thread."""
    watch = Compiling(tell)
    with event.install_listener("numba:compile", watch):
        yield watch


# ------------------------------------------------------------------------------------------------ memory at an address


@part
def address_of(array: Any) -> int:
    """Where an array's memory begins."""
    return np.int64(array.ctypes.data)  # type: ignore[no-any-return]


if config.DISABLE_JIT:

    def view(address: int, count: int, dtype: Any) -> Any:
        """Memory at an address as an array of a dtype, or of the type of a number; the caller keeps it alive."""
        item: Any = np.dtype(dtype if isinstance(dtype, type) else type(dtype))
        if count <= 0:
            return np.empty(0, item)
        raw: Any = (ctypes.c_char * (int(count) * item.itemsize)).from_address(int(address))
        return np.frombuffer(raw, item)

    def borrow(array: Any) -> Any:
        """The array itself: nothing counts references here."""
        return array

    def prefetch(address: int) -> None:
        """Nothing to do: a hint to the processor."""

    def ask_for(address: int, size: int) -> None:
        """Ask the system for the pages of some memory, which begins with a page; nothing is read here."""
        if WILL_NEED is not None:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(int(address)), ctypes.c_size_t(int(size)), WILL_NEED)

else:

    def _as_array(context: Any, builder: Any, kind: Any, data: Any, shape: Any, strides: Any) -> Any:
        """An array over memory that somebody else keeps alive."""
        array = context.make_array(kind)(context, builder)
        size = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
        populate_array(array, data=data, shape=shape, strides=strides or [size], itemsize=size, meminfo=None)
        return array._getvalue()

    @intrinsic  # type: ignore[untyped-decorator]
    def view(_: Any, address: Any, count: Any, dtype: Any) -> Any:
        """Memory at an address as an array of a dtype, or of the type of a number; the caller keeps it alive."""
        item = dtype if isinstance(dtype, types.Number) else dtype.dtype
        kind = types.Array(item, 1, "C")

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = builder.inttoptr(args[0], context.get_data_type(item).as_pointer())
            return _as_array(context, builder, kind, data, [args[1]], None)

        return kind(types.int64, types.int64, dtype), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def borrow(_: Any, array: Any) -> Any:
        """An array's memory without its owner, whom the caller keeps alive.

        Numba counts references to the owner, in atomic steps, for each slice and each call that takes the array:
        that took half the time of a loop over short records.
        """

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            own = context.make_array(array)(context, builder, value=args[0])
            shape, strides = (cgutils.unpack_tuple(builder, part) for part in (own.shape, own.strides))
            return _as_array(context, builder, array, own.data, shape, strides)

        return array(array), codegen

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

    if WILL_NEED is None:

        @kernel
        def ask_for(address: int, size: int) -> None:
            """Nothing to do: this system takes no such hint."""

    else:
        _madvise = types.ExternalFunction("madvise", types.int32(types.int64, types.int64, types.int32))

        @kernel
        def ask_for(address: int, size: int) -> None:
            """Ask the system for the pages of some memory, which begins with a page; nothing is read here."""
            _madvise(address, size, WILL_NEED)
