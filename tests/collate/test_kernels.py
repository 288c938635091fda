"""The kernels as plain Python: the tests of collate and plan once more, with Numba's compiler switched off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
FILES = [
    "collate/test_collate.py",
    "collate/test_shapes.py",
    "load/test_loader.py",
    "plan/test_packing.py",
    "collate/test_batch_counts.py",
    "collate/test_in_row.py",
]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_without_the_compiler(file: str) -> None:
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "HYPOTHESIS_MAX_EXAMPLES": "15"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        str(TESTS / file),
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
