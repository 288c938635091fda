"""The token store: shards and a manifest in one directory, written atomically and read by memory map.

`manifest.json` is the commit point: a directory without it is an unfinished job, never a store.
"""

from __future__ import annotations

import copy
import functools
import operator
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError
from fastcollate.options import local_path
from fastcollate.store.files import naming
from fastcollate.store.manifest import LENGTHS, MANIFEST, read_manifest
from fastcollate.store.shards import ShardColumns, ShardInfo, open_shards, shard_schema, token_dtype

_REMEDIES = {
    "rows": "prepare pairs with --template preference",
    "pairs": "BatchLoader and train --objective dpo take pairs",
    "answers": "an answer with a verdict is none to learn; store.as_rows() takes each by itself all the same",
    "documents": "upgrade with: pip install --upgrade fastcollate",
}
_SAMPLED_ROWS = 16  # of a shard, the first and the last among them: each may be a page to read


class Example(NamedTuple):
    """One row of a store.

    Attributes:
        input_ids: uint16 or uint32 `(length,)`.
        spans: uint32, alternating counts of prompt and response tokens, prompt first; they sum to `length`, or to
            `length + 1` where a last prompt span also covers the end-of-text that the collate appends.
        source_row: the record's position in the sources.
    """

    input_ids: npt.NDArray[Any]
    spans: npt.NDArray[np.uint32]
    source_row: int


