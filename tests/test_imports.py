"""The house's one direction: a folder imports only from folders above it, and no file stands in a circle."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fastcollate"
# Data flows down this list (see CONTRIBUTING.md).
ORDER = [
    "errors", "lazy", "options", "progress", "ranks", "jit", "sources", "text", "store", "plan", "ingest", "collate",
    "load", "integrations", "train", "check", "cli", "testing",
]  # fmt: skip
# Folders that others import only through their face, of at most ten names (a module counts as one).
FACED = {"check", "cli", "collate", "ingest", "integrations", "load", "plan", "sources", "store", "text", "train"}
MOVED = {"gpt2": ("GPT2", "GPT2Config"), "mixing": ("MixedStore",), "splits": ("split_rows",)}  # until the next release
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
                yield from (module, *(f"{module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("fastcollate."))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_folders_above_its_own(path: Path) -> None:
    own = ORDER.index(room_of(path))
    for module in imports_of(path):
        room = module.split(".")[1]
        if room in ORDER:
            assert ORDER.index(room) <= own, f"{path.relative_to(PACKAGE)} imports {module}, which is below it"


@pytest.mark.slow
@pytest.mark.parametrize("folder", sorted(FACED))
def test_a_folder_is_imported_through_its_face_of_at_most_ten_names(folder: str) -> None:
    names: dict[str, set[str]] = {}  # a folder within it has names of its own
    for path in [*FILES, PACKAGE / "__init__.py"]:
        if room_of(path) != folder:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    assert not any(a.name.startswith(f"fastcollate.{folder}") for a in node.names), name_of(path)
                elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"fastcollate.{folder}"):
                    through_face = node.module == f"fastcollate.{folder}" or room_of(path) == "__init__"
                    assert through_face, f"{name_of(path)} imports {node.module}, not fastcollate.{folder}"
                    parts = str(node.module).split(".")
                    within = ".".join(parts[1:3]) if PACKAGE.joinpath(*parts[1:3]).is_dir() else folder
                    names.setdefault(within, set()).update(alias.name for alias in node.names)
    for within, own in names.items():
        assert len(own) <= 10, (within, sorted(own))


def test_nothing_but_the_provers_imports_the_oracle() -> None:
    users = {room_of(path) for path in FILES if any(m == "fastcollate.collate.reference" for m in imports_of(path))}
    assert users <= {"check", "cli"}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_the_table_has_one_row_a_folder_in_this_order() -> None:
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    table = page.split("| folder | is responsible for |", 1)[1].split("\n\n", 1)[0]
    cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    assert [name for cell in cells for name in re.findall(r"`(\w+)`", cell)] == ORDER
    assert 1 <= len(page.split("| word | means |", 1)[1].splitlines()[2:]) <= 15, "a glossary of at most 15 words"


def test_the_table_names_each_folder_within_a_folder_in_its_row() -> None:
    table = (PACKAGE.parent / "CONTRIBUTING.md").read_text().split("| folder |", 1)[1].split("\n\n", 1)[0]
    named = [(row.split("`")[1], inner) for row in table.splitlines() for inner in re.findall(r"`(\w+/\w+)`", row)]
    found = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("*/*/__init__.py")}
    assert {inner for _, inner in named} == found
    assert all(inner.startswith(f"{folder}/") for folder, inner in named)


def test_every_folder_and_file_at_the_top_has_its_place_in_the_order() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__", "__main__"} <= {*ORDER, *MOVED}


@pytest.mark.slow
@pytest.mark.parametrize("module", MOVED)
def test_a_place_that_the_last_release_documented_still_works_and_warns(module: str) -> None:
    sys.modules.pop(f"fastcollate.{module}", None)
    with pytest.warns(FutureWarning, match=f"fastcollate.{module} has moved"):
        moved = importlib.import_module(f"fastcollate.{module}")
    assert all(getattr(moved, name) for name in MOVED[module])


def test_a_folder_has_at_most_eight_code_files() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}
    for folder in sorted(folders):
        files = [path.stem for path in folder.glob("*.py") if path.stem not in ("__init__", "__main__")]
        assert len(files) <= 8, f"{folder.name}: {sorted(files)}; make a sub-folder"


def test_a_file_has_at_most_400_lines() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        num_lines = len(path.read_text().splitlines())
        assert num_lines <= 400, f"{name_of(path)} has {num_lines} lines, more than 400: cut it in two"


def test_only_the_cellar_names_the_compilers_insides() -> None:
    for path in FILES:
        modules = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules |= {f"{node.module}.{alias.name}" for alias in node.names}
        named = {module for module in modules if re.match(r"llvmlite\b|numba\.core\b", module)}
        assert not named or name_of(path) == "jit.py", f"{name_of(path)} imports {sorted(named)}"


def test_nothing_at_the_top_hides_a_public_name_or_a_module_of_the_standard_library() -> None:
    import fastcollate

    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not found & set(fastcollate.__all__)
    assert not found & set(sys.stdlib_module_names)
