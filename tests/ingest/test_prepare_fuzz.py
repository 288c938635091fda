"""A short run of `benchmarks/prepare_fuzz.py`, whose long one has 100,000 records and lines of 50 MB."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.prepare_fuzz import LARGE, MAKERS, check, large_cases, make_cases
from fastcollate.sources import blocks as sources_module

SEED = int(os.environ.get("FUZZ_SEED", "1"))


@pytest.mark.slow
@pytest.mark.parametrize("block_bytes", [3_000, 8 << 20])
def test_bad_records_are_reported_and_good_ones_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(sources_module, "SIZES", sources_module.Sizes(block_bytes, 8 * block_bytes))
    print(f"FUZZ_SEED={SEED}")
    cases = make_cases(1500, SEED)
    assert {case.kind for case in cases} >= set(MAKERS) - {"deep nesting"}
    result = check(cases, tmp_path, workers=1)
    assert result["stored"] > 100
    assert result["reported"] > 100


@pytest.mark.slow
def test_lines_of_many_megabytes(tmp_path: Path) -> None:
    assert LARGE == 50 << 20
    result = check([*large_cases(size=9 << 20), *make_cases(5, SEED)], tmp_path, workers=1)
    assert result["by_kind"]["very long line"] == {"records": 4, "good": 1}
