"""The drop-in and the store path against the plain Python collate, values and dtype."""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastcollate.collate import fill as kernels
from fastcollate.collate.batch import Batch
from fastcollate.collate.collator import Collator
from fastcollate.collate.drop_in import collate_fn
from fastcollate.collate.reference import custom_collate_fn, custom_collate_with_masking_fn
from fastcollate.errors import InputError
from fastcollate.store.layout import TABLE_COLUMNS, Table
from tests.chapter import InstructionDataset
from tests.helpers import make_shards

PAD = 50256
ids = st.one_of(st.integers(0, 50255), st.just(PAD), st.sampled_from([0, 1, 7]))
rows = st.lists(st.lists(ids, max_size=12), min_size=1, max_size=6)
limits = st.one_of(st.none(), st.integers(-15, 15), st.just(1024))
ignores = st.sampled_from([-100, -1, 0, 7, PAD])


def check(found: Any, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Equal in values and dtype; the reference gives float32 where there is no column, and we int64."""
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.int64
        assert mine.shape == theirs.shape
        assert theirs.dtype == torch.int64 or theirs.numel() == 0
        assert mine.tolist() == theirs.tolist()


def pairs_of(batch: list[list[int]], data: st.DataObject) -> list[tuple[int, list[int]]]:
    return [(data.draw(st.integers(-3, len(row) + 4)), row) for row in batch]


@pytest.mark.slow
@given(rows, limits, ignores, st.sampled_from([PAD, 0, 7, -1, 2**40]))
@example([[], []], None, -100, PAD)
def test_plain_rows(batch: list[list[int]], limit: int | None, ignore: int, pad: int) -> None:
    options = {"pad_token_id": pad, "ignore_index": ignore, "allowed_max_length": limit}
    check(collate_fn(batch, **options), custom_collate_fn(batch, **options))


@pytest.mark.slow
@given(rows, limits, ignores, st.sampled_from([PAD, 0, 7]), st.data())
def test_rows_with_prompt_lengths(
    batch: list[list[int]], limit: int | None, ignore: int, pad: int, data: st.DataObject
) -> None:
    options = {"pad_token_id": pad, "ignore_index": ignore, "allowed_max_length": limit}
    pairs = pairs_of(batch, data)
    check(collate_fn(pairs, **options), custom_collate_with_masking_fn(pairs, **options))


@pytest.mark.slow
@given(rows, limits, st.data())
def test_arrays_and_tensors_are_rows_too(batch: list[list[int]], limit: int | None, data: st.DataObject) -> None:
    kinds = [
        tuple, lambda r: np.array(r, np.uint16), lambda r: np.array(r, np.int32), lambda r: torch.tensor(r, dtype=int),
    ]  # fmt: skip
    other = [data.draw(st.sampled_from(kinds))(row) for row in batch]
    check(collate_fn(other, allowed_max_length=limit), custom_collate_fn(batch, allowed_max_length=limit))
    lengths = [data.draw(st.integers(0, 9)) for _ in batch]
    scalars = [data.draw(st.sampled_from([int, np.int64, torch.tensor]))(length) for length in lengths]
    check(
        collate_fn(list(zip(scalars, other, strict=True)), allowed_max_length=limit),
        custom_collate_with_masking_fn(list(zip(lengths, batch, strict=True)), allowed_max_length=limit),
    )


@pytest.mark.slow
@given(st.lists(st.lists(st.integers(0, 50255), min_size=1, max_size=12), min_size=1, max_size=6), limits, st.data())
def test_positional_equals_the_reference_outside_its_corners(
    batch: list[list[int]], limit: int | None, data: st.DataObject
) -> None:
    check(collate_fn(batch, allowed_max_length=limit, mode="positional"), custom_collate_fn(batch, PAD, -100, limit))
    pairs = [(data.draw(st.integers(1, len(row) + 4)), row) for row in batch]
    check(
        collate_fn(pairs, allowed_max_length=limit, mode="positional"),
        custom_collate_with_masking_fn(pairs, PAD, -100, limit),
    )


def test_positional_does_what_the_user_means() -> None:
    _, targets = collate_fn([[1, PAD, 2, PAD], [5], []], mode="positional")
    assert targets.tolist() == [[PAD, 2, PAD, PAD], [PAD, -100, -100, -100], [-100, -100, -100, -100]]
    _, targets = collate_fn([(0, [1, 2, 3]), (2, [4, 5])], ignore_index=-7, mode="positional")
    assert targets.tolist() == [[2, 3, PAD], [-7, PAD, -7]]


def test_golden() -> None:
    batch = collate_fn([[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]])
    assert isinstance(batch, Batch)
    inputs, targets = batch
    assert inputs.tolist() == [[0, 1, 2, 3, 4], [5, 6, PAD, PAD, PAD], [7, 8, 9, PAD, PAD]]
    assert targets.tolist() == [[1, 2, 3, 4, PAD], [6, PAD, -100, -100, -100], [8, 9, PAD, -100, -100]]


@pytest.mark.slow
def test_large_integers_are_read_exactly() -> None:
    batch = [[2**63 - 1, -(2**63), 10**18], [-1, 999999999999999999]]
    check(collate_fn(batch), custom_collate_fn(batch))


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ([], "no rows"),
        ([[1, 2.5]], "row 0"),
        ([[1], ["a"]], "row 1"),
        ([[1], [None]], "row 1"),
        ([[1], [[2]]], "row 1"),
        ([[2**63]], "row 0"),
        ([[2**64]], "row 0"),
        ([(3, [1]), [1, 2]], "mixed"),
        ([[1, 2], (3, [1])], "mixed"),
        ([(3, [1]), (3, 4, [1])], "mixed"),
        ([(3, [1]), (3, [1], 5)], "mixed"),
        ([(3, [1]), (3.5, [1])], "mixed"),
        ([torch.zeros(2, 2, dtype=torch.int64)], "row 0"),
        ([np.zeros(2)], "row 0"),
    ],
)
def test_what_is_no_row_of_ids_is_named(batch: list[Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        collate_fn(batch)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "exact"}, "mode='exact'"),
        ({"allowed_max_length": 2.5}, "allowed_max_length"),
        ({"pad_token_id": "x"}, "pad_token_id"),
        ({"ignore_index": 2**63}, "ignore_index"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        collate_fn([[1]], **options)


# ------------------------------------------------------------------------------------------------- rows of a store


@given(rows, st.one_of(st.none(), st.integers(1, 15)), st.integers(1, 3), st.sampled_from(["uint16", "uint32"]))
def test_store_path_without_masks(batch: list[list[int]], limit: int | None, num_shards: int, dtype: str) -> None:
    numbers = np.random.default_rng(0).permutation(len(batch))
    collator = Collator(make_shards(batch, num_shards=num_shards, dtype=dtype), max_length=limit)
    check(collator(numbers), custom_collate_fn([batch[i] for i in numbers], allowed_max_length=limit))


@given(rows, st.one_of(st.none(), st.integers(1, 15)), st.integers(1, 3), st.data())
def test_store_path_with_masks(batch: list[list[int]], limit: int | None, num_shards: int, data: st.DataObject) -> None:
    pairs = [(data.draw(st.integers(0, len(row) + 1)), row) for row in batch]
    spans = [[p, max(len(row) - p, 0)] if p <= len(row) else [p] for p, row in pairs]
    collator = Collator(make_shards(batch, spans, num_shards=num_shards), max_length=limit, mask_prompt=True)
    check(collator(range(len(batch))), custom_collate_with_masking_fn(pairs, allowed_max_length=limit))


def plain_multi_turn(row: list[int], spans: list[int]) -> list[int]:
    """Targets of one row alone, token by token: a response's tokens, and the end-of-text after a last response."""
    roles = [k % 2 for k, count in enumerate(spans) for _ in range(count)]
    roles += [1 if len(spans) % 2 == 0 else 0] * (len(row) + 1 - len(roles))
    tokens = [*row, PAD]
    return [tokens[i] if roles[i] else -100 for i in range(1, len(tokens))]


@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=7), min_size=1, max_size=4), st.booleans())
def test_every_response_of_a_chat_is_a_target_and_nothing_else(all_spans: list[list[int]], reference: bool) -> None:
    rng = np.random.default_rng(0)
    batch, spans = [], []
    for counts in all_spans:
        total = sum(counts)
        covers = len(counts) % 2 == 1 and counts[-1] > 0
        batch.append(rng.integers(0, 50256, total - covers).tolist())
        spans.append(counts)
    mode = "reference" if reference else "positional"
    _, targets = Collator(make_shards(batch, spans), mask_prompt=True, mode=mode)(range(len(batch)))
    width = targets.shape[1]
    for row, counts, found in zip(batch, spans, targets.tolist(), strict=True):
        if row:
            expected = plain_multi_turn(row, counts)
            assert found == expected + [-100] * (width - len(expected))


