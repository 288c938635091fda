"""Every name that users import shows an example in its docstring, and every example runs as it stands.

These are the names in `fastcollate.__all__`, whatever README and `docs/` import of `fastcollate` besides, and the
adapters' classes. An example runs in a directory with `records.jsonl` and `store`: 600 records of the built-in sample.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import fastcollate
from tests.helpers import ADAPTERS, public_names

CHECKS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fastcollate.sources.sample import sample_records

    folder = tmp_path_factory.mktemp("examples")
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sample_records(600)))
    fastcollate.prepare(folder / "records.jsonl", folder / "store", workers=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("public_name", public_names())
def test_the_example_runs(public_name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, name = public_name.rpartition(".")
    pytest.importorskip(ADAPTERS.get(module.split(".")[-1], "torch"))
    public: Any = getattr(importlib.import_module(module), name)
    text = inspect.getdoc(public) or ""
    assert re.search(r"^Examples?:$", text, re.M), f"{public_name}: give its docstring an Example"
    example = doctest.DocTestParser().get_doctest(text, {}, name, inspect.getsourcefile(public), 0)
    assert example.examples, f"{public_name}: the example has no >>> line"
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False, optionflags=CHECKS).run(example, out=said.append)
    assert result.failed == 0, "".join(said)
