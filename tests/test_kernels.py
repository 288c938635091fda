"""The kernels as plain Python: the tests of collate and plan once more, with Numba's compiler switched off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.parametrize("file", ["test_collate.py", "test_loader.py", "test_packing.py", "test_vectors.py"])
def test_without_the_compiler(file: str) -> None:
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "HYPOTHESIS_MAX_EXAMPLES": "25"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
