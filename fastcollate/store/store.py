"""The token store: shards and a manifest in one directory, written atomically and read by memory map.

`manifest.json` is the commit point: a directory without it is an unfinished job, never a store.
"""

from __future__ import annotations

import functools
import operator
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError, SourceReadError
from fastcollate.store.files import naming
from fastcollate.store.layout import AbsentShard
from fastcollate.store.manifest import LENGTHS, MANIFEST, read_manifest
from fastcollate.store.remote.objects import Objects, folder_of
from fastcollate.store.remote.shards import RemoteShard, RemoteShards
from fastcollate.store.shards import ShardColumns, ShardInfo, open_shards, shard_schema, token_dtype

_REMEDIES = {
    "rows": "prepare pairs with --template preference",
    "pairs": "BatchLoader and train --objective dpo take pairs",
    "answers": "BatchLoader takes answers with their verdicts; store.as_rows() takes each by itself all the same",
    "documents": "documents are batches of rows by themselves",
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

    Of a store in object storage opening reads the manifest and the lengths. Each shard is fetched when rows of it are
    needed, once for all processes of the machine, its checksum is compared, and it is memory-mapped from there.

    Args:
        path: the store's directory, or its URL, such as `s3://bucket/store`.
        cache: the folder for what is fetched; by default `FASTCOLLATE_CACHE`, else `~/.cache/fastcollate/stores`.
        cache_limit: bytes of this store's shards there at most, such as `"20GB"`; what was used longest ago goes first.
            By default `FASTCOLLATE_CACHE_LIMIT`, else there is none.

    Raises:
        InputError: there is no finished store, it is of another format version, or a file's size or layout does not
            agree with the manifest. Flipped bytes are found by `verify_checksums`, and in what is fetched at once.

    Example:
        >>> from fastcollate import TokenStore
        >>> store = TokenStore("store")
        >>> len(store), store.tokenizer_name, store.vocab_size
        (600, 'gpt2', 50257)
        >>> row = store[3]
        >>> row.input_ids[:4], row.spans  # 44 tokens of prompt, 12 of response
        (array([21106,   318,   281, 12064], dtype=uint16), array([44, 12], dtype=uint32))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        cache: str | os.PathLike[str] | None = None,
        cache_limit: int | str | None = None,
    ) -> None:
        self.path = folder = folder_of(path)
        is_remote = isinstance(folder, Objects)
        if not is_remote and (cache, cache_limit) != (None, None):
            raise InputError(f"{folder}: cache and cache_limit are for a store behind a URL; leave them out")
        self._again = folder.url if isinstance(folder, Objects) else folder.absolute(), cache, cache_limit
        self.manifest = manifest = _manifest_of(folder)
        self.fingerprint, self.kind, self.end = manifest["fingerprint"], manifest["kind"], manifest["end"]
        self.num_tokens, self.max_length = manifest["num_tokens"], manifest["max_length"]
        tokenizer = manifest["tokenizer"]
        self.vocab_size = tokenizer["vocab_size"]
        self.pad_token_id, self.end_token_id = tokenizer["pad_token_id"], tokenizer["end_token_id"]
        schema = shard_schema(token_dtype(self.vocab_size), manifest["columns"])
        infos = [ShardInfo(**entry) for entry in manifest["shards"]]
        self._remote: RemoteShards | None = None
        if isinstance(folder, Objects):
            self._remote = RemoteShards(folder.url, manifest, infos, schema, cache, cache_limit)
            self.lengths = self._remote.lengths = _open_lengths(self._remote.cache.folder, manifest)
            rows = [info.num_rows for info in infos]
            own = (RemoteShard(self._remote, n, rows[n], token_dtype(self.vocab_size)) for n in range(len(rows)))
            self.shards = cast(tuple[ShardColumns, ...], tuple(own))
        else:
            self.shards = open_shards(folder, infos, schema)
            self.lengths = _open_lengths(folder, manifest)
            rows = [len(shard.source_row) for shard in self.shards]
        self.shard_starts = np.cumsum([0, *rows], dtype=np.int64)
        if not is_remote:
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
    def tokenizer_name(self) -> str:
        """The encoding's name, such as `gpt2`, or the path of the store's own `tokenizer.json`."""
        tokenizer, root = self.manifest["tokenizer"], self._again[0]
        if not tokenizer["files"]:
            return str(tokenizer["name"])
        if self._remote is not None:
            root = self._remote.fetch_files()
        return str(Path(root) / tokenizer["files"][0])

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
                    f"{self.path}/{LENGTHS}: damaged, or not of this store (rows {first} to {stop - 1} have other "
                    "lengths in their shard); prepare the store again"
                )

    def seen_from(self, folder: Path) -> str:
        """How to name the store in a file of this folder: its relative path, or its URL without user and password."""
        return os.path.relpath(self.path, folder) if isinstance(self.path, Path) else str(self.path)

    def as_rows(self) -> TokenStore:
        """The same store with each row by itself, whatever links it to another, such as to look at or to verify them.

        Example:
            >>> from fastcollate import TokenStore
            >>> TokenStore("store").as_rows().kind
            'rows'
        """
        found = TokenStore.__new__(TokenStore)  # `copy.copy` would open it again
        vars(found).update(vars(self))
        found.kind = "rows"
        return found

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the further columns."""
        return tuple(self.manifest["columns"])

    def column(self, name: str) -> npt.NDArray[Any]:
        """A further column of all rows, `(num_rows,)`, such as the labels of answers.

        Raises:
            InputError: the store has no such column.
        """
        if name not in self.manifest["columns"]:
            have = ", ".join(map(repr, self.manifest["columns"])) or "none"
            raise InputError(f"{self.path}: no column {name!r}; it has {have}")
        there = (shard.columns if isinstance(shard, AbsentShard) else shard for shard in self.shards)
        return np.concatenate([shard.extra[name] for shard in there])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        row = operator.index(index)
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {index} of a store with {len(self)} rows")
        row %= len(self)
        number = int(np.searchsorted(self.shard_starts, row, side="right")) - 1
        shard, row = self.shards[number], row - int(self.shard_starts[number])
        shard = shard.columns if isinstance(shard, AbsentShard) else shard
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
        open_again = _opened if self.kind == self.manifest["kind"] else _opened_as_rows
        return open_again, self._again  # a worker process opens its own map instead of receiving a copy


def _opened_as_rows(*again: Any) -> TokenStore:
    return _opened(*again).as_rows()


def _opened(path: str | Path, cache: str | None, cache_limit: int | str | None) -> TokenStore:
    return TokenStore(path, cache=cache, cache_limit=cache_limit)


def require_served(store: Any, kinds: Collection[str] = ("rows", "documents")) -> None:
    """Refuse a store of another kind than batches are made of here; its rows can be read all the same.

    Its rows are no rows of their own. What has its rows in memory and says nothing of them is no such store.
    """
    kind = getattr(store, "kind", "rows")
    if kind not in kinds:
        raise InputError(
            f"{store.path}: a store of {kind}; this makes batches of {' or '.join(kinds)}; {_REMEDIES[kind]}"
        )


def _manifest_of(folder: Path | Objects) -> dict[str, Any]:
    """The manifest of the store that is here."""
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        if isinstance(folder, Path) or isinstance(error, SourceReadError):
            raise
        manifest = read_manifest(folder)  # it may have been damaged on the way
    if manifest is None:
        is_file = isinstance(folder, Path) and folder.is_file()
        what = f"{folder} STORE" if is_file else f"SOURCE {folder}"
        raise InputError(
            f"{folder}: no finished token store here (no {MANIFEST}); make one with: fastcollate prepare {what}"
        )
    if "format" in manifest["sources"] and manifest["template"].get("name") == "tokenized":
        warnings.warn(
            f"{folder}: made from ready ids by an older release: an end-of-text that closed a row is taken off, "
            "and each row gets one, also those that had none; make the store anew where rows differ in that",
            stacklevel=3,
        )
    return manifest


def _cell(values: npt.NDArray[Any], offsets: npt.NDArray[np.int64], row: int, path: object) -> npt.NDArray[Any]:
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
