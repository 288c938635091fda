"""Mistakes that people make, each with the message it gives, word for word as in `mistakes.txt`.

`UPDATE_MISTAKES=1 python -m pytest tests/test_mistakes.py` writes the file anew, to be read before it is committed.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

from fastcollate.ingest.job import prepare
from tests.helpers import run_cli

GOLDEN = Path(__file__).parent / "mistakes.txt"
FILES = {
    "records.jsonl": "".join(json.dumps({"instruction": f"a {n}", "output": "b"}) + "\n" for n in range(40)),
    "other.jsonl": "".join(json.dumps({"instruction": f"x {n}", "output": "y"}) + "\n" for n in range(40)),
    "strange.jsonl": '{"headline": "a", "body": "b"}\n',
    "number.jsonl": '{"instruction": "a", "output": 7}\n',
    "cut.json": '[{"instruction": "a", "output": ',
    "more.json": '{"data": [{"instruction": "a", "output": "b"}], "version": 1}',
    "pretty.jsonl": '{\n "instruction": "a",\n "output": "b"\n}\n',
    "ragged.csv": "instruction,output\na,b,c\n",
    "empty.jsonl": "",
    "notes.docx": "a",
    "end.jsonl": '{"instruction": "a <|endoftext|> b", "output": "c"}\n',
    "ids.jsonl": '{"input_ids": [1, 2, 3]}\n',
    "pairs.jsonl": "".join(
        json.dumps({"prompt": f"a {n}", "chosen": " b", "rejected": " c"}) + "\n" for n in range(40)
    ),
    "half.jsonl": '{"prompt": "a", "chosen": " b"}\n',
    "verdicts.jsonl": '{"prompt": "a", "completion": " b", "label": true}\n',
    "cut-mix.json": "{",
    "list-mix.json": '["store", "pairs"]',
    "step-mix.json": '{"stores": {"a": "store"}, "weights": {"0": {"a": 1}, "end": {"a": 1}}}',
    "less-mix.json": '{"stores": {"a": "store"}, "weights": {"a": -1}}',
    "names-mix.json": '{"stores": {"a": "store"}, "weights": {"b": 1}}',
    "key-mix.json": '{"stores": {"a": "store"}, "weight": {"a": 1}}',
    "pair-mix.json": '{"stores": {"a": "store", "b": "pairs"}}',
}
# a command, and what its message must tell to do
MISTAKES = """
prepare => see: fastcollate prepare --help
prepare records.jsonl => such as: fastcollate prepare records.jsonl store
prepare store records.jsonl => train on it with: fastcollate train --store store
prepare record.jsonl new => did you mean records.jsonl?
prepare nowhere/records.jsonl new => check the path
prepare *.parquet new => check the folder, and the ending
prepare folder new => name files in it, such as folder/*.jsonl
prepare empty.jsonl new => leave it out
prepare notes.docx new => use one of .json, .jsonl,
prepare strange.jsonl new => map it with --field instruction=NAME
prepare number.jsonl new => --on-error skip
prepare cut.json new => --on-error skip
prepare more.json new => write them alone, one a line, or in an array
prepare pretty.jsonl new => write one record a line
prepare ragged.csv new => --on-error skip
prepare end.jsonl new => --special-text encode
prepare ids.jsonl new => need the one that made them (--tokenizer)
prepare tatsu-lab/alpaca new => give NEW.jsonl
prepare other.jsonl store => choose another directory, or make this one anew with prepare --overwrite
prepare records.jsonl new --tokenizer meta-llama/Llama-3.1-8B => then give NEW
prepare records.jsonl new --tokenizer gpt3 => choose one of gpt2,
prepare records.jsonl new --template mistral => choose one of alpaca,
prepare records.jsonl new --template mine.jinja => check the path
prepare records.jsonl new --template tokenizer => use template 'chat'
prepare records.jsonl new --field instruction => write it as NAME=SOURCE
prepare records.jsonl new --field title=headline => has the fields instruction, input, output; give one of them
prepare records.jsonl new --on-error ignore => is not one of 'raise', 'skip'; see: fastcollate prepare --help
prepare records.jsonl new --workers 0 => give at least 1
prepare records.jsonl new --split train => leave out split='train'
prepare records.jsonl https://example.org/store => name a place of object storage, such as s3://
prepare records.jsonl s3:/bucket/store => give a path of this machine
prepare pairs.jsonl new => for preferences use --template preference
prepare half.jsonl new --template preference => name the fields that are to be taken, such as --field chosen=NAME
prepare verdicts.jsonl new => or use --template preference
prepare records.jsonl new --template document => map it with --field text=NAME
prepare pairs.jsonl new --template preference:mistral => choose one of alpaca,
push store => such as s3://bucket/store
push store elsewhere => give one, such as s3://bucket/store
push nowhere memory://bucket/store => make one with: fastcollate prepare SOURCE nowhere
push memory://bucket/store store => give a path of this machine
push store memory:// => name a folder of the storage, such as memory://bucket/store
push store memory://bucket/store?versionId=3 => give credentials as the storage's own library has them
pull store copy => give one, such as s3://bucket/store
pull memory://bucket/nothing copy => write one there with: fastcollate push STORE memory://bucket/nothing
pull https://example.org/store copy => name a place of object storage
verify nosuch://bucket/store => check how it begins, such as s3://
inspect memory:/bucket/store => as text with both slashes
inspect memory://bucket/nothing => make one with: fastcollate prepare SOURCE memory://bucket/nothing
inspect => see: fastcollate inspect --help
inspect records.jsonl => make one with: fastcollate prepare records.jsonl STORE
inspect stor => make one with: fastcollate prepare SOURCE stor
inspect store --row 40 => has rows 0 to 39; give one of them
inspect store --row first => see: fastcollate inspect --help
inspect store --max-length 0 => give at least 1
verify store --source other.jsonl => give the same files, in the same order
verify store --capacity 64 => give --policy packed with it
verify store --policy random => is not one of 'sequential', 'shuffled', 'bucketed', 'packed'; see:
bench store --step-ms 0 => give a step's time in milliseconds
bench store --batch-size 0 => give 1 to
train other.jsonl --store store => give either files of records, or what is prepared already
train --store store --tokenizer gpt2 => give it to fastcollate prepare
train --data nowhere.jsonl => fastcollate sample nowhere.jsonl
train --store store --polcy packed => Possible options: --epochs, --policy
train --store store --model 7B => is not one of 'tiny', '124M', '355M', '774M', '1558M'; see:
train --store store --mask-promt => Possible options: --mask-prompt,
train --store store --dropout 1.5 => give 0 or more, below 1
train --store store --train-share 2 => give more than 0, at most 1
train --store store --device gpu => choose auto, cpu, cuda or cuda:N
train --store store --max-steps 0 => give 1 or more
train --store store --store pairs => give one store, or one --mix
train --store store --packing concatenate => give --policy packed with it
train --store store --see-across => give --policy packed with it
train --store pairs => BatchLoader and train --objective dpo take pairs
train --store pairs --objective kto => is not one of 'sft', 'dpo'; see:
train --store pairs --objective dpo => give --reference-checkpoint RUN with it
train --store pairs --reference-checkpoint runs/first => give --objective dpo with it
train --store pairs --objective dpo --reference-checkpoint nowhere => train first: fastcollate train --out nowhere
train --store store --objective dpo --reference-checkpoint runs/first => fastcollate prepare --template preference
train --objective dpo --reference-checkpoint runs/first => give records that hold some
train --store store --beta 0.5 => give --objective dpo with it
train --mix store => write a file such as
train --mix nowhere.json => write a file such as
train --mix cut-mix.json => write a file such as
train --mix list-mix.json => write a file such as
train --mix step-mix.json => or weights by step
train --mix less-mix.json => a number of 0 or more
train --mix names-mix.json => the stores are ['a']
train --mix key-mix.json => a mix has stores, weights,
train --mix pair-mix.json => train --objective dpo take pairs
train --mix key-mix.json --store store => give one store, or one --mix
train --mix key-mix.json --tokenizer gpt2 => give it to fastcollate prepare
generate --prompt hello => make one with: fastcollate train --out runs/first
generate --checkpoint nowhere --prompt hello => train first: fastcollate train --out nowhere
generate --checkpoint store --prompt hello => train first: fastcollate train --out
evaluate --checkpoint nowhere => train first: fastcollate train --out nowhere
convert store new => use it as it is
preprare records.jsonl store => Did you mean 'prepare'?
""".strip().splitlines()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "folder").mkdir()
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.slow
def test_each_mistake_gives_its_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare("records.jsonl", "store")
    prepare("pairs.jsonl", "pairs", template="preference")
    said: list[str] = []
    lacking: list[str] = []  # a remedy
    for command, remedy in (line.split(" => ") for line in MISTAKES):
        status = run_cli(monkeypatch, *shlex.split(command))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err, command
        assert status in (1, 2), f"{command}: {captured.err}"
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        (message,) = errors or [line for line in captured.err.splitlines() if "others than" in line]
        lacking += [] if remedy in message else [f"{command}: {message}"]
        said.append(f"$ fastcollate {command}\n{message.replace(str(folder), 'FOLDER')}\n")
    assert not lacking, "\n".join(lacking)
    found = "\n".join(said)
    if os.environ.get("UPDATE_MISTAKES"):
        GOLDEN.write_text(found, encoding="utf-8")
    assert found == GOLDEN.read_text(encoding="utf-8")
    assert len(MISTAKES) >= 40
