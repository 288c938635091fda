"""One job at a time below a URL, kept by objects that only one can create.

`.lock/000001` is the first job's. Its owner writes it anew every few seconds; a job that finds it unchanged for long,
or its process gone from this machine, takes over by creating the next number, which the storage grants to one alone.
Who no longer has the highest number has lost the store, and stops. No clock of another machine is compared with.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fastcollate.errors import InputError, SourceReadError
from fastcollate.ingest.lock import is_ours, refuse_foreign
from fastcollate.store import remote

LOCKS = ".lock/"
JOB = ".job/"  # what is noted of an unfinished job
BEAT_S = 10.0  # seconds between two signs of life
DEAD_S = 90.0  # seconds without one
_POLL_S = 1.0
_LINE_S = 10.0


class StorageLock:
    """The right to write a store below a URL.

    Attributes:
        token: names the owner; with `number`, its place in the row of owners.
        waited: whether another job held it.
    """

    def __init__(self, folder: remote.Objects, *, wait: bool) -> None:
        self._folder, self._wait = folder, wait
        self.token, self.number = secrets.token_hex(8), 0
        self.waited = self._was_empty = self._is_lost = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._started = int(time.time())

    def __enter__(self) -> StorageLock:
        refuse_foreign(self._folder, [*self._folder.found()])
        self._acquire()
        self._was_empty = not self._folder.found() and not self._folder.found(JOB)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        with contextlib.suppress(SourceReadError):  # a lock that stays is taken over
            mine = f"{LOCKS}{self.number:06}"
            self._folder.remove(name for name in self._folder.found(LOCKS) if name <= mine)

    def check(self) -> None:
        """Ask the storage whether the lock is still this job's.

        Raises:
            SourceReadError: another job has taken the store over.
        """
        if self._is_lost or not holds_lock(self._folder, self.number, self.token):
            self._is_lost = True
            raise SourceReadError(
                f"{self._folder}: another job has taken this store over, as this one gave no sign of life for "
                f"{DEAD_S:.0f} s; run the same command again"
            )

    def remove_folder(self) -> None:
        """Remove all that this job has made where nothing lay before it."""
        if self._was_empty:
            self._folder.remove([*self._folder.found(JOB), *filter(is_ours, self._folder.found())])

    def _acquire(self) -> None:
        watched: tuple[bytes | None, float] = (None, 0.0)
        said = 0.0
        while True:
            top = max(self._folder.found(LOCKS), default=None)
            content = None if top is None else self._folder.get(top)
            if top is not None and content is None:
                continue  # it was just given back
            if content is None or _is_gone(content) or self._is_silent(content, watched):
                self.number = 1 + int((top or "0").removeprefix(LOCKS))
                if self._folder.write(f"{LOCKS}{self.number:06}", self._sign(0), create=True):
                    return
                continue
            says = f"{self._folder}: another job is writing this store{_holder(content)}"
            if not self._wait:
                raise InputError(
                    f"{says}; wait for it, or stop it first; one that died elsewhere is taken over by a job that waits"
                )
            if content != watched[0]:
                watched = content, time.monotonic()
            if not said or time.monotonic() - said > _LINE_S:
                print(f"{says}; waiting for it", file=sys.stderr, flush=True)
                said = time.monotonic()
            self.waited = True
            time.sleep(_POLL_S)

    def _is_silent(self, content: bytes, watched: tuple[bytes | None, float]) -> bool:
        return content == watched[0] and time.monotonic() - watched[1] > DEAD_S

    def _sign(self, beat: int) -> bytes:
        who = {"token": self.token, "pid": os.getpid(), "host": socket.gethostname(), "process": _process(os.getpid())}
        return json.dumps({**who, "started": self._started, "beat": beat}).encode()

    def _beat(self) -> None:
        beat = 0
        while not self._end.wait(BEAT_S):
            beat += 1
            with contextlib.suppress(SourceReadError):  # the next one may pass
                if not holds_lock(self._folder, self.number, self.token):
                    self._is_lost = True
                    return
                self._folder.write(f"{LOCKS}{self.number:06}", self._sign(beat))


def holds_lock(folder: remote.Objects, number: int, token: str) -> bool:
    """Whether a lock is still its owner's: there, and no higher one."""
    found = _parsed(folder.get(f"{LOCKS}{number:06}") or b"")
    return bool(found.get("token") == token) and folder.find(f"{LOCKS}{number + 1:06}") is None


def _parsed(content: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(content)
        return found if isinstance(found, dict) else {}
    return {}


def _holder(content: bytes) -> str:
    found = _parsed(content)
    seconds = max(0, int(time.time()) - int(found.get("started", time.time())))
    return f" (process {found.get('pid')} on {found.get('host')}, for {seconds} s)"


def _process(pid: int) -> list[str]:
    """A process of this machine and this space of process numbers, as no other is or will be; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return []
    if start[0] in "ZX":  # ended
        return []
    return [boot, os.readlink("/proc/self/ns/pid"), str(pid), start[19]]


def _is_gone(content: bytes) -> bool:
    """Whether a lock's owner was a process of this machine that has ended."""
    found = _parsed(content)
    process, mine = found.get("process"), _process(os.getpid())
    if not process or not mine or process[:2] != mine[:2]:
        return False
    return bool(_process(int(process[2])) != process)
