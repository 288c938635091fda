"""The report page: its numbers, and the page itself in a real browser."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from html import unescape
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastcollate.check import page as room
from fastcollate.check.counts import inspect_store
from fastcollate.check.terminal import KINDS
from fastcollate.errors import InputError, MissingExtraError
from fastcollate.ingest.job import prepare
from fastcollate.load.loader import BatchLoader
from fastcollate.plan.plan import plan_epoch
from fastcollate.store.store import TokenStore
from fastcollate.text.tokenizer import load_tokenizer
from fastcollate.train import MaskOptions
from tests.helpers import Row, run_cli, write_store

pytest.importorskip("matplotlib", reason="needs the extra 'report'")
HOSTILE = "</script><script>document.title='broken'</script><img src=http://example.org/x onerror=alert(1)> $name"
TURNED = "\" ' `&quot; \u202egnirts\u2066 \u2028 \x1b[31m <!-- ]]> </style>"
SHOWN = "\" ' `&quot; \\u202egnirts\\u2066 \\u2028 \\u001b[31m <!-- ]]> </style>"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """43 rows of real text, one of which tries to break out of the page."""
    tokenizer = load_tokenizer("gpt2", "tiktoken")
    rows: list[Row] = []
    for number in range(43):
        prompt = tokenizer.encode(f"Question {number}: " + "and so on, " * (number % 7))
        response = tokenizer.encode({17: HOSTILE, 18: TURNED}.get(number, f"\nAnswer {number} is here, naïve Ünïcödé."))
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


def test_a_long_epoch_is_pictured_by_evenly_spaced_batches(store: TokenStore) -> None:
    pictured = room.picture(store, MaskOptions(), "shuffled", 1, 0, most=10)
    assert (pictured["total"], pictured["every"], len(pictured["batches"])) == (43, 5, 9)
    plan = list(plan_epoch(store.lengths, batch_size=1, policy="shuffled"))
    assert [batch["width"] for batch in pictured["batches"]] == [int(store.lengths[rows[0]]) for rows in plan[::5]]


def test_the_viewer_holds_rows_up_to_a_number_of_bytes(store: TokenStore) -> None:
    found = inspect_store(store, MaskOptions(max_length=9, mask_prompt=True), progress=False)
    assert found.rows_without_trained > 10
    untrained = found.examples_without_trained

    def rows(**options: Any) -> list[int]:
        return [entry["row"] for entry in room._viewer(store, found, None, **options)["rows"]]

    assert rows(num_rows=2) == sorted({0, 1, *untrained})
    assert rows(num_rows=2, row=30) == sorted({0, 1, *untrained, 28, 29, 30, 31, 32})
    assert rows(num_rows=2, row=42) == sorted({0, 1, *untrained, 40, 41, 42})
    assert rows(num_rows=43, row=42, room=10) == []
    for most in (1000, 3000):
        viewer = room._viewer(store, found, load_tokenizer("gpt2", "tiktoken"), 43, row=42, room=most)
        assert 42 in [entry["row"] for entry in viewer["rows"]]
        assert most / 3 < len(json.dumps([viewer["rows"], viewer["pieces"]], separators=(",", ":"))) < most * 1.2


@pytest.mark.slow
@pytest.mark.parametrize(("turns", "batch_size"), [(40, 64), (2, 8), (2, 4096), (4000, 8)])
def test_a_page_is_under_two_megabytes(tmp_path: Path, turns: int, batch_size: int) -> None:
    """Also of many turns, of large batches, and of rows of which a single one is longer than a page."""
    rows: list[Row] = [([3, 5] * (turns // 2), [number % 50000] * (4 * turns)) for number in range(40_000 // turns)]
    store = write_store(
        tmp_path / "store", rows, shard_rows=1 << 16, tokenizer=load_tokenizer("gpt2", "tiktoken").identity()
    )
    page = tmp_path / "report.html"
    room.write_report(store, page, inspect_store(store, progress=False), batch_size=batch_size, row=len(rows) - 1)
    assert 100_000 < page.stat().st_size < 2_000_000
    assert len(data_of(page)["epochs"]["packed"]["batches"]) >= 1


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
    with pytest.raises(InputError, match="rows 0 to 42"):
        room.write_report(store, tmp_path / "r.html", found, row=43)


def test_it_is_said_what_is_missing(store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib.*pip install 'fastcollate\[report\]'"):
        room.write_report(store, tmp_path / "r.html", inspect_store(store, progress=False))
    assert not (tmp_path / "r.html").exists()


def test_the_headline_says_what_the_counts_say(store: TokenStore, page_file: Path) -> None:
    text = unescape(re.sub("<[^>]*>", "", page_file.read_text()))
    found = inspect_store(store, progress=False)
    padding = room.padding_by_policy(store.cells, None, batch_sizes=[4])
    assert f"of the tokens are trained: {found.trained_tokens:,} of {found.kept_tokens:,}; " in text
    assert found.masks.in_words.partition("; ")[2] in text
    shares = {policy: by_size[4].share for policy, by_size in padding.items()}
    assert f"{shares['bucketed']:.1%} of a bucketed epoch's cells are padding, at 4 rows a batch" in text
    assert f"(shuffled {shares['shuffled']:.1%}, packed {shares['packed']:.1%})" in text
    made = datetime.fromtimestamp((store.path / "manifest.json").stat().st_mtime, timezone.utc)
    assert f"{store.manifest['sources']['num_records']:,} records), {made:%Y-%m-%d %H:%M} UTC" in text


@pytest.mark.slow
def test_the_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "a <b>.jsonl").write_text('{"instruction": "x", "output": "y"}\n')
    prepare(tmp_path / "a <b>.jsonl", tmp_path / "store", workers=1, progress=False)
    store = TokenStore(tmp_path / "store")
    room.write_report(store, tmp_path / "r.html", inspect_store(store, progress=False))
    assert "a &lt;b&gt;.jsonl (1 record), 20" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rows_without_trained": 3, "examples_without_trained": [7, 8, 9]},
            "3 rows train nothing; look at one: <code>#7",
        ),
        ({"options": MaskOptions(max_length=20, mode="reference"), "rows_cut": 5}, "<code>--max-length 39</code>"),
        ({"skipped_records": 2}, "2 records were skipped"),
        ({"dropped_fields": {"<tools>": 4}}, "no row: &lt;tools&gt;; name them with <code>prepare --field"),
        ({"boundary_mismatches": 6}, "<code>prepare --boundary exact"),
        ({"corner_rows": 4}, "4 rows have corners"),
        ({}, "<code>--mask-prompt"),
        ({"options": MaskOptions(mask_prompt=True)}, "--store &#x27;my store&#x27; --mask-prompt</code>"),
    ],
)
def test_what_to_do(store: TokenStore, changes: dict[str, Any], said: str) -> None:
    found = inspect_store(store, progress=False)
    found = replace(found, percentiles={**found.percentiles, "100": 38}, corner_rows=0)
    padding = dict.fromkeys(room.POLICIES, room.Padding(10, 100, 1))
    lines = room.advice(replace(found, **changes), padding, "my store")
    assert sum(said in line for line in lines) == 1
    assert lines[-1].count("fastcollate train --store") == 1
    padding["bucketed"] = room.Padding(10, 100, 30)
    assert "--policy packed" in room.advice(found, padding, "my store")[-1]


@pytest.mark.slow
def test_the_command_writes_the_page(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.html"
    assert run_cli(monkeypatch, "inspect", store.path, "--report", path, "--batch-size", 2) == 0
    assert f"wrote {path}" in capsys.readouterr().out
    assert len(data_of(path)["epochs"]["bucketed"]["batches"][0]["rows"]) == 2
    assert data_of(path)["rows"]["first"] is None
    assert run_cli(monkeypatch, "inspect", store.path, "--report", path, "--row", 41) == 0
    assert data_of(path)["rows"]["first"] == 41
    assert run_cli(monkeypatch, "inspect", store.path, "--report", path, "--row", 43) != 0


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

    def __init__(self, browser: Any, file: Path, width: int = 1600, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("#rows")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()

    def rows(self) -> list[str]:
        return [text.split("record")[0].strip() for text in self.page.locator("#rows h3").all_inner_texts()]


COLOURS = """() => { const c = document.getElementById("epoch");
    const copy = new OffscreenCanvas(c.width, c.height).getContext("2d", { willReadFrequently: true });
    copy.drawImage(c, 0, 0);
    const d = copy.getImageData(0, 0, c.width, c.height).data;
    const seen = new Set();
    for (let i = 0; i < d.length; i += 4) seen.add(d.slice(i, i + 3).join());
    return [...seen]; }"""
PAINT = {"light": {"191,219,254", "20,83,45"}, "dark": {"39,69,127", "52,178,107"}}
PAPER = {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 24, 39)"}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_renders_and_asks_for_nothing(browser: Any, page_file: Path, scheme: str) -> None:
    with Opened(browser, page_file, scheme=scheme) as opened:
        page = opened.page
        assert page.title() == "my <store>: token store"
        for name in ("lengths", "padding", "shares"):
            assert page.locator(f"svg#figure-{name} path").count() > 2
            assert page.locator(f"svg#figure-{name}").inner_html().count("#0") == 0  # no colour but the page's
        page.check("#epoch-mask")
        assert set(page.evaluate(COLOURS)) >= PAINT[scheme]
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == PAPER[scheme]
        other = {"light": "dark", "dark": "light"}[scheme]
        page.select_option("#scheme", other)  # the page's own switch
        assert set(page.evaluate(COLOURS)) >= PAINT[other]
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == PAPER[other]
        page.wait_for_timeout(300)
        assert opened.problems == []
        assert opened.requests == [page_file.as_uri()]


CONTRAST = """() => {
    const parts = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = (rgb) => { const [r, g, b] = rgb.slice(0, 3).map((v) => v / 255)
        .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    let worst = [99, ""];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const parent = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !parent.getClientRects().length || parent.closest(":disabled")) continue;
        let under = parent;
        while (under && parts(getComputedStyle(under).backgroundColor)[3] === 0) under = under.parentElement;
        const style = getComputedStyle(parent);
        const ink = light(parts(parent.closest("svg") ? style.fill : style.color));
        const paper = light(parts(getComputedStyle(under || document.body).backgroundColor));
        const found = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
        if (found < worst[0]) worst = [found, walker.currentNode.data];
    }
    return worst; }"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out(browser: Any, page_file: Path, scheme: str) -> None:
    with Opened(browser, page_file, scheme=scheme) as opened:
        for summary in opened.page.locator("summary").all():
            summary.click()
        opened.page.locator(".toggle").first.click()
        contrast, text = opened.page.evaluate(CONTRAST)
        assert contrast >= 4.5, text  # what WCAG asks for


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
        page.fill("#search", "42")  # its number first, then the texts that hold it
        assert opened.rows()[0] == "row 42"
        page.fill("#search", "nothing like it")
        assert opened.rows() == []
        assert page.inner_text("#place") == "no row in this page matches"
        page.fill("#search", "#43")
        assert page.inner_text("#place") == "there is no row 43: the store has rows 0 to 42"
        page.fill("#search", "")
        assert len(opened.rows()) == 5


