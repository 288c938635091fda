"""The house's one direction: a folder imports only from folders above it, and no file stands in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fastcollate"
# Data flows down this list (see CONTRIBUTING.md).
ORDER = [
    "errors", "progress", "jit", "sources", "text", "store", "plan", "ingest", "collate", "load", "integrations",
    "train", "check", "cli", "testing",
]  # fmt: skip
# Arrows that still point up; the list only gets shorter.
NOT_YET = {
    ("store/table.py", "collate"),
    ("store/page_kernels.py", "collate"),
}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.stem in ORDER]


def imports_of(path: Path) -> Iterator[str]:
    """The modules of this package that a file names in an import, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write imports in full"
            module = node.module or ""
            if module == "fastcollate":
                yield from (f"fastcollate.{alias.name}" for alias in node.names)
            elif module.startswith("fastcollate."):
                yield module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("fastcollate."))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_folders_above_its_own(path: Path) -> None:
    own = ORDER.index(room_of(path))
    for module in imports_of(path):
        room = module.split(".")[1]
        if room in ORDER and (str(path.relative_to(PACKAGE)), room) not in NOT_YET:
            assert ORDER.index(room) <= own, f"{path.relative_to(PACKAGE)} imports {module}, which is below it"


def test_nothing_but_the_provers_imports_the_oracle() -> None:
    users = {room_of(path) for path in FILES if any(m == "fastcollate.collate.reference" for m in imports_of(path))}
    assert users <= {"check", "cli"}
