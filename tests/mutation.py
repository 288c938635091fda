"""Change one constant, bound or comparison at a time and see whether the tests notice: `python -m tests.mutation`.

By hand, not part of the test run. Each mutant runs the tests of its room in a forked process in which the kernels are
plain Python (`NUMBA_DISABLE_JIT=1`), stopping at the first failure. The survivors are listed with their place.

A docstring, an annotation and the text of a message are not mutated, nor `__slots__`, `__all__` and the like.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib.machinery
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "collate/batch": ["collate/test_batch_counts.py", "load/test_transfer.py"],
    "collate/fill": ["collate", "load/test_loader.py", "load/test_prefetch.py", "check/test_reference_check.py"],
    "collate/fill_packed": ["collate", "plan/test_packs.py", "plan/test_packing.py", "load/test_packed_loader.py"],
    "collate/masks": ["collate", "plan/test_packing.py", "check/test_reference_check.py"],
    "collate/collator": ["collate", "plan/test_packing.py", "load", "check/test_reference_check.py"],
    "collate/drop_in": ["collate"],
    "collate/settings": ["collate", "plan/test_packing.py"],
    "collate/pairs/batch": ["load/test_pair_batches.py", "load/test_answer_batches.py"],
    "store/layout": ["collate", "store/test_pages.py", "plan/test_packing.py", "load/test_packed_loader.py"],
    "store/pages": ["store/test_pages.py"],
    "store/store": ["store", "ingest/test_prepare.py"],
    "plan/kernels": ["plan", "load/test_loader.py"],
    "plan/documents/kernels": ["plan/test_documents.py", "load/test_mixed_ends.py"],
    "plan/documents/pack": ["plan/test_documents.py", "load/test_mixed_ends.py"],
    "plan/moving/kernels": ["plan/test_moving.py", "plan/test_mixing.py"],
    "plan/moving/schedule": ["plan/test_moving.py", "plan/test_mixing.py"],
    "plan/orders/order": ["plan/test_mixing.py", "plan/test_pair_plans.py", "plan/test_position.py"],
    "plan/pairs/units": ["plan/test_pair_plans.py", "load/test_pair_batches.py"],
    "plan/cost/kernels": ["plan", "load/test_loader.py"],
    "plan/packing": ["plan", "load/test_packed_loader.py"],
    "plan/plan": ["plan", "load/test_loader.py", "integrations/test_pytorch.py"],
    "load/jobs": ["load"],
    "load/prefetch": ["load"],
    "load/sources": ["load/test_sources.py", "load/test_mixed_ends.py"],
    "load/transfer": ["load"],
    "load/buffers": ["load"],
    "load/cuda": ["load"],
}
MAX_EXAMPLES = "100"  # what the test run has
SECONDS = 120  # a mutant that loops for ever is caught
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
}  # fmt: skip


class Mutant(NamedTuple):
    """One change: the module's text with it, and what it is."""

    room: str
    line: int
    change: str
    source: str


def mutants_of(room: str) -> Iterator[Mutant]:
    """Every mutant of a room, in the order of its lines."""
    text = (ROOT / "fastcollate" / f"{room}.py").read_text()
    tree = ast.parse(text)
    skipped = skipped_nodes(tree)
    nodes = [node for node in ast.walk(tree) if id(node) not in skipped]
    for index, node in enumerate(nodes):
        for number in range(len(changes(node))):
            mutated = copy.deepcopy(tree)
            skip = skipped_nodes(mutated)
            target = [other for other in ast.walk(mutated) if id(other) not in skip][index]
            before = ast.unparse(target)
            apply = changes(target)[number]
            apply()
            after = ast.unparse(target)
            source = ast.unparse(ast.fix_missing_locations(mutated))
            yield Mutant(room, node.lineno, f"{before} -> {after}", source)  # type: ignore[attr-defined]


