"""Batches of pairs against plain Python: cells, which row is which, resuming, the same tensors from threads."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from fastcollate import BatchLoader, MixedStore, PreferenceBatch, TokenStore, prepare
from fastcollate.errors import InputError
from tests.integrations import chats

PADDED: list[dict[str, Any]] = [
    {"policy": "sequential", "batch_size": 5},
    {"policy": "shuffled", "max_tokens": 600, "max_length": 60},
    {"batch_size": 4, "max_length": 20, "pad_to_multiple_of": 8},
    {"batch_size": 4, "mask_prompt": False, "inputs_dtype": torch.int32},
]
PACKED: list[dict[str, Any]] = [
    {"batch_size": 2, "capacity": 512},
    {"batch_size": 3, "capacity": 64, "max_length": 32},
    {"batch_size": 1, "capacity": "median", "long_rows": "drop"},
    {"batch_size": 2, "capacity": 512, "max_length": "median", "long_rows": "drop"},
    {"max_tokens": 700, "capacity": 320, "max_length": 160, "max_segments": 400, "mask_prompt": False},
]


@pytest.fixture(scope="module", params=["append", "in_row"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder = tmp_path_factory.mktemp("pairs")
    records: list[dict[str, Any]] = []
    for number, chat in enumerate(chats.make_chats(60, most_turns=1, seed=2)):
        prompt, answer = chat[-2]["content"], chat[-1]["content"] + f" {number}"
        records.append({"prompt": prompt, "chosen": answer, "rejected": "no" * (number % 9 + 1)})
    options = {}
    if request.param == "in_row":
        pytest.importorskip("transformers")
        chats.byte_tokenizer().save_pretrained(folder / "tokenizer")
        options = {"tokenizer": str(folder / "tokenizer")}
        for record in records:
            record.update({key: [{"role": "assistant", "content": record[key]}] for key in ("chosen", "rejected")})
    prepare(records, folder / "store", template="preference", **options)
    found = TokenStore(folder / "store")
    assert found.end == request.param
    return found


def cells_of(store: TokenStore, row: int, options: dict[str, Any], limit: int | None) -> tuple[list[int], list[int]]:
    """A row's inputs and targets, a token at a time."""
    ids, prompt = store[row].input_ids.tolist(), int(store[row].spans[0])
    ids += [store.end_token_id] * (store.end == "append")
    masked = options.get("mask_prompt", True)
    targets = [-100 if masked and place < prompt else token for place, token in enumerate(ids)]
    return ids[:-1][:limit], targets[1:][:limit]


