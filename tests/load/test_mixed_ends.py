"""Chats that hold their end, instructions that get one, and documents in one mix: each row as in its own store."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcollate import BatchLoader, BucketBatchSampler, MixedStore, StoreDataset
from fastcollate.errors import InputError
from fastcollate.load.options import order_keywords
from fastcollate.store.store import TokenStore
from tests.helpers import store_of_rows

END, PAD = 96, 0
KINDS = {"chat": "in_row", "one": "append", "documents": "append"}
OPTIONS: list[dict[str, Any]] = [
    {"batch_size": 7},
    {"batch_size": 4, "mask_prompt": True, "max_length": 9, "ignore_index": -1},
    {"batch_size": 4, "mask_prompt": True, "max_length": 6, "truncation": "left", "policy": "shuffled"},
    {"max_tokens": 90, "mask_prompt": True, "pad_to_multiple_of": 8},
    {"batch_size": 2, "policy": "packed", "capacity": 40, "mask_prompt": True},
    {"batch_size": 3, "policy": "packed", "capacity": 24, "max_length": 8, "truncation": "left", "mask_prompt": True},
    {"batch_size": 2, "policy": "packed", "capacity": 40, "cp_size": 2, "balance": True},
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenStore]:
    """Rows that begin with their store's and their own number; some are empty, some all prompt."""
    folder, random = tmp_path_factory.mktemp("mixed"), np.random.default_rng(3)
    found = {}
    for kind, (name, end) in enumerate(KINDS.items()):
        rows, spans = [], []
        for number in range(41):
            length = int(random.integers(3, 24)) if number else 0
            rows.append([80 + kind, 1 + number, *random.integers(60, 79, max(length - 2, 0)).tolist()][:length])
            prompt = int(random.integers(0, length + 1))
            spans.append([prompt, length - prompt] if number % 3 else [prompt, (length - prompt) // 2, length])
            spans[-1][-1] = max(length - sum(spans[-1][:-1]), 0)
        found[name] = store_of_rows(folder / name, rows, spans, vocab_size=97, end=end, pad_token_id=PAD, num_shards=3)
    found["documents"].kind = "documents"
    return found


def mix_of(stores: dict[str, TokenStore], **options: Any) -> MixedStore:
    return MixedStore(stores, weights={"chat": 2, "one": 1, "documents": 1.5}, **{"num_rows": 120, **options})


def cells_of(store: TokenStore, row: int, options: dict[str, Any]) -> list[tuple[int, int]]:
    """A row's inputs and targets, token by token, by nothing but its ids, its spans and its store's end."""
    example, ignore = store[row], options.get("ignore_index", -100)
    ids = example.input_ids.tolist()
    trained, place = [], 0
    for number, count in enumerate(example.spans.tolist()):
        trained += [number % 2 == 1] * count
    if store.end == "append" and ids:  # behind a prompt that follows a response it is none of that
        ids, trained = [*ids, END], [*trained, len(example.spans) != 3]
    trained = [True] * len(ids) if not options.get("mask_prompt") else trained
    cells = [(a, b if is_trained else ignore) for a, b, is_trained in zip(ids, ids[1:], trained[1:], strict=False)]
    limit, place = options.get("max_length"), len(cells)
    if limit is not None and place > limit:
        cells = cells[-limit:] if options.get("truncation") == "left" else cells[:limit]
    return cells


def named(mix: MixedStore, row: int) -> tuple[TokenStore, int]:
    source = int(mix.source_of([row])[0])
    return mix.stores[source], row - int(mix.starts[source])


@pytest.mark.filterwarnings("ignore:.* rows have no trained target")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_row_is_as_in_a_batch_of_its_own_store(stores: dict[str, TokenStore], options: dict[str, Any]) -> None:
    mix = mix_of(stores)
    dataset = StoreDataset(mix, **{k: v for k, v in options.items() if k in COLLATE})
    sampler = BucketBatchSampler(dataset, **order_keywords(options))  # type: ignore[arg-type]
    loader, multiple = BatchLoader(mix, **options), 2 * options.get("cp_size", 0) or 1
    ignore, seen = options.get("ignore_index", -100), []
    for rows, batch in zip(sampler, loader, strict=True):
        own = dataset.collate(dataset.__getitems__(rows))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(batch, own, strict=True))
        cells = [cells_of(*named(mix, row), options) for row in rows]
        for row, found in zip(rows, cells, strict=True):  # the oracle is what each store alone gives
            store, number = named(mix, row)
            plain = {k: v for k, v in options.items() if k in COLLATE - {"pad_to_multiple_of", "cp_size"}}
            alone = StoreDataset(store, mode="positional", **plain).collator()([number])
            assert list(zip(alone.inputs[0].tolist(), alone.targets[0].tolist(), strict=True)) == found
        lines = zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)
        if options.get("policy") != "packed":
            packs = [[one] for one in cells]
        else:
            packs = [cells[a:b] for a, b in pairwise(rows.bounds)]  # type: ignore[attr-defined]
        for (inputs, targets), pack in zip(lines, packs, strict=True):
            wanted: list[tuple[int, int]] = []
            for one in pack:
                wanted += one + [(PAD, ignore)] * (-len(one) % multiple)
            wanted += [(PAD, ignore)] * (len(inputs) - len(wanted))
            assert list(zip(inputs, targets, strict=True)) == wanted
        seen += rows
    assert sorted(seen) == sorted(mix.rows_of_epoch(0).tolist())
    assert sum(loader.stats.trained_by_source.values()) == loader.stats.trained_tokens > 0