@pytest.mark.slow
def test_a_row_that_is_not_in_the_page_is_found(browser: Any, store: TokenStore, tmp_path: Path) -> None:
    file, found = tmp_path / "few.html", inspect_store(store, progress=False)
    room.write_report(store, file, found, num_rows=10)
    with Opened(browser, file) as opened:
        assert "Here are 10 of 43 rows." in opened.page.inner_text("#viewer-note")
        opened.page.fill("#search", "31")
        said = opened.page.inner_text("#place")
    assert said.startswith("row 31 is in the store, and not in this page of 10 rows; see it with: fastcollate inspect ")
    command = shlex.split(said.partition(", or in a page: ")[2])
    assert command == ["fastcollate", "inspect", str(store.path), "--row", "31", "--report", str(file)]
    room.write_report(store, file, found, num_rows=10, row=31)
    with Opened(browser, file) as opened:
        assert opened.rows() == ["row 31"]
        opened.page.fill("#search", "")
        assert opened.page.inner_text("#place") == "page 1 of 3, 15 rows"


@pytest.mark.slow
def test_a_hostile_text_stays_text(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file) as opened:
        opened.page.fill("#search", "#17")
        assert HOSTILE in opened.page.inner_text("#rows .text")
        opened.page.fill("#search", "#18")
        assert SHOWN in opened.page.inner_text("#rows .text")  # no mark of direction does what it says
        opened.page.locator(".toggle").first.click()
        assert not re.search("[\u202a-\u202e\u2066-\u2069]", opened.page.inner_text("#rows"))
        assert opened.page.locator("img").count() == 0
        assert opened.problems == []
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
        for name in ("lengths", "padding", "shares"):
            boxes = [text.bounding_box() for text in page.locator(f"#figure-{name} text").all()]
            assert min(min(box["width"], box["height"]) for box in boxes if box["width"] > 30) >= 12
            assert not any(overlap(a, b) for a, b in combinations(boxes, 2)), name


def overlap(a: dict[str, float], b: dict[str, float]) -> bool:
    """Whether two texts cover each other by more than a pixel."""
    return all(
        min(a[x] + a[size], b[x] + b[size]) - max(a[x], b[x]) > 1 for x, size in (("x", "width"), ("y", "height"))
    )
