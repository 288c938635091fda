"""The part `faults` of `benchmarks.remote_read`: readers of a store where each so many requests go wrong."""

from __future__ import annotations

import faulthandler
import hashlib
import json
import random
import re
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.harness import save_part
from benchmarks.remote_stores import OPTIONS, local_digest, make_store, tiny, upload
from benchmarks.slow_proxy import FAULTS, SlowProxy
from fastcollate import BatchLoader, TokenStore
from fastcollate.errors import InputError

CALL_LIMIT_S = 120  # of each call: opening, or the next batch
SHARDS, ROWS = 1000, 200
SHARES = (0.2, 0.2, 0.5)  # of requests that go wrong, reader after reader
MOST_ERRORS = 100  # of one reader
Result = TypeVar("Result")


class Calls:
    """Calls that end in time, or with the process; those that fail clearly are counted and made again."""

    def __init__(self) -> None:
        self.errors, self.longest_s = Counter[str](), 0.0

    def make(self, action: Callable[[], Result]) -> Result:
        while True:
            faulthandler.dump_traceback_later(CALL_LIMIT_S, exit=True)
            start = time.monotonic()
            try:
                return action()
            except InputError as error:  # whatever else ends this process
                what = re.sub(r"shard-\d+", "shard-N", str(error).split("bucket/faults/")[-1])
                self.errors[what] += 1
                if self.errors.total() > MOST_ERRORS:
                    raise
            finally:
                self.longest_s = max(self.longest_s, time.monotonic() - start)
                faulthandler.cancel_dump_traceback_later()


def through_faults(url: str, cache: str) -> dict[str, Any]:
    """Read an epoch whatever goes wrong: after an error from the state that the loader had."""
    warnings.simplefilter("ignore")
    list(BatchLoader(tiny(Path(cache).parent / "tiny"), **OPTIONS))  # compiles
    calls, digest = Calls(), hashlib.sha256()
    store = calls.make(lambda: TokenStore(url, cache=cache))
    loader = BatchLoader(store, **OPTIONS)
    batches = iter(loader)

    def following() -> Any:
        nonlocal loader, batches
        try:
            return next(batches, None)
        except InputError:
            state = loader.state_dict()
            loader = BatchLoader(store, **OPTIONS)
            loader.load_state_dict(state)
            batches = iter(loader)
            raise

    while (batch := calls.make(following)) is not None:
        digest.update(batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes())
    return {"digest": digest.hexdigest(), "errors": calls.errors, "longest_s": round(calls.longest_s, 1)}


def inject_faults(proxy: SlowProxy, root: Path, wanted: int) -> None:
    """Read a store of many small shards, again and again, until so many faults were injected."""
    make_store(root / "faults", SHARDS, ROWS)
    upload(root / "faults", proxy)
    expected, dice, kinds = local_digest(root / "faults"), random.Random(5), Counter[str]()
    lock, share = threading.Lock(), 0.0

    def choose(method: str, path: str) -> str | None:
        with lock:
            if dice.random() > share or kinds.total() >= wanted:
                return None
            kind = dice.choice(FAULTS)
            kinds[kind] += 1
            return kind

    proxy.faults, errors, seconds, longest = choose, Counter[str](), list[float](), 0.0
    while kinds.total() < wanted:
        share, start = SHARES[len(seconds) % len(SHARES)], time.monotonic()
        one = read_once(root / f"faults-cache{len(seconds)}")
        if one["digest"] != expected:
            raise SystemExit("a batch differs from the local store's")
        errors.update(one["errors"])
        seconds.append(round(time.monotonic() - start, 1))
        longest = max(longest, one["longest_s"])
        print(len(seconds), dict(kinds), dict(errors), seconds, longest, flush=True)
    proxy.faults = lambda method, path: None
    what = (
        f"readers of {SHARDS:,} shards, each with an empty cache; {SHARES} of the requests go wrong in turn; every "
        "batch of every reader is that of the local store; after an error a reader goes on from its state"
    )
    save_part("remote_read", "faults", {
        "what": what, "faults": dict(kinds), "readers": len(seconds), "wrong_rows": 0, "errors_told": dict(errors),
        "call_limit_s": CALL_LIMIT_S, "longest_call_s": longest, "seconds_a_reader": seconds,
    })  # fmt: skip


def read_once(cache: Path) -> dict[str, Any]:
    """What a reader in a process of its own found."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.remote_read",
        "--reader",
        "faults",
        "s3://bucket/faults",
        str(cache),
        "",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=20 * CALL_LIMIT_S, check=False)
    if done.returncode:
        raise SystemExit("a reader hung, or stopped without a clear error, as it says above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
