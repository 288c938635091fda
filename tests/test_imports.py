"""The table in CONTRIBUTING.md against the code: a room imports only what is written beside it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastcollate"
OPEN_TO_ALL = {"errors", "progress"}


def table() -> dict[str, set[str]]:
    """Room -> rooms it may import, from the table; `all` is every room."""
    rows = re.findall(r"^\| `([\w/]+?)(?:\.py|/)` \|.*\| (.+?) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    return {room: set(re.findall(r"\w+", re.sub(r"\[.*?\]", "", allowed))) for room, allowed in rows}


def imports_of(path: Path) -> set[str]:
    """The rooms of this package that a file names in an import, at any depth; not what it does run as a script."""
    rooms = set()
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and "__main__" in ast.unparse(n.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastcollate":
            parts = node.module.split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("fastcollate.")}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path.name}: write imports in full"
    return rooms


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else path.stem


FILES = [
    p for p in sorted(PACKAGE.rglob("*.py")) if p.relative_to(PACKAGE).parts[0] not in ("__init__.py", "__main__.py")
]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_room_imports_only_what_the_table_allows(path: Path) -> None:
    allowed = table().get(room_of(path))
    assert allowed is not None, f"{room_of(path)} has no row in the table of CONTRIBUTING.md"
    if "all" not in allowed:
        assert imports_of(path) - {room_of(path)} <= allowed | OPEN_TO_ALL


def test_every_room_of_the_table_exists() -> None:
    assert {
        room for room in table() if not (PACKAGE / f"{room}.py").exists() and not (PACKAGE / room).is_dir()
    } == set()


def test_nothing_but_the_provers_imports_the_oracle() -> None:
    users = {room_of(p) for p in FILES if "reference" in imports_of(p)}
    assert users <= {"verify", "inspect", "bench", "cli"}
