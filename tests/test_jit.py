"""Kernels are kept on disk: renewed with every file that they are made of, wherever something can be written."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastcollate import jit

PACKAGE = Path(jit.__file__).parent
KERNEL_FILES = sorted(
    path for path in PACKAGE.rglob("*.py")
    if path.name != "jit.py" and {"@kernel", "@part"} & set(path.read_text().splitlines())
)  # fmt: skip
SCRIPT = """
import numpy as np
from fastcollate.jit import compiling
from fastcollate.store.pages import ask_for_item_pages
array = np.zeros(8192, np.int64)
with compiling(lambda: print("compiling", end=" ")) as watch:
    print(ask_for_item_pages(array.ctypes.data, 8, np.array([0, 1, 8191]), 4096), watch.seconds > 0)
"""
WITHOUT = "2 False"
COMPILED = "compiling 2 True"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package without what was compiled."""
    folder = tmp_path / "site" / "fastcollate"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(package: Path, **environment: str) -> str:
    own = {"HOME": str(package.parent), "TMPDIR": str(package.parent), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-B", "-c", SCRIPT]
    done = subprocess.run(
        command, env={**own, "PYTHONPATH": str(package.parent), **environment}, capture_output=True, text=True,
        timeout=280, check=False, cwd=package.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_there_are_kernel_files() -> None:
    assert {"fill.py", "layout.py", "kernels.py", "pages.py"} <= {path.name for path in KERNEL_FILES}


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.name)
def test_a_kernel_is_made_of_all_that_its_file_imports(path: Path) -> None:
    files = {file.name for file in jit._imported(path)}
    assert {path.name, "jit.py"} <= files
    if path.parent.name == "collate":
        assert {"layout.py", "settings.py"} <= files


@pytest.mark.slow
def test_what_kernel_files_hold_from_elsewhere_is_part_of_them_through_faces_too() -> None:
    """Another process imports them, and tells where their functions, kernels and modules come from."""
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in KERNEL_FILES]
    script = f"""
import importlib, inspect
for number, name in enumerate({names!r}):
    for value in vars(importlib.import_module(name)).values():
        place = value if inspect.ismodule(value) else inspect.getmodule(getattr(value, "py_func", value))
        if getattr(place, "__name__", "").startswith("fastcollate."):
            print(number, place.__file__)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    found = [line.split(" ", 1) for line in run.stdout.splitlines()]
    assert {int(number) for number, _ in found} == set(range(len(KERNEL_FILES)))
    for number, file in found:
        assert Path(file) in jit._imported(KERNEL_FILES[int(number)]), (names[int(number)], file)


def decorated(tree: ast.Module, *names: str) -> list[ast.FunctionDef]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [one for one in functions if any(isinstance(d, ast.Name) and d.id in names for d in one.decorator_list)]


@pytest.mark.slow
def test_only_kernels_name_a_part_of_kernels() -> None:
    """A part has no entry for Python: a call from there ends the process."""
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    parts = {function.name for tree in trees.values() for function in decorated(tree, "part")}
    assert {"shard_of", "locate", "fill_row", "mask_row"} <= parts
    for path, tree in trees.items():
        inside = {id(node) for function in decorated(tree, "kernel", "part") for node in ast.walk(function)}
        outside = [node for node in ast.walk(tree) if id(node) not in inside]
        named = {node.id for node in outside if isinstance(node, ast.Name)}
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        own = {function.name for function in decorated(tree, "part")}
        own |= parts & {alias.name for node in imports for alias in node.names}
        assert not named & own, f"{path.name} names {sorted(named & own)} outside of a kernel"
        of_modules = {n.attr for n in outside if isinstance(n, ast.Attribute) and "kernels" in ast.unparse(n.value)}
        assert not of_modules & parts, f"{path.name} names {sorted(of_modules & parts)} outside of a kernel"


@pytest.mark.slow
def test_kernels_are_renewed_when_a_file_that_they_use_changes_and_only_then(package: Path) -> None:
    assert run(package) == COMPILED
    assert run(package) == WITHOUT
    rows = package / "store" / "layout.py"
    os.utime(rows, (1, 1))
    assert run(package) == WITHOUT  # the same text
    (package / "cli.py").write_text("")
    assert run(package) == WITHOUT  # no part of a kernel
    rows.write_text(rows.read_text() + "# changed\n")
    assert run(package) == COMPILED
    assert run(package) == WITHOUT


@pytest.mark.slow
def test_where_no_folder_can_be_written_a_temporary_one_keeps_the_kernels(package: Path) -> None:
    for folder in (package, *(path for path in package.iterdir() if path.is_dir())):
        (folder / "__pycache__").write_text("a file where numba wants a folder: this holds for root, too")
    home = package.parent / "home"
    home.write_text("")
    options = {"HOME": str(home), "XDG_CACHE_HOME": str(home)}
    assert run(package, **options) == COMPILED
    assert run(package, **options) == WITHOUT
    (kept,) = package.parent.glob("fastcollate-kernels-*")
    assert kept.stat().st_mode & 0o077 == 0
    kept.chmod(0o777)  # somebody else could have put code there
    assert run(package, **options) == COMPILED
    assert run(package, **options) == COMPILED


@pytest.mark.slow
def test_a_cache_that_is_full_or_damaged_costs_time_and_no_batch(package: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    full = "import builtins, os; real = open\n" + (
        "def opening(path, mode='r', *rest, **options):\n"
        "    return real('/dev/full' if '.tmp.' in str(path) and 'w' in mode else path, mode, *rest, **options)\n"
        "builtins.open = opening\n"
    )
    (package.parent / "sitecustomize.py").write_text(full)
    for _ in range(2):
        assert run(package) == COMPILED
    (package.parent / "sitecustomize.py").unlink()
    assert run(package) == COMPILED
    assert run(package) == WITHOUT
    for pattern in ("*.nbc", "*.nbi"):
        for kept in package.rglob(pattern):
            kept.write_bytes(kept.read_bytes()[: kept.stat().st_size // 2])
        assert run(package) == COMPILED


NO_OVERRIDE = ["setpriv", "--inh-caps=-dac_override", "--bounding-set=-dac_override"]  # root, to whom modes apply


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="folders are made read-only by their modes")
@pytest.mark.parametrize("cache", [None, "read-only", "missing"])
def test_where_nothing_can_be_written_each_process_compiles_and_says_so_once(package: Path, cache: str | None) -> None:
    """A package folder, a home, and a folder for temporary files that may only be read; NUMBA_CACHE_DIR too."""
    root = package.parent.parent
    for name in ("home", "tmp", "read-only"):
        (root / name).mkdir()
    options = {"HOME": str(root / "home"), "XDG_CACHE_HOME": str(root / "home"), "TMPDIR": str(root / "tmp")}
    if cache is not None:
        options["NUMBA_CACHE_DIR"] = str(root / cache)
    nowhere = (
        "import tempfile; tempfile.tempdir = None; "
        f"tempfile._candidate_tempdir_list = lambda: [{str(root / 'tmp')!r}]\n"
    )
    before = [] if os.geteuid() else NO_OVERRIDE
    places = [root, *(path for path in root.rglob("*") if path.is_dir())]
    try:
        for place in places:
            place.chmod(0o555)
        writes = [sys.executable, "-c", f"open({str(package / 'x')!r}, 'w')"]
        if subprocess.run([*before, *writes], capture_output=True, check=False).returncode == 0:
            pytest.skip("modes do not apply to this user")
        for _ in range(2):
            done = subprocess.run(
                [*before, sys.executable, "-B", "-W", "always", "-c", nowhere + SCRIPT], capture_output=True, text=True,
                env={"PATH": os.environ["PATH"], "PYTHONPATH": str(package.parent), **options}, timeout=280,
                check=False, cwd=package,
            )  # fmt: skip
            assert done.stdout.strip() == COMPILED, done.stderr
            assert (
                done.stderr.count("compiled kernels cannot be kept (the package's, the home and the temporary folder ")
                == 1
            ), done.stderr
            assert "Traceback" not in done.stderr
    finally:
        for place in places:
            place.chmod(0o755)
