"""What encodes texts, behind one small contract: tiktoken and Hugging Face's tokenizers; gigatoken has its own file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, NamedTuple

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
    """Texts on which a backend fails; `reasons` are what it says, by the text's number."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__(next(iter(reasons.values())))
        self.reasons = reasons


class DifferentIdsError(RuntimeError):
    """gigatoken and the reference give different ids for a text; the message names it."""


class Texts:
    """Many texts, end to end as UTF-8; lone surrogates become U+FFFD.

    They are given as `strings`, or end to end as `data` with `offsets`, int64 `(num_texts + 1,)`, where each begins.
    """

    def __init__(
        self, strings: Sequence[str] = (), *, data: bytes = b"", offsets: npt.NDArray[np.int64] | None = None
    ) -> None:
        if offsets is None:
            encoded = list(map(_utf8, strings))
            data, offsets = b"".join(encoded), starts_of(list(map(len, encoded)))
        self.data = data
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        return self.data[self.offsets[index] : self.offsets[index + 1]].decode()

    def strings(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Some of the texts as strings."""
        bounds = self.offsets[start : None if stop is None else stop + 1].tolist()
        return [self.data[begin:end].decode() for begin, end in pairwise(bounds)]


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return without_surrogates(text).encode()


def starts_of(lengths: Any) -> npt.NDArray[np.int64]:
    """Where things of these lengths begin that stand end to end, and the end of the last, `(len(lengths) + 1,)`."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def exchanged(
    values: npt.NDArray[Any], offsets: npt.NDArray[np.int64], rows: Mapping[int, Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Ragged rows of which some, ascending, are exchanged for others."""
    found, lengths, place = [], np.diff(offsets), 0
    for row, new in rows.items():
        found += [values[offsets[place] : offsets[row]], np.asarray(new).astype(values.dtype)]
        lengths[row], place = len(new), row + 1
    return np.concatenate([*found, values[offsets[place] :]]), starts_of(lengths)


class TiktokenBackend:
    """tiktoken in a serial loop: its batch call starts a thread per text, which costs more than short texts do."""

    name = "tiktoken"
    bounds_in_bytes = True

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        self.encode = encoding.encode_ordinary
        self.decode = encoding.decode

    def encode_batch(self, texts: Texts) -> RaggedIds:
        """The ids of each text."""
        return _ragged_ids(list(map(self.encode, texts.strings())))

    def trim(self) -> None:
        """Nothing to give back: it keeps no cache."""

    @cached_property
    def _num_bytes(self) -> npt.NDArray[np.int64]:
        num_bytes = np.zeros(self._encoding.max_token_value + 1, np.int64)
        for token, rank in self._encoding._mergeable_ranks.items():
            num_bytes[rank] = len(token)
        return num_bytes

    def token_bounds(self, text: str, ids: npt.NDArray[Any]) -> TokenBounds:
        """Where each token begins and ends, in UTF-8 bytes: a row's tokens put together are its text."""
        ends = np.cumsum(self._num_bytes[ids])
        return ends - self._num_bytes[ids], ends


@contextlib.contextmanager
def serial_tokenizers() -> Iterator[None]:
    """Keep `tokenizers` from threads of its own, after which a process that is forked from this one would warn."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class TokenizersBackend:
    """A Hugging Face `tokenizer.json`."""

    name = "tokenizers"
    bounds_in_bytes = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return list(self._tokenizer.encode(without_surrogates(text), add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def encode_batch(self, texts: Texts) -> RaggedIds:
        """The ids of each text."""
        encoded = self._tokenizer.encode_batch_fast(texts.strings(), add_special_tokens=False)
        return _ragged_ids([item.ids for item in encoded])

    def encode_placed(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """The ids of each text, and where each token begins and ends in characters, as transformers sees it."""
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [(item.ids, item.offsets) for item in encoded]

    def trim(self) -> None:
        """Nothing to give back: its cache is bounded."""

    def token_bounds(self, text: str, ids: npt.NDArray[Any]) -> TokenBounds:
        """Where each token begins and ends, in characters; those of one character share them."""
        bounds = np.array(self._tokenizer.encode(text, add_special_tokens=False).offsets, np.int64).reshape(-1, 2)
        return bounds[:, 0], bounds[:, 1]


def _ragged_ids(rows: list[list[int]]) -> RaggedIds:
    offsets = starts_of(list(map(len, rows)))
    return RaggedIds(np.fromiter(chain.from_iterable(rows), np.uint32, int(offsets[-1])), offsets)


Engine = TiktokenBackend | TokenizersBackend
"""What defines the ids."""
