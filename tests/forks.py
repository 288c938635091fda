"""Scripts of tests run in forks of a process that has imported torch and the loader: that takes seconds, a fork none.

`Forks` starts that process, `python -m tests.forks SOCKET`, which listens on a Unix socket: what is to run comes as a
line of JSON with its three streams, the exit status goes back. Ranks find in their environment what `torchrun` would
put there. `python tests/forks.py SOCKET ARGUMENTS` is the command `fastcollate` by way of it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

TYPE_CHECKING = False  # `typing` takes longer than all that a command needs here
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = [
    "fastcollate.load.loader", "fastcollate.train.loop", "fastcollate.cli.app", "torch.distributed.tensor", "gigatoken",
    "matplotlib.pyplot", "torch._dynamo",
]  # fmt: skip


class Forks:
    """Starts the process when it is first needed, and again where a script took too long."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory()

    def run(
        self,
        what: str | Path,
        *arguments: object,
        cwd: Path,
        num_ranks: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a script's text, a file, or a module (`"-m name"`); with `num_ranks` in so many processes at once."""
        if isinstance(what, str) and not what.startswith("-m "):
            (cwd / "script.py").write_text(what)
            what = cwd / "script.py"
        names = [Path(self._folder.name) / name for name in ("out", "err")]
        try:
            with open(os.devnull) as nothing, open(names[0], "wb") as out, open(names[1], "wb") as err:
                streams = [nothing.fileno(), out.fileno(), err.fileno()]
                values = {**os.environ, **(environment or {})}
                status = ask(self.address, str(what), arguments, streams, str(cwd), values, num_ranks)
        except BaseException:  # its time is up, or Ctrl-C
            self.close()
            raise
        said, told = (name.read_text() for name in names)
        return subprocess.CompletedProcess([str(what), *map(str, arguments)], status, said, told)

    @property
    def address(self) -> str:
        """The socket of the process, which runs."""
        address = Path(self._folder.name) / "socket"
        if self._process is None:
            address.unlink(missing_ok=True)
            command = [sys.executable, "-m", "tests.forks", str(address)]
            self._process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE)
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == b"ready\n"
        return str(address)

    def close(self) -> None:
        """End the process, with what still runs of its scripts."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None


def ask(
    address: str,
    what: str,
    arguments: Any,
    streams: list[int],
    cwd: str,
    environment: Mapping[str, str],
    num_ranks: int = 0,
) -> int:
    """Have it run; its exit status."""
    request = {
        "what": what, "arguments": [*map(str, arguments)], "cwd": cwd, "environment": {**environment},
        "num_ranks": num_ranks,
    }  # fmt: skip
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [b"+"], streams)
        connection.sendall(json.dumps(request).encode() + b"\n")
        return int(connection.makefile().readline())


# -------------------------------------------------------------------------------------------------- the process itself


def _requests(address: str) -> dict[str, Any]:
    """In a fork for each connection, and there in one for each rank: what it is to run."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks are not waited for here
        while True:
            connection, _ = listener.accept()
            if not os.fork():
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile().readline())
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    port = _free_port()
    children = set()
    for rank in range(max(request["num_ranks"], 1)):
        if not (child := os.fork()):
            connection.close()
            return {**request, "environment": _environment(request, rank, port)}
        children.add(child)
    status = _wait(children)
    connection.sendall(f"{status}\n".encode())
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(request: dict[str, Any], rank: int, port: int) -> dict[str, str]:
    if not request["num_ranks"]:
        return dict(request["environment"])
    number = str(request["num_ranks"])
    ranks = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return {**request["environment"], **ranks}


def _wait(children: set[int]) -> int:
    """The first exit status that is not 0; the other ranks are ended then, for they may wait for that one."""
    status = 0
    while children:
        child, ended = os.wait()
        children.discard(child)
        if ended and not status:
            status = os.waitstatus_to_exitcode(ended)
            for other in children:
                os.kill(other, signal.SIGKILL)
    return status


def _become(request: dict[str, Any]) -> None:
    """Run, with folder and environment as of a process of its own."""
    import runpy

    import torch

    environment = request["environment"]
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(environment)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        errors = "backslashreplace" if name == "stderr" else "strict"
        setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", errors=errors, closefd=False))  # noqa: SIM115
    if "OMP_NUM_THREADS" in environment:  # it is read when torch is imported
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    what = request["what"]
    sys.argv = [what, *request["arguments"]]
    if what.startswith("-m "):
        sys.path[0] = request["cwd"]
        runpy.run_module(what.removeprefix("-m "), run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(what).parent)
        runpy.run_path(what, run_name="__main__")


def _import() -> None:
    import contextlib
    import importlib

    for name in IMPORTED:
        with contextlib.suppress(ImportError):  # an optional package
            importlib.import_module(name)


if __name__ == "__main__":
    if __package__:
        _import()
        _become(_requests(sys.argv[1]))
    else:
        sys.exit(ask(sys.argv[1], "-m fastcollate", sys.argv[2:], [0, 1, 2], os.getcwd(), os.environ))
