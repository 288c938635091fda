"""Rows that hold their own end, and two ids for end and padding: every way to batches against a plain oracle."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastcollate import Batch, BatchLoader, BucketBatchSampler, MixedStore, PackedBatch, StoreDataset
from fastcollate.check import verify
from fastcollate.collate.collator import Collator
from fastcollate.collate.reference import collate_in_row, custom_collate_fn
from fastcollate.errors import InputError
from fastcollate.load import collator_of
from fastcollate.store.store import TokenStore
from fastcollate.train import MaskOptions, OrderOptions
from tests.helpers import make_shards, store_of_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*(have no trained target|mode='reference' gives other)")
END, PAD = 96, 3  # of a vocabulary of 97; both may stand anywhere in a row
Cells = list[tuple[int, int]]

rows_of_flags = st.lists(  # ids, and whether each is trained
    st.lists(st.tuples(st.one_of(st.sampled_from([END, PAD, 0]), st.integers(0, END)), st.booleans()), max_size=14),
    min_size=1, max_size=9,
)  # fmt: skip
options_of = st.fixed_dictionaries(
    {
        "max_length": st.one_of(st.none(), st.integers(1, 16)),
        "mask_prompt": st.booleans(),
        "ignore_index": st.sampled_from([-100, -1, 5]),
        "truncation": st.sampled_from(["left", "right"]),
    }
)


def spans_of(flags: list[bool]) -> list[int]:
    """Alternating counts, those that are not trained first."""
    spans = [0]
    for flag in flags:
        if flag != (len(spans) % 2 == 0):
            spans.append(0)
        spans[-1] += 1
    return spans


def test_the_spans_of_flags() -> None:
    assert spans_of([True, True, False, True]) == [0, 2, 1, 1]
    assert spans_of([False, False]) == [2]


def cells_of(row: list[tuple[int, bool]], options: dict[str, Any]) -> Cells:
    """Input and target of each column of a row, cut to the limit."""
    ignore, masked, limit = options["ignore_index"], options["mask_prompt"], options["max_length"]
    cells = [(a, b if trained or not masked else ignore) for (a, _), (b, trained) in pairwise(row)]
    return cells if limit is None else cells[-limit:] if options["truncation"] == "left" else cells[:limit]


def padded(rows: list[Cells], ignore: int) -> tuple[list[list[int]], list[list[int]]]:
    width = max(map(len, rows))
    filled = [cells + [(PAD, ignore)] * (width - len(cells)) for cells in rows]
    return [[a for a, _ in cells] for cells in filled], [[b for _, b in cells] for cells in filled]


def shards_of(rows: list[list[tuple[int, bool]]], num_shards: int = 2) -> Any:
    ids = [[token for token, _ in row] for row in rows]
    return make_shards(ids, [spans_of([flag for _, flag in row]) for row in rows], num_shards=num_shards)


def store_in(folder: str, rows: list[list[tuple[int, bool]]], end: str = "in_row") -> TokenStore:
    ids = [[token for token, _ in row] for row in rows]
    spans = [spans_of([flag for _, flag in row]) for row in rows]
    return store_of_rows(
        Path(folder) / "store", ids, spans, vocab_size=END + 1, num_shards=min(2, len(rows)), end=end, pad_token_id=PAD
    )


def check(batch: Any, rows: list[Cells], ignore: int) -> None:
    inputs, targets = padded(rows, ignore)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.shape == batch.targets.shape == (len(rows), max(map(len, rows)))
    assert batch.inputs.tolist() == inputs
    assert batch.targets.tolist() == targets


@pytest.mark.slow
@given(rows_of_flags, options_of)
def test_a_batch_is_the_ids_but_the_last_and_but_the_first(
    rows: list[list[tuple[int, bool]]], options: dict[str, Any]
) -> None:
    collator = Collator(shards_of(rows), end="in_row", mode="positional", pad_token_id=PAD, end_token_id=END, **options)
    batch, wanted = collator(range(len(rows))), [cells_of(row, options) for row in rows]
    check(batch, wanted, options["ignore_index"])
    if options["ignore_index"] != -100:
        assert not (batch.targets == -100).any()
    if options["truncation"] == "right":
        ids = [[token for token, _ in row] for row in rows]
        spans = [spans_of([flag for _, flag in row]) for row in rows] if options["mask_prompt"] else None
        plain = collate_in_row(ids, spans, PAD, options["ignore_index"], options["max_length"])
        for mine, theirs in zip(batch, plain, strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


@pytest.mark.slow
@given(rows_of_flags, options_of, st.integers(0, 2**32))
def test_a_pack_is_rows_of_as_many_cells_end_to_end(
    rows: list[list[tuple[int, bool]]], options: dict[str, Any], seed: int
) -> None:
    rows = [*rows, [(1, True)] * 3]
    longest = max(max(len(row) - 1 for row in rows), 1)
    with TemporaryDirectory() as folder:
        store = store_in(folder, rows)
        assert store.cells.tolist() == [max(len(row) - 1, 0) for row in rows]
        order: dict[str, Any] = {"policy": "packed", "batch_size": 2, "capacity": longest, "seed": seed}
        dataset = StoreDataset(store, **options)
        sampler = BucketBatchSampler(dataset, **order)
        loaded: list[Any] = list(BatchLoader(store, **order, **options))
        for packs, batch in zip(sampler, loaded, strict=True):
            assert isinstance(batch, PackedBatch)
            for mine, theirs in zip(batch, dataset.collate(dataset.__getitems__(packs)), strict=True):
                assert torch.equal(mine, theirs)
            for p, (start, stop) in enumerate(pairwise(packs.bounds)):  # type: ignore[attr-defined]
                cells = [cell for row in packs[start:stop] for cell in cells_of(rows[row], options)]
                assert len(cells) <= longest
                cells += [(PAD, options["ignore_index"])] * (longest - len(cells))
                assert list(zip(batch.inputs[p].tolist(), batch.targets[p].tolist(), strict=True)) == cells
        assert sum(batch.counts.rows for batch in loaded) == len(rows)


@pytest.mark.slow
@given(rows_of_flags, st.integers(1, 6))
def test_split_rows_train_each_id_but_the_first_once(rows: list[list[tuple[int, bool]]], capacity: int) -> None:
    rows = [*rows, [(1, True)] * 3]
    with TemporaryDirectory() as folder:
        store = store_in(folder, rows)
        loader = BatchLoader(store, policy="packed", batch_size=1, capacity=capacity, long_rows="split", prefetch=0)
        trained = sorted(int(t) for batch in loader for t in batch.targets.flatten() if t != -100)
    assert trained == sorted(token for row in rows for token, _ in row[1:])


@pytest.mark.slow
@given(rows_of_flags, options_of, st.sampled_from(["bucketed", "packed"]))
def test_verify_knows_both_ends(rows: list[list[tuple[int, bool]]], options: dict[str, Any], policy: str) -> None:
    rows = [*rows, [(1, True)] * 3]
    masks = MaskOptions(max_length=options["max_length"], mask_prompt=options["mask_prompt"])
    order = OrderOptions(policy=policy, batch_size=3)
    for end in ("in_row", "append"):
        with TemporaryDirectory() as folder:
            found = verify(store_in(folder, rows, end), masks, order, progress=False)
        assert found.ok, found.problems
        assert found.rows == len(rows)


@pytest.mark.slow
@given(rows_of_flags, st.one_of(st.none(), st.integers(1, 16)), st.sampled_from(["reference", "positional"]))
def test_an_appended_end_is_not_the_padding(rows: list[list[tuple[int, bool]]], limit: int | None, mode: str) -> None:
    """Two ids: targets are the chapter's with the end for its one id, inputs hold padding where no row's id is."""
    ids = [[token for token, _ in row] for row in rows]
    with TemporaryDirectory() as folder:
        store = store_in(folder, rows, "append")
        batch = collator_of(store, {"max_length": limit, "mode": mode})(range(len(rows)))
    if not max(map(len, ids)):
        return
    inputs, targets = custom_collate_fn(ids, pad_token_id=END, allowed_max_length=limit)
    for number, row in enumerate(ids):
        inputs[number, len(row) :] = PAD
        if mode == "positional":
            wanted = ([*row[1:], END] if row else [])[:limit]
            targets[number] = torch.tensor(wanted + [-100] * (targets.shape[1] - len(wanted)))
    assert torch.equal(batch.inputs, inputs)
    assert torch.equal(batch.targets, targets)


def test_reference_masks_are_refused(tmp_path: Path) -> None:
    store = store_in(str(tmp_path), [[(1, True), (2, True)], [(4, False), (5, True)]])
    for use in (
        lambda: BatchLoader(store, batch_size=1, mode="reference"), lambda: StoreDataset(store, mode="reference"),
        lambda: verify(store, MaskOptions(mode="reference"), progress=False),
        lambda: Collator(store.shards, end="in_row"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"mode='reference' of rows that hold their own end: .*leave mode out"):
            use()
    with pytest.raises(InputError, match="end='both': choose one of 'append', 'in_row'"):
        Collator(store.shards, end="both")


def test_a_mix_wants_one_padding_and_one_end_to_append(tmp_path: Path) -> None:
    rows = [[5, 6, 7], [8, 9]]

    def store(name: str, **options: Any) -> TokenStore:
        return store_of_rows(tmp_path / name, rows, vocab_size=END + 1, **options)

    first, third = store("a", end="in_row"), store("c", end="in_row", pad_token_id=0)
    with pytest.raises(InputError, match=r"a is padded with 96, .*c with 0: .*prepare one of them again"):
        MixedStore({"one": third, "two": first})
    ended = store("e"), store("f")
    ended[1].end_token_id = 7
    with pytest.raises(InputError, match=r"f is ended by 7, .*e by 96: a batch appends one end-of-text"):
        MixedStore({"chat": first, "one": ended[0], "two": ended[1]})
    first.end_token_id = 5  # nothing is appended there
    assert MixedStore({"chat": first, "one": ended[0]}).end_token_id == 96
    mix = MixedStore({"one": third, "two": store("d", end="in_row", pad_token_id=0)}, num_rows=4)
    assert mix.cells.tolist() == [2, 1, 2, 1]
    batch = next(iter(BatchLoader(mix, batch_size=4, policy="sequential")))
    assert isinstance(batch, Batch)
    assert sorted(batch.inputs.tolist()) == [[5, 6], [5, 6], [8, 0], [8, 0]]
    assert sorted(batch.targets.tolist()) == [[6, 7], [6, 7], [9, -100], [9, -100]]


def test_untrained_and_counted_rows(tmp_path: Path) -> None:
    rows = [[(1, True)], [], [(4, False), (5, True), (6, False)], [(7, True), (8, False)]]
    store = store_in(str(tmp_path), rows)
    loader = BatchLoader(store, batch_size=4, mask_prompt=True, drop_untrained=True)
    (batch,) = loader
    assert (batch.inputs.tolist(), batch.targets.tolist()) == ([[4, 5]], [[5, -100]])
    everything = BatchLoader(store, batch_size=4, policy="sequential", max_length=1)
    with pytest.warns(UserWarning, match="2 of 4 rows have no trained target"):
        (batch,) = everything
    assert batch.counts is not None
    assert tuple(batch.counts) == (4, 4, 2, 2, 0, 2, 1, 1)
    assert np.array_equal(store[0].input_ids, np.array([1], np.uint16))
