"""PNG plots of `bench_results/`: `python -m benchmarks.plots` draws them beside the results."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.harness import RESULTS
from benchmarks.tables import result

OURS, THEIRS = "#1b7f5c", "#9aa5b1"


def bars(axes: Axes, micros: dict[str, float], title: str) -> None:
    """Microseconds a batch on a logarithmic axis, the quickest on top, each with its number."""
    names = sorted(micros, key=lambda name: -micros[name])
    values = [micros[name] for name in names]
    colors = [OURS if name.startswith("fastcollate") else THEIRS for name in names]
    axes.barh(names, values, color=colors)
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 2, max(values) * 6)
    for place, value in enumerate(values):
        axes.text(value * 1.1, place, f"{value:,.3g}", va="center", fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("microseconds a batch")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def draw(name: str, panels: dict[str, dict[str, float]], columns: int) -> None:
    """One PNG of several panels: title -> contender -> microseconds."""
    rows = -(-len(panels) // columns)
    height = 1.1 + 0.3 * max(map(len, panels.values()))
    figure, grid = plt.subplots(rows, columns, figsize=(5.6 * columns, height * rows), squeeze=False)
    for axes, (title, micros) in zip(grid.flat, panels.items(), strict=True):
        bars(axes, micros, title)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    plt.close(figure)
    print(f"wrote bench_results/{name}.png")


def main() -> None:
    if (RESULTS / "collate.json").exists():
        cases = result("collate")["cases"]
        panels = {f"batch {c['batch_size']}, {c['order']} order": c["microseconds_per_batch"] for c in cases}
        draw("collate", panels, columns=2)
    if (RESULTS / "loader.json").exists():
        panels = {
            f"batch {case['batch_size']}": {n: row["microseconds_per_batch"] for n, row in case["loaders"].items()}
            for case in result("loader")["cases"]
        }
        draw("loader", panels, columns=len(panels))


if __name__ == "__main__":
    main()
