"""What real sets hold: empty files among many, completions that end in a written end-of-text, sources that are many."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from fastcollate.check import verify
from fastcollate.errors import InputError
from fastcollate.ingest.job import prepare
from fastcollate.store.store import TokenStore
from tests.helpers import run_cli

END = "<|endoftext|>"


def write_records(path: Path, first: int, count: int) -> Path:
    records = [{"instruction": f"Say {number}.", "output": f"{number}!"} for number in range(first, first + count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def rows_of(store: Path) -> list[tuple[list[int], list[int]]]:
    return [(row.input_ids.tolist(), row.spans.tolist()) for row in TokenStore(store)]


def skipped(report: Any) -> list[list[str]]:
    assert report.skipped_report is not None
    return [line.split("\t") for line in Path(report.skipped_report).read_text().splitlines()[1:]]


# -------------------------------------------------------------------------------------------------------- empty files


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("b.jsonl", b""),
        ("b.json", b""),
        ("b.csv", b""),
        ("b.txt", b""),
        ("b.parquet", b""),
        ("b.jsonl.gz", b""),
        ("b.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("b.csv.xz", lzma.compress(b"")),
        ("b.txt.bz2", bz2.compress(b"")),
    ],
)
def test_an_empty_file_among_others_is_named_and_can_be_skipped(tmp_path: Path, name: str, data: bytes) -> None:
    files = [write_records(tmp_path / "a.jsonl", 0, 40), tmp_path / name, write_records(tmp_path / "c.jsonl", 40, 60)]
    files[1].write_bytes(data)
    with pytest.raises(InputError, match=rf"{name}.* is empty"):
        prepare(files, tmp_path / "s")
    report = prepare(files, tmp_path / "s", on_error="skip", workers=1)
    assert report.summary["num_skipped"] == 1
    assert skipped(report) == [[str(files[1]), "-", "40", "the file is empty"]]
    prepare([files[0], files[2]], tmp_path / "others", workers=1)
    assert rows_of(tmp_path / "s") == rows_of(tmp_path / "others")
    assert prepare(files, tmp_path / "s", on_error="skip").reused
    found = verify(TokenStore(tmp_path / "s"), sources=list(map(str, files)), progress=False)
    assert (found.ok, found.records) == (True, 100)


def test_an_empty_file_that_has_become_full_is_another_source(tmp_path: Path) -> None:
    files = [write_records(tmp_path / "a.jsonl", 0, 4), tmp_path / "b.jsonl"]
    files[1].touch()
    prepare(files, tmp_path / "s", on_error="skip")
    write_records(files[1], 4, 1)
    with pytest.raises(InputError, match=r"differs in the content of .*b\.jsonl"):
        prepare(files, tmp_path / "s", on_error="skip")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_files_that_are_all_empty(tmp_path: Path, count: int) -> None:
    files = [tmp_path / f"{number}.jsonl" for number in range(count)]
    for path in files:
        path.touch()
    more = rf" \(and {count - 1} more of the files\)" if count > 1 else ""
    with pytest.raises(InputError, match=rf"0\.jsonl{more}: is empty; .*--on-error skip"):
        prepare(files, tmp_path / "s")
    with pytest.raises(
        InputError, match=rf"no usable record \({count} of 0 records skipped, all .*: the file is empty"
    ):
        prepare(files, tmp_path / "s", on_error="skip")


# ------------------------------------------------------------------------------------------------ a written end-of-text


def record_of(template: str, answer: str) -> dict[str, Any]:
    if template == "chat":
        return {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": answer}]}
    return {"prompt": "Say it.", "completion": answer}


def write_answers(path: Path, template: str, answers: list[str]) -> Path:
    path.write_text("".join(json.dumps(record_of(template, answer)) + "\n" for answer in answers))
    return path


@pytest.fixture
def jinja(tmp_path: Path) -> str:
    path = tmp_path / "t.jinja"
    path.write_text("{{ prompt }}\n{% generation %}{{ completion }}{% endgeneration %}")
    return str(path)


@pytest.mark.parametrize("name", ["completion", "alpaca", "phi3", "jinja"])
def test_exactly_the_one_at_the_end_is_dropped(
    tmp_path: Path, name: str, jinja: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = jinja if name == "jinja" else name
    plain, ended = ["Yes.", "So it is.\n", "é", "No"], [f"Yes.{END}", f"So it is.\n{END}", f"é{END}", "No"]
    options = {"template": template, "workers": 1}
    prepare(write_answers(tmp_path / "a.jsonl", name, plain), tmp_path / "plain", **options)
    source = write_answers(tmp_path / "b.jsonl", name, ended)
    prepare(source, tmp_path / "s", special_text="strip-end", **options)
    assert rows_of(tmp_path / "s") == rows_of(tmp_path / "plain")
    monkeypatch.chdir(tmp_path)  # where the template's file lies
    assert verify(TokenStore("s"), sources=[str(source)], progress=False).ok


@pytest.mark.parametrize("template", ["completion", "alpaca", "phi3"])
@pytest.mark.parametrize("answer", [f"a{END}{END}", f"a{END} ", f"{END}a", f"a{END}b{END}", f"a{END}\n"])
def test_one_that_stands_elsewhere_is_refused_as_before(tmp_path: Path, template: str, answer: str) -> None:
    source = write_answers(tmp_path / "a.jsonl", template, ["fine", f"fine{END}", answer])
    report = prepare(source, tmp_path / "s", template=template, special_text="strip-end", on_error="skip")
    ((_, line, record, reason),) = skipped(report)
    assert (line, record) == ("3", "2")
    assert reason.startswith(f"holds the special token '{END}' as text")
    assert rows_of(tmp_path / "s")[0] == rows_of(tmp_path / "s")[1]


def test_a_turn_of_a_chat_does_not_end_the_row(tmp_path: Path) -> None:
    source = write_answers(tmp_path / "a.jsonl", "chat", ["fine", f"a{END}"])
    report = prepare(source, tmp_path / "s", template="chat", special_text="strip-end", on_error="skip")
    assert skipped(report)[0][2] == "1"


def test_an_end_that_a_tokenizer_json_names(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    made.train_from_iterator(["the cat sat on the mat"] * 5, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    options = {"template": "completion", "tokenizer": str(tmp_path / "tokenizer.json"), "workers": 1}
    prepare(write_answers(tmp_path / "a.jsonl", "completion", ["the cat", "b"]), tmp_path / "plain", **options)
    source = write_answers(tmp_path / "b.jsonl", "completion", ["the cat</s>", "b"])
    with pytest.raises(InputError, match=r"record 0: ends in '</s>' as text; drop it with --special-text strip-end"):
        prepare(source, tmp_path / "s", **options)
    prepare(source, tmp_path / "s", special_text="strip-end", **options)
    assert rows_of(tmp_path / "s") == rows_of(tmp_path / "plain")


@pytest.mark.parametrize("count", [1, 3, 50])
def test_it_is_said_once_with_the_count(tmp_path: Path, count: int) -> None:
    source = write_answers(tmp_path / "a.jsonl", "completion", ["fine"] * 4 + [f"a{END}"] * count)
    message = r"line 5, record 4: ends in '<\|endoftext\|>' as text; drop it with --special-text strip-end, or store"
    alike = rf".*\(the same in {count} of the {count + 4} records that were read with it\)"
    more = alike if count > 1 else r".*encode; mend it"
    with pytest.raises(InputError, match=message + more):
        prepare(source, tmp_path / "s", template="completion")
    if count < 5:
        assert prepare(source, tmp_path / "s", template="completion", on_error="skip").num_rows == 4
        return
    with pytest.warns(UserWarning, match=rf"{count} of {count + 4} records skipped, all for this reason: ends in"):
        prepare(source, tmp_path / "s", template="completion", on_error="skip")


def test_where_nothing_is_left_the_reason_is_told(tmp_path: Path) -> None:
    source = write_answers(tmp_path / "a.jsonl", "completion", [f"a{END}"] * 7)
    with pytest.raises(InputError, match=r"no usable record \(7 of 7 records skipped, all .*: ends in .* strip-end"):
        prepare(source, tmp_path / "s", template="completion", on_error="skip")


# ---------------------------------------------------------------------------------------------------------- many files


@pytest.mark.parametrize("order", ["store first", "store last", "each named"])
def test_verify_takes_the_many_files_that_a_shell_makes_of_a_pattern(
    tmp_path: Path, order: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write_records(tmp_path / f"{number}.jsonl", 10 * number, 10) for number in range(4)]
    store = tmp_path / "s"
    prepare(files, store, workers=1)
    arguments = {
        "store first": [store, "--source", *files],
        "store last": ["--source", *files, store],
        "each named": [store, *(word for file in files for word in ("--source", file))],
    }[order]
    assert run_cli(monkeypatch, "verify", *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["records"] == 40
    changed = write_records(files[2], 30, 10)
    assert run_cli(monkeypatch, "verify", *arguments) == 1
    assert "row 20" in capsys.readouterr().err
    assert changed == files[2]
