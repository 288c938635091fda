"""prepare, inspect, the report and a loader give the same numbers for the same thing, under the same names."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastcollate import BatchLoader, TokenStore, prepare
from fastcollate.check.counts import inspect_store, pack_capacity
from fastcollate.check.page import padding_by_policy
from fastcollate.check.terminal import summary_of
from fastcollate.ingest import summary_in_words
from fastcollate.ingest.options import PrepareReport


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> PrepareReport:
    folder = tmp_path_factory.mktemp("same")
    rng = np.random.default_rng(0)
    records = [{"Instruction": "a " * int(n), "Output": "b " * int(n % 9 + 1)} for n in rng.lognormal(3, 0.8, 500)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    return prepare(str(folder / "a.jsonl"), folder / "s")


def test_fields_in_other_capitals_are_taken_and_said(report: PrepareReport) -> None:
    assert report.num_rows == 500
    assert report.template.endswith("with the fields Instruction, Output")
    fields = TokenStore(report.store).manifest["template"]["fields"]
    assert fields == {"instruction": "Instruction", "output": "Output"}


@pytest.mark.parametrize("batch_size", [8, 64])
@pytest.mark.parametrize("policy", ["shuffled", "bucketed"])
def test_padding_is_what_a_loader_gives(report: PrepareReport, policy: str, batch_size: int) -> None:
    loader = BatchLoader(report.store, policy=policy, batch_size=batch_size)
    for _ in loader:
        pass
    share = loader.stats.padded_cells / (loader.stats.padded_cells + loader.stats.real_cells)
    said = report.summary[f"padding_{batch_size}_{policy.replace('shuffled', 'random')}"]
    assert said == round(share, 4)
    store = TokenStore(report.store)
    assert said == round(padding_by_policy(store.cells, None)[policy][batch_size].share, 4)
    assert (
        summary_of(inspect_store(store, progress=False))[f"padding, {batch_size} rows a batch, {policy}"]
        == f"{said:.1%}"
    )


def test_what_prepare_says_inspect_says_by_the_same_name(report: PrepareReport) -> None:
    said = summary_in_words(report.summary)
    found = summary_of(inspect_store(TokenStore(report.store), progress=False))
    ours = {"prompts that fill the limit", "rows without a trained token, prompts masked"}  # by prepare's own options
    assert set(said) - ours <= set(found)
    for name in set(said) - ours:
        assert str(said[name]) == str(found[name]), name
    assert not any("_" in name for name in (*said, *found))


def test_packs_hold_what_train_packs(report: PrepareReport) -> None:
    cells = TokenStore(report.store).cells
    assert (pack_capacity(cells, None), pack_capacity(cells, 300)) == (max(1024, cells.max()), 300)
