"""The API pages build from the docstrings, and every public name has its page entry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fastcollate

ROOT = Path(__file__).resolve().parent.parent


def test_the_pages_build_and_name_everything_public(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason="needs the extra 'docs'")
    command = [sys.executable, str(ROOT / "docs" / "pages.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stderr
    for name in fastcollate.__all__:
        room = fastcollate._MODULE_OF[name]
        page = (tmp_path / "fastcollate" / f"{room.replace('.', '/')}.html").read_text()
        assert f'id="{name}"' in page, name
