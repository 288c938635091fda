"""gigatoken: exact ids an order of magnitude faster, with caches that never shrink.

They are kept small by beginning again with empty ones. The process's memory is looked at: how large they are cannot be
asked.
"""

from __future__ import annotations

import base64
import gc
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken

from fastcollate.text.engines.backends import RaggedIds, Texts

_PIECE_BYTES = 1 << 19  # of text, encoded at once: a call costs a third of a millisecond
_MOST_GROWTH = 32 << 20  # bytes of memory between blocks of texts, beyond which the caches are thrown away
_MOST_GROWTH_AT_WORK = 96 << 20  # the same within a block, whose own memory counts with them
_GROWTH_OF_JSON = 96 << 20  # as much more where it takes a second to begin again


class GigatokenBackend:
    """gigatoken; several threads may use it. `make` gives one of its tokenizers with empty caches."""

    name = "gigatoken"

    def __init__(self, make: Callable[[], Any], *, more_growth: int = 0) -> None:
        self._make = make
        self._more_growth = more_growth
        self._lock = threading.Lock()
        self._load()
        self._dtype = np.uint16 if self._tokenizer.vocab_size <= 1 << 16 else np.uint32

    @classmethod
    def of_ranks(cls, encoding: tiktoken.Encoding, scheme: str) -> GigatokenBackend:
        """For an encoding, without its special tokens."""
        return cls(lambda: _from_ranks(encoding, scheme))

    @classmethod
    def of_json(cls, content: str) -> GigatokenBackend:
        """For a `tokenizer.json`."""
        import gigatoken

        return cls(
            lambda: gigatoken.Tokenizer(gigatoken.gigatoken_rs.load_hf_json(content)), more_growth=_GROWTH_OF_JSON
        )

    def _load(self) -> None:
        self._tokenizer = self._make()
        self._floor = resident_bytes()

    @cached_property
    def num_bytes(self) -> npt.NDArray[np.int64]:
        """How many bytes of text each token has, `(vocab_size,)`."""
        lengths = np.zeros(self._tokenizer.vocab_size, np.int64)
        for token, content in self._tokenizer.vocab.items():
            lengths[token] = len(content)
        return lengths

    def encode_batch(self, texts: Texts) -> RaggedIds:
        """The ids of each text."""
        parts = []
        for piece in _pieces(texts):
            parts.append(self._encode_piece(piece))
            self._renew_beyond(_MOST_GROWTH_AT_WORK)
        return _joined(parts)

    def _encode_piece(self, piece: Any) -> RaggedIds:
        with self._lock:
            tokenizer = self._tokenizer
        encoded = tokenizer.encode_batch(piece, parallel=False).layout
        offsets = np.array(encoded.offsets.data)
        # A copy, as narrow as can be: what gigatoken has written is free again before the next piece.
        ids = np.asarray(encoded.content.data)[offsets[0] : offsets[-1]].astype(self._dtype)
        return RaggedIds(ids, offsets - offsets[0])

    def _renew_beyond(self, growth: int) -> None:
        """Begin again with empty caches where the process has grown by so many bytes since it last did."""
        with self._lock:
            if resident_bytes() - self._floor > growth + self._more_growth:
                del self._tokenizer  # a thread that is at work keeps it until it is done
                gc.collect()
                return_free_memory()
                self._load()

    def trim(self) -> None:
        """Give back what a block has left behind, and renew grown caches; call it between blocks."""
        if resident_bytes() - self._floor > _MOST_GROWTH + self._more_growth:
            return_free_memory()
            self._renew_beyond(_MOST_GROWTH)


def _from_ranks(encoding: tiktoken.Encoding, scheme: str) -> Any:
    import gigatoken

    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in encoding._mergeable_ranks.items())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ranks.tiktoken"
        path.write_bytes(lines)
        return gigatoken.Tokenizer.from_tiktoken(path, pretokenizer=scheme, special_tokens={})


def _pieces(texts: Texts) -> Iterator[Any]:
    """Texts in runs of about so many bytes, as gigatoken takes them; one run without a text where there is none."""
    start = 0
    while True:
        stop = int(np.searchsorted(texts.offsets, texts.offsets[start] + _PIECE_BYTES, side="right")) - 1
        stop = min(max(stop, start + 1), len(texts))
        yield _awkward_strings(texts.data, texts.offsets[start : stop + 1])
        if stop >= len(texts):
            return
        start = stop


def _joined(parts: Sequence[RaggedIds]) -> RaggedIds:
    """Several batches as one."""
    if len(parts) == 1:
        return parts[0]
    before = np.cumsum([0, *(len(part.ids) for part in parts)])
    offsets = [part.offsets[1:] + start for part, start in zip(parts, before, strict=False)]
    return RaggedIds(np.concatenate([part.ids for part in parts]), np.concatenate([np.zeros(1, np.int64), *offsets]))


def _awkward_strings(data: bytes, offsets: npt.NDArray[np.int64]) -> Any:
    """Texts that lie end to end, as the array of strings that gigatoken takes without copying."""
    import awkward  # gigatoken needs it too

    content = awkward.contents.NumpyArray(np.frombuffer(data, np.uint8), parameters={"__array__": "char"})
    index = awkward.index.Index64(offsets)
    return awkward.Array(awkward.contents.ListOffsetArray(index, content, parameters={"__array__": "string"}))


def resident_bytes() -> int:
    """The memory that this process holds; 0 where nothing tells it (Windows), so that caches are kept."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the peak is the next best thing
        import sys

        try:
            import resource
        except ImportError:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def return_free_memory() -> None:
    """Ask the C library to give free memory back to the system, where it can."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
