"""The pages' plots, from `bench_results/`: `python -m benchmarks.plots` draws them anew, a test holds them equal.

Plain SVG, written as text: bars on a linear axis that begins at 0, one scale a panel, light and dark colours inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from xml.sax.saxutils import escape

from benchmarks.harness import RESULTS
from benchmarks.tables import (
    COLD,
    COLLATE,
    GPU,
    GPU_DATA,
    PACKING,
    PREPARE,
    RECIPES,
    STEPS,
    TRAINING,
    chat_rows,
    loader_title,
    result,
)

IMAGES = RESULTS.parent / "docs" / "images"
WIDTH, ROW, HEADING = 480, 34, 34
STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.unit { fill: #59636e }
.heading { font-weight: 600 }
.value { text-anchor: end; font-variant-numeric: tabular-nums }
.ours { fill: #1b7f5c }
.theirs { fill: #a9b4c0 }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc }
.unit { fill: #9aa4af }
.ours { fill: #43c394 }
.theirs { fill: #6b7885 }
}"""


class Bar(NamedTuple):
    name: str
    value: float
    label: str
    ours: bool


Panels = dict[str, list[Bar]]
SHORTER = "shorter is better; behind the dot: times the first bar's"
LONGER = "longer is better; behind the dot: "
PLAIN = {STEPS["chapter"], STEPS["chapter_tuned"]}


def bars(values: dict[str, float], ours: set[str], number: str, ratios: dict[str, float]) -> list[Bar]:
    """A bar a value, with its ratio behind the number where it has one."""
    found = []
    for name, value in values.items():
        behind = f" · {ratios[name]:.3g} ×" if name in ratios else ""
        found.append(Bar(name.replace("`", ""), value, f"{value:{number}}{behind}", name in ours))
    return found


def over(values: dict[str, float], base: str) -> dict[str, float]:
    """How many times the base's value each other one is."""
    return {name: value / values[base] for name, value in values.items() if name != base}


def drawing(title: str, notes: list[str], panels: Panels) -> str:
    """One SVG: what the numbers are, then a heading a panel and its bars, each under its name and its number."""
    parts = [f'<text class="unit" x="0" y="{18 * (1 + line)}">{escape(note)}</text>' for line, note in enumerate(notes)]
    y = 18 * len(notes)
    for heading, panel in panels.items():
        y += HEADING
        parts.append(f'<text class="heading" x="0" y="{y}">{escape(heading)}</text>')
        longest = max(bar.value for bar in panel)
        for bar in panel:
            y += ROW
            length = max(WIDTH * bar.value / longest, 1)
            parts.append(f'<text x="0" y="{y - 9}">{escape(bar.name)}</text>')
            parts.append(f'<text class="value" x="{WIDTH}" y="{y - 9}">{escape(bar.label)}</text>')
            parts.append(
                f'<rect class="{"ours" if bar.ours else "theirs"}" y="{y - 4}" width="{length:.1f}" height="8"/>'
            )
    size = f'viewBox="0 0 {WIDTH} {y + 12}" width="{WIDTH}" height="{y + 12}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<title>{escape(title)}</title>'
    return f"{head}\n<style>{STYLE}\n</style>\n" + "\n".join(parts) + "\n</svg>\n"


def recipes() -> str:
    panels: Panels = {}
    for name, heading in RECIPES.items():
        row = result("integrations")["recipes"][name]
        seconds = {"after": row["seconds_per_epoch_after"], "before": row["seconds_per_epoch_before"]}
        panels[heading.replace("`", "")] = bars(seconds, {"after"}, ".2f", over(seconds, "after"))
    return drawing("What the recipes give", ["seconds of the data path an epoch", SHORTER], panels)


def collate() -> str:
    panels: Panels = {}
    for case in result("collate")["cases"]:
        if case["batch_size"] == 64:
            micros = {title: case["microseconds_per_batch"][name] for name, title in COLLATE.items()}
            panels[f"64 rows, {case['order']}"] = bars(micros, {"fastcollate"}, ",.1f", over(micros, "fastcollate"))
    return drawing("What a batch costs", ["microseconds a batch", SHORTER], panels)