@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=7), min_size=1, max_size=4), st.integers(1, 12))
def test_a_chat_cut_on_the_left_trains_what_it_trained(all_spans: list[list[int]], limit: int) -> None:
    rng = np.random.default_rng(0)
    batch = [rng.integers(0, 50256, max(sum(counts) - len(counts) % 2, 0)).tolist() for counts in all_spans]
    spans = [counts if sum(counts) <= len(row) + 1 else [] for row, counts in zip(batch, all_spans, strict=True)]
    options: dict[str, Any] = {"max_length": limit, "truncation": "left", "mask_prompt": True, "mode": "positional"}
    cut = Collator(make_shards(batch, spans), **options)(range(len(batch)))
    for i, row in enumerate(batch):
        if row:
            whole = Collator(make_shards([row], [spans[i]]), mask_prompt=True, mode="positional")([0])
            kept = min(len(row), limit)
            assert cut.inputs[i, :kept].tolist() == row[-kept:]
            assert cut.targets[i, :kept].tolist() == whole.targets[0, -kept:].tolist()
            assert set(cut.targets[i, kept:].tolist()) <= {-100}


@given(rows, st.integers(1, 8), st.sampled_from(["positional", "reference"]))
def test_left_truncation_keeps_the_last_columns(batch: list[list[int]], limit: int, mode: str) -> None:
    batch = batch if mode == "positional" else [row or [7] for row in batch]  # the reference trains an empty row
    whole = [collate_fn([row], mode=mode) for row in batch]
    inputs, targets = Collator(make_shards(batch), max_length=limit, truncation="left", mode=mode)(range(len(batch)))
    for i, (row_inputs, row_targets) in enumerate(whole):
        kept = min(len(batch[i]), limit)
        assert inputs[i, :kept].tolist() == row_inputs[0, len(batch[i]) - kept :].tolist()
        assert targets[i, :kept].tolist() == row_targets[0, len(batch[i]) - kept :].tolist()
        assert set(targets[i, kept:].tolist()) <= {-100}