@pytest.mark.parametrize("options", PADDED)
def test_padded_pairs_are_those_of_plain_python(store: TokenStore, options: dict[str, Any]) -> None:
    seen: list[int] = []
    for batch in BatchLoader(store, **options, seed=3):
        assert isinstance(batch, PreferenceBatch)
        rows = batch.rows.tolist()
        half = len(rows) // 2
        assert rows[half:] == [row + 1 for row in rows[:half]]
        assert batch.pairs.tolist() == [row // 2 for row in rows[:half]]
        lines = [cells_of(store, row, options, options.get("max_length")) for row in rows]
        multiple = options.get("pad_to_multiple_of", 1)
        width = -(-max(len(inputs) for inputs, _ in lines) // multiple) * multiple
        pad = store.pad_token_id
        inputs = torch.tensor([line + [pad] * (width - len(line)) for line, _ in lines])
        targets = torch.tensor([line + [-100] * (width - len(line)) for _, line in lines])
        assert batch.inputs.dtype == options.get("inputs_dtype", torch.int64)
        assert torch.equal(batch.inputs.long(), inputs)
        assert torch.equal(batch.targets, targets)
        trained = [sum(target != -100 for target in line) for _, line in lines]
        assert batch.by_pair((batch.targets != -100).long()).tolist() == [trained[:half], trained[half:]]
        assert batch.counts is not None
        assert batch.counts.trained_tokens == sum(trained)
        if "max_tokens" in options:
            assert batch.inputs.numel() <= options["max_tokens"]
        seen += batch.pairs.tolist()
    assert sorted(seen) == [*range(60)]


@pytest.mark.parametrize("options", PACKED)
def test_packed_pairs_are_those_of_plain_python(store: TokenStore, options: dict[str, Any]) -> None:
    if options["capacity"] == "median":  # of what a pair takes
        options = {**options, "capacity": int(np.median(store.cells.reshape(-1, 2).sum(1)))}
    if options.get("max_length") == "median":  # of the longer rows
        options = {**options, "max_length": int(np.median(store.cells.reshape(-1, 2).max(1)))}
    capacity, seen = options["capacity"], []
    limit = min(options.get("max_length", capacity), capacity)
    for batch in BatchLoader(store, policy="packed", **options, seed=3):
        assert isinstance(batch, PreferenceBatch)
        assert batch.position_ids is not None
        assert batch.cu_seqlens is not None
        bounds, rows = batch.cu_seqlens.tolist(), batch.rows.tolist()
        assert len(bounds) == len(rows) + 1
        inputs, targets, positions = (
            tensor.flatten().tolist() for tensor in (batch.inputs, batch.targets, batch.position_ids)
        )
        places = {}
        for start, stop, row in zip(bounds, bounds[1:], rows, strict=False):
            wanted = cells_of(store, row, options, limit) if row >= 0 else (inputs[start:stop], [-100] * (stop - start))
            assert (inputs[start:stop], targets[start:stop]) == wanted
            assert positions[start:stop] == [*range(stop - start)]
            if row >= 0:
                places[row] = start // capacity
                assert (stop - 1) // capacity == start // capacity
        pairs = batch.pairs.tolist()
        named = [row for row in rows if row >= 0]
        assert named == [row for pair in pairs for row in (2 * pair, 2 * pair + 1)]
        assert all(places[2 * pair] == places[2 * pair + 1] for pair in pairs)  # both in one pack
        trained = [
            [sum(t != -100 for t in cells_of(store, 2 * p + i, options, limit)[1]) for p in pairs] for i in (0, 1)
        ]
        assert batch.by_pair((batch.targets != -100).long()).tolist() == trained
        seen += pairs
    wanted_pairs = [
        pair
        for pair in range(60)
        if options.get("long_rows") != "drop"
        or (
            int(store.cells[2 * pair : 2 * pair + 2].sum()) <= capacity
            and int(store.cells[2 * pair : 2 * pair + 2].max()) <= limit
        )
    ]
    assert sorted(seen) == wanted_pairs
    assert (len(seen) < 60) == (options.get("long_rows") == "drop")


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"policy": "packed", "batch_size": 1, "capacity": 320}])
def test_a_loader_of_pairs_resumes_and_is_pickled(store: TokenStore, options: dict[str, Any]) -> None:
    whole = [(batch.rows.tolist(), batch.inputs) for batch in BatchLoader(store, **options, prefetch=0)]
    loader = BatchLoader(store, **options)
    iterator = iter(loader)
    first = [next(iterator) for _ in range(3)]
    resumed = BatchLoader(store, **options)
    resumed.load_state_dict(loader.state_dict())
    for begin, other in ((first, resumed), ([], pickle.loads(pickle.dumps(loader)))):
        found = [(batch.rows.tolist(), batch.inputs) for batch in [*begin, *other]]
        assert [rows for rows, _ in found] == [rows for rows, _ in whole]
        assert all(map(torch.equal, [inputs for _, inputs in found], [inputs for _, inputs in whole]))


def test_ranks_share_the_pairs_of_a_step(store: TokenStore) -> None:
    for options in ({"batch_size": 3}, {"policy": "packed", "batch_size": 1, "capacity": 320}):
        ranks = [BatchLoader(store, **options, tail="uneven", rank=rank, world_size=2) for rank in range(2)]
        assert sorted(pair for rank in ranks for batch in rank for pair in batch.pairs.tolist()) == [*range(60)]


def test_untrained_pairs_are_left_out_whole(store: TokenStore) -> None:
    limit = int(np.median([int(row.spans[0]) for row in store]))
    loader = BatchLoader(store, batch_size=4, max_length=limit, drop_untrained=True)
    found = sorted(pair for batch in loader for pair in batch.pairs.tolist())
    wanted = [
        p for p in range(60) if all(any(t != -100 for t in cells_of(store, 2 * p + i, {}, limit)[1]) for i in (0, 1))
    ]
    assert found == wanted
    assert 0 < len(found) < 60


def test_a_mix_of_pairs_is_loaded(store: TokenStore) -> None:
    mix = MixedStore({"a": store, "b": store}, weights={"a": 1, "b": 2}, num_rows=30)
    rows = [row for batch in BatchLoader(mix, batch_size=5) for row in batch.rows.tolist()]
    assert sorted(row // 120 for row in rows) == [0] * 20 + [1] * 40
    assert {row ^ 1 for row in rows} == {*rows}


@pytest.mark.parametrize("options", [{"mode": "reference"}, {"policy": "packed", "capacity": 512, "cp_size": 2}])
def test_what_pairs_have_no_use_for_is_refused(store: TokenStore, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="with pairs: their targets are told by position"):
        BatchLoader(store, batch_size=2, **options)