def skipped_nodes(tree: ast.AST) -> set[int]:
    """Docstrings, annotations, f-strings, raised messages and module metadata: no behaviour a test should pin."""
    skipped: set[int] = set()

    def skip(node: ast.AST | None) -> None:
        if node is not None:
            skipped.update(id(child) for child in ast.walk(node))

    for node in ast.walk(tree):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if docstring or isinstance(node, ast.JoinedStr | ast.Assert):  # an assert holds by construction
            skip(node)
        elif isinstance(node, ast.AnnAssign | ast.arg):
            skip(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            skip(node.returns)
            for decorator in node.decorator_list:
                skip(decorator)
    return skipped


def changes(node: ast.AST) -> list[Any]:
    """What can be done to a node, as functions that do it in place."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            return [lambda: setattr(node, "value", not node.value)]
        if isinstance(node.value, int):
            return [lambda: setattr(node, "value", node.value + 1), lambda: setattr(node, "value", node.value - 1)]
    elif isinstance(node, ast.Compare):
        swaps = [COMPARISONS[type(operator)] for operator in node.ops]
        return [lambda i=i, swap=swap: node.ops.__setitem__(i, swap()) for i, swap in enumerate(swaps)]
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OPERATORS and not _of_text(node):
        return [lambda: setattr(node, "op", OPERATORS[type(node.op)]())]
    elif isinstance(node, ast.BoolOp):
        return [lambda: setattr(node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("min", "max"):
        function = node.func
        return [lambda: setattr(function, "id", "max" if function.id == "min" else "min")]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return [lambda: setattr(node, "op", ast.UAdd())]  # the value as it is
    return []


def _of_text(node: ast.BinOp | ast.AugAssign) -> bool:
    parts = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.value,)
    return any(isinstance(part, ast.JoinedStr | ast.List | ast.Tuple | ast.Name) and _is_type(part) for part in parts)


def _is_type(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Name) and node.id in ("str", "None"))


class Trial:
    """A mutant's tests in a forked process; a mutant that gets through meets them again with all examples.

    Forked by the main thread: a fork of another one is no main thread to what a test forks in its turn, and fails it.
    """

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant
        self.survives = False
        self._begin(os.environ.get("HYPOTHESIS_MAX_EXAMPLES", MAX_EXAMPLES))

    def _begin(self, max_examples: str) -> None:
        self._examples, self._deadline = max_examples, time.monotonic() + SECONDS
        self._child = os.fork()
        if self._child == 0:
            os.environ["HYPOTHESIS_MAX_EXAMPLES"] = max_examples
            os._exit(run_tests(self.mutant))

    def is_over(self) -> bool:
        """Whether the outcome is known."""
        done, status = os.waitpid(self._child, os.WNOHANG)
        if not done:
            if time.monotonic() < self._deadline:
                return False
            os.kill(self._child, 9)
            os.waitpid(self._child, 0)
            return True
        self.survives = os.waitstatus_to_exitcode(status) == 0
        if self.survives and self._examples != MAX_EXAMPLES:
            self._begin(MAX_EXAMPLES)
            return False
        return True


def try_all(mutants: list[Mutant], jobs: int) -> list[Trial]:
    """Every mutant's outcome, said as soon as it is known: a run that is stopped has still shown what it found."""
    waiting, running, over = list(reversed(mutants)), [], []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Trial(waiting.pop()))
        time.sleep(0.02)
        for trial in [trial for trial in running if trial.is_over()]:
            running.remove(trial)
            over.append(trial)
            mutant = trial.mutant
            outcome = "SURVIVES" if trial.survives else "caught"
            print(f"{mutant.room}.py:{mutant.line}: {mutant.change}: {outcome}", flush=True)
    return over


def run_tests(mutant: Mutant | None, room: str = "") -> int:
    """In the child: import the changed source in place of the room's, run the tests, give pytest's exit code."""
    import pytest

    if mutant is not None:
        path = str(ROOT / "fastcollate" / f"{mutant.room}.py")
        original = importlib.machinery.SourceFileLoader.get_code

        def get_code(self: Any, name: str) -> Any:
            if name == f"fastcollate.{mutant.room.replace('/', '.')}":
                return compile(mutant.source, path, "exec")
            return original(self, name)

        importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign, assignment]
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    files = [str(ROOT / "tests" / name) for name in TESTS[mutant.room if mutant else room]]
    files = [name for name in files if Path(name).exists()]
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--benchmark-disable", "-m", "not slow"]
    deselected = ["-k", "not ray and not kill and not workers and not processes"]
    with contextlib.suppress(BaseException):
        return int(pytest.main([*arguments, *deselected, *files]))
    return 1


def preload() -> None:
    """Import in the parent what every child needs, but nothing of the package."""
    import hypothesis
    import msgspec
    import numba
    import pyarrow
    import pytest
    import tiktoken
    import torch

    assert all((hypothesis, msgspec, numba, pyarrow, pytest, tiktoken))
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rooms", nargs="*", default=list(TESTS))
    parser.add_argument("--sample", type=int, help="this many mutants of each room, drawn at random; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    if os.environ.get("NUMBA_DISABLE_JIT") != "1":
        sys.exit("run it as: NUMBA_DISABLE_JIT=1 HYPOTHESIS_MAX_EXAMPLES=30 python -m tests.mutation")
    preload()
    os.chdir(ROOT)
    results = {}
    for room in options.rooms:
        child = os.fork()
        if child == 0:
            os._exit(run_tests(None, room))
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
            sys.exit(f"the tests of {room} fail without any mutant: {' '.join(TESTS[room])}")
        mutants = list(mutants_of(room))
        picked = mutants
        if options.sample is not None and options.sample < len(mutants):
            picked = sorted(random.Random(options.seed).sample(mutants, options.sample), key=lambda m: m.line)
        trials = sorted(try_all(picked, options.jobs), key=lambda trial: trial.mutant.line)
        survivors = [f"{t.mutant.room}.py:{t.mutant.line}: {t.mutant.change}" for t in trials if t.survives]
        caught = len(picked) - len(survivors)
        print(
            f"{room}: {caught} of {len(picked)} caught ({caught / len(picked):.1%}), {len(mutants)} exist", flush=True
        )
        results[room] = {"exist": len(mutants), "tried": len(picked), "caught": caught, "survivors": survivors}
    save_results(results)


def save_results(results: dict[str, Any]) -> None:
    """Put the rooms tried now in the place of what the result file says of them, and count anew."""
    from benchmarks.harness import RESULTS, save

    file = RESULTS / "mutation.json"
    before = json.loads(file.read_text())["rooms"] if file.exists() else {}
    rooms = {room: results.get(room, before.get(room)) for room in TESTS}
    rooms = {room: result for room, result in rooms.items() if result}
    tried, caught = (sum(result[key] for result in rooms.values()) for key in ("tried", "caught"))
    save("mutation", {"tried": tried, "caught": caught, "share_caught": round(caught / tried, 4), "rooms": rooms})


if __name__ == "__main__":
    main()