@pytest.mark.slow
@given(rows, st.one_of(st.none(), st.integers(1, 15)))
def test_narrow_inputs(batch: list[list[int]], limit: int | None) -> None:
    shards = make_shards(batch)
    inputs, targets = Collator(shards, max_length=limit, inputs_dtype=torch.int32)(range(len(batch)))
    wide = Collator(shards, max_length=limit)(range(len(batch)))
    assert inputs.dtype == torch.int32
    assert inputs.tolist() == wide.inputs.tolist()
    check([targets], [wide.targets])


def test_a_row_without_spans_has_no_prompt_and_no_corner() -> None:
    for spans, width, trained, corners in (([], 3, 3, 0), ([0, 3], 3, 1, 1), ([0, 1], 1, 1, 0)):
        collator = Collator(make_shards([[1, 2, 3][:width]], [spans]), mask_prompt=True)
        out, report = np.empty(99, np.int64), np.empty((1, kernels.REPORT_COLUMNS), np.int64)
        assert collator.fill_group(np.array([0]), np.array([0, 1]), out, report) == 1
        assert (report[0, kernels.TRAINED], report[0, kernels.CORNERS]) == (trained, corners)


def test_narrow_inputs_take_half_the_room() -> None:
    assert kernels.plain_cells_of(3, 11, 8) == (40, 80)  # 33 cells each, on lines of eight
    assert kernels.plain_cells_of(3, 11, 4) == (24, 64)


