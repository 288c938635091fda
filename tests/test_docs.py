"""Every code block of the README and of `docs/` runs here, in the order of the page, in an empty directory.

`bash` blocks run line by line as they stand, except that installing is left out (the CI script does that), that
`python` means this interpreter, and that a first run is of few steps (`benchmarks.first_answers` runs it whole).
`python` blocks and the command `fastcollate` run each in a process of its own, a fork (`tests/forks.py`); a block below
`<!-- ranks 2 1 -->` in two that find what `torchrun` would tell them, and then again in one. A block below
`<!-- output -->` is what the block before it prints. Other blocks are text.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forks as forks_module
from tests.forks import Forks
from tests.helpers import PAGES, ROOT, save_chat_models

TEST_COMMAND = "<!-- test command -->"
OUTPUT = "<!-- output -->"
RANKS = re.compile(r"<!-- ranks ([\d ]+) -->\n$")


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """(line, language, text) of each fenced block to run or compare; the block that runs these tests is left out."""
    text = page.read_text()
    found = []
    for match in re.finditer(r"^```(bash|python|text)\n(.*?)^```$", text, re.M | re.S):
        before = text[: match.start()]
        if match[1] == "text" and not before.rstrip().endswith(OUTPUT):
            continue
        if not before.rstrip().endswith(TEST_COMMAND):
            ranks = RANKS.search(before)
            found.append((before.count("\n") + 1, f"ranks {ranks[1]}" if ranks else match[1], match[2]))
    return found


def without_install(line: str) -> str:
    """The line from behind its `pip install ... &&`, empty if it only installs."""
    return re.sub(r"^(python -m )?pip install [^&]*(&&\s*)?", "", line)


def shortened(line: str) -> str:
    return re.sub(r"(fastcollate train --out \S+)$", r"\1 --max-steps 20", line)


def run_ranks(text: str, cwd: Path, num_ranks: str, forks: Forks) -> subprocess.CompletedProcess[str]:
    """Run in each of these numbers of processes, one after another."""
    for number in map(int, num_ranks.split()):
        result = forks.run(text, cwd=cwd, num_ranks=number, environment={"HF_HUB_OFFLINE": "1"})
        if result.returncode:
            break
    return result


def run_bash(text: str, cwd: Path, forks: Forks) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = shlex.join([sys.executable, "-I", "-S", forks_module.__file__, forks.address])
    lines = [f'fastcollate() {{ {command} "$@"; }}', *map(shortened, map(without_install, text.splitlines()))]
    whole = ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]
    return subprocess.run(whole, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280, check=False)


def without_trailing_blanks(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page: Path, tmp_path: Path, forks: Forks) -> None:
    if page.name == "chats.md":
        save_chat_models(tmp_path)
    printed = ""
    for line, language, text in blocks(page):
        if language == "text":
            assert printed == without_trailing_blanks(text), f"{page.name}, line {line}, is now:\n{printed}"
            continue
        if language.startswith("ranks "):
            result = run_ranks(text, tmp_path, language.removeprefix("ranks "), forks)
        else:
            result = run_bash(text, tmp_path, forks) if language == "bash" else forks.run(text, cwd=tmp_path)
        printed = without_trailing_blanks(result.stdout)
        assert result.returncode == 0, f"{page.name}, block at line {line}:\n{text}\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize(
    ("page", "cell"),
    [
        ("README.md", "data path"),
        ("README.md", "**On a GPU**"),
        ("docs/performance.md", "| Lightning |"),
        ("docs/randomness.md", "| 15,625 |"),
    ],
)
def test_the_pages_tables_agree_with_the_results(page: str, cell: str) -> None:
    sys.path.insert(0, str(ROOT))  # `benchmarks` is no part of the installed package
    from benchmarks.tables import with_tables

    text = (ROOT / page).read_text()
    assert cell in text
    assert with_tables(text) == text


def test_the_plots_agree_with_the_results() -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.plots import IMAGES, PLOTS

    page = (ROOT / "docs" / "performance.md").read_text()
    for name, draw in PLOTS.items():
        assert (IMAGES / f"{name}.svg").read_text() == draw(), f"python -m benchmarks.plots draws {name}.svg anew"
        assert f"(images/{name}.svg)" in page


def test_the_readme_is_read_in_a_minute() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_the_answer_in_the_readme_is_a_measured_one() -> None:
    runs = json.loads((ROOT / "bench_results" / "first_answers.json").read_text())["runs"]
    asked = [one for run in runs for some in run["asked"].values() for one in some]
    readme = (ROOT / "README.md").read_text()
    question, answer = re.search(r'runs/first --prompt "(.*?)" --input "(.*?)"', readme), "Does Emma walk all day?"
    assert question is not None
    assert answer in readme
    assert (*question.groups(), answer) in [(o["instruction"], o["input"], o["answer"]) for o in asked]


def test_the_install_commands_are_left_out_and_nothing_else() -> None:
    assert without_install('python -m pip install ".[vocab]" && fastcollate train') == "fastcollate train"
    assert without_install("pip install fastcollate") == ""
    assert without_install("fastcollate sample records.jsonl") == "fastcollate sample records.jsonl"


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_what_a_page_points_to_is_there(page: Path) -> None:
    """Links to files and headings, pictures, and files of this repository that stand in backquotes."""
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)
    named = re.findall(r"`((?:fastcollate|tests|docs|benchmarks|bench_results|\.ci)/[\w./-]*)`", text)
    missing = [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    for link in links:
        file, _, anchor = link.partition("#")
        if "://" in link or "NAME" in link:
            continue
        target = page.parent / file if file else page
        made = "api" in target.parts  # from the docstrings, when the site is built, which checks these
        if not target.exists() or (anchor and not made and anchor not in anchors(target)):
            missing.append(link)
    assert not missing, f"{page.name}: {missing}"
