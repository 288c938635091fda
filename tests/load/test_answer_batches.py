"""Batches of answers with verdicts against plain Python: cells, and the label or score of each row, once an epoch."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcollate import AnswerBatch, BatchLoader, MixedStore, TokenStore, prepare
from fastcollate.errors import InputError

OPTIONS: list[dict[str, Any]] = [
    {"batch_size": 5, "policy": "sequential"},
    {"batch_size": 4, "max_length": 6, "inputs_dtype": torch.int32},
    {"max_tokens": 60, "policy": "shuffled", "mask_prompt": False},
    {"policy": "packed", "batch_size": 2, "capacity": 32},
    {"policy": "packed", "batch_size": 3, "capacity": 16, "max_length": 7, "max_segments": 60},
    {"policy": "packed", "batch_size": 1, "capacity": 14, "long_rows": "drop"},
]


@pytest.fixture(scope="module", params=["label", "score"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder: Path = tmp_path_factory.mktemp("answers")
    records = [
        {"prompt": f"Q{n}?" if n % 6 else "", "completion": " yes" * (n % 9) if n % 6 else " no" * (n % 4), **verdict}
        for n in range(60)
        for verdict in [{"label": n % 3 == 0} if request.param == "label" else {"score": n / 7}]
    ]
    prepare(records, folder / "store", template="preference", on_error="skip")
    return TokenStore(folder / "store")


def cells_of(store: TokenStore, row: int, options: dict[str, Any]) -> tuple[list[int], list[int]]:
    """A row's inputs and targets, a token at a time."""
    ids, prompt = [*store[row].input_ids.tolist(), store.end_token_id], int(store[row].spans[0])
    masked, limit = options.get("mask_prompt", True), options.get("max_length")
    return ids[:-1][:limit], [-100 if masked and n < prompt else t for n, t in enumerate(ids)][1:][:limit]


@pytest.mark.filterwarnings("ignore:.* rows have no trained target")
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_row_has_its_cells_and_its_verdict(store: TokenStore, options: dict[str, Any], prefetch: int) -> None:
    seen: list[int] = []
    column = store.columns[0]
    for batch in BatchLoader(store, prefetch=prefetch, **options):
        assert isinstance(batch, AnswerBatch)
        verdicts = batch.label if column == "label" else batch.score
        assert (batch.score if column == "label" else batch.label) is None
        assert verdicts is not None
        assert verdicts.dtype == (torch.int8 if column == "label" else torch.float32)
        width, inputs, targets = batch.inputs.shape[1], batch.inputs.flatten(), batch.targets.flatten()
        bounds = list(range(0, len(inputs) + 1, width)) if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
        sums = batch.by_row((batch.targets != -100).float())
        assert len(batch.rows) == len(verdicts) == len(sums) == len(bounds) - 1
        for place, row in enumerate(batch.rows.tolist()):
            own = slice(bounds[place], bounds[place + 1])
            if row < 0:
                assert sums[place] == 0
                assert verdicts[place] == -1 if column == "label" else verdicts[place].isnan()
                continue
            ids, wanted = cells_of(store, row, options)
            assert inputs[own].tolist()[: len(ids)] == ids
            assert targets[own].tolist() == wanted + [-100] * (own.stop - own.start - len(wanted))
            assert float(verdicts[place]) == float(store.column(column)[row])
            assert sums[place] == sum(target != -100 for target in wanted)
            seen.append(row)
    longest = options["capacity"] if options.get("long_rows") == "drop" else 10**9
    assert sorted(seen) == [row for row in range(len(store)) if 0 < store.lengths[row] <= longest]


def test_ranks_a_resumed_run_and_a_mix_give_each_row_once(store: TokenStore) -> None:
    def rows_of(*batches: Any) -> list[int]:
        return [row for batch in batches for row in batch.rows.tolist()]

    ranks = [BatchLoader(store, batch_size=3, rank=r, world_size=3, tail="uneven", prefetch=0) for r in range(3)]
    assert sorted(rows_of(*(batch for loader in ranks for batch in loader))) == list(range(len(store)))
    first = [BatchLoader(store, batch_size=3, rank=r, world_size=2, tail="uneven", prefetch=0) for r in range(2)]
    begun = [next(iter(loader)) for loader in first]
    rest = BatchLoader(store, batch_size=6, rank=0, world_size=1, tail="uneven", prefetch=0)
    rest.load_state_dict(first[0].state_dict())
    assert sorted(rows_of(*begun, *pickle.loads(pickle.dumps(rest)))) == list(range(len(store)))
    mix = MixedStore({"a": store, "b": store}, weights={"a": 1, "b": 3}, num_rows=40)
    loader = BatchLoader(mix, batch_size=4)
    for batch in loader:
        assert isinstance(batch, AnswerBatch)
        assert batch.sources is not None
        assert batch.sources.tolist() == (batch.rows >= len(store)).long().tolist()
        verdicts = batch.label if batch.label is not None else batch.score
        wanted = np.tile(store.column(store.columns[0]), 2)[batch.rows.numpy()]
        assert verdicts is not None
        assert verdicts.tolist() == wanted.tolist()
    assert loader.source_rows == {"a": 10, "b": 30}


def test_what_makes_no_sense_is_refused(store: TokenStore, tmp_path: Path) -> None:
    for options in ({"long_rows": "split"}, {"packing": "concatenate"}, {"packing": "crop"}):
        with pytest.raises(InputError, match="with answers: a part of a row is no answer"):
            BatchLoader(store, policy="packed", batch_size=1, capacity=32, **options)  # type: ignore[arg-type]
    for options in ({"mode": "reference"}, {"cp_size": 2, "policy": "packed", "capacity": 32}):
        with pytest.raises(InputError, match="with answers: their targets are told by position"):
            BatchLoader(store, batch_size=2, **options)  # type: ignore[arg-type]
    other = "score" if store.columns[0] == "label" else "label"
    prepare([{"prompt": "a", "completion": " b", other: 1 if other == "score" else True}], tmp_path / "other",
            template="preference")  # fmt: skip
    with pytest.raises(InputError, match=r"for verdicts, .* a batch has one kind"):
        MixedStore({"one": store, "other": TokenStore(tmp_path / "other")})
    prepare([{"instruction": "a", "output": "b"}], tmp_path / "rows")
    with pytest.raises(InputError, match="a store of rows; this makes batches of answers"):
        MixedStore({"one": store, "other": TokenStore(tmp_path / "rows")})