@given(rows, st.booleans(), st.data())
def test_report_counts_cells_targets_and_corners(batch: list[list[int]], masked: bool, data: st.DataObject) -> None:
    prompts = [data.draw(st.integers(0, len(row))) for row in batch]
    shards = make_shards(batch, [[p, len(row) - p] for p, row in zip(prompts, batch, strict=True)])
    bounds = np.array([0, len(batch)])
    results = {}
    for mode in ("reference", "positional"):
        collator = Collator(shards, mask_prompt=masked, mode=mode, ignore_index=-100)
        out, report = np.empty(4096, np.int64), np.empty((1, kernels.REPORT_COLUMNS), np.int64)
        assert collator.fill_group(np.arange(len(batch)), bounds, out, report) == 1
        (results[mode],) = collator.batches(out, report.tolist())
        assert report[0, kernels.TRAINED] == (results[mode].targets != -100).sum()
        assert report[0, kernels.REAL] == sum(map(len, batch))
        corners = report[0, kernels.CORNERS]
        if mode == "positional":
            assert corners == 0
        elif corners == 0:
            expected = Collator(shards, mask_prompt=masked, mode="positional")(range(len(batch)))
            check(results[mode], expected)


def test_damaged_offsets_are_named_and_never_followed() -> None:
    batch = [[1, 2], [3], [4, 5, 6], [7]]
    for column, values in (
        ("offsets", [0, 2**40, 3]), ("offsets", [0, -5, 3]), ("offsets", [2, 1, 3]),
        ("span_offsets", [0, 2**40, 4]), ("span_offsets", [0, -1, 4]),
    ):  # fmt: skip
        shards = make_shards(batch, [[1, len(row) - 1] for row in batch], num_shards=2)
        shards[1] = shards[1]._replace(**{column: np.array(values)})
        collator = Collator(shards, mask_prompt=True, name="STORE")
        collator([0, 1])
        with pytest.raises(InputError, match=r"STORE, shard 1, row 0 \(row 2 of the store\) is damaged"):
            collator([0, 2])
    for spans in ([5, 5], [1, 3], [0, 1, 1, 2]):  # more than the row and its end-of-text
        with pytest.raises(InputError, match=r"shard 0, row 0 \(row 0 of the store\) is damaged"):
            Collator(make_shards(batch, [spans] * 4), mask_prompt=True)([0])
    Collator(make_shards(batch, [[1, 2]] * 4), mask_prompt=True)([0])


def test_damage_is_told_in_full() -> None:
    shards = make_shards([[1, 2], [3], [4, 5, 6], [7]], num_shards=2)
    shards[1] = shards[1]._replace(offsets=np.array([0, 3, 99]))
    with pytest.raises(
        InputError, match=r"shard 1, row 1 \(row 3 of the store\) is damaged: tokens 3\.\.99 of 4, spans"
    ):
        Collator(shards)([0, 3])


