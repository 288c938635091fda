"""Hugging Face's `datasets` in and out: a store as a `Dataset`, and a store made of a tokenized one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fastcollate.errors import InputError, choice, import_extra
from fastcollate.ingest import columns_of_ids, rows_of_ids, with_end_appended
from fastcollate.integrations.pytorch import StoreDataset
from fastcollate.options import local_path
from fastcollate.sources import records
from fastcollate.store import TokenStore, files, require_served, shards
from fastcollate.store import manifest as manifests
from fastcollate.text import load_tokenizer

Int64Array = npt.NDArray[np.int64]

IGNORE = -100
SHARD_ROWS = 1 << 16
BATCH_ROWS = 1000  # of a batch of Arrow, as `datasets` writes them
LENGTH_ROWS = 10_000  # whose tokens are read at once to count them


def lengths_of(dataset: Any) -> npt.NDArray[np.int64]:
    """Tokens in each row that a model will see: of a `StoreDataset` with its end, or a `datasets.Dataset`.

    Raises:
        InputError: the data set has no tokenized column `input_ids`.

    Example:
        >>> from datasets import Dataset
        >>> from fastcollate.integrations.huggingface import lengths_of
        >>> lengths_of(Dataset.from_dict({"input_ids": [[5, 6, 7], [8]]}))
        array([3, 1])
    """
    if isinstance(dataset, StoreDataset):
        return dataset.lengths.astype(np.int64) + dataset.appended(np.arange(len(dataset)))
    if "input_ids" not in (getattr(dataset, "column_names", None) or ()):
        raise InputError(
            f"{type(dataset).__name__} without a column 'input_ids': tokenize it first, or make a store of it with "
            "fastcollate.prepare and give StoreDataset(store)"
        )
    parts = dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=LENGTH_ROWS)
    lengths = [pc.list_value_length(part["input_ids"]).to_numpy().astype(np.int64) for part in parts]
    return np.concatenate([np.empty(0, np.int64), *lengths])


def open_dataset(store: TokenStore | str | os.PathLike[str], *, mask_prompt: bool = True) -> Any:
    """A store as a `datasets.Dataset` that `SFTTrainer` takes as it is: plain, packed, or padding-free.

    Its columns are `input_ids`, each row with its end; `labels`, the ids that are trained and -100 elsewhere; and
    `assistant_masks`, which says the same to TRL before 1.7. They are written once, 9 bytes a token, into the folder
    where `datasets` keeps what it prepares (`HF_DATASETS_CACHE`), and memory-mapped from there.

    Args:
        store: the store, or its directory.
        mask_prompt: train the responses only, or all.

    Example:
        >>> from fastcollate.integrations.huggingface import open_dataset
        >>> dataset = open_dataset("store")
        >>> dataset.column_names, len(dataset)
        (['input_ids', 'labels', 'assistant_masks'], 600)
        >>> dataset.to_iterable_dataset().column_names  # where the trainer shall stream
        ['input_ids', 'labels', 'assistant_masks']
    """
    datasets = import_extra("datasets", "hf")
    store = store if isinstance(store, TokenStore) else TokenStore(store)
    require_served(store)
    what = f"labelled 1 {store.fingerprint} {mask_prompt}"
    name = hashlib.sha256(what.encode()).hexdigest()[:32]
    path = Path(datasets.config.HF_DATASETS_CACHE) / "fastcollate" / f"{name}.arrow"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path, sync=False) as file:
            _write_labelled(store, mask_prompt, file)
    # given a fingerprint, `datasets` does not read the whole table to compute one
    return datasets.Dataset(datasets.table.MemoryMappedTable.from_file(str(path)), fingerprint=name)


def _write_labelled(store: TokenStore, mask_prompt: bool, file: Any) -> None:
    """All rows with their labels, as the stream of Arrow batches that `datasets` reads; a shard a batch, or several."""
    kinds = {"input_ids": pa.int32(), "labels": pa.int32(), "assistant_masks": pa.uint8()}
    with pa.ipc.new_stream(file, pa.schema({name: pa.list_(kind) for name, kind in kinds.items()})) as writer:
        for shard in store.shards:
            offsets, ids, trained = _with_ends(shard, store)
            if not mask_prompt:
                trained = np.ones_like(trained)
            columns = ids, np.where(trained, ids, IGNORE), trained.astype(np.uint8)
            for first in range(0, len(offsets) - 1, BATCH_ROWS):
                own = offsets[first : first + BATCH_ROWS + 1]
                part = slice(own[0], own[-1])
                arrays = [
                    pa.ListArray.from_arrays((own - own[0]).astype(np.int32), pa.array(np.asarray(values)[part], kind))
                    for values, kind in zip(columns, kinds.values(), strict=True)
                ]
                writer.write_batch(pa.record_batch(arrays, names=list(kinds)))


def _with_ends(
    shard: shards.ShardColumns, store: TokenStore
) -> tuple[Int64Array, npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """A shard's rows with their ends: offsets, ids, and which of these are trained where prompts are masked.

    An appended end is trained with the last response, and where a row is one prompt without a response, unless its
    span covers the end too.
    """
    ids, offsets, num_spans = shard.input_ids.astype(np.int32), shard.offsets, np.diff(shard.span_offsets)
    if store.end == "append":
        ids = np.insert(ids, offsets[1:], store.end_token_id)
        offsets = offsets + np.arange(len(offsets))
    before = np.concatenate([[0], np.cumsum(shard.spans, dtype=np.int64)])
    rest = np.diff(offsets) - np.diff(before[shard.span_offsets])
    if (rest < 0).any():
        row = int(np.argmax(rest < 0))
        raise InputError(f"{store.path}: spans of row {row} of a shard are longer than it; prepare the store again")
    is_response = (np.arange(len(shard.spans)) - np.repeat(shard.span_offsets[:-1], num_spans)) % 2 == 1
    ends_trained = (num_spans % 2 == 0) | (num_spans == 1)
    places = shard.span_offsets[1:]
    counts = np.insert(shard.spans.astype(np.int64), places, rest)
    return offsets, ids, np.repeat(np.insert(is_response, places, ends_trained), counts)


def store_from_dataset(dataset: Any, path: str | os.PathLike[str], tokenizer: Any, *, end: str = "auto") -> TokenStore:
    """Make a store of a tokenized `datasets.Dataset` (for one of texts, give it to `fastcollate.prepare`).

    Args:
        dataset: with `input_ids`, and with `labels` (-100 where not trained, else the id at the same place), masks, or
            none: then all tokens are trained. `fastcollate.prepare(dataset, path, template="tokenized", tokenizer=...)`
            reads the same columns by the same rules (docs/prepare.md); this takes the tokenizer as an object.
        path: the store's directory, which holds no store yet.
        tokenizer: the one of Hugging Face that made the ids.
        end: `"auto"` or `"in_row"`: rows are exactly these ids. `"append"`: an end-of-text that closes a row is taken
            off, since the collate appends one to each row, as the chapter does.

    Raises:
        InputError: the data set is not tokenized, its labels are shifted or other ids, the tokenizer has no
            end-of-text, or there is a store already.

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
        (array([0, 1, 2], dtype=uint16), array([1, 2], dtype=uint32))
    """
    root, end = local_path(path), "in_row" if end == "auto" else choice("end", end, ("auto", *manifests.ENDS))
    last, pad = tokenizer.eos_token_id, getattr(tokenizer, "pad_token_id", None)
    if last is None:
        raise InputError(f"{type(tokenizer).__name__} has no eos_token: set it; a store names the id that ends a text")
    if manifests.read_manifest(root) is not None:
        raise InputError(f"{root}: there is a store already; open it with TokenStore, or choose another directory")
    lengths_of(dataset)
    root.mkdir(parents=True, exist_ok=True)
    columns = columns_of_ids(dataset.column_names, {})
    identity, own_files = _saved(tokenizer)
    vocab_size = identity["vocab_size"]
    infos: list[shards.ShardInfo] = []
    first, content = 0, hashlib.sha256()
    for part in dataset.select_columns([*columns.values()]).with_format("arrow").iter(batch_size=SHARD_ROWS):
        shard = _shard(part, columns, first, vocab_size, last if end == "append" else None)
        infos.append(shards.write_shard(root, shards.shard_name(len(infos)), shard))
        content.update(infos[-1].sha256.encode())
        first += part.num_rows
    identity |= {"pad_token_id": int(last if pad is None or end == "append" else pad), "end_token_id": int(last)}
    sources = manifests.sources_of([content.hexdigest()], len(dataset))
    made_from = manifests.StoreIdentity(sources, identity, {"name": "tokenized", "fields": columns}, {}, end=end)
    kept = [files.write_file(root / name, content) for name, content in own_files.items()]
    manifests.write_manifest(root, made_from, infos, files=kept)
    return TokenStore(root)


def _saved(tokenizer: Any) -> tuple[dict[str, Any], Mapping[str, bytes]]:
    """What a store records of a tokenizer, and the files by which it decodes itself; none where it cannot be saved."""
    identity = {
        "name": Path(str(tokenizer.name_or_path)).name or type(tokenizer).__name__,
        "fingerprint": hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest(),
        "vocab_size": len(tokenizer),
        "files": [],
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(InputError):
        tokenizer.save_pretrained(folder)
        saved = load_tokenizer(folder)
        return {**saved.identity(), "name": identity["name"]}, saved.files
    return identity, {}


def _shard(
    part: pa.Table, columns: Mapping[str, str], first: int, vocab_size: int, end: int | None
) -> shards.ShardColumns:
    """The rows of records from number `first` on; an `end` is taken off where it closes a row."""
    found, bad = rows_of_ids(records.TableRecords(part), columns, vocab_size)
    if bad:
        number = min(bad)
        raise InputError(f"row {first + number}: {bad[number]}")
    rows = found if end is None else with_end_appended(found, end)
    return shards.ShardColumns(
        rows.ids.astype(shards.token_dtype(vocab_size)),
        *rows[1:4],
        rows.source_row + np.uint64(first),
    )
