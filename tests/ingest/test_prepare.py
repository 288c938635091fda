"""prepare: bit-exact rows, one clear line for every fault, the same bytes whatever happens on the way."""

from __future__ import annotations

import contextlib
import csv
import gc
import gzip
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastcollate import prepare as public_prepare
from fastcollate.errors import InputError, SourceReadError
from fastcollate.ingest.job import _Job, prepare
from fastcollate.sources import blocks as sources_module
from fastcollate.store.manifest import verify_checksums
from fastcollate.store.store import TokenStore
from fastcollate.text.tokenizer import load_encoding
from tests.chapter import (
    InstructionDataset,
    InstructionDatasetWithMasking,
    format_input_phi,
    format_response_phi,
)

SMALL = sources_module.Sizes(20_000, 60_000)
AWKWARD = [
    {"instruction": "Add.", "input": "1 2\n", "output": "3"},
    {"instruction": "Ends in blanks  ", "input": "", "output": "ok"},
    {"instruction": "Ends in newlines\n\n", "input": "", "output": ""},
    {"instruction": "", "input": "only input", "output": "x"},
    {"instruction": "nulled", "input": None, "output": "naïve 日本 👍🏽"},
    {"instruction": "x\u00a0", "input": "", "output": "\n\n  y"},
    {"instruction": "NUL\x00", "input": "\x1c", "output": "z"},
    {"instruction": "no input key", "output": "fine"},
]


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def store_hash(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.name != "sources.json":  # where the sources lie is no part of the store
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def many(count: int, seed: int = 0) -> list[dict[str, str]]:
    chance = random.Random(seed)
    words = ["the", "a", "of", "to", "and", "Q:", "x1", "3.14", "naïve", "日本", "it's", "\n"]
    return [
        {
            "instruction": " ".join(chance.choices(words, k=chance.randrange(1, 30))),
            "input": " ".join(chance.choices(words, k=chance.randrange(0, 5))),
            "output": " ".join(chance.choices(words, k=chance.randrange(0, 60))),
        }
        for _ in range(count)
    ]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of at most 20 kB, three to ten a shard, so that a small file has many."""
    monkeypatch.setattr(sources_module, "SIZES", SMALL)


def check_against_reference(store: TokenStore, records: list[dict[str, Any]]) -> None:
    records = [{"input": "", **record} for record in records]
    encoding = load_encoding("gpt2")
    masked = InstructionDatasetWithMasking(records, encoding)
    assert len(store) == len(records)
    for index, (prompt_length, ids) in enumerate(masked):  # type: ignore[arg-type]
        row = store[index]
        assert row.input_ids.tolist() == ids
        assert row.source_row == index
        assert int(row.spans[0]) == min(prompt_length, len(ids) + 1)
        assert int(row.spans.sum()) == max(len(ids), int(row.spans[0]))
        if index == len(records) - 1:
            break
    assert [row.input_ids.tolist() for row in store] == InstructionDataset(records, encoding).encoded_texts


def test_public_name_is_the_function() -> None:
    assert public_prepare is prepare


@pytest.mark.parametrize("backend", ["tiktoken", "auto"])
def test_awkward_rows_equal_the_reference(tmp_path: Path, backend: str) -> None:
    records = AWKWARD + many(300)
    report = prepare(write_lines(tmp_path / "a.jsonl", records), tmp_path / "s", backend=backend)
    store = TokenStore(tmp_path / "s")
    check_against_reference(store, records)
    assert report.summary["boundary_mismatches"] > 0
    assert verify_checksums(tmp_path / "s") == []


def test_the_chapters_records_equal_the_reference(tmp_path: Path, instruction_data: Path) -> None:
    report = prepare(instruction_data, tmp_path / "s")
    check_against_reference(TokenStore(tmp_path / "s"), json.loads(instruction_data.read_text()))
    assert (report.num_rows, report.summary["num_tokens"]) == (1100, 62025)
    assert (report.summary["length_p0"], report.summary["length_p50"], report.summary["length_p100"]) == (40, 55, 91)


def test_questions_and_answers_equal_the_reference(tmp_path: Path) -> None:
    records = [record for record in many(300) if record["instruction"] and record["output"]]
    lines = [{"question": record["instruction"], "answer": record["output"]} for record in records]
    prepare(write_lines(tmp_path / "a.jsonl", lines), tmp_path / "s")
    check_against_reference(TokenStore(tmp_path / "s"), [{**record, "input": ""} for record in records])


def test_gsm8k_equals_the_reference_and_its_fields_are_recognised(tmp_path: Path, gsm8k: Path) -> None:
    prepare(gsm8k, tmp_path / "s")
    records = [json.loads(line) for line in gsm8k.read_text().splitlines()]
    records = [{"instruction": r["question"], "input": "", "output": r["answer"]} for r in records]
    check_against_reference(TokenStore(tmp_path / "s"), records)


def test_phi3_equals_the_reference(tmp_path: Path) -> None:
    records = [{"input": "", **record, "instruction": record["instruction"] or "i"} for record in AWKWARD]
    prepare(write_lines(tmp_path / "a.jsonl", records), tmp_path / "s", template="phi3")
    encoding = load_encoding("gpt2")
    for record, row in zip(records, TokenStore(tmp_path / "s"), strict=True):
        assert row.input_ids.tolist() == encoding.encode(format_input_phi(record) + format_response_phi(record))
        assert row.spans[0] == len(encoding.encode(format_input_phi(record)))


def test_exact_boundary_begins_at_the_first_token_with_a_response_character(tmp_path: Path) -> None:
    records = AWKWARD + many(200)
    source = write_lines(tmp_path / "a.jsonl", records)
    prepare(source, tmp_path / "s", boundary="exact")
    encoding = load_encoding("gpt2")
    for record, row in zip(records, TokenStore(tmp_path / "s"), strict=True):
        count = int(row.spans[0])
        before = encoding.decode_bytes(row.input_ids[:count].tolist())
        until = encoding.decode_bytes(row.input_ids[: count + 1].tolist())
        assert b"### Response" not in before
        mark = encoding.decode_bytes(row.input_ids.tolist()).rindex(b"\n\n### Response:\n")
        assert len(before) <= mark < len(until), record


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_every_input_gives_the_same_rows(tmp_path: Path) -> None:
    records = many(400, seed=3)
    lines = write_lines(tmp_path / "a.jsonl", records)
    raw = lines.read_bytes()
    (tmp_path / "b.json").write_text(json.dumps(records, indent=2), encoding="utf-8")
    (tmp_path / "c.json").write_bytes(raw)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "crlf.jsonl").write_bytes(b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n\r\n").rstrip())
    table = pa.Table.from_pylist(records)
    pq.write_table(table, tmp_path / "e.parquet")
    with pa.ipc.new_file(str(tmp_path / "f.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    with pa.ipc.new_stream(str(tmp_path / "g.arrow"), table.schema) as writer:
        writer.write_table(table)
    with open(tmp_path / "h.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(records)
    names = ["b.json", "c.json", "d.jsonl.gz", "crlf.jsonl", "e.parquet", "f.arrow", "g.arrow", "h.csv"]
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "i.jsonl.zst").write_bytes(zstandard.compress(raw))
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("/fastcollate/x.jsonl", raw)
    prepare(lines, tmp_path / "s", workers=1)
    expected = [(row.input_ids.tolist(), row.spans.tolist(), row.source_row) for row in TokenStore(tmp_path / "s")]
    assert len(TokenStore(tmp_path / "s").shards) > 1
    for name in [*(str(tmp_path / n) for n in [*names, "i.jsonl.zst"]), "memory://fastcollate/x.jsonl"]:
        target = tmp_path / f"s-{Path(name).name}"
        prepare(name, target, workers=1)
        found = [(row.input_ids.tolist(), row.spans.tolist(), row.source_row) for row in TokenStore(target)]
        assert found == expected, name


def test_a_dataset_and_several_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    records = many(50)
    prepare(datasets.Dataset.from_list(records), tmp_path / "s")
    check_against_reference(TokenStore(tmp_path / "s"), records)
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    prepare(tmp_path / "saved", tmp_path / "s1")
    check_against_reference(TokenStore(tmp_path / "s1"), records)
    assert prepare(str(tmp_path / "saved"), tmp_path / "s1").reused
    splits = datasets.DatasetDict(test=datasets.Dataset.from_list(records), train=datasets.Dataset.from_list(records))
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(InputError, match=r"splits: holds several splits; choose one of test, train"):
        prepare(tmp_path / "splits", tmp_path / "s3")
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(InputError, match="saved: cannot be read as a saved data set"):
        prepare(tmp_path / "saved", tmp_path / "s3")
    write_lines(tmp_path / "p1.jsonl", records[:20])
    write_lines(tmp_path / "p2.jsonl", records[20:])
    prepare(str(tmp_path / "p*.jsonl"), tmp_path / "s2")
    check_against_reference(TokenStore(tmp_path / "s2"), records)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"instruction": "a", "output": "b"}\n{"instr', r"a\.jsonl, line 2, record 1: not valid JSON"),
        ("a.jsonl", b'\n\n{"instruction": "a"}', r"a\.jsonl, line 3, record 0: no field 'output'.*--field output=NAME"),
        ("a.jsonl", b'{"instruction": 5, "output": "b"}', r"record 0: field 'instruction' is a number, not text"),
        ("a.jsonl", b"[1]", r"record 0: not an object but a list"),
        ("a.jsonl", b'{"instruction": "\xff", "output": "b"}', r"line 1, record 0: a byte that is not UTF-8"),
        ("a.jsonl", b"", r"a\.jsonl: is empty"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: no usable record"),
        ("a.json", b"[]", r"a\.json: no usable record"),
        ("a.json", b'[{"instruction": "a", "output": "b"}', r"line 1, record 1: the file ends inside its JSON array"),
        ("b.json", b'[{"instruction": "a", "output": "b"}, ', r"line 1, record 1: the file ends inside its JSON array"),
        ("a.json", b'[\n{"instruction": "a", "output": "b"},\n{]', r"a\.json, line 3, record 1: not valid JSON"),
        ("a.json", b'[{"instruction": "a", "output": "b"}] x', r"something follows the end of the JSON array"),
        ("a.jsonl", b'{"instruction": "", "input": "", "output": ""}', r"record 0: no text"),
        ("a.jsonl", b'{"instruction": "<|endoftext|>", "output": "b"}', r"record 0: holds the special token"),
        ("a.doc", b"x", r"a\.doc: the ending \.doc is not known; use one of \.json, .*, each also with \.gz"),
        ("a.parquet", b"x" * 20, r"a\.parquet: cannot be read"),
        ("a.jsonl.gz", b"x" * 20, r"a\.jsonl\.gz: its compressed data is damaged before byte 20"),
    ],
)
def test_a_fault_is_one_clear_line_and_leaves_no_store(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        prepare(tmp_path / name, tmp_path / "s")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "s" / "manifest.json").exists()
    with pytest.raises(InputError, match=message):
        prepare(tmp_path / name, tmp_path / "runs" / "first" / "store")
    kept = isinstance(caught.value, SourceReadError)  # the storage's fault: what is finished stays
    assert (tmp_path / "runs").exists() == kept


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_after_an_error_no_worker_is_left_to_the_garbage_collector(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"instruction": "a", "output": "b"}\n' * 2000 + b"no json\n" + b"{}\n" * 2000)
    gc.disable()
    try:
        with pytest.raises(InputError, match="not valid JSON") as caught:  # whose traceback keeps the job's frames
            prepare(source, tmp_path / "s", workers=2)
        assert not multiprocessing.active_children()
        assert not [thread for thread in threading.enumerate() if "Executor" in type(thread).__name__]
    finally:
        gc.enable()
    assert caught.traceback


def test_wrong_arguments(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", AWKWARD)
    with pytest.raises(InputError, match=r"is a directory; name files in it"):
        prepare(tmp_path, tmp_path / "s")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").touch()
    with pytest.raises(InputError, match="is a token store, not records; train on it with: fastcollate train --store"):
        prepare(tmp_path / "store", tmp_path / "s")
    with pytest.raises(InputError, match="no such file"):
        prepare(tmp_path / "none.jsonl", tmp_path / "s")
    with pytest.raises(InputError, match="no file matches"):
        prepare(str(tmp_path / "*.csv"), tmp_path / "s")
    with pytest.raises(InputError, match=r"template 'x': choose one of alpaca"):
        prepare(source, tmp_path / "s", template="x")
    with pytest.raises(InputError, match=r"on_error='x': choose one of 'raise', 'skip'"):
        prepare(source, tmp_path / "s", on_error="x")
    with pytest.raises(InputError, match=r"field 'x': template 'alpaca' has the fields"):
        prepare(source, tmp_path / "s", fields={"x": "y"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds files that are not of a store, such as mine\.txt"):
        prepare(source, tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_skipped_records_are_listed_and_good_ones_stored(tmp_path: Path) -> None:
    good = many(300)
    lines = [json.dumps(record) for record in good]
    bad = {10: "{", 57: '{"instruction": 1, "output": ""}', 200: "\x00", 299: '{"a": "' + "x" * 100}
    for place, line in bad.items():
        lines[place] = line
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    report = prepare(tmp_path / "a.jsonl", tmp_path / "s", on_error="skip", workers=2)
    store = TokenStore(tmp_path / "s")
    assert [row.source_row for row in store] == [i for i in range(300) if i not in bad]
    assert report.skipped_report is not None
    listed = [line.split("\t") for line in Path(report.skipped_report).read_text().splitlines()[1:]]
    assert [(int(line), int(row)) for _, line, row, _ in listed] == [(i + 1, i) for i in bad]
    assert report.summary["num_skipped"] == 4
    assert verify_checksums(tmp_path / "s") == []


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_workers_and_backends_do_not_change_a_byte(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", many(1500))
    hashes = set()
    for number, (workers, backend) in enumerate([(1, "auto"), (2, "auto"), (3, "tiktoken")]):
        prepare(source, tmp_path / f"s{number}", workers=workers, backend=backend)
        hashes.add(store_hash(tmp_path / f"s{number}"))
    assert len(hashes) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_the_ray_engine_gives_the_same_bytes_even_when_a_worker_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    accept = _Job._accept
    source = write_lines(tmp_path / "a.jsonl", many(600))
    prepare(source, tmp_path / "s", workers=1)
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        killed = []

        def accept_and_kill(self: Any, block: Any, result: Any) -> None:
            accept(self, block, result)
            for process in psutil.Process().children(recursive=True):
                name = ""
                with contextlib.suppress(psutil.Error):  # gone, or going
                    name = " ".join(process.cmdline()).strip()
                if not killed and name in ("ray::encode_unit", "ray::IDLE"):
                    killed.append(process.pid)
                    process.kill()

        monkeypatch.setattr(_Job, "_accept", accept_and_kill)
        prepare(source, tmp_path / "s2", engine="ray")
        assert killed
    finally:
        ray.shutdown()
    assert store_hash(tmp_path / "s2") == store_hash(tmp_path / "s")


def run_cli(source: Path, store: Path) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from fastcollate import prepare; from fastcollate.sources import blocks as sources; "
        "sources.SIZES = sources.Sizes(20_000, 60_000); prepare(sys.argv[1], sys.argv[2], workers=2)"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(source), str(store)], stderr=subprocess.PIPE)


@pytest.mark.slow
def test_a_killed_job_continues_to_the_same_bytes(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", many(6000))
    undisturbed = run_cli(source, tmp_path / "s0")
    assert undisturbed.wait() == 0
    kills = 0
    for attempt in range(40):
        process = run_cli(source, tmp_path / "s1")
        deadline = time.monotonic() + 30
        wanted = 10 * (attempt + 1)
        while process.poll() is None and time.monotonic() < deadline:
            journal = tmp_path / "s1" / ".journal"
            done = journal.read_bytes().count(b'"line": "unit"') if journal.exists() else 0
            if done >= wanted and kills < 5:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        if process.wait() == 0:
            break
        process.stderr.close()  # type: ignore[union-attr]
    assert kills > 1
    assert store_hash(tmp_path / "s1") == store_hash(tmp_path / "s0")


def test_long_prompts(tmp_path: Path) -> None:
    records = [
        {"instruction": "a " * 80, "output": "answer"},
        {"instruction": "b", "output": "c"},
    ]
    source = write_lines(tmp_path / "a.jsonl", records)
    with pytest.raises(InputError, match=r"record 0: its prompt of \d+ tokens leaves none to train within 60"):
        prepare(source, tmp_path / "s", max_length=60)
    kept = prepare(source, tmp_path / "keep", max_length=60, long_prompt="keep")
    assert (kept.num_rows, kept.summary["untrained_rows"], kept.summary["long_prompts"]) == (2, 1, 1)
    cut = prepare(source, tmp_path / "cut", max_length=60, long_prompt="cut")
    assert cut.summary["untrained_rows"] == 0
    whole, short = TokenStore(tmp_path / "keep")[0], TokenStore(tmp_path / "cut")[0]
    assert short.input_ids.tolist() == whole.input_ids[-len(short.input_ids) :].tolist()
    assert len(short.input_ids) <= 60
    skipped = prepare(source, tmp_path / "skip", max_length=60, on_error="skip")
    assert (skipped.num_rows, skipped.summary["num_skipped"]) == (1, 1)


def test_special_text_is_refused_or_ordinary_text(tmp_path: Path) -> None:
    records = [{"instruction": "a <|endoftext|>", "output": "b"}, {"instruction": "c", "output": "d"}]
    source = write_lines(tmp_path / "a.jsonl", records)
    prepare(source, tmp_path / "s", special_text="encode")
    assert 50256 not in np.concatenate([row.input_ids for row in TokenStore(tmp_path / "s")])
    assert prepare(source, tmp_path / "t", on_error="skip").num_rows == 1


def trained_text(store: TokenStore, index: int) -> list[str]:
    row, place, texts = store[index], 0, []
    for number, count in enumerate(row.spans.tolist()):
        if number % 2:
            texts.append(load_encoding("gpt2").decode(row.input_ids[place : place + count].tolist()))
        place += count
    return texts


def test_chat_trains_every_assistant_turn_and_nothing_else(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello\n\n  you"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "  Bye."},
    ]
    share = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}, {"from": "human", "value": "?"}]
    source = write_lines(tmp_path / "a.jsonl", [{"messages": turns}, {"conversations": share}])
    prepare(source, tmp_path / "s", template="chat", special_text="encode")
    store = TokenStore(tmp_path / "s")
    text = load_encoding("gpt2").decode(store[0].input_ids.tolist())
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assis")
    assert store[0].input_ids.tolist() == load_encoding("gpt2").encode(text, disallowed_special=())
    assert trained_text(store, 0)[0] in ("Hello\n\n  you<|im_end|>", "\nHello\n\n  you<|im_end|>")
    assert trained_text(store, 0)[1].strip() == "Bye.<|im_end|>"
    assert trained_text(store, 1) == ["Yo<|im_end|>"]
    assert int(store[1].spans.sum()) == len(store[1].input_ids) + 1
    assert int(store[0].spans.sum()) == len(store[0].input_ids)


def test_a_jinja_template(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    template = tmp_path / "t.jinja"
    template.write_text("Q: {{ q }}\nA:{% generation %} {{ a }}{% endgeneration %}\n")
    source = write_lines(tmp_path / "a.jsonl", [{"q": "one", "a": "two"}, {"q": "no answer"}])
    prepare(source, tmp_path / "s", template=str(template), on_error="skip")
    store = TokenStore(tmp_path / "s")
    assert len(store) == 1
    assert trained_text(store, 0) == [" two"]
    template.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InputError, match="the template fails"):
        prepare(source, tmp_path / "t", template=str(template))
    template.write_text("{% if %}")
    with pytest.raises(InputError, match=r"t\.jinja', line 1"):
        prepare(source, tmp_path / "u", template=str(template))


def test_lone_surrogates_get_tiktokens_treatment(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "a \\ud83d b", "output": "\\ud83d\\ude00 c"}\n')
    prepare(tmp_path / "a.jsonl", tmp_path / "s")
    record = {"instruction": "a \ufffd b", "input": "", "output": "\U0001f600 c"}
    check_against_reference(TokenStore(tmp_path / "s"), [record])