def test_a_table_of_nothing_and_of_less() -> None:
    nothing = Table([])
    assert nothing.num_rows == 0
    assert nothing.array.shape == (1, TABLE_COLUMNS)
    with pytest.raises(InputError, match="row 0 of the store, which has 0 rows"):
        Collator([])([0])
    (shard,) = make_shards([[1]])
    empty = np.empty(0, np.int64)
    with pytest.raises(InputError, match=r"num_rows \+ 1 items"):
        Table([shard._replace(offsets=empty, span_offsets=empty)])
    with pytest.raises(InputError, match=r"num_rows \+ 1 items"):
        Table([shard._replace(span_offsets=np.zeros(3, np.int64))])


def test_settings_are_shared_and_so_cannot_be_written() -> None:
    settings = Collator(make_shards([[1]])).settings
    assert settings is Collator(make_shards([[2]])).settings
    with pytest.raises(ValueError, match="read-only"):
        settings[0] = 1


def test_rows_that_do_not_exist_are_named() -> None:
    collator = Collator(make_shards([[1], [2]]))
    for row in (-1, 2, 2**62, -(2**62)):
        with pytest.raises(InputError, match=f"row {row} of the store, which has 2 rows"):
            collator([0, row])
    with pytest.raises(InputError, match="at least one row"):
        collator([])


@pytest.mark.parametrize(
    "rows", [[1.5], [1.0], [True, False], None, "ab", ["1"], [[0], [1, 1]], [2**64], [2**63], [0, None], {0: 1}]
)
def test_row_numbers_are_integers(rows: Any) -> None:
    collator = Collator(make_shards([[1], [2]]))
    with pytest.raises(InputError, match="row numbers are"):
        collator(rows)
    with pytest.raises(InputError, match="row numbers are"):
        collator.pack(rows, [0, 1], capacity=4)


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.uint64, np.dtype(">i8"), torch.int32, torch.int64])
def test_row_numbers_of_any_kind_of_integer(kind: Any) -> None:
    collator = Collator(make_shards([[1], [2, 3], [4]]))
    rows = torch.tensor([2, 1], dtype=kind) if isinstance(kind, torch.dtype) else np.array([2, 1], kind)
    check(collator(rows), custom_collate_fn([[4], [2, 3]]))
    check(collator(np.array([2, 0, 1, 0])[::2]), custom_collate_fn([[4], [2, 3]]))


@pytest.mark.parametrize("capacity", [0, -1, -(2**70), 2**31, 2**70])
def test_a_pack_has_a_capacity(capacity: int) -> None:
    with pytest.raises(InputError, match=f"capacity={capacity}: give 1 to"):
        Collator(make_shards([[1], [2]])).pack([0], [0, 1], capacity=capacity)


@pytest.mark.parametrize("limit", [2**62, 2**63, 10**30])
def test_a_limit_beyond_any_row_is_none(limit: int) -> None:
    rows = [[4, 5, 6], [7]]
    check(collate_fn(rows, allowed_max_length=limit), custom_collate_fn(rows))
    check(Collator(make_shards(rows), max_length=limit)([0, 1]), custom_collate_fn(rows))


@pytest.mark.parametrize("limit", [-(2**62), -(2**63), -(10**30)])
def test_a_limit_below_any_row_leaves_nothing(limit: int) -> None:
    assert [part.shape for part in collate_fn([[4, 5, 6], [7]], allowed_max_length=limit)] == [(2, 0), (2, 0)]


def test_a_limit_is_an_integer() -> None:
    with pytest.raises(InputError, match=r"the limit is 2\.5: give an integer"):
        Collator(make_shards([[1, 2, 3]]), max_length=2.5)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Truncating the start")  # PyTorch, of the reference's slice
@pytest.mark.parametrize("prompt", [2**62, 2**63, 2**70, -(2**62), -(2**63), -(2**70)])
def test_prompts_beyond_any_row(prompt: int) -> None:
    batch = [(1, [4, 5, 6]), (prompt, [7, 8]), (2, [9])]
    check(collate_fn(batch), custom_collate_with_masking_fn(batch))


