"""The report page: its numbers, and the page itself in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastcollate.check import page as room
from fastcollate.check.counts import inspect_store
from fastcollate.check.terminal import KINDS
from fastcollate.errors import InputError
from fastcollate.load.loader import BatchLoader
from fastcollate.plan.plan import plan_epoch
from fastcollate.store.store import TokenStore
from fastcollate.text.tokenizer import load_tokenizer
from fastcollate.train import MaskOptions
from tests.helpers import Row, run_cli, write_store

pytest.importorskip("plotly", reason="needs the extra 'report'")
HOSTILE = "</script><script>document.title='broken'</script><img src=http://example.org/x onerror=alert(1)> $name"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """43 rows of real text, one of which tries to break out of the page."""
    tokenizer = load_tokenizer("gpt2", "tiktoken")
    rows: list[Row] = []
    for number in range(43):
        prompt = tokenizer.encode(f"Question {number}: " + "and so on, " * (number % 7))
        response = tokenizer.encode(HOSTILE if number == 17 else f"\nAnswer {number} is here, naïve Ünïcödé.")
        rows.append(([len(prompt), len(response)], prompt + response))
    path = tmp_path_factory.mktemp("report") / "my <store>"
    return write_store(path, rows, shard_rows=20, tokenizer=tokenizer.identity())


@pytest.fixture(scope="module")
def page_file(store: TokenStore) -> Path:
    path = store.path.parent / "report.html"
    room.write_report(store, path, inspect_store(store, progress=False), batch_size=4)
    return path


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_padding_is_that_of_the_filled_batches(store: TokenStore) -> None:
    options = MaskOptions(max_length=30)
    table = room.padding_by_policy(store.lengths, 30, seed=3)
    packed = table.pop("packed")
    cells = int(np.minimum(store.lengths, 30).sum())
    assert all(found.cells - found.padded == cells for found in packed.values())
    assert list(table) == ["sequential", "shuffled", "bucketed"]
    assert list(table["bucketed"]) == [1, 2, 4, 8, 16, 32]
    collator = options.collator(store)
    for policy, by_size in table.items():
        plan = plan_epoch(store.lengths, batch_size=8, policy=policy, seed=3, max_length=30)
        batches = [(rows, collator(rows)) for rows in plan]
        cells = sum(batch.inputs.numel() for _, batch in batches)
        filled = sum(int(np.minimum(store.lengths[rows], 30).sum()) for rows, _ in batches)
        assert by_size[8] == (len(batches), cells, cells - filled)
        assert by_size[1].padded == 0
    assert table["bucketed"][8].share < table["shuffled"][8].share
    assert room.Padding(0, 0, 0).share == 0


def test_the_picture_holds_every_cell(store: TokenStore) -> None:
    pictured = room.picture(store, MaskOptions(mask_prompt=True), "sequential", 4, 0)
    assert (pictured["total"], pictured["every"], len(pictured["batches"])) == (11, 1, 11)
    assert len(pictured["batches"][-1]["rows"]) == 3
    for number, batch in enumerate(pictured["batches"]):
        for place, row in enumerate(batch["rows"]):
            example = store[number * 4 + place]
            prompt, length = int(example.spans[0]), len(example.input_ids)
            expected = [["prompt", prompt - 1], ["trained", length - prompt + 1], ["padding", batch["width"] - length]]
            assert [[KINDS[kind], cells] for kind, cells in row] == [pair for pair in expected if pair[1]]


def test_the_picture_of_packs_holds_every_token(store: TokenStore) -> None:
    pictured = room.picture(store, MaskOptions(max_length=20, mask_prompt=True), "packed", 2, 0)
    assert len(pictured["batches"]) == pictured["total"]
    cells = dict.fromkeys(KINDS, 0)
    for batch in pictured["batches"]:
        assert batch["width"] == 20
        for row in batch["rows"]:
            assert sum(count for _, count in row) == 20
            for kind, count in row:
                cells[KINDS[kind]] += count
    loader = BatchLoader(store, batch_size=1, max_length=20, mask_prompt=True)
    for _ in loader:
        pass
    assert cells["trained"] == loader.stats.trained_tokens
    assert cells["trained"] + cells["prompt"] == int(np.minimum(store.lengths, 20).sum())


def test_a_long_epoch_is_pictured_by_evenly_spaced_batches(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_PICTURED_BATCHES", 10)
    pictured = room.picture(store, MaskOptions(), "shuffled", 1, 0)
    assert (pictured["total"], pictured["every"], len(pictured["batches"])) == (43, 5, 9)
    plan = list(plan_epoch(store.lengths, batch_size=1, policy="shuffled"))
    assert [batch["width"] for batch in pictured["batches"]] == [int(store.lengths[rows[0]]) for rows in plan[::5]]


def test_the_viewer_holds_rows_up_to_a_number_of_tokens(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    found = inspect_store(store, MaskOptions(max_length=9, mask_prompt=True), progress=False)
    assert found.rows_without_trained > 10
    entries = room._viewer(store, found, None, 2)["rows"]
    assert [entry["row"] for entry in entries] == [0, 1, *found.examples_without_trained]
    monkeypatch.setattr(room, "_SHOWN_TOKENS", 50)
    shown = len(room._viewer(store, inspect_store(store, progress=False), None, 1000)["rows"])
    assert int(store.lengths[:shown].sum()) <= 50 < int(store.lengths[: shown + 1].sum())


def test_an_entry_of_the_viewer(page_file: Path, store: TokenStore) -> None:
    data = data_of(page_file)
    entry = data["rows"]["rows"][17]
    assert entry["ids"] == [*store[17].input_ids.tolist(), 50256]
    assert entry["record"] == 170
    first, *prompt, response = entry["runs"]  # the longest row has no padding
    assert [KINDS[run[0]] for run in entry["runs"]] == ["prompt", "trained", "trained"]
    assert [KINDS[run[3]] for run in entry["runs"]] == ["prompt", "prompt", "trained"]
    assert first[1] + prompt[0][1] == int(store[17].spans[0])
    assert response[2] == HOSTILE + "<|endoftext|>"
    assert data["rows"]["pieces"]["50256"] == "<|endoftext|>"


def test_wrong_sizes_are_refused(store: TokenStore, tmp_path: Path) -> None:
    found = inspect_store(store, progress=False)
    for options in ({"batch_size": 0}, {"num_rows": 0}):
        with pytest.raises(InputError, match="give at least 1"):
            room.write_report(store, tmp_path / "r.html", found, **options)


def test_the_command_writes_the_page(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.html"
    assert run_cli(monkeypatch, "inspect", store.path, "--report", path, "--batch-size", 2) == 0
    assert f"wrote {path}" in capsys.readouterr().out
    assert len(data_of(path)["epochs"]["bucketed"]["batches"][0]["rows"]) == 2


# ------------------------------------------------------------------------------------------------ in a real browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright to drive a browser")
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("needs chromium (Debian: apt-get install chromium)")
    with api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Opened:
    """The page in a window of some width, with what went wrong and what was asked of the network."""

    def __init__(self, browser: Any, file: Path, width: int = 1600) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("#figure-shares .main-svg")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()

    def rows(self) -> list[str]:
        return [text.split("record")[0].strip() for text in self.page.locator("#rows h3").all_inner_texts()]


@pytest.mark.slow
def test_it_renders_and_asks_for_nothing(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file) as opened:
        page = opened.page
        assert page.title() == "my <store>: token store"
        for name in ("lengths", "padding", "shares"):
            assert page.locator(f"#figure-{name} .main-svg").count() > 0
        assert page.locator("#figure-lengths .bars path").count() > 0
        assert page.locator("#figure-padding .scatterlayer .trace").count() == 4
        page.check("#epoch-mask")
        colours = page.evaluate(
            """() => { const c = document.getElementById("epoch");
            const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
            const seen = new Set();
            for (let i = 0; i < d.length; i += 4) seen.add(d.slice(i, i + 3).join());
            return [...seen]; }"""
        )
        assert {"191,219,254", "20,83,45", "220,38,38"} & set(colours) >= {"191,219,254", "20,83,45"}
        page.wait_for_timeout(300)
        assert opened.problems == []
        assert opened.requests == [page_file.as_uri()]


@pytest.mark.slow
def test_the_policy_changes_the_picture(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file) as opened:
        notes = {}
        for policy in ("bucketed", "shuffled"):
            opened.page.select_option("#policy", policy)
            notes[policy] = float(re.search(r"([\d.]+)% of", opened.page.inner_text("#epoch-note"))[1])
        assert notes["bucketed"] < notes["shuffled"]


@pytest.mark.slow
def test_the_viewer_pages(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file) as opened:
        page = opened.page
        assert opened.rows() == [f"row {i}" for i in range(5)]
        assert page.locator("#previous").is_disabled()
        page.click("#next")
        assert opened.rows() == [f"row {i}" for i in range(5, 10)]
        assert page.inner_text("#place") == "page 2 of 9, 43 rows"
        page.click("#previous")
        assert opened.rows()[0] == "row 0"
        for _ in range(8):
            page.click("#next")
        assert opened.rows() == ["row 40", "row 41", "row 42"]
        assert page.locator("#next").is_disabled()


@pytest.mark.slow
def test_a_search_finds_rows(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file) as opened:
        page = opened.page
        page.fill("#search", "ANSWER 31 is")
        assert opened.rows() == ["row 31"]
        assert "Ünïcödé" in page.inner_text("#rows .text")
        page.fill("#search", "#42")
        assert opened.rows() == ["row 42"]
        page.fill("#search", "nothing like it")
        assert opened.rows() == []
        assert page.inner_text("#place") == "no row matches"
        page.fill("#search", "")
        assert len(opened.rows()) == 5


@pytest.mark.slow
def test_a_hostile_text_stays_text(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file) as opened:
        opened.page.fill("#search", "#17")
        assert HOSTILE in opened.page.inner_text("#rows .text")
        assert opened.page.locator("img").count() == 0
        assert opened.page.title() == "my <store>: token store"


@pytest.mark.slow
def test_ids_and_targets_stand_side_by_side(browser: Any, page_file: Path, store: TokenStore) -> None:
    with Opened(browser, page_file) as opened:
        page = opened.page
        marks = page.locator("#rows .row").first.locator(".mark").all_inner_texts()
        assert [mark.split()[:2] for mark in marks] == [["?", "prompt"], *[["+", "trained"]] * 2, [".", "padding"]]
        page.check("#viewer-mask")  # what masking would give
        marks = page.locator("#rows .row").first.locator(".mark").all_inner_texts()
        assert [mark.split()[:2] for mark in marks] == [["?", "prompt"]] * 2 + [["+", "trained"], [".", "padding"]]
        page.locator(".toggle").first.click()
        lines = [line.split("\t") for line in page.locator(".cells tr").all_inner_texts()[1:]]
        ids, prompt = store[0].input_ids.tolist(), int(store[0].spans[0])
        assert [int(line[1]) for line in lines] == ids
        assert [int(line[3]) for line in lines] == [-100] * (prompt - 1) + [*ids[prompt:], 50256]
        assert [line[5] for line in lines] == ["? prompt"] * (prompt - 1) + ["+ trained"] * (len(ids) - prompt + 1)
        page.locator(".toggle").first.click()
        assert page.locator(".cells").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1600])
def test_it_is_legible_at_both_widths(browser: Any, page_file: Path, width: int) -> None:
    with Opened(browser, page_file, width) as opened:
        page = opened.page
        page.locator(".toggle").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        smallest = page.evaluate(
            """() => { let smallest = 99;
            const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            while (walker.nextNode()) {
              const parent = walker.currentNode.parentElement;
              if (!walker.currentNode.data.trim() || !parent.getClientRects().length) continue;
              smallest = Math.min(smallest, parseFloat(getComputedStyle(parent).fontSize));
            }
            return smallest; }"""
        )
        assert smallest >= 12
        for selector in ("#figure-lengths", "#figure-padding", "#figure-shares", "#epoch", "#summary", "#search"):
            box = page.locator(selector).bounding_box()
            assert box["x"] >= 0, selector
            assert box["x"] + box["width"] <= width, selector
            assert box["width"] > 150, selector
        ticks = page.locator("#figure-padding .xtick text")
        boxes = [ticks.nth(i).bounding_box() for i in range(ticks.count())]
        assert all(a["x"] + a["width"] <= b["x"] for a, b in pairwise(boxes))
