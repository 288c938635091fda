"""kill -9 at random moments, shared by the scripts that show what a killed job leaves behind."""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import Callable
from pathlib import Path


def run_and_kill(command: list[str], delay_s: float) -> bool:
    """Run a command and kill it after a while; whether it was still running then.

    Raises:
        RuntimeError: it failed by itself.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, errors = process.communicate(timeout=delay_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {errors.decode()}")
    return False


def kill_many_times(
    command: list[str],
    num_kills: int,
    *,
    dice: random.Random,
    delays_s: tuple[float, float],
    progress: Callable[[], int],
    finished: Callable[[], None],
) -> list[int]:
    """Kill a resumable command at random moments, starting it again each time.

    Args:
        command: what to run.
        num_kills: how often it is killed.
        dice: the source of the moments.
        delays_s: the earliest and the latest moment of a kill after a start; the latest longer than a whole run takes.
        progress: how far the command has come.
        finished: called when the command has come to its end between two kills; checks what it left, and removes it.

    Returns:
        How far the command had come at each kill.
    """
    kills: list[int] = []
    while len(kills) < num_kills:
        delay_s = dice.uniform(*delays_s)
        if run_and_kill(command, delay_s):
            kills.append(progress())
            print(f"kill {len(kills)} after {delay_s:.2f} s at {kills[-1]}", flush=True)
        else:
            print(f"finished after {len(kills)} kills; from the start again", flush=True)
            finished()
    return kills


def store_hash(store: Path) -> str:
    """Over every file's name and bytes, and what a killed run might have left behind; names of sources are no part."""
    digest = hashlib.sha256()
    for file in sorted(store.iterdir()):
        if file.name != "sources.json":
            digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