def test_columns_of_a_wrong_layout_are_refused() -> None:
    shard = make_shards([[1, 2], [3]])[0]
    for change in (
        {"input_ids": shard.input_ids.astype(np.int16)}, {"offsets": shard.offsets.astype(np.int32)},
        {"input_ids": np.zeros((2, 2), np.uint16)}, {"input_ids": np.zeros(8, np.uint16)[::2]},
        {"span_offsets": shard.span_offsets[:-1]},
    ):  # fmt: skip
        with pytest.raises(InputError, match="shard 0"):
            Collator([shard._replace(**change)])


# ------------------------------------------------------------------------------------------------- data loaders


class Rows(torch.utils.data.Dataset[list[int]]):
    def __init__(self, items: list[list[int]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> list[int]:
        return self.items[index]


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers(context: str) -> None:
    items = [list(range(n % 7)) for n in range(20)]
    loader = torch.utils.data.DataLoader(
        Rows(items), batch_size=4, collate_fn=partial(collate_fn, device="cpu", allowed_max_length=5),
        num_workers=1, multiprocessing_context=context,
    )  # fmt: skip
    for start, batch in zip(range(0, 20, 4), loader, strict=True):
        assert isinstance(batch, Batch)
        check(batch, custom_collate_fn(items[start : start + 4], allowed_max_length=5))


def test_batches_can_be_pickled() -> None:
    batch = collate_fn([[1, 2], [3]])
    check(pickle.loads(pickle.dumps(batch)), batch)


def test_the_chapters_loader_gives_the_same_widths(instruction_data: Path, expected_widths: Path) -> None:
    from fastcollate.text.tokenizer import load_encoding

    data = json.loads(instruction_data.read_text())[: int(1100 * 0.85)]
    encoding = load_encoding("gpt2")
    torch.manual_seed(123)
    dataset = InstructionDataset(data, encoding)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=8, shuffle=True, drop_last=True,
        collate_fn=partial(collate_fn, device="cpu", allowed_max_length=1024),
    )  # fmt: skip
    widths = [inputs.shape[1] for inputs, _ in loader]
    expected = json.loads(expected_widths.read_text())
    assert widths == (expected["widths"] if isinstance(expected, dict) else expected)
    assert len(widths) == 116


def test_a_buffer_that_just_fits_is_filled_once() -> None:
    collator = Collator(make_shards([[1, 2], [3]]))
    asked = []
    exact = np.empty(kernels.plain_cells_of(2, 2, 8)[1], np.int64)

    def take(num_cells: int) -> np.ndarray:
        asked.append(num_cells)
        return exact

    inputs, _ = collator([0, 1], take)
    assert asked == [0]
    assert inputs.tolist() == [[1, 2], [3, 50256]]


def test_a_group_that_does_not_fit_and_one_that_is_damaged() -> None:
    shards = make_shards([[1, 2, 3], [4], [5, 6]])
    rows, bounds = np.arange(3), np.array([0, 2, 3])
    report = np.zeros((2, kernels.REPORT_COLUMNS), np.int64)
    collator = Collator(shards)
    assert collator.fill_group(rows, bounds, np.empty(3, np.int64), report) == 0
    assert report[0, kernels.WIDTH] == 3
    assert collator.fill_group(rows, bounds, np.empty(kernels.plain_cells_of(2, 3, 8)[1], np.int64), report) == 1
    shards[0] = shards[0]._replace(offsets=np.array([0, 3, 4, 99]))
    with pytest.raises(InputError, match=r"row 2 of the store\) is damaged"):
        Collator(shards).fill_group(rows, bounds, np.empty(100, np.int64), report)


def test_limits_and_packs_at_their_edges() -> None:
    shards = make_shards([[1, 2, 3], [4]])
    for limit in (0, -1):
        with pytest.raises(InputError, match=f"max_length={limit}: give at least 1"):
            Collator(shards, max_length=limit)
    assert Collator(shards, max_length=1)([0]).inputs.tolist() == [[1]]
    collator = Collator(shards)
    with pytest.raises(InputError, match=r"bounds=\[0\] of 0 rows"):
        collator.pack([], [0], capacity=4)
    with pytest.raises(InputError, match=r"bounds=\[0, 2, 1\]"):
        collator.pack([0], [0, 2, 1], capacity=4)
    assert collator.pack([1], [0, 0, 1], capacity=2).inputs.tolist() == [[50256, 50256], [4, 50256]]


def test_a_packed_group_that_does_not_fit() -> None:
    collator = Collator(make_shards([[1, 2], [3]]))
    report = np.zeros((1, kernels.REPORT_COLUMNS), np.int64)
    group = np.arange(2), np.empty(0, np.int64), np.array([0, 2]), np.array([0, 1]), 4
    assert collator.fill_packed_group(*group, np.empty(8, np.int64), report) == 0
    assert collator.fill_packed_group(*group, np.empty(collator.packed_cells(1, 4, 2), np.int64), report) == 1


def test_cells_of_a_part_are_counted_from_its_start() -> None:
    collator = Collator(make_shards([list(range(9)), list(range(7))]))
    with pytest.raises(InputError, match=r"the rows of pack 0 take 13 cells up to row 1, more than capacity=12"):
        collator.pack([0, 1], [0, 2], starts=[3, 0], capacity=12)


def test_a_damaged_first_row_and_a_pack_overfull_are_told_by_row() -> None:
    shards = make_shards([[1, 2], [3, 4], [5, 6], [7]])
    collator = Collator(shards)
    with pytest.raises(InputError, match=r"the rows of pack 1 take 4 cells up to row 2, more than capacity=3"):
        collator.pack([0, 1, 2, 3], [0, 1, 4], capacity=3)
    shards[0] = shards[0]._replace(offsets=np.array([-1, 2, 4, 6, 7]))
    report = np.zeros((1, kernels.REPORT_COLUMNS), np.int64)
    with pytest.raises(InputError, match=r"row 0 of the store\) is damaged"):
        Collator(shards).fill_group(np.array([0, 1]), np.array([0, 2]), np.empty(64, np.int64), report)


def test_rows_without_ids_and_with_the_largest() -> None:
    one = np.array([5], np.uint16)
    for empty in (np.array([]), torch.tensor([]), [], ()):
        inputs, targets = collate_fn([empty, one])
        assert (inputs.tolist(), targets.tolist()) == ([[50256], [5]], [[50256], [50256]])
    assert collate_fn([np.array([2**62, 1], np.uint64)]).inputs.tolist() == [[2**62, 1]]
    with pytest.raises(InputError, match="row 0 of the batch is uint64"):
        collate_fn([np.array([2**63], np.uint64)])


def test_rows_may_be_dicts_of_ids() -> None:
    rows = [[5, 6, 7], [8]]
    wanted = collate_fn(rows)
    for made in (list, torch.tensor):
        got = collate_fn([{"input_ids": made(row), "attention_mask": [1] * len(row)} for row in rows])
        assert torch.equal(got.inputs, wanted.inputs)
        assert torch.equal(got.targets, wanted.targets)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"input_ids": [1], "labels": [1]}, "'labels' would be passed over; .*honours labels"),
        ({"input_ids": [1, 2], "attention_mask": [1, 0]}, "an attention_mask with zeros"),
        ({"ids": [1]}, "or as a dict with 'input_ids'"),
        ([1, 2], "or as a dict with 'input_ids'"),
    ],
)
def test_what_a_dict_says_of_its_row_is_not_passed_over(row: object, says: str) -> None:
    with pytest.raises(InputError, match=f"row 1 of the batch.*{says}"):
        collate_fn([{"input_ids": [1]}, row])
