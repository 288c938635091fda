"""Mistakes that people make, each with the message it gives, word for word as in `mistakes.txt`.

`UPDATE_MISTAKES=1 python -m pytest tests/test_mistakes.py` writes the file anew, to be read before it is committed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from fastcollate.ingest.job import prepare
from tests.helpers import run_cli

GOLDEN = Path(__file__).parent / "mistakes.txt"
REMEDY = re.compile(
    r"\b(give|name|choose|check|see:|[Dd]id you mean|store it|skipped|need the one|has the fields|make|map it|write|"
    r"train first|leave|convert|raise|resume|has rows|install|use one|is left|fastcollate \w+)\b"
)
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
}
COMMANDS = """
prepare
prepare records.jsonl
prepare store records.jsonl
prepare record.jsonl new
prepare nowhere/records.jsonl new
prepare *.parquet new
prepare folder new
prepare empty.jsonl new
prepare notes.docx new
prepare strange.jsonl new
prepare number.jsonl new
prepare cut.json new
prepare more.json new
prepare pretty.jsonl new
prepare ragged.csv new
prepare end.jsonl new
prepare ids.jsonl new
prepare tatsu-lab/alpaca new
prepare other.jsonl store
prepare records.jsonl new --tokenizer meta-llama/Llama-3.1-8B
prepare records.jsonl new --tokenizer gpt3
prepare records.jsonl new --template mistral
prepare records.jsonl new --template mine.jinja
prepare records.jsonl new --template tokenizer
prepare records.jsonl new --field instruction
prepare records.jsonl new --field title=headline
prepare records.jsonl new --on-error ignore
prepare records.jsonl new --workers 0
prepare records.jsonl new --split train
prepare records.jsonl https://example.org/store
prepare records.jsonl s3:/bucket/store
inspect
inspect records.jsonl
inspect stor
inspect store --row 40
inspect store --row first
inspect store --max-length 0
verify store --source other.jsonl
verify store --policy random
bench store --step-ms 0
bench store --batch-size 0
train other.jsonl --store store
train --store store --tokenizer gpt2
train --data nowhere.jsonl
train --store store --polcy packed
train --store store --model 7B
train --store store --mask-promt
train --store store --dropout 1.5
train --store store --train-share 2
train --store store --device gpu
train --store store --max-steps 0
generate --prompt hello
generate --checkpoint nowhere --prompt hello
generate --checkpoint store --prompt hello
evaluate --checkpoint nowhere
convert store new
preprare records.jsonl store
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
    said: list[str] = []
    lacking: list[str] = []  # a remedy
    for command in COMMANDS:
        status = run_cli(monkeypatch, *shlex.split(command))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err, command
        assert status in (1, 2), f"{command}: {captured.err}"
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        (message,) = errors or [line for line in captured.err.splitlines() if "others than" in line]
        lacking += [] if REMEDY.search(message) else [f"{command}: {message}"]
        said.append(f"$ fastcollate {command}\n{message.replace(str(folder), 'FOLDER')}\n")
    assert not lacking, "\n".join(lacking)
    found = "\n".join(said)
    if os.environ.get("UPDATE_MISTAKES"):
        GOLDEN.write_text(found, encoding="utf-8")
    assert found == GOLDEN.read_text(encoding="utf-8")
    assert len(COMMANDS) >= 40
