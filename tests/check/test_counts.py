"""`inspect`: counts against the oracle, the kinds of a row's tokens, what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcollate.check import counts as room
from fastcollate.check import terminal
from fastcollate.check.counts import Histogram, inspect_store
from fastcollate.check.terminal import view_row
from fastcollate.collate.reference import custom_collate_with_masking_fn
from fastcollate.errors import InputError
from fastcollate.store.store import TokenStore
from fastcollate.text.tokenizer import load_tokenizer
from fastcollate.train import MaskOptions
from tests.helpers import GPT2, Row, run_cli, write_store

PAD = 50256
MASKED = MaskOptions(mask_prompt=True)
ROWS: list[Row] = [
    ([2, 2], [1, 2, 3, 4]),
    ([4, 1], [5, 6, 7, 8, 9]),
    ([1, 3], [10, 11, PAD, 12]),  # a literal end-of-text in the response
    ([6], [13, 14, 15, 16, 17]),  # a prompt that covers the end-of-text too
    ([1, 1, 2, 2], [18, 19, 20, 21, 22, 23]),
]


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return write_store(tmp_path / "store", ROWS, shard_rows=2, summary={"boundary_mismatches": 1, "num_skipped": 7})


@pytest.mark.slow
def test_counts_of_a_small_store(store: TokenStore) -> None:
    found = inspect_store(store, MASKED, progress=False)
    assert (found.num_rows, found.num_tokens, found.num_shards, found.mean_length) == (5, 24, 3, 4.8)
    assert found.percentiles == {"0": 4, "1": 4, "5": 4, "25": 4, "50": 5, "75": 5, "95": 6, "99": 6, "100": 6}
    assert found.kept_tokens == 24
    assert found.trained_tokens == 3 + 2 + 3 + 0 + 4
    assert (found.rows_without_trained, found.examples_without_trained) == (1, [3])
    assert found.corner_rows == 1
    assert (found.boundary_mismatches, found.skipped_records, found.rows_cut) == (1, 7, 0)
    assert found.lengths == Histogram([4.0, 5.0, 6.0, 7.0], [2, 2, 1])
    assert sum(found.shares.counts) == 5
    assert [i for i, count in enumerate(found.shares.counts) if count] == [0, 8, 13, 15]


def test_a_limit_cuts_rows_and_leaves_some_without_a_target(store: TokenStore) -> None:
    found = inspect_store(store, MaskOptions(max_length=3, mask_prompt=True), progress=False)
    assert (found.rows_cut, found.kept_tokens) == (5, 15)
    assert found.examples_without_trained == [1, 3]
    at_four = inspect_store(store, MaskOptions(max_length=4, mask_prompt=True), progress=False)
    assert at_four.rows_cut == 3


def test_without_masks_every_token_is_trained(store: TokenStore) -> None:
    found = inspect_store(store, MaskOptions(mask_prompt=False, mode="positional"), progress=False)
    assert found.trained_tokens == found.kept_tokens == 24


def test_both_masks_stand_side_by_side(store: TokenStore) -> None:
    plain, masked = inspect_store(store, progress=False).masks, inspect_store(store, MASKED, progress=False).masks
    assert (
        plain.sentence == "trained: 95.8%; 50.0% with --mask-prompt (1 row without a trained token)"
    )  # one end is ignored
    assert masked.sentence == "trained: 50.0%; 95.8% with --train-prompt"
    assert room.trained_by_mask(store) == plain
    cut = room.trained_by_mask(store, MaskOptions(max_length=3))
    assert (cut.kept_tokens, cut.trained_tokens) == (15, 15)
    assert cut.other_rows_without_trained == 2


def test_the_old_name_of_progress_warns(store: TokenStore) -> None:
    with pytest.warns(FutureWarning, match="silent=True is now progress=False"):
        inspect_store(store, silent=True)


def test_a_store_without_a_summary_says_so(tmp_path: Path) -> None:
    found = inspect_store(write_store(tmp_path / "s", ROWS), progress=False)
    assert found.boundary_mismatches is None
    assert terminal.summary_of(found)["boundary mismatches"] == "not recorded"


rows_strategy = st.lists(
    st.lists(st.integers(0, 5).map(lambda t: PAD if t == 5 else t), min_size=1, max_size=12).flatmap(
        lambda ids: st.tuples(st.integers(0, len(ids)).map(lambda n: [n, len(ids) - n]), st.just(ids))
    ),
    min_size=1,
    max_size=7,
)


@pytest.mark.slow
@given(rows=rows_strategy, limit=st.none() | st.integers(1, 13))
def test_counts_are_those_of_the_oracle(rows: list[Row], limit: int | None) -> None:
    with TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "s", rows)
        found = inspect_store(store, MaskOptions(max_length=limit, mask_prompt=True), progress=False)
        trained = []
        for spans, ids in rows:
            _, targets = custom_collate_with_masking_fn([(spans[0], list(ids))], allowed_max_length=limit)
            trained.append(int((targets != -100).sum()))
        assert found.trained_tokens == sum(trained)
        assert found.rows_without_trained == trained.count(0)
        assert found.kept_tokens == sum(min(len(ids), limit or 99) for _, ids in rows)
        check_views(store, MaskOptions(max_length=limit, mask_prompt=True))


def check_views(store: TokenStore, options: MaskOptions) -> None:
    """A token is shown as trained exactly where it is a target."""
    longest = int(np.argmax(store.lengths))
    for row in range(len(store)):
        view = view_row(store, row, options)
        pair = [(int(store[r].spans[0]), store[r].input_ids.tolist()) for r in (row, longest)]
        inputs, targets = custom_collate_with_masking_fn(pair, allowed_max_length=options.max_length)
        assert view.inputs.tolist() == inputs[0].tolist()
        assert view.targets.tolist() == targets[0].tolist()
        assert len(view.kinds) == len(view.tokens) == len(view.inputs) + 1
        for column, target in enumerate(view.targets.tolist()):
            assert (view.kinds[column + 1] == "trained") == (target != -100)
            if target != -100:
                assert view.tokens[column + 1] == target


def kinds(view: terminal.RowView) -> str:
    return "".join(terminal.MARKS[kind] for kind in view.kinds)


@pytest.mark.slow
def test_the_kinds_of_a_row(store: TokenStore) -> None:
    assert kinds(view_row(store, 0, MASKED)) == "??+++.."  # two each of prompt and response, the end, padding
    assert kinds(view_row(store, 2, MASKED)) == "?+++x.."  # the real end-of-text is ignored after a literal one...
    assert kinds(view_row(store, 2, MaskOptions(mode="positional", mask_prompt=True))) == "?++++.."  # ...but should be
    assert kinds(view_row(store, 3, MASKED)) == "??????."
    assert kinds(view_row(store, 4, MASKED)) == "?+??+++"
    assert kinds(view_row(store, 4, MaskOptions(max_length=3, mask_prompt=True))) == "?+??"
    assert view_row(store, 4, MASKED).source_row == 40


def test_the_first_token_of_a_row_without_prompt_is_ignored(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", [([0, 2], [1, 2])])
    assert kinds(view_row(store, 0, MaskOptions(mode="positional", mask_prompt=True))) == "x++"


@pytest.mark.parametrize("row", [-1, 5])
def test_a_row_that_does_not_exist(store: TokenStore, row: int) -> None:
    with pytest.raises(InputError, match=rf"row {row}: the store .* has rows 0 to 4"):
        view_row(store, row)


def test_percentiles_and_bars_of_many_lengths() -> None:
    lengths = np.repeat(np.array([3, 100, 65535], np.uint16), [50, 49, 1])
    by_length = room.count_lengths(lengths)
    assert [room.percentile(by_length, p) for p in (0, 50, 51, 99, 100)] == [3, 3, 100, 100, 65535]
    bars = room.length_histogram(by_length)
    assert len(bars.counts) <= 24
    assert (bars.counts[0], sum(bars.counts), bars.counts[-1]) == (99, 100, 1)
    assert bars.edges[-2] <= 65535 < bars.edges[-1]


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=60))
def test_every_length_lies_in_its_bar(lengths: list[int]) -> None:
    by_length = room.count_lengths(np.array(lengths, np.uint32))
    bars = room.length_histogram(by_length, num_bars=8)
    assert bars.counts == np.histogram(lengths, bars.edges)[0].tolist()
    assert len(bars.counts) <= 8
    assert sum(bars.counts) == len(lengths)


def test_lengths_are_counted_piece_by_piece() -> None:
    lengths = np.arange((1 << 20) + 5) % 7
    assert room.count_lengths(lengths).tolist() == np.bincount(lengths).tolist()


def test_a_histogram_for_the_terminal() -> None:
    lines = terminal.render_histogram(Histogram([0.0, 1.0, 3.0], [1, 1000]), width=10).splitlines()
    assert lines == ["            0 │█          1", "          1-2 │██████████ 1,000"]


def test_the_printed_row_reads_without_colour(store: TokenStore) -> None:
    lines = terminal.render_row(view_row(store, 2, MASKED), None).plain.splitlines()
    assert lines.pop().split() == ["...", "the", "same", "to", "column", "5"]
    assert "? prompt: 1  + trained: 3  x ignored: 1  . padding: 2" in lines[1]
    assert lines[3].split() == ["turn", "tokens", "trained"]
    text = lines.index("", 3) + 1
    assert {line.split()[0] for line in lines[4 : text - 1]} == {"prompt", "response"}
    assert [line[:12].strip() for line in lines[text : text + 4]] == [
        "prompt ? │",
        "trained + │",
        "ignored x │",
        "padding . │",
    ]
    assert [line.split()[-2:] for line in lines[-5:]] == [
        ["+", "trained"], ["+", "trained"], ["+", "trained"], ["x", "ignored"], [".", "padding"],
    ]  # fmt: skip
    columns = [line.replace("->", "").split()[:3] for line in lines[-5:]]
    assert columns[2:4] == [["2", "50256", "12"], ["3", "12", "-100"]]


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert terminal.printable("a\x1b[31m\ttä\r") == "a\\x1b[31m\\ttä\\r"


def test_text_is_shown_with_the_vocabulary_of_the_store(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("gpt2", "tiktoken")
    prompt, response = tokenizer.encode("Say hi:"), tokenizer.encode("\nHi [bold]!")
    rows = [([len(prompt), len(response)], prompt + response)]
    store = write_store(tmp_path / "s", rows, tokenizer=tokenizer.identity())
    found, problem = room.tokenizer_of(store)
    assert found is not None
    assert problem == ""
    text = terminal.render_row(view_row(store, 0, MASKED), found).plain
    assert "  prompt ? │ Say hi:\n trained + │ \n         + │ Hi [bold]!<|endoftext|>\n" in text


def test_another_vocabulary_of_the_same_name_is_not_used(store: TokenStore) -> None:
    found, problem = room.tokenizer_of(store)
    assert found is None
    assert "not the one the store was made with" in problem


def test_a_vocabulary_that_cannot_be_had_is_said(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", ROWS, tokenizer={**GPT2, "name": "no-such-encoding"})
    found, problem = room.tokenizer_of(store)
    assert found is None
    assert "no-such-encoding" in problem


def test_the_command(store: TokenStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(monkeypatch, "inspect", store.path) == 0
    out = capsys.readouterr().out
    assert "rows without a trained token" in out
    assert "4 │███" in out
    assert run_cli(monkeypatch, "inspect", store.path, "--json", "--max-length", 3) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows_cut"] == 5
    assert printed["options"] == {"max_length": 3, "mask_prompt": False, "mode": "reference"}


def test_the_command_for_a_row(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "inspect", store.path, "--row", 0) == 0
    printed = capsys.readouterr()
    assert "row 0, record 0: 4 tokens" in printed.out
    assert "note: ids only" in printed.err
    assert run_cli(monkeypatch, "inspect", store.path, "--row", 1, "--json", "--train-prompt") == 0
    view = json.loads(capsys.readouterr().out)
    assert view["targets"] == [6, 7, 8, 9, PAD, -100]
    assert view["kinds"] == ["prompt", *["trained"] * 5, "padding"]
    assert run_cli(monkeypatch, "inspect", store.path, "--row", 9) == 1
    assert capsys.readouterr().err.startswith("error: row 9")
    assert run_cli(monkeypatch, "inspect", store.path / "nothing") == 1
