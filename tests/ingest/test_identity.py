"""Identity is content: the same bytes make the same store wherever they lie; other bytes never pass for them."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_prepare import many, store_hash, write_lines

from fastcollate.errors import InputError, SourceReadError
from fastcollate.ingest import spec as spec_module
from fastcollate.ingest.job import prepare
from fastcollate.ingest.options import PrepareOptions
from fastcollate.load.loader import BatchLoader
from fastcollate.sources import blocks
from fastcollate.sources import find as find_module
from fastcollate.store import files
from fastcollate.store.store import TokenStore


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SIZES", blocks.Sizes(20_000, 60_000))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as at rest at once."""
    monkeypatch.setattr(find_module, "_SETTLED_NS", 0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that are read to be compared."""
    found: list[str] = []
    read = spec_module._read

    def noted(source: Any, *rest: Any) -> Any:
        found.append(source.name)
        return read(source, *rest)

    monkeypatch.setattr(spec_module, "_read", noted)
    return found


@pytest.mark.slow
def test_the_same_content_is_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(tmp_path / "a.jsonl", many(700))
    prepare(source, tmp_path / "s")
    expected = store_hash(tmp_path / "s")
    assert len(TokenStore(tmp_path / "s").shards) > 2
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.copy(source, tmp_path / "elsewhere" / "b.ndjson"))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
    monkeypatch.chdir(tmp_path)
    same = ["a.jsonl", "./elsewhere/../a.jsonl", str(tmp_path / "a*.jsonl"), f"file://{source}", moved, "c.jsonl.gz"]
    for number, name in enumerate(same):
        prepare(name, f"t{number}", workers=1 + number % 2)
        assert store_hash(tmp_path / f"t{number}") == expected, name
        assert prepare(name, tmp_path / "s").reused, name
    os.utime(source, (1, 1))
    assert prepare("a.jsonl", "s").reused
    source.rename(tmp_path / "new.jsonl")
    assert prepare("new.jsonl", "s").reused
    (tmp_path / "s").rename(tmp_path / "moved")
    assert prepare("new.jsonl", "moved").reused
    assert store_hash(tmp_path / "moved") == expected


def test_the_fingerprint_knows_how_content_is_read(tmp_path: Path) -> None:
    raw = b'[{"instruction": "a", "output": "b"}]\n'
    (tmp_path / "a.json").write_bytes(raw)
    (tmp_path / "a.jsonl").write_bytes(raw + b'{"instruction": "a", "output": "b"}\n')
    prepare(tmp_path / "a.json", tmp_path / "s")
    with pytest.raises(InputError, match=r"differs in the content of .*a\.jsonl"):
        prepare(tmp_path / "a.jsonl", tmp_path / "s", on_error="skip")
    (tmp_path / "t.csv").write_text("instruction,output\na,b\tc\n")
    (tmp_path / "t.tsv").write_text("instruction,output\na,b\tc\n")
    prepare(tmp_path / "t.csv", tmp_path / "t")
    with pytest.raises(InputError, match=r"differs in the content of .*t\.tsv"):
        prepare(tmp_path / "t.tsv", tmp_path / "t", on_error="skip")


@pytest.mark.slow
def test_data_sets_tables_and_iterables_by_their_records(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    records = [{"input": "", **record} for record in many(300)]
    prepare(datasets.Dataset.from_list(records), tmp_path / "s")
    expected = store_hash(tmp_path / "s")
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=77)
    for source in (datasets.Dataset.from_list(records), tmp_path / "saved", tmp_path / "a.parquet"):
        assert prepare(source, tmp_path / "s").reused
    prepare(tmp_path / "a.parquet", tmp_path / "s2", workers=2)
    assert store_hash(tmp_path / "s2") == expected
    prepare(iter(records), tmp_path / "t", workers=2)
    assert prepare((dict(record) for record in records), tmp_path / "t").reused
    with pytest.raises(InputError, match="differs in the content of the records given"):
        prepare(records[:-1], tmp_path / "t")
    assert [row.input_ids.tolist() for row in TokenStore(tmp_path / "t")] == [
        row.input_ids.tolist() for row in TokenStore(tmp_path / "s")
    ]


@pytest.mark.slow
def test_loader_states_exchange(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", many(200))
    prepare(source, tmp_path / "s")
    source.rename(tmp_path / "b.jsonl")
    prepare(tmp_path / "b.jsonl", tmp_path / "t")
    loader = BatchLoader(TokenStore(tmp_path / "s"), batch_size=8)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    expected = next(batches)
    other = BatchLoader(TokenStore(tmp_path / "t"), batch_size=8)
    other.load_state_dict(state)
    assert next(iter(other))[0].tolist() == expected[0].tolist()


@pytest.mark.slow
@pytest.mark.usefixtures("settled")
def test_an_unchanged_file_is_not_read_again(tmp_path: Path, reads: list[str]) -> None:
    names = [write_lines(tmp_path / f"{i}.jsonl", many(50, seed=i)) for i in range(3)]
    prepare(names, tmp_path / "s")
    assert prepare(names, tmp_path / "s").reused
    assert reads == []
    os.utime(names[1])
    assert prepare(names, tmp_path / "s").reused
    assert reads == [str(names[1])]
    assert prepare(names, tmp_path / "s").reused
    assert reads == [str(names[1])]
    (tmp_path / "s" / "sources.json").write_text("{")
    assert prepare(names, tmp_path / "s").reused
    assert len(reads) == 4
    (tmp_path / "s" / "sources.json").unlink()
    assert prepare(names, tmp_path / "s").reused
    assert prepare(names, tmp_path / "s").reused
    assert len(reads) == 7


@pytest.mark.usefixtures("settled")
@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_one_file_under_names_that_are_read_otherwise(tmp_path: Path, link: Any) -> None:
    (tmp_path / "a.csv").write_text('instruction,output\n"one\ttwo",three\n')
    link(tmp_path / "a.csv", tmp_path / "a.tsv")
    prepare(tmp_path / "a.csv", tmp_path / "s")
    assert prepare(tmp_path / "a.csv", tmp_path / "s").reused
    with pytest.raises(InputError, match=r"differs in the content of .*a\.tsv"):
        prepare(tmp_path / "a.tsv", tmp_path / "s")


@pytest.mark.slow
def test_the_side_file_of_another_store_proves_nothing(tmp_path: Path, reads: list[str]) -> None:
    first = write_lines(tmp_path / "a.jsonl", many(50))
    second = write_lines(tmp_path / "b.jsonl", many(50, seed=1))
    prepare(first, tmp_path / "s")
    prepare(second, tmp_path / "t")
    shutil.copy(tmp_path / "t" / "sources.json", tmp_path / "s" / "sources.json")
    with pytest.raises(InputError, match="differs in the content of its sources"):
        prepare(second, tmp_path / "s")
    assert reads == [str(second)]


@pytest.mark.slow
def test_a_file_changed_within_a_tick_of_the_clock_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(tmp_path / "a.jsonl", many(50))
    prepare(source, tmp_path / "s")
    stat = os.stat(source)
    source.write_bytes(source.read_bytes().replace(b"the", b"teh", 1))
    monkeypatch.setattr(os, "stat", lambda path, **_: stat if str(path) == str(source) else os.lstat(path))
    with pytest.raises(InputError, match=r"differs in the content of .*a\.jsonl"):
        prepare(source, tmp_path / "s")


@pytest.mark.slow
@pytest.mark.usefixtures("settled")
def test_a_change_of_content_is_told_whatever_the_times_say(tmp_path: Path) -> None:
    names = [write_lines(tmp_path / f"{i}.jsonl", many(50, seed=i)) for i in range(5)]
    prepare(names, tmp_path / "s")
    before = store_hash(tmp_path / "s")
    with pytest.raises(InputError, match=r"differs in its sources \(5, now 4\)"):
        prepare(names[:4], tmp_path / "s")
    with pytest.raises(InputError, match="differs in the order of its sources"):
        prepare(names[::-1], tmp_path / "s")
    for name in names[1:]:
        stat = name.stat()
        name.write_bytes(name.read_bytes().replace(b"the", b"teh", 1))
        os.utime(name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(
        InputError, match=r"the content of .*1\.jsonl, .*2\.jsonl, .*3\.jsonl and 1 more; .*--overwrite"
    ):
        prepare(names, tmp_path / "s")
    assert store_hash(tmp_path / "s") == before
    assert not prepare(names, tmp_path / "s", overwrite=True).reused
    assert prepare(names, tmp_path / "s").reused
    assert store_hash(tmp_path / "s") != before


def test_a_file_that_changes_while_it_is_read_is_an_error_and_touching_it_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "a.jsonl", many(300))
    real = blocks.Block.read

    def change() -> None:
        source.write_bytes(source.read_bytes().replace(b"the", b"teh"))

    def read(self: Any) -> bytes:
        data = real(self)
        if self.first_row > 100 and todo:
            todo.pop(0)()
        return data

    monkeypatch.setattr(blocks.Block, "read", read)
    todo = [lambda: os.utime(source, (5, 5))]
    prepare(source, tmp_path / "s", workers=1)
    assert not todo
    todo = [change]
    with pytest.raises(SourceReadError, match=r"a\.jsonl: was changed while it was read"):
        prepare(source, tmp_path / "t", workers=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"template": "phi3"}, r"template name \('alpaca', now 'phi3'\)"),
        ({}, {"boundary": "exact"}, r"option boundary \('reference', now 'exact'\)"),
        ({}, {"max_length": 50, "long_prompt": "keep"}, r"option max_length \(None, now 50\); option long_prompt"),
        ({"special_text": "encode"}, {}, r"option special_text \('encode', now 'reject'\)"),
        ({}, {"fields": {"instruction": "output"}}, r"template fields \({}, now {'instruction': 'output'}\)"),
        ({}, {"tokenizer": "r50k_base"}, r"tokenizer name \('gpt2', now 'r50k_base'\)"),
    ],
)
def test_what_differs_is_said_in_words(tmp_path: Path, first: Any, second: Any, message: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", many(20))
    prepare(source, tmp_path / "s", **first)
    with pytest.raises(InputError, match=f"holds a store that differs in {message}.*--overwrite"):
        prepare(source, tmp_path / "s", **second)
    prepare(source, tmp_path / "s", overwrite=True, **second)
    with pytest.raises(InputError, match="holds a store that differs in"):
        prepare(source, tmp_path / "s", **first)


def test_a_templates_text_counts_and_not_its_place(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    source = write_lines(tmp_path / "a.jsonl", [{"q": "one", "a": "two"}])
    for folder, end in (("x", "!"), ("y", "!"), ("z", "?")):
        (tmp_path / folder).mkdir()
        text = "Q: {{ q }}\nA:{% generation %} {{ a }}{% endgeneration %}" + end
        (tmp_path / folder / "t.jinja").write_text(text)
    prepare(source, tmp_path / "s", template=str(tmp_path / "x" / "t.jinja"))
    assert prepare(source, tmp_path / "s", template=str(tmp_path / "y" / "t.jinja")).reused
    with pytest.raises(InputError, match="differs in template source"):
        prepare(source, tmp_path / "s", template=str(tmp_path / "z" / "t.jinja"))


def write_tokenizer(path: Path, *, added: str | None = None) -> str:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<eos>": 0, **{chr(i): i - 31 for i in range(32, 127)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<eos>"))
    tokenizer.add_special_tokens(["<eos>", *([added] if added else [])])
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return str(path)


def test_a_tokenizers_content_counts_and_not_its_place(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"instruction": "one", "output": "two"}])
    prepare(source, tmp_path / "s", tokenizer=write_tokenizer(tmp_path / "x" / "tokenizer.json"))
    expected = store_hash(tmp_path / "s")
    same = write_tokenizer(tmp_path / "y" / "tokenizer.json")
    assert prepare(source, tmp_path / "s", tokenizer=same).reused
    prepare(source, tmp_path / "t", tokenizer=same)
    assert store_hash(tmp_path / "t") == expected
    assert (tmp_path / "t" / "tokenizer.json").read_bytes() == Path(same).read_bytes()
    write_tokenizer(tmp_path / "y" / "tokenizer.json", added="<extra>")  # under the name that was loaded before
    with pytest.raises(InputError, match="differs in tokenizer fingerprint"):
        prepare(source, tmp_path / "s", tokenizer=same)


@pytest.mark.slow
def test_a_template_that_changes_while_the_job_runs_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jinja2")
    template = tmp_path / "t.jinja"
    template.write_text("Q: {{ q }}\nA:{% generation %} {{ a }}{% endgeneration %}")
    source = write_lines(tmp_path / "a.jsonl", [{"q": f"one {i}", "a": "two"} for i in range(3000)])
    read = blocks.Block.read

    def changes(self: Any) -> bytes:
        template.write_text("{{ q }}{% generation %}{{ a }}{% endgeneration %}")
        return read(self)

    with monkeypatch.context() as patch:
        patch.setattr(blocks.Block, "read", changes)
        prepare(source, tmp_path / "s", template=str(template), workers=1)  # with what was there when it began
    assert not prepare(source, tmp_path / "t", template=str(template)).reused
    assert TokenStore(tmp_path / "s")[0].input_ids.tolist() != TokenStore(tmp_path / "t")[0].input_ids.tolist()
    sealed = spec_module.JobSpec(PrepareOptions(template=str(template))).sealed()
    template.write_text("{{ q }}!{% generation %}{{ a }}{% endgeneration %}")
    monkeypatch.setattr(spec_module, "_LOADED", {})  # as in a worker that begins late
    with pytest.raises(SourceReadError, match=r"t\.jinja' was changed while the job was running"):
        sealed.tools()


@pytest.mark.slow
def test_files_that_systems_put_everywhere_hurt_nobody(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", many(200))
    junk = [".DS_Store", "Thumbs.db", ".nfs0000000000abcdef", "._shard-00000.arrow", "desktop.ini", "lost+found"]
    (tmp_path / "s").mkdir()
    for name in junk:
        (tmp_path / "s" / name).write_bytes(b"x")
    prepare(source, tmp_path / "s")
    assert prepare(source, tmp_path / "s").reused
    prepare(source, tmp_path / "s", overwrite=True)
    assert all((tmp_path / "s" / name).read_bytes() == b"x" for name in junk)
    (tmp_path / "s" / "notes.txt").write_text("mine")
    assert prepare(source, tmp_path / "s").reused
    prepare(source, tmp_path / "s", overwrite=True)
    assert (tmp_path / "s" / "notes.txt").read_text() == "mine"
    assert prepare(source, tmp_path / "s").reused


@pytest.mark.slow
def test_a_finished_store_on_a_read_only_disk_is_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    source = write_lines(tmp_path / "a.jsonl", many(50))
    prepare(source, tmp_path / "s")

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(filelock.FileLock, "acquire", read_only)
    monkeypatch.setattr(files, "write_file", read_only)
    before = store_hash(tmp_path / "s")
    assert prepare(source, tmp_path / "s").reused  # read again: it was changed just before
    os.utime(source, (1, 1))
    assert prepare(source, tmp_path / "s").reused
    assert len(reads) >= 2
    assert store_hash(tmp_path / "s") == before
    with pytest.raises(InputError, match=r"Read-only file system.*choose a folder that can be written"):
        prepare(source, tmp_path / "s", overwrite=True)


@pytest.mark.slow
def test_a_store_from_which_records_were_left_out_is_taken_only_by_who_skips(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [*many(20), {"instruction": 5}])
    prepare(source, tmp_path / "s", on_error="skip")
    assert prepare(source, tmp_path / "s", on_error="skip").reused
    with pytest.raises(InputError, match=r"1 bad records were left out of this store \(see .*skipped\.txt\)"):
        prepare(source, tmp_path / "s")
    good = write_lines(tmp_path / "b.jsonl", many(20))
    prepare(good, tmp_path / "t", on_error="skip")
    assert prepare(good, tmp_path / "t").reused


@pytest.mark.slow
def test_skipping_gives_the_same_store_wherever_the_sources_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "a.jsonl", [*many(20), {"instruction": 5}])
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a.jsonl", str(tmp_path / "a.jsonl"))):
        prepare(name, tmp_path / f"s{number}", on_error="skip")
    manifests = [json.loads((tmp_path / f"s{number}" / "manifest.json").read_bytes()) for number in range(2)]
    assert manifests[0] == manifests[1]


@pytest.mark.slow
def test_a_damaged_store_is_told_and_made_anew(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", many(400))
    prepare(source, tmp_path / "s")
    expected = store_hash(tmp_path / "s")
    (tmp_path / "s" / "shard-00001.arrow").unlink()
    with pytest.raises(InputError, match=r"shard-00001\.arrow: missing or damaged; make the store anew"):
        prepare(source, tmp_path / "s")
    prepare(source, tmp_path / "s", overwrite=True)
    (tmp_path / "s" / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json: damaged"):
        prepare(source, tmp_path / "s")
    prepare(source, tmp_path / "s", overwrite=True)
    assert store_hash(tmp_path / "s") == expected