def loader() -> str:
    case = next(case for case in result("loader")["cases"] if case["batch_size"] == 64)
    micros = {loader_title(name): row["microseconds_per_batch"] for name, row in case["loaders"].items()}
    times = {loader_title(name): row["times_ours"] for name, row in case["loaders"].items()}
    del times["fastcollate, shuffled"]
    ours = {name for name in micros if name.startswith("fastcollate")}
    panels = {"batches of 64": bars(micros, ours, ",.1f", times)}
    return drawing("Whole loaders", ["microseconds a batch", SHORTER], panels)


def cold() -> str:
    case = next(case for case in result("cold")["cases"] if case["batch_size"] == 64)
    micros = {title: case[way]["microseconds_per_batch"] for way, title in COLD.items()}
    panels = {"batches of 64": bars(micros, {*COLD.values()} - {"NumPy row loop"}, ",.0f", over(micros, "fastcollate"))}
    return drawing("A store that is not in memory", ["microseconds a batch", SHORTER], panels)


def prepare() -> str:
    panels: Panels = {}
    ours = {name for name in PREPARE.values() if name.startswith("fastcollate")}
    for kind, heading in (("short", "short instructions"), ("long", "long texts")):
        rates = {title: result(f"prepare_{kind}")["megabytes_per_second"][name] for name, title in PREPARE.items()}
        times = {name: 1 / share for name, share in over(rates, "fastcollate, gigatoken").items() if name not in ours}
        panels[heading] = bars(rates, ours, ",.3g", times)
    notes = ["MB of records a second, two processes each", LONGER + "times as fast the first is"]
    return drawing("Tokenizing once", notes, panels)


def chats() -> str:
    panels: Panels = {}
    for template, row in chat_rows():
        if row["chats"] >= 1000:
            found = row["microseconds_a_chat"]
            micros = {"fastcollate": found["ours"], "datasets.map": found["theirs"]}
            heading = f"{row['chats']:,} chats, {template}, processes: {row['processes']}"
            panels[heading] = bars(micros, {"fastcollate"}, ",.0f", {"datasets.map": row["times_as_fast"]})
    return drawing("Chats through a model's template", ["microseconds a chat", SHORTER], panels)


def packing() -> str:
    rows = {title: result("packing")["materialised"][name] for name, title in PACKING.items()}
    rates = {title: row["rows_per_s"] for title, row in rows.items()}
    times = {title: row["times_the_faster_trl"] for title, row in rows.items()}
    notes = ["rows a second, from lengths to finished packs", LONGER + "times the faster TRL"]
    return drawing(
        "Rows into packs", notes, {"packs of 1,024 cells": bars(rates, {*list(PACKING.values())[:2]}, ",", times)}
    )


def training() -> str:
    panels: Panels = {}
    for name, heading in TRAINING.items():
        rows = {title: result("train_throughput")[name][key] for key, title in STEPS.items()}
        rates = {title: row["useful_tokens_per_s"] for title, row in rows.items()}
        times = {title: row["times_chapter"] for title, row in rows.items() if title != STEPS["chapter"]}
        panels[heading] = bars(rates, {*rates} - PLAIN, ",", times)
    notes = ["useful tokens a second, two CPU cores", LONGER + "times the chapter's loop"]
    return drawing("Whole training steps", notes, panels)


def gpu() -> str:
    panels: Panels = {}
    for step, heading in GPU_DATA.items():
        contenders = result("gpu").get(step, {}).get("contenders", {})
        rates = {
            title.removeprefix(f"{heading}, "): contenders[name]["useful_tokens_per_s"]
            for (kind, name), title in GPU.items()
            if kind == step and "useful_tokens_per_s" in contenders.get(name, {})
        }
        if rates:
            times = over(rates, STEPS["chapter"]) if STEPS["chapter"] in rates else {}
            panels[heading] = bars(rates, {*rates} - PLAIN, ",", times)
    notes = ["useful tokens a second, GPT-2 124M, bfloat16, one card", LONGER + "times the chapter's loop"]
    return drawing("Training on a GPU", notes, panels)


PLOTS: dict[str, Callable[[], str]] = {
    "recipes": recipes,
    "collate": collate,
    "loader": loader,
    "cold": cold,
    "prepare": prepare,
    "chats": chats,
    "packing": packing,
    "training": training,
    "gpu": gpu,
}


if __name__ == "__main__":
    for name, draw in PLOTS.items():
        (IMAGES / f"{name}.svg").write_text(draw())
