"""Where a mix's rows are from: noted on each batch, and counted, as the tokens themselves say."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastcollate import BatchLoader, MixedStore
from fastcollate.store.store import TokenStore
from tests.helpers import DEVICES, store_of_rows

OPTIONS: list[dict[str, Any]] = [
    {"batch_size": 8},
    {"max_tokens": 120, "policy": "shuffled"},
    {"batch_size": 2, "policy": "packed", "capacity": 48, "mask_prompt": True},
    {"batch_size": 3, "policy": "packed", "capacity": 16, "long_rows": "split", "max_segments": 90},
    {"batch_size": 2, "policy": "packed", "capacity": 48, "max_length": 7, "cp_size": 2, "mode": "positional"},
    {"batch_size": 5, "mask_prompt": True, "max_length": 9, "ignore_index": -1, "window": 40},
]


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> MixedStore:
    """Three stores whose tokens, in thousands, say which one they are of; some of their rows are empty."""
    stores: dict[str, TokenStore] = {}
    folder: Path = tmp_path_factory.mktemp("sources")
    random = np.random.default_rng(8)
    for number, name in enumerate(("one", "two", "three")):
        lengths = random.integers(0, 40, 60)
        rows = [(1000 * (number + 1) + random.integers(0, 999, n)).tolist() for n in lengths]
        spans = [[prompt := int(random.integers(0, n + 1)), int(n) - prompt] for n in lengths]
        stores[name] = store_of_rows(folder / name, rows, spans)
    return MixedStore(stores, weights={"one": 1, "two": 2, "three": 0.5}, num_rows=300)


@pytest.mark.filterwarnings("ignore:a row on which", "ignore:.* rows have no trained target")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_row_and_segment_says_where_it_is_from(
    mix: MixedStore, options: dict[str, Any], prefetch: int, device: str
) -> None:
    loader = BatchLoader(mix, prefetch=prefetch, device=device, **options)
    trained = dict.fromkeys(mix.names, 0)
    ignored = {-100, options.get("ignore_index", -100)}
    for batch in loader:
        inputs, targets, found = batch.inputs.flatten().tolist(), batch.targets.flatten().tolist(), batch.sources
        assert found is not None
        if options.get("policy") == "packed":
            bounds = batch[-1].tolist()
        else:
            bounds = list(range(0, len(inputs) + 1, batch.inputs.shape[1]))
        assert len(found) == len(bounds) - 1
        for source, start, stop in zip(found.tolist(), bounds[:-1], bounds[1:], strict=True):
            own = {token // 1000 - 1 for token in inputs[start:stop] if token < 4000}
            if options.get("policy") == "packed":
                assert own == ({source} if source >= 0 else set())
            else:
                assert own <= {source}
            count = sum(target not in ignored for target in targets[start:stop])
            if source >= 0:
                trained[mix.names[source]] += count
            else:
                assert not count
    assert loader.stats.trained_by_source == trained
    assert sum(trained.values()) == loader.stats.trained_tokens


@pytest.mark.filterwarnings("ignore:a row on which")
def test_what_was_counted_stays_and_goes_on(mix: MixedStore) -> None:
    loader = BatchLoader(mix, batch_size=8, prefetch=0)
    batches = iter(loader)
    next(batches)
    before = loader.stats
    kept = dict(before.trained_by_source)
    copy = pickle.loads(pickle.dumps(loader))
    next(batches)
    assert before.trained_by_source == kept
    assert sum(loader.stats.trained_by_source.values()) > sum(kept.values())
    copy.load_state_dict(copy.state_dict())
    next(iter(copy))
    assert copy.stats.trained_by_source == loader.stats.trained_by_source


def test_of_one_store_nothing_is_noted(tmp_path: Path) -> None:
    loader = BatchLoader(store_of_rows(tmp_path / "store", [[1, 2], [3]]), batch_size=2)
    assert next(iter(loader)).sources is None
    assert loader.stats.trained_by_source == {}