class TokenStore:
    """A finished store, memory-mapped: opening it reads no token, and processes that open it share its pages.

    Args:
        path: the store's directory.

    Raises:
        InputError: there is no finished store, it is of another format version, or a file's size or layout does not
            agree with the manifest. Flipped bytes are found by `verify_checksums`.

    Example:
        >>> from fastcollate import TokenStore
        >>> store = TokenStore("store")
        >>> len(store), store.tokenizer_name, store.vocab_size
        (600, 'gpt2', 50257)
        >>> row = store[3]
        >>> row.input_ids[:4], row.spans  # 44 tokens of prompt, 12 of response
        (array([21106,   318,   281, 12064], dtype=uint16), array([44, 12], dtype=uint32))
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = local_path(path)
        self._from_anywhere = self.path.absolute()  # also after `chdir`
        manifest = read_manifest(self.path)
        if manifest is None:
            what = f"{self.path} STORE" if self.path.is_file() else f"SOURCE {self.path}"
            raise InputError(
                f"{self.path}: no finished token store here (no {MANIFEST}); make one with: fastcollate prepare {what}"
            )
        self.manifest = manifest
        if "format" in manifest["sources"] and manifest["template"].get("name") == "tokenized":
            warnings.warn(
                f"{self.path}: made from ready ids by an older release: an end-of-text that closed a row is taken off, "
                "and each row gets one, also those that had none; make the store anew where rows differ in that",
                stacklevel=2,
            )
        self.fingerprint, self.kind, self.end = manifest["fingerprint"], manifest["kind"], manifest["end"]
        self.num_tokens, self.max_length = manifest["num_tokens"], manifest["max_length"]
        tokenizer = manifest["tokenizer"]
        self.vocab_size, own = tokenizer["vocab_size"], tokenizer["files"]
        self.pad_token_id, self.end_token_id = tokenizer["pad_token_id"], tokenizer["end_token_id"]
        self.tokenizer_name = str(self._from_anywhere / own[0]) if own else tokenizer["name"]
        schema = shard_schema(token_dtype(self.vocab_size), manifest["columns"])
        self.shards = open_shards(self.path, [ShardInfo(**entry) for entry in manifest["shards"]], schema)
        self.lengths = _open_lengths(self.path, manifest)
        self.shard_starts = np.zeros(len(self.shards) + 1, np.int64)
        np.cumsum([len(shard.source_row) for shard in self.shards], out=self.shard_starts[1:])
        self._check_lengths()

    shards: tuple[ShardColumns, ...]
    """Each shard's columns, zero-copy; of very many small ones (see `shards.open_shards`), neighbours as one."""
    lengths: npt.NDArray[Any]
    """Each row's length in ids, uint16 or uint32 `(num_rows,)`, memory-mapped; see `cells` for what a batch takes."""
    shard_starts: npt.NDArray[np.int64]
    """The first row of each shard, then the number of rows; `(num_shards + 1,)`."""
    fingerprint: str
    """What the store was made from (sources, tokenizer, template, options), as one hash."""
    num_tokens: int
    """Tokens in all rows, without the end-of-text of each."""
    max_length: int
    """The longest row's length in tokens."""
    vocab_size: int
    """The number of token ids; every id of the store is below it."""
    tokenizer_name: str
    """The encoding's name, such as `gpt2`, or the path of the store's own `tokenizer.json`."""
    kind: str
    """What rows are: `rows`; `pairs`, two neighbouring rows of one `source_row` each, the chosen one first; `answers`,
    a row with a verdict each; or `documents`."""
    end: str
    """`append`: the collate appends the end-of-text to each row; `in_row`: rows hold their end themselves."""
    pad_token_id: int
    """The id that the collate pads with."""
    end_token_id: int
    """The end-of-text id, which the collate appends to each row of an `append` store."""

    @functools.cached_property
    def cells(self) -> npt.NDArray[Any]:
        """Cells that each row fills in a batch, which is what plans count: its length, or in an `in_row` store, whose
        last id is a target only, one less."""
        return self.lengths - (self.lengths > 0) if self.end == "in_row" else self.lengths

    def _check_lengths(self) -> None:
        """Compare `lengths.npy`, which plans are made of, with the shards: all sums, and some rows of each shard."""
        for first, stop, shard in zip(self.shard_starts[:-1], self.shard_starts[1:], self.shards, strict=True):
            rows = np.linspace(0, stop - first - 1, min(_SAMPLED_ROWS, stop - first)).astype(np.int64)
            lengths = self.lengths[first:stop]
            agrees = np.array_equal(lengths[rows], shard.offsets[rows + 1] - shard.offsets[rows])
            if not agrees or int(lengths.sum(dtype=np.int64)) != int(shard.offsets[-1]):
                raise InputError(
                    f"{self.path / LENGTHS}: damaged, or not of this store (rows {first} to {stop - 1} have other "
                    "lengths in their shard); prepare the store again"
                )

    def as_rows(self) -> TokenStore:
        """The same store with each row by itself, whatever links it to another, such as to look at or to verify them.

        Example:
            >>> from fastcollate import TokenStore
            >>> TokenStore("store").as_rows().kind
            'rows'
        """
        found = copy.copy(self)
        found.kind = "rows"
        return found

    def column(self, name: str) -> npt.NDArray[Any]:
        """A further column of all rows, `(num_rows,)`, such as the labels of answers.

        Raises:
            InputError: the store has no such column.
        """
        if name not in self.manifest["columns"]:
            have = ", ".join(map(repr, self.manifest["columns"])) or "none"
            raise InputError(f"{self.path}: no column {name!r}; it has {have}")
        return np.concatenate([shard.extra[name] for shard in self.shards])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        row = operator.index(index)
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {index} of a store with {len(self)} rows")
        row %= len(self)
        number = int(np.searchsorted(self.shard_starts, row, side="right")) - 1
        shard, row = self.shards[number], row - int(self.shard_starts[number])
        return Example(
            _cell(shard.input_ids, shard.offsets, row, self.path),
            _cell(shard.spans, shard.span_offsets, row, self.path),
            int(shard.source_row[row]),
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"TokenStore({str(self.path)!r}): {len(self):,} rows, {self.num_tokens:,} tokens"

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process opens its own map instead of receiving a copy.
        as_rows = self.kind != self.manifest["kind"]
        return (_rows_at if as_rows else TokenStore), (self._from_anywhere,)


def _rows_at(path: Path) -> TokenStore:
    return TokenStore(path).as_rows()


def require_served(store: Any, kinds: Collection[str] = ("rows",)) -> None:
    """Refuse a store of another kind than batches are made of here; its rows can be read all the same.

    Its rows are no rows of their own. What has its rows in memory and says nothing of them is no such store.
    """
    kind = getattr(store, "kind", "rows")
    if kind not in kinds:
        raise InputError(
            f"{store.path}: a store of {kind}; this makes batches of {' or '.join(kinds)}; {_REMEDIES[kind]}"
        )


def _cell(values: npt.NDArray[Any], offsets: npt.NDArray[np.int64], row: int, path: Path) -> npt.NDArray[Any]:
    start, stop = int(offsets[row]), int(offsets[row + 1])
    if not 0 <= start <= stop <= len(values):
        raise InputError(f"{path}: damaged offsets at row {row} of a shard; run: fastcollate verify --checksums {path}")
    return values[start:stop]


def _open_lengths(root: Path, manifest: Mapping[str, Any]) -> npt.NDArray[Any]:
    path = root / LENGTHS
    with naming(path):
        try:
            lengths: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
        except (ValueError, EOFError) as error:
            raise InputError(f"{path}: cannot be opened ({error}); prepare the store again") from error
    if lengths.shape != (manifest["num_rows"],) or lengths.dtype not in (np.uint16, np.uint32):
        raise InputError(f"{path}: {lengths.dtype} {lengths.shape} does not fit the manifest; prepare the store again")
    return lengths
