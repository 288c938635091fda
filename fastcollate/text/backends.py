"""What encodes texts: tiktoken, gigatoken or a Hugging Face `tokenizer.json`, behind one small contract."""

from __future__ import annotations

import base64
import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol, overload

import numpy as np
import numpy.typing as npt
import tiktoken

_CACHE_GROWTH = 16 << 20  # bytes by which gigatoken's caches may grow before they are thrown away
_PIECE_BYTES = 1 << 19  # of text, after which that growth is looked at: on words never seen it is fifty times as much
_CALM = 8  # pieces with hardly any growth, after which they are twice as large: a call costs a third of a millisecond


class RaggedIds(NamedTuple):
    """Token ids of several texts, end to end.

    Attributes:
        ids: uint32, or uint16 where all ids of the vocabulary fit, `(num_tokens,)`.
        offsets: int64 `(num_texts + 1,)`, where each text starts in `ids`.
    """

    ids: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]


def without_surrogates(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD, as tiktoken does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Texts(Sequence[str]):
    """Many texts, end to end as UTF-8.

    Args:
        strings: the texts; lone surrogates become U+FFFD.
        data: the texts end to end, in place of `strings`.
        offsets: int64 `(num_texts + 1,)`, where each text begins in `data`.
    """

    def __init__(
        self, strings: Sequence[str] = (), *, data: bytes = b"", offsets: npt.NDArray[np.int64] | None = None
    ) -> None:
        if offsets is None:
            encoded = list(map(_utf8, strings))
            offsets = np.zeros(len(encoded) + 1, np.int64)
            np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=offsets[1:])
            data = b"".join(encoded)
        self.data = data
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.data[self.offsets[index] : self.offsets[index + 1]].decode()

    def strings(self) -> list[str]:
        """All texts as strings."""
        return [self.data[start:stop].decode() for start, stop in pairwise(self.offsets.tolist())]


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return without_surrogates(text).encode()


class Backend(Protocol):
    """What encodes many texts at once.

    Attributes:
        name: `tiktoken`, `gigatoken` or `tokenizers`.
    """

    name: str

    def encode_batch(self, texts: Texts) -> RaggedIds:
        """The ids of each text."""
        ...

    def trim(self) -> None:
        """Give back memory that earlier texts have left behind."""
        ...


class TiktokenBackend:
    """tiktoken in a serial loop: its batch call starts a thread per text, which costs more than short texts do."""

    name = "tiktoken"

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding

    def encode_batch(self, texts: Texts) -> RaggedIds:
        """The ids of each text."""
        return ragged_ids(list(map(self._encoding.encode_ordinary, texts.strings())))

    def trim(self) -> None:
        """Nothing to give back: it keeps no cache."""


class GigatokenBackend:
    """gigatoken without special tokens; its caches are thrown away when they have grown."""

    name = "gigatoken"

    def __init__(self, encoding: tiktoken.Encoding, scheme: str) -> None:
        self._encoding = encoding
        self._scheme = scheme
        self._calm = 0  # pieces in a row on which the caches have hardly grown
        self._dtype = np.uint16 if encoding.max_token_value < 1 << 16 else np.uint32
        self._load()

    def _load(self) -> None:
        import gigatoken

        lines = b"".join(
            base64.b64encode(token) + b" %d\n" % rank for token, rank in self._encoding._mergeable_ranks.items()
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ranks.tiktoken"
            path.write_bytes(lines)
            self._tokenizer = gigatoken.Tokenizer.from_tiktoken(path, pretokenizer=self._scheme, special_tokens={})
        self._empty: int | None = None  # resident bytes with caches as good as empty; taken at the next `trim`
        self._grown = 0  # by how much there were more at the last one

    def encode_batch(self, texts: Texts) -> RaggedIds:
        """The ids of each text."""
        parts = []
        start, kept = resident_bytes() - self._grown, 0
        grown = self._grown
        for piece in _pieces(texts, lambda: _PIECE_BYTES if self._calm < _CALM else 2 * _PIECE_BYTES):
            parts.append(self._encode_piece(piece))
            kept += parts[-1].ids.nbytes + parts[-1].offsets.nbytes
            before, grown = grown, resident_bytes() - start - kept
            self._calm = self._calm + 1 if grown - before < _CACHE_GROWTH // 8 else 0
            if grown > _CACHE_GROWTH:
                self._start_afresh()
                start, kept, grown = resident_bytes(), 0, 0
        return _joined(parts)

    def _encode_piece(self, piece: Any) -> RaggedIds:
        encoded = self._tokenizer.encode_batch(piece, parallel=False).layout
        offsets = np.array(encoded.offsets.data)
        # A copy, as narrow as can be: what gigatoken has written is free again before the next piece.
        ids = np.asarray(encoded.content.data)[offsets[0] : offsets[-1]].astype(self._dtype)
        return RaggedIds(ids, offsets - offsets[0])

    def _start_afresh(self) -> None:
        del self._tokenizer
        gc.collect()
        return_free_memory()
        self._load()

    def trim(self) -> None:
        """Give back what a block has left behind, and see what the caches hold; call it between blocks."""
        return_free_memory()
        self._empty = resident_bytes() if self._empty is None else self._empty
        self._grown = resident_bytes() - self._empty


def _pieces(texts: Texts, size: Callable[[], int]) -> Iterator[Any]:
    """Texts in runs of about so many bytes, as gigatoken takes them; one run without a text where there is none."""
    start = 0
    while True:
        stop = int(np.searchsorted(texts.offsets, texts.offsets[start] + size(), side="right")) - 1
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


class TokenizersBackend:
    """A Hugging Face `tokenizer.json`."""

    name = "tokenizers"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return list(self._tokenizer.encode(without_surrogates(text), add_special_tokens=False).ids)

    def encode_batch(self, texts: Texts) -> RaggedIds:
        """The ids of each text."""
        encoded = self._tokenizer.encode_batch_fast(texts.strings(), add_special_tokens=False)
        return ragged_ids([item.ids for item in encoded])

    def trim(self) -> None:
        """Nothing to give back: its cache is bounded."""

    def token_ends(self, text: str, ids: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Where each token ends, in characters."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array([end for _, end in encoded.offsets], np.int64)


def ragged_ids(rows: list[list[int]]) -> RaggedIds:
    """Lists of ids as arrays."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)), out=offsets[1:])
    return RaggedIds(np.fromiter(chain.from_iterable(rows), np.uint32, int(offsets[-1])), offsets)


def resident_bytes() -> int:
    """The memory that this process holds."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the peak is the next best thing
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def return_free_memory() -> None:
    """Ask the C library to give free memory back to the system, where it can."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