COLLATE = {
    "mask_prompt", "max_length", "truncation", "ignore_index", "pad_to_multiple_of", "cp_size"
}  # fmt: skip


def test_laid_end_to_end_and_split_each_token_is_trained_once(stores: dict[str, TokenStore]) -> None:
    mix = mix_of(stores, num_rows=123)
    wanted = sorted(target for row in mix.rows_of_epoch(0).tolist() for _, target in cells_of(*named(mix, row), {}))
    for options in ({"packing": "concatenate"}, {"long_rows": "split"}, {"long_rows": "split", "stride": 3}):
        loader = BatchLoader(mix, policy="packed", batch_size=2, capacity=11, tail="uneven", **options)  # type: ignore[arg-type]
        found = [int(t) for batch in loader for t in batch.targets.flatten() if t != -100]
        assert sorted(found) == wanted, options


@pytest.mark.filterwarnings("ignore:.* rows have no trained target")
@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[3], OPTIONS[4]], ids=str)
def test_ranks_share_them_and_a_run_goes_on_with_others(stores: dict[str, TokenStore], options: dict[str, Any]) -> None:
    mix = mix_of(stores)

    def rows_of(loaders: list[BatchLoader], steps: int | None = None) -> list[tuple[int, ...]]:
        found = []
        for loader in loaders:
            for batch in islice(loader, steps):
                lines = batch.inputs
                if options.get("policy") == "packed":
                    starts = batch[-1][:-1].long()
                    lines = torch.nn.functional.pad(lines.flatten(), (0, 1))[starts[:, None] + torch.arange(2)]
                found += [tuple(line[:2]) for line in lines.tolist() if line[0] >= 80]
        return found

    def ranks(count: int, **more: Any) -> list[BatchLoader]:
        own = {**options, "truncation": "right", "max_length": None, "tail": "uneven", "prefetch": 0, **more}
        return [BatchLoader(mix, rank=rank, world_size=count, **own) for rank in range(count)]

    whole = sorted(rows_of(ranks(1)))
    assert whole == sorted(rows_of(ranks(3)))
    first = ranks(2)
    begun = rows_of(first, 2)
    size = options.get("batch_size")  # of so many tokens a rank, as many ranks go on
    again = ranks(1, batch_size=2 * size) if size else ranks(2)
    for loader, stopped in zip(again, first, strict=False):
        loader.load_state_dict(stopped.state_dict())
    assert sorted(begun + rows_of(again)) == whole


def test_what_makes_no_sense_is_refused(stores: dict[str, TokenStore], tmp_path: Path) -> None:
    mix = mix_of(stores)
    assert (mix.end, mix.end_token_id) == ("mixed", END)
    with pytest.raises(InputError, match=r"mode='reference' of rows that hold their own end: .*leave mode out"):
        BatchLoader(mix, batch_size=4, mode="reference")
    other = store_of_rows(tmp_path / "other", [[1, 2]], vocab_size=98, end="in_row", pad_token_id=PAD)
    with pytest.raises(InputError, match=r"tokenized by test98, .* their ids mean different texts"):
        MixedStore({**stores, "other": other})
    with pytest.raises(InputError, match="2 ends of 9 shards"):
        BatchLoader(mix, batch_size=4)._collator.__class__(mix.shards, end=["append", "in_row"])
