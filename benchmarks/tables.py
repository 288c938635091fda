"""The pages' tables, from `bench_results/`: `python -m benchmarks.tables` rewrites them, a test holds them equal."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from typing import Any

from benchmarks.harness import RESULTS

PAGES = [RESULTS.parent / "README.md", *sorted((RESULTS.parent / "docs").glob("*.md"))]

RECIPES = {  # the benchmark's name of a recipe -> its heading in docs/recipes.md
    "DataLoader": "PyTorch: `DataLoader`",
    "Trainer": "Hugging Face: `Trainer`",
    "Lightning": "Lightning",
}


def wrap(sentence: str) -> str:
    """A paragraph in lines of a page's width, for a page's own sentences that hold results."""
    return textwrap.fill(sentence, 120, break_on_hyphens=False)


def result(name: str) -> dict[str, Any]:
    """A result file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def headline() -> str:
    """The README's figures, in a sentence."""
    recipe, card = result("integrations")["recipes"]["Trainer"], result("gpu")["t0"]
    before, after = ((recipe[f"padding_{when}"], recipe[f"seconds_per_epoch_{when}"]) for when in ("before", "after"))
    return wrap(
        f"Measured ([all of it](docs/performance.md)): in a `Trainer` on gsm8k, padding {before[0]:.1%} → "
        f"{after[0]:.1%}, data path {before[1]:.2f} → {after[1]:.2f} s an epoch; on two CPU cores, tokenizing "
        f"{result('prepare_short')['times_datasets_map']:.0f} times as fast as `datasets.map`; on one card, "
        f"{card['times_chapter_tuned']:.1f} times the useful tokens a second of the chapter's loop, tuned."
    )


def card() -> str:
    """What was run on a card, and when."""
    found = result("gpu")
    steps = [step for step in found.values() if "card" in step]
    cards, commits = (" and ".join(dict.fromkeys(step[key] for step in steps)) for key in ("card", "commit"))
    return wrap(
        f"**On a GPU**: one {cards}, at commits {commits} ({found['machine']['date']}): training, copies, a memory "
        f"check, {found['tests']['passed']} tests that need a card. Later commits were not run there, and several GPUs "
        "never: the tests' ranks are CPU processes."
    )


def recipes_table() -> str:
    """What each recipe gives: lines changed, the data path's time per epoch and the padding, before and after."""
    found = result("integrations")
    lines = [
        "| recipe | lines changed | data path, s per epoch | padding |",
        "|---|---|---|---|",
    ]
    for name, heading in RECIPES.items():
        row = found["recipes"][name]
        lines.append(
            f"| {heading} | {found['lines_changed'][heading]} "
            f"| {row['seconds_per_epoch_before']:.2f} → {row['seconds_per_epoch_after']:.2f} "
            f"| {row['padding_before']:.1%} → {row['padding_after']:.1%} |"
        )
    return "\n".join(lines)


COLLATE = {
    "fastcollate": "fastcollate",
    "reference": "the chapter's collate",
    "numpy loop": "NumPy row loop",
    "fill": "filling the same bytes",
}


def collate_table() -> str:
    """Microseconds a batch, and how many times as long the others take."""
    names = list(COLLATE.values())
    lines = [
        f"| batch | order | {names[0]}, µs | " + " | ".join(names[1:]) + " |",
        "|---|---|---|---|---|---|",
    ]
    for case in result("collate")["cases"]:
        lines.append(
            f"| {case['batch_size']} | {case['order']} | {case['microseconds_per_batch']['fastcollate']:.1f} "
            f"| {case['times_the_reference']:,.0f} × | {case['times_the_numpy_loop']:.1f} × "
            f"| {1 / case['times_a_fill_takes']:.2f} × |"
        )
    return "\n".join(lines)


def loader_title(name: str) -> str:
    """A loader's name in the pages, from its name in the results."""
    return name.replace("baseline", "release 0.1")


