"""70,000 files of one record each: seconds, shards, memory, and the store's files when the job runs again.

Run as `python -m benchmarks.prepare_many_files [FILES]`; writes `bench_results/prepare_many_files.json`. Every second
file is a JSON array, every other one JSON Lines; each row is compared with the record of its file.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import save
from benchmarks.prepare_memory import peak
from fastcollate.ingest.job import prepare
from fastcollate.sources.sample import sample_records
from fastcollate.store.manifest import verify_checksums
from fastcollate.store.store import TokenStore
from fastcollate.text.tokenizer import load_encoding

MOST_SECONDS, MOST_SHARDS = 40, 16


def write_files(folder: Path, records: list[dict[str, str]]) -> None:
    """A file a record."""
    folder.mkdir()
    for number, record in enumerate(records):
        text = json.dumps([record] if number % 2 else record)
        (folder / f"{number:06d}.{'json' if number % 2 else 'jsonl'}").write_text(text)


def check(store: TokenStore, records: list[dict[str, str]]) -> None:
    """Every row is of its record: its text ends with the record's answer."""
    encoding = load_encoding("gpt2")
    assert len(store) == len(records)
    for number, (row, record) in enumerate(zip(store, records, strict=True)):
        assert row.source_row == number
        assert encoding.decode(row.input_ids.tolist()).endswith(f"### Response:\n{record['output']}")


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 70_000
    records = sample_records(count)
    with tempfile.TemporaryDirectory() as folder:
        files, store = Path(folder) / "files", Path(folder) / "store"
        write_files(files, records)
        first = peak(files / "*.json*", store)
        opened = TokenStore(store)
        check(opened, records)
        started = time.perf_counter()
        assert prepare(str(files / "*.json*"), store).reused
        again = time.perf_counter() - started
        result: dict[str, Any] = {
            "files": count,
            "seconds": first["seconds"],
            "peak_mb": first["peak_mb"],
            "shards": len(opened.manifest["shards"]),
            "seconds_when_unchanged": round(again, 2),
            "checksum_problems": verify_checksums(store),
            "within_40_s_and_16_shards": first["seconds"] <= MOST_SECONDS
            and len(opened.manifest["shards"]) <= MOST_SHARDS,
        }
    print(json.dumps(result, indent=2))
    save("prepare_many_files", result)


if __name__ == "__main__":
    main()
