"""Hugging Face's `datasets` in and out: a store as a `Dataset`, and a store made of a tokenized one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fastcollate.errors import InputError, import_extra
from fastcollate.integrations.pytorch import StoreDataset
from fastcollate.store import ShardInfo, TokenStore, shards
from fastcollate.store import manifest as manifests

IGNORE = -100
SHARD_ROWS = 1 << 16
LENGTH_ROWS = 10_000  # whose tokens are read at once to count them


def lengths_of(dataset: Any) -> npt.NDArray[np.int64]:
    """Tokens in each row that a model will see: of a `StoreDataset` with the end-of-text, or a `datasets.Dataset`.

    Raises:
        InputError: the data set has no tokenized column `input_ids`.

    Example:
        >>> from datasets import Dataset
        >>> from fastcollate.integrations.huggingface import lengths_of
        >>> lengths_of(Dataset.from_dict({"input_ids": [[5, 6, 7], [8]]}))
        array([3, 1])
    """
    if isinstance(dataset, StoreDataset):
        return dataset.lengths.astype(np.int64) + 1
    if "input_ids" not in (getattr(dataset, "column_names", None) or ()):
        raise InputError(
            f"{type(dataset).__name__} without a column 'input_ids': tokenize it first, or make a store of it with "
            "fastcollate.prepare and give StoreDataset(store)"
        )
    parts = dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=LENGTH_ROWS)
    lengths = [pc.list_value_length(part["input_ids"]).to_numpy().astype(np.int64) for part in parts]
    return np.concatenate([np.empty(0, np.int64), *lengths])


def open_dataset(store: TokenStore | str | os.PathLike[str]) -> Any:
    """A store as a `datasets.Dataset`, memory-mapped: nothing is copied.

    Its columns are the store's: `input_ids` (without the end-of-text), `spans`, `source_row`.

    Example:
        >>> from fastcollate.integrations.huggingface import open_dataset
        >>> dataset = open_dataset("store")
        >>> dataset.column_names, len(dataset)
        (['input_ids', 'spans', 'source_row'], 600)
    """
    datasets = import_extra("datasets", "hf")
    store = store if isinstance(store, TokenStore) else TokenStore(store)
    table = pa.Table.from_batches([shards.record_batch(columns) for columns in store.shards])
    # given a fingerprint, `datasets` does not read the whole table to compute one
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=store.fingerprint[:16])


def store_from_dataset(dataset: Any, path: str | os.PathLike[str], tokenizer: Any) -> TokenStore:
    """Make a store of a tokenized `datasets.Dataset` (for one of texts, give it to `fastcollate.prepare`).

    Args:
        dataset: with `input_ids`, and with `labels` (-100 where not trained) or `completion_mask`, or neither: then
            all tokens are trained. An end-of-text that closes a row is taken off: the collate appends it.
        path: the store's directory, which holds no store yet.
        tokenizer: the one of Hugging Face that made the ids.

    Raises:
        InputError: the data set is not tokenized, the tokenizer has no end-of-text, or there is a store already.

    Example:
        >>> from datasets import Dataset
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> from fastcollate.integrations.huggingface import store_from_dataset
        >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> rows = Dataset.from_dict({"input_ids": [[0, 1, 2], [1, 2]], "completion_mask": [[0, 1, 1], [1, 1]]})
        >>> store = store_from_dataset(rows, "tokenized", tokenizer)
        >>> store[0].input_ids, store[0].spans
        (array([0, 1], dtype=uint16), array([1, 1], dtype=uint32))
    """
    root, end = Path(path), tokenizer.eos_token_id
    if end is None:
        raise InputError(f"{type(tokenizer).__name__} has no eos_token: set it, for every row ends with it")
    if manifests.read_manifest(root) is not None:
        raise InputError(f"{root}: there is a store already; open it with TokenStore, or choose another directory")
    lengths_of(dataset)
    root.mkdir(parents=True, exist_ok=True)
    columns = [name for name in ("input_ids", "labels", "completion_mask") if name in dataset.column_names]
    vocab_size = len(tokenizer)
    infos: list[ShardInfo] = []
    first = 0
    for part in dataset.select_columns(columns).with_format("numpy").iter(batch_size=SHARD_ROWS):
        shard = _shard(part, first, end, vocab_size)
        infos.append(shards.write_shard(root, shards.shard_name(len(infos)), shard))
        first += len(shard.source_row)
    identity = {
        "name": str(tokenizer.name_or_path or type(tokenizer).__name__),
        "fingerprint": hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest(),
        "vocab_size": vocab_size,
        "pad_token_id": int(end),
        "end_token_id": int(end),
        "files": [],
    }
    sources = manifests.sources_of([str(dataset._fingerprint)], len(dataset))
    made_from = manifests.StoreIdentity(sources, identity, {"name": "tokenized"}, {"columns": columns})
    manifests.write_manifest(root, made_from, infos)
    return TokenStore(root)


def _shard(part: Mapping[str, Any], first: int, end: int, vocab_size: int) -> shards.ShardColumns:
    rows, spans = [], []
    for number, ids in enumerate(part["input_ids"]):
        ids = np.asarray(ids, np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise InputError(f"row {first + number} has ids beyond the tokenizer's {vocab_size:,}: it made other ids")
        trained = np.ones(len(ids), bool)
        if "labels" in part:
            trained = np.asarray(part["labels"][number]) != IGNORE
        elif "completion_mask" in part:
            trained = np.asarray(part["completion_mask"][number]) != 0
        if len(trained) != len(ids):
            raise InputError(f"row {first + number} has {len(ids)} ids and {len(trained)} labels: give one an id")
        closed = len(ids) > 0 and int(ids[-1]) == end
        rows.append(ids[:-1] if closed else ids)
        # the end-of-text is trained like the row's last token, unless the row says it itself
        spans.append(_spans(trained if closed else np.append(trained, trained[-1:])))
    return shards.ShardColumns(
        np.concatenate(rows).astype(shards.token_dtype(vocab_size)),
        np.cumsum([0, *map(len, rows)], dtype=np.int64),
        np.concatenate(spans).astype(np.uint32),
        np.cumsum([0, *map(len, spans)], dtype=np.int64),
        np.arange(first, first + len(rows), dtype=np.uint64),
    )


def _spans(trained: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Alternating counts, prompt first, of a row with its end-of-text, whose own place a response does not count."""
    edges = np.flatnonzero(np.diff(trained, prepend=False, append=not trained[-1] if len(trained) else False))
    counts = np.diff(edges, prepend=0)
    if len(counts) % 2 == 0 and len(counts):
        counts[-1] -= 1
    return counts