def loader_table() -> str:
    """Microseconds a batch by loader and batch size, and how many times ours that is."""
    cases = result("loader")["cases"]
    lines = [
        "| loader, µs a batch of | " + " | ".join(str(case["batch_size"]) for case in cases) + " |",
        "|---" * (len(cases) + 1) + "|",
    ]
    for name in dict.fromkeys(name for case in cases for name in case["loaders"]):
        cells = []
        for case in cases:
            row = case["loaders"].get(name)
            if row is None:
                cells.append("–")
                continue
            times = "" if name.startswith("fastcollate") else f" ({row['times_ours']:.3g} ×)"
            micros = row["microseconds_per_batch"]
            cells.append((f"{micros:,.0f}" if micros >= 1000 else f"{micros:.4g}") + times)
        lines.append(f"| {loader_title(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


COLD = {
    "asking ahead": "fastcollate",
    "without asking": "the same, asking for nothing",
    "row loop": "NumPy row loop",
}


def cold_table() -> str:
    """The first batch and the mean of the next ones from a store that is not in memory."""
    lines = [
        "| batch | " + " | ".join(f"{title}: first, ms | µs a batch" for title in COLD.values()) + " |",
        "|---" * (1 + 2 * len(COLD)) + "|",
    ]
    for case in result("cold")["cases"]:
        cells = [f"{case[way]['first_batch_ms']:,.0f} | {case[way]['microseconds_per_batch']:,.0f}" for way in COLD]
        lines.append(f"| {case['batch_size']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


PREPARE = {
    "fastcollate_gigatoken": "fastcollate, gigatoken",
    "fastcollate_tiktoken": "fastcollate, tiktoken",
    "tiktoken_pool": "tiktoken in two processes",
    "datasets_map": "`datasets.map`, two processes",
}


def prepare_table() -> str:
    """Megabytes of records a second, file to finished store, and how many times as many ours are."""
    kinds = [result(f"prepare_{kind}")["megabytes_per_second"] for kind in ("short", "long")]
    lines = ["| MB of records a second | short instructions | long texts |", "|---|---|---|"]
    for name, title in PREPARE.items():
        cells = [
            f"{rates[name]:,.3g}"
            + ("" if name.startswith("fast") else f" ({rates['fastcollate_gigatoken'] / rates[name]:.3g} ×)")
            for rates in kinds
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chat_rows() -> list[tuple[str, dict[str, Any]]]:
    """(template, result) of each run over chats, the largest first."""
    rows = [(name.split(",")[0], row) for name, row in result("chat_speed").items() if name != "machine"]
    return sorted(rows, key=lambda pair: -pair[1]["chats"])


def chats_table() -> str:
    """Microseconds a chat through a model's own template, and how many times as long the others take."""
    lines = [
        "| chats | template of TRL | processes | fastcollate, µs a chat | `datasets.map`, µs a chat | with start-up |",
        "|---|---|---|---|---|---|",
    ]
    for template, row in chat_rows():
        micros = row["microseconds_a_chat"]
        lines.append(
            f"| {row['chats']:,} | `{template}` | {row['processes']} | {micros['ours']:,.0f} "
            f"| {micros['theirs']:,.0f} ({row['times_as_fast']} ×) | {row['times_as_fast_with_start']} × |"
        )
    return "\n".join(lines)


PACKING = {
    "threads ahead": "fastcollate, threads ahead",
    "one thread": "fastcollate, one thread",
    "TRL, map batches of 1,000": "TRL's `pack_dataset`, map batches of 1,000",
    "TRL, map batches of 200,000": "TRL's `pack_dataset`, map batches of 200,000",
}


def packing_table() -> str:
    """Rows a second from lengths to finished packs, and the share of cells that hold a token."""
    lines = ["| packs of 1,024 cells | rows a second | over the faster TRL | cells used |", "|---|---|---|---|"]
    for name, title in PACKING.items():
        row = result("packing")["materialised"][name]
        lines.append(
            f"| {title} | {row['rows_per_s']:,} | {row['times_the_faster_trl']:.1f} × | {row['cells_used']:.2%} |"
        )
    return "\n".join(lines)


TRAINING = {
    "t0_like": "T0-like lengths, every token trained",
    "gsm8k": "gsm8k, every token trained",
    "gsm8k_masked": "gsm8k, prompt masked",
}


STEPS = {
    "chapter": "the chapter's loop",
    "chapter_tuned": "the same, tuned",
    "bucketed": "bucketed",
    "packed": "packed",
}


def training_table() -> str:
    """Useful tokens a second of a training step, and how many times as many as the chapter's loop."""
    found = result("train_throughput")
    lines = [
        "| useful tokens a second | " + " | ".join(STEPS.values()) + " |",
        "|---|---|---|---|---|",
    ]
    for name, title in TRAINING.items():
        rates = {key: found[name][key] for key in STEPS}
        cells = [f"{row['useful_tokens_per_s']:,} ({row['times_chapter']} ×)" for row in rates.values()]
        cells[0] = f"{rates['chapter']['useful_tokens_per_s']:,}"
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def windows_table() -> str:
    """Padding and the correlation of neighbouring batches' mean lengths, by window."""
    lines = ["| window, in batches | padding | correlation |", "|---|---|---|"]
    for line in result("plan")["windows"]["by_window"]:
        lines.append(f"| {line['window_batches']:,} | {line['padding']:.2%} | {line['neighbour_correlation']:+.3f} |")
    return "\n".join(lines)


def writing_table() -> str:
    """Seconds of prepare to a folder and to object storage, and of a client that only sends."""
    lines = ["| | prepare, local | only sending | prepare to storage | of the lower rate |", "|---|---|---|---|---|"]
    rates = result("remote_write")["rates"]
    for name, title in (("apart", "one worker on one core, server and proxy on the other"), ("shared", "two workers")):
        cells = [f"{rates[name]['source_mb_per_s'][kind]} MB/s" for kind in ("local", "send", "remote")]
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {rates[name]['share_of_the_lower']:.2f} |")
    return "\n".join(lines)


def writing_kills() -> str:
    """What kills did, in a sentence."""
    found = result("remote_write")["kills"]
    kinds = ", ".join(f"{count} of {kind}" for kind, count in found["kills"].items())
    return wrap(
        f"{sum(found['kills'].values())} kills at random moments ({kinds}); {found['finished_stores_compared']} stores "
        "were finished, and each was byte for byte the local one."
    )


def writing_on_ray() -> str:
    """What nodes of a Ray cluster did, in a sentence."""
    found = result("remote_ray")["nodes"]
    most = max(one["VmRSS"] for one in found["most_megabytes"] if one["whose"] != "driver")
    begun = sum(found["shards_begun"].values())
    return wrap(
        f"On Ray, {found['num_shards']} shards on nodes of one processor each: one joined after the first shard and "
        f"made {found['shards_begun']['c']}, one was killed; {begun} shards were begun, and the store was the local "
        f"one. A worker had {most} MB in memory at most, with the pages of Ray's object store that it shares."
    )


GPU_DATA = {"dense": "rows of 1,024", "t0": "T0-like lengths", "chat": "chat lengths to 8,192"}
GPU = {
    ("dense", "padded_compiled"): "rows of 1,024, padded, compiled",
    ("dense", "packed_compiled"): "rows of 1,024, packed, compiled",
    ("dense", "padded_compiled_with_pytorch_s_attention"): "the same, padded, with PyTorch's attention (cuDNN)",
    ("dense", "packed"): "rows of 1,024, packed",
    ("t0", "chapter"): "T0-like lengths, the chapter's loop",
    ("t0", "chapter_tuned"): "T0-like lengths, the same, tuned",
    ("t0", "bucketed"): "T0-like lengths, bucketed",
    ("t0", "packed"): "T0-like lengths, packed",
    ("t0", "packed_compiled"): "T0-like lengths, packed, compiled",
    ("chat", "packed_compiled"): "chat lengths to 8,192, packed, compiled",
}


def gpu_table() -> str:
    """Training GPT-2 124M on a card, which the table names; empty where none was measured."""
    if not (RESULTS / "gpu.json").exists():
        return ""
    found = result("gpu")
    cards = list(dict.fromkeys(found[step]["card"] for step, _ in GPU if step in found))
    lines = [
        f"| GPT-2 124M, bfloat16, on {' and '.join(cards)} | useful tokens a second | model FLOPs, share of peak "
        "| waiting for data | peak memory, GiB |",
        "|---|---|---|---|---|",
    ]
    for (step, name), title in GPU.items():
        contenders = found.get(step, {}).get("contenders", {})
        row = contenders.get(name)
        if row is None:
            continue
        label = title if len(cards) == 1 else f"{title} ({found[step]['card']})"
        if "failed" in row:
            lines.append(f"| {label} | failed | – | – | – |")
            continue
        chapter = contenders.get("chapter", {}).get("useful_tokens_per_s")
        times = f" ({row['useful_tokens_per_s'] / chapter:.3g} ×)" if chapter and name != "chapter" else ""
        mfu = f"{row['mfu']:.1%}" if row["mfu"] is not None else "–"
        lines.append(
            f"| {label} | {row['useful_tokens_per_s']:,}{times} | {mfu} | {row['wait_share']:.2%} "
            f"| {row['peak_memory_gib']:.1f} |"
        )
    return "\n".join(lines)


def remote_table() -> str:
    """Reading from object storage, a line a store."""
    found = result("remote_read")
    lines = [
        "| store | first batch, s | opening, s | waiting | received in an epoch | cache limit, most on disk |",
        "|---|---|---|---|---|---|",
    ]
    for part in ("real", "small"):
        one = found[part]
        size = f"{one['shards']:,} shards, {one['shard_bytes'] / 1e6:,.0f} MB"
        spans = " | ".join(f"{min(one[name])} to {max(one[name])}" for name in ("first_batch_s", "opened_s"))
        lines.append(
            f"| {size} | {spans} | {one['wait_share']:.2%} | {one['received_over_store']:.3f} × the store "
            f"| {one['cache_limit'] / 1e6:,.0f} MB, {one['most_in_cache'] / 1e6:,.0f} MB |"
        )
    return "\n".join(lines)


def remote_faults() -> str:
    """What injected faults did, in a sentence."""
    found = result("remote_read")["faults"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found["faults"].items()))
    told, total = sum(found["errors_told"].values()), sum(found["faults"].values())
    return wrap(
        f"{total:,} faults in the readers' requests ({kinds}): {found['wrong_rows']} wrong rows, "
        f"{told} calls that ended in a clear error, after which the reader went on; the longest call took "
        f"{found['longest_call_s']:.0f} s, and {found['call_limit_s']} s end the process."
    )


def remote_peers_table() -> str:
    """The same rows read by the peers, a line each."""
    lines = ["| reader | first batch, s | rows a second | received in an epoch |", "|---|---|---|---|"]
    for name, one in result("remote_read")["peers"]["found"].items():
        figures = f"{one['first_batch_s']} | {one['rows_per_s']:,} | {one['received_over_store']:.2f} × its files"
        lines.append(f"| {name} | {figures} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "card": card,
    "training": training_table,
    "recipes": recipes_table,
    "collate": collate_table,
    "loader": loader_table,
    "cold": cold_table,
    "prepare": prepare_table,
    "chats": chats_table,
    "packing": packing_table,
    "windows": windows_table,
    "writing": writing_table,
    "writing_kills": writing_kills,
    "writing_on_ray": writing_on_ray,
    "gpu": gpu_table,
    "remote": remote_table,
    "remote_faults": remote_faults,
    "remote_peers": remote_peers_table,
}


def with_tables(text: str) -> str:
    """The page with each marked table made afresh."""
    pattern = r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)"
    return re.sub(pattern, lambda match: match[1] + TABLES[match[2]]() + "\n" + match[3], text, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
