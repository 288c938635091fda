"""Two ranks against one: the same losses, every row once, also when their number changes on the way."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from fastcollate.store.store import TokenStore
from fastcollate.train import ranks as parallel
from tests.forks import Forks
from tests.helpers import losses, metrics, write_store

# Train on a tiny vocabulary, note each row that a rank is given by its first token, and fail where a test wants it.
SCRIPT = """
import json, os, sys
from pathlib import Path
import fastcollate.train.model as gpt2
from fastcollate.train.step import Feed
from fastcollate.train.options import TrainOptions
from fastcollate.train.ranks import join_ranks
from fastcollate.train.step import Stepper
from fastcollate.train.loop import train

gpt2.CONFIGS = {**gpt2.CONFIGS, "tiny": gpt2.GPT2Config(
    num_layers=2, num_heads=2, width=16, vocab_size=300, context_length=64)}
store, out, fail_at, values = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
ranks = join_ranks("cpu")
step, done = Stepper.step, [0]
attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

def noted_step(self, batches, *args):
    done[0] += 1
    if done[0] == fail_at and ranks.rank == ranks.world_size - 1 and attempt == "0":
        os.kill(os.getpid(), 9)
    loss = step(self, batches, *args)
    with open(f"{out}.rows-{ranks.rank}-of-{ranks.world_size}", "a") as file:
        for batch in batches:
            if batch.num_useful:
                file.write(json.dumps([done[0], batch.inputs[:, :2].tolist()]) + "\\n")
    return loss

Stepper.step = noted_step
options = TrainOptions(out=Path(out), device="cpu", tensorboard=False, sample_tokens=0, **values)
train(store, options, ranks=ranks, progress=False)

