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

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ADAPTERS = {"huggingface": "transformers", "lightning": "lightning", "pytorch": "torch"}
CHECKS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def imported_by_the_pages() -> set[str]:
    """`module.name` of each `from fastcollate... import name` on a page."""
    text = "\n".join(page.read_text() for page in PAGES)
    found = re.findall(r"^ *from (fastcollate[\w.]*) import ([\w, ]+)", text, re.M)
    return {f"{module}.{name.strip()}" for module, names in found for name in names.split(",")}


def public_names() -> list[str]:
    """Each as `module.name`."""
    names = {f"fastcollate.{name}" for name in fastcollate.__all__} | imported_by_the_pages()
    for adapter in ADAPTERS:
        path = ROOT / "fastcollate" / "integrations" / f"{adapter}.py"
        classes = re.findall(r"^class ([A-Z]\w+)", path.read_text(), re.M)
        names |= {f"fastcollate.integrations.{adapter}.{name}" for name in classes if name not in fastcollate.__all__}
    return sorted(names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fastcollate.sources.sample import sample_records

    folder = tmp_path_factory.mktemp("examples")
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sample_records(600)))
    fastcollate.prepare(folder / "records.jsonl", folder / "store", workers=1)
    return folder


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
