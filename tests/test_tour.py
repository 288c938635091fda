"""The tour's commands twice in one folder, on every kind of output: none fails, none shows a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = """
sample records.jsonl --num-records 60
prepare records.jsonl store
inspect store
inspect store --row 3 --mask-prompt
verify store --source records.jsonl --checksums
train --store store --max-steps 1 --policy packed --out runs/packed --sample-tokens 2
generate --checkpoint runs/packed --prompt hello --input insect --max-new-tokens 2
"""
BENCH = "bench store --step-ms 1 --rounds 1 --batch-size 2"  # once, for it takes its seconds
SCRIPT = f"""
import sys
from fastcollate.cli import main
for command in [*2 * {COMMANDS.split(chr(10))[1:-1]!r}, {BENCH!r}]:
    sys.argv = ["fastcollate", *command.split()]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (command, stop.code)
"""
OUTPUTS = {
    "80 columns": {"COLUMNS": "80"},
    "60 columns, a terminal": {"COLUMNS": "60", "FORCE_COLOR": "1", "TERM": "xterm"},
    "no colour": {"NO_COLOR": "1", "TERM": "dumb"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
}


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
def test_the_tour_runs_twice(output: str, tmp_path: Path) -> None:
    environment = {**os.environ, **OUTPUTS[output]}
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        code = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            cwd=tmp_path,
            env=environment,
            stdout=out,
            stderr=err,
            timeout=280,
            check=False,
        ).returncode
    said, told = ((tmp_path / name).read_bytes().decode("cp1252", "replace") for name in ("out", "err"))
    assert code == 0, told
    assert "Traceback" not in told
    assert ("\x1b[" in said + told) == ("FORCE_COLOR" in OUTPUTS[output])
    assert told.count("next: fastcollate ") == 2 * len(COMMANDS.split("\n")[1:-1]) + 1
    assert said.count("verified, all identical") == 2
    assert said.count("data-bound: beside steps of 1 ms the loop waits for data") == 1
