"""The site builds without a warning, and every public name has an entry with its docstring's example."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from fastcollate.ingest.options import PrepareOptions
from fastcollate.options import flag_of
from fastcollate.train.options import TrainOptions
from tests.helpers import ROOT, public_names


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="needs the extra 'docs'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
def test_every_public_name_has_its_entry_with_its_example(site: Path) -> None:
    text = "\n".join(page.read_text() for page in sorted(site.glob("api/*/index.html")))
    entries = re.split(r'<h[23] id="(?=fastcollate\.)', text)[1:]
    shown = {entry[: entry.index('"')] for entry in entries if "&gt;&gt;&gt;" in entry}
    assert set(public_names()) <= shown


@pytest.mark.slow
def test_the_landing_page_leads_to_every_page(site: Path) -> None:
    pages = {str(page.parent.relative_to(site)) + "/" for page in site.glob("**/index.html")} - {"./"}
    text = (site / "index.html").read_text()
    body = text[text.index("<article") : text.index("</article>")]
    assert pages == set(re.findall(r'<a href="([\w/]+/)"', body))


@pytest.mark.slow
def test_every_command_and_option_is_listed(site: Path) -> None:
    text = (site / "commands" / "index.html").read_text()
    for item in (*fields(PrepareOptions), *fields(TrainOptions)):
        assert flag_of(item) in text


@pytest.mark.slow
def test_no_page_asks_another_server_for_anything(site: Path) -> None:
    loads = re.compile(r"""<(?:script|img|iframe)[^>]*src="(https?:)?//|<link[^>]*href="(https?:)?//""")
    for page in site.rglob("*.html"):
        assert not loads.search(page.read_text()), page
