"""What encodes texts, behind one small contract: tiktoken and Hugging Face's tokenizers; gigatoken has its own file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple, Protocol, overload

import numpy as np
import numpy.typing as npt
import tiktoken

TokenBounds = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Where each token of a text begins and ends, each `(num_tokens,)`."""


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


class UnencodableError(Exception):
    """Texts on which a backend fails.

    Attributes:
        reasons: what it says, by the text's number.
    """

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__(next(iter(reasons.values())))
        self.reasons = reasons


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

    def token_bounds(self, text: str, ids: npt.NDArray[Any]) -> TokenBounds:
        """Where each token begins and ends, in characters; those of one character share them."""
        bounds = np.array(self._tokenizer.encode(text, add_special_tokens=False).offsets, np.int64).reshape(-1, 2)
        return bounds[:, 0], bounds[:, 1]


def ragged_ids(rows: list[list[int]]) -> RaggedIds:
    """Lists of ids as arrays."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)), out=offsets[1:])
    return RaggedIds(np.fromiter(chain.from_iterable(rows), np.uint32, int(offsets[-1])), offsets)
