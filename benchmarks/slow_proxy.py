"""An HTTP proxy before a storage server that waits before each request, limits the rate, and injects faults.

Run as `python -m benchmarks.slow_proxy UPSTREAM_HOST:PORT [--port P] [--latency-ms 20] [--rate-mb 200]`, or in a test's
own process, as a thread:

    with SlowProxy("127.0.0.1:8333", latency_s=0.02) as proxy:
        proxy.address  # "127.0.0.1:40001"
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

_CHUNK = 1 << 18
FAULTS = ("500", "503", "reset", "cut", "flip", "slow")
Faults = Callable[[str, str], str | None]


class SlowProxy:
    """A proxy in a thread of its own; what it does can be changed while it runs.

    Args:
        upstream: host and port of the server.
        port: its own; one that is free by default.
        latency_s: waited before a request is passed on.
        bytes_per_s: of all connections and both directions together; `None` for no limit.
        faults: told of each request's method and path, gives what is to go wrong with it, or `None`: an answer `500` or
            `503`; `reset`, the connection is reset before the request is passed on; `cut`, after half of the answer's
            body; `flip`, one bit of that is another; `slow`, the answer waits two seconds in its midst.

    Attributes:
        counts: requests by method, `sent` and `received` body bytes as the client sees them, faults by name.
    """

    def __init__(
        self, upstream: str, *, port: int = 0, latency_s: float = 0.0, bytes_per_s: float | None = None,
        faults: Faults = lambda method, path: None,
    ) -> None:  # fmt: skip
        host, _, number = upstream.rpartition(":")
        self._upstream = host, int(number)
        self.latency_s, self.bytes_per_s, self.faults = latency_s, bytes_per_s, faults
        self.counts: Counter[str] = Counter()
        self.address, self._port, self._free_at = "", port, 0.0
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> SlowProxy:
        self._thread.start()
        self._is_up.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def reset_all(self) -> None:
        """Reset every connection, now."""

        def reset() -> None:
            for writer in [*self._writers]:
                _reset(writer)

        self._loop.call_soon_threadsafe(reset)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", self._port, limit=4 * _CHUNK)
        )
        self.address = "{}:{}".format(*server.sockets[0].getsockname()[:2])
        self._is_up.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        up: Any = None
        try:
            while head := await _head(reader):
                if up is None:
                    up = await asyncio.open_connection(*self._upstream, limit=4 * _CHUNK)
                if not await self._request(head, reader, writer, *up):
                    break
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # one side has gone
        finally:
            self._writers.discard(writer)
            for one in (writer, *([up[1]] if up else [])):
                with contextlib.suppress(Exception):
                    one.close()

    async def _request(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader, up_writer: asyncio.StreamWriter,
    ) -> bool:  # fmt: skip
        """One request and its answer; whether the connection goes on."""
        method, path = head.split(b" ", 2)[:2]
        self.counts[method.decode()] += 1
        fault = self.faults(method.decode(), path.decode())
        if fault:
            self.counts[fault] += 1
        await asyncio.sleep(self.latency_s)
        if fault == "reset":
            _reset(writer)
            return False
        fields = _fields(head)
        if fields.pop("expect", ""):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:"))
        passed = None if fault in ("500", "503") else up_writer
        if passed:
            passed.write(head)
        size = await self._body(fields, reader, passed)  # before the sum is read: others add to it meanwhile
        self.counts["sent"] += size
        if passed is None:
            reason = b"Internal Server Error" if fault == "500" else b"Slow Down"
            writer.write(b"HTTP/1.1 %s %s\r\nContent-Length: 0\r\n\r\n" % (str(fault).encode(), reason))
            await writer.drain()
            return True
        answer = await _head(up_reader)
        while answer.startswith(b"HTTP/1.1 100"):
            answer = await _head(up_reader)
        fields, status = _fields(answer), int(answer.split(b" ", 2)[1])
        writer.write(answer)
        if method != b"HEAD" and status not in (204, 304):
            size = await self._body(
                fields, up_reader, writer, fault
            )  # before the sum is read: others add to it meanwhile
            self.counts["received"] += size
        await writer.drain()
        if fault == "cut":
            _reset(writer)
        return fault != "cut" and fields.get("connection", "").lower() != "close"

    async def _body(
        self, fields: dict[str, str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter | None,
        fault: str | None = None,
    ) -> int:  # fmt: skip
        """Pass a body on; the number of its bytes."""
        if fields.get("transfer-encoding", "").lower() == "chunked":
            total = 0
            while True:
                line = await reader.readline()
                size = int(line.split(b";")[0], 16)
                if writer:
                    writer.write(line)
                await self._bytes(size + 2, reader, writer, None)
                total += size
                if not size:
                    return total
        return await self._bytes(int(fields.get("content-length", "0")), reader, writer, fault)

    async def _bytes(
        self, size: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter | None, fault: str | None
    ) -> int:
        left = size
        while left:
            data = await reader.readexactly(min(left, _CHUNK))
            left -= len(data)
            if self.bytes_per_s:
                now = self._loop.time()
                self._free_at = max(now, self._free_at) + len(data) / self.bytes_per_s
                await asyncio.sleep(self._free_at - now)
            if fault == "slow":
                fault = None
                await asyncio.sleep(2.0)
            elif fault == "flip":
                data, fault = data[:-1] + bytes([data[-1] ^ 1]), None
            elif fault == "cut" and left <= size // 2:
                data, left = data[: len(data) // 2], 0
            if writer:
                writer.write(data)
                await writer.drain()
        return size


async def _head(reader: asyncio.StreamReader) -> bytes:
    """The first lines of a request or an answer; empty where the other side has closed."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return b""


def _fields(head: bytes) -> dict[str, str]:
    pairs = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:] if line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection so that the other side sees a reset, not an end."""
    connection = writer.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("upstream")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--rate-mb", type=float, default=0.0)
    given = parser.parse_args()
    rate = given.rate_mb * 1e6 or None
    with SlowProxy(given.upstream, port=given.port, latency_s=given.latency_ms / 1e3, bytes_per_s=rate) as proxy:
        print(proxy.address, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