def gloo_threads():
    return sum("gloo" in Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task"))

before = gloo_threads()
ranks.close()
after = gloo_threads()
assert after <= before // 2, (before, after)  # the gradients' group may live on, PyTorch keeps it
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """101 rows, each known by its first two tokens."""
    random = np.random.default_rng(0)
    rows = []
    for row in range(101):
        length = int(random.integers(4, 41))
        ids = [row // 20, row % 20, *random.integers(20, 299, length - 2).tolist()]
        rows.append(([3, length - 3], ids))
    tokenizer = {"name": "gpt2", "fingerprint": "00", "vocab_size": 300, "pad_token_id": 299}
    return write_store(tmp_path_factory.mktemp("ranks") / "store", rows, shard_rows=50, tokenizer=tokenizer)


def launch(
    forks: Forks, num_ranks: int, store: TokenStore, out: Path, *, fail_at: int = 0, restarts: int = 0, **values: object
) -> int:
    """Train on so many ranks; with `restarts` under `torchrun` itself."""
    arguments = [str(store.path), str(out), str(fail_at), json.dumps(values)]
    if restarts:
        script = out.parent / "script.py"
        script.write_text(SCRIPT)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        command = [sys.executable, *launcher, f"--max-restarts={restarts}", str(script), *arguments]
        process = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    else:
        process = forks.run(SCRIPT, *arguments, cwd=out.parent, num_ranks=num_ranks)
    if process.returncode and not fail_at:
        pytest.fail(process.stderr[:3000])
    return process.returncode


def rows_seen(out: Path) -> Counter[int]:
    seen: Counter[int] = Counter()
    for file in out.parent.glob(f"{out.name}.rows-*"):
        for line in file.read_text().splitlines():
            seen.update(first * 20 + second for first, second in json.loads(line)[1])
    return seen


COMMON = {"train_share": 1.0, "test_share": 0.0, "batch_size": 8, "schedule": "constant", "eval_every": 0}


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(forks: Forks, tmp_path: Path, store: TokenStore) -> None:
    values = {**COMMON, "epochs": 2, "mask_prompt": True, "accumulate": 2}
    launch(forks, 1, store, tmp_path / "one", **values)
    launch(forks, 2, store, tmp_path / "two", **values)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 14  # 13 batches an epoch, the last of 5 rows: three for one rank, two for the other
    assert two == pytest.approx(one, abs=1e-5)
    assert [s["useful_tokens"] for s in metrics(tmp_path / "one")] == [
        s["useful_tokens"] for s in metrics(tmp_path / "two")
    ]
    assert rows_seen(tmp_path / "one") == rows_seen(tmp_path / "two") == Counter(dict.fromkeys(range(101), 2))


def part_of(store: TokenStore, path: Path, num_rows: int) -> TokenStore:
    """A store of the first rows."""
    rows = [([3, len(row.input_ids) - 3], row.input_ids.tolist()) for row in itertools.islice(store, num_rows)]
    return write_store(path, rows, shard_rows=50, tokenizer=store.manifest["tokenizer"])


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("num_ranks", "num_rows", "values"),
    [
        (2, 17, {"batch_size": 8, "epochs": 2}),  # one row is left for two ranks
        (3, 14, {"batch_size": 6, "epochs": 1, "accumulate": 2, "checkpoint_every": 1}),  # two rows for three
        (3, 8, {"batch_size": 6, "epochs": 1, "policy": "packed", "capacity": 64, "max_steps": 9}),
        (2, 12, {"epochs": 1, "train_share": 0.9, "test_share": 0.0, "eval_every": 1}),  # one row to validate
    ],
)
def test_ranks_end_together_where_the_last_batch_has_fewer_rows_than_ranks(
    forks: Forks, tmp_path: Path, store: TokenStore, num_ranks: int, num_rows: int, values: dict[str, Any]
) -> None:
    part = part_of(store, tmp_path / "store", num_rows)
    values = {**COMMON, **values}
    launch(forks, 1, part, tmp_path / "one", **values)
    launch(forks, num_ranks, part, tmp_path / "many", **values)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert rows_seen(tmp_path / "many") == rows_seen(tmp_path / "one")


@pytest.fixture(scope="module")
def whole(forks: Forks, tmp_path_factory: pytest.TempPathFactory, store: TokenStore) -> list[float | None]:
    """The losses of an epoch in one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    launch(forks, 1, store, out, epochs=1, **COMMON)
    return losses(out)


@pytest.mark.slow
def test_a_killed_rank_restarts_from_the_checkpoint(
    forks: Forks, tmp_path: Path, store: TokenStore, whole: list[float | None]
) -> None:
    values = {**COMMON, "epochs": 1, "checkpoint_every": 3, "resume": True}
    assert launch(forks, 2, store, tmp_path / "run", fail_at=8, restarts=1, **values) == 0
    assert losses(tmp_path / "run") == pytest.approx(whole, abs=1e-5)
    assert [step["step"] for step in metrics(tmp_path / "run")] == list(range(1, 14))


@pytest.mark.slow
def test_a_restarted_rank_waits_out_the_address_of_the_attempt_before(monkeypatch: pytest.MonkeyPatch) -> None:
    lent = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with socket.socket() as dead:
        dead.bind(("localhost", 0))  # bound, never listening: a connection is refused
        lent.set(parallel._STORE_KEY, str(dead.getsockname()[1]))
        monkeypatch.setattr(parallel, "_CONNECT_TIMEOUT", timedelta(seconds=0.5))
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(lent.port))
        with ThreadPoolExecutor() as pool:
            second = pool.submit(parallel._store_of_this_attempt, 1)
            time.sleep(1)
            assert not second.done()
            first = parallel._store_of_this_attempt(0)
            first.set("greeting", "hello")
            assert second.result(timeout=60).get("greeting") == b"hello"


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_gets_exactly_the_rows_not_yet_seen(
    forks: Forks, tmp_path: Path, store: TokenStore, whole: list[float | None], before: int, after: int
) -> None:
    values = {**COMMON, "resume": True}
    launch(forks, before, store, tmp_path / "run", max_steps=5, **values)
    assert sum(rows_seen(tmp_path / "run").values()) == 40
    launch(forks, after, store, tmp_path / "run", epochs=1, **values)
    assert rows_seen(tmp_path / "run") == Counter(range(101))
    assert losses(tmp_path / "run") == pytest.approx(whole, abs=1e-5)
