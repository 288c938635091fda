"""Compressed files: whole, or one clear error, wherever they are cut and however many frames they have."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from fastcollate.errors import SourceReadError
from fastcollate.sources.compression import COMPRESSIONS, open_compressed

zstandard = pytest.importorskip("zstandard")
DICE = random.Random(3)
RAW = b"".join(b'{"number": %d}\n' % DICE.randrange(10**9) for _ in range(3000))
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress, "zstd": zstandard.ZstdCompressor(write_checksum=True).compress, "bz2": bz2.compress,
    "xz": lzma.compress,
}  # fmt: skip
EVERY = pytest.mark.parametrize("compression", sorted(COMPRESS))


class Slow(io.BytesIO):
    """A file that gives fewer bytes than it is asked for."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(size or 0, 7) if size and size > 0 else size)


def read(data: bytes, compression: str) -> bytes:
    found = open_compressed(io.BytesIO(data), compression, "a.jsonl").read()
    if len(data) < 20_000:
        assert open_compressed(Slow(data), compression, "a.jsonl").read() == found
    return found


def test_every_ending_is_tested() -> None:
    assert {*COMPRESSIONS.values()} == {*COMPRESS}


@EVERY
def test_one_frame_or_many(compression: str) -> None:
    compress = COMPRESS[compression]
    assert read(compress(RAW), compression) == RAW
    assert read(compress(RAW[:100]) + compress(b"") + compress(RAW[100:200]), compression) == RAW[:200]
    assert read(b"".join(compress(RAW[i : i + 50]) for i in range(0, 1000, 50)), compression) == RAW[:1000]


@EVERY
@pytest.mark.parametrize("num_frames", [1, 2])
def test_cut_at_any_byte(compression: str, num_frames: int) -> None:
    compress, size = COMPRESS[compression], len(RAW[:9000]) // num_frames
    frames = [compress(RAW[:9000][i * size : (i + 1) * size]) for i in range(num_frames)]
    data, ends = b"".join(frames), {len(frames[0]), sum(map(len, frames))}
    for cut in {*range(1, 40), *range(ends.pop() - 40, len(data)), *range(0, len(data), 23)} - {len(frames[0]), 0}:
        with pytest.raises(SourceReadError, match=rf"a\.jsonl: ends at byte {cut} inside its compressed data"):
            open_compressed(io.BytesIO(data[:cut]), compression, "a.jsonl").read()


@EVERY
def test_a_changed_bit_is_noticed(compression: str) -> None:
    data = COMPRESS[compression](RAW[:3000]) + COMPRESS[compression](RAW[3000:6000])
    for _ in range(300):
        place, bit = DICE.randrange(len(data)), 1 << DICE.randrange(8)
        changed = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
        with contextlib.suppress(SourceReadError):
            found = open_compressed(io.BytesIO(changed), compression, "a.jsonl").read()
            assert found == RAW[:6000]  # a bit that means nothing, such as gzip's time


@EVERY
def test_something_else_behind_the_frames(compression: str) -> None:
    data = COMPRESS[compression](RAW)
    with pytest.raises(SourceReadError, match=r"is damaged before byte|ends at byte"):
        read(data + b"garbage and more of it, longer than a header", compression)
    if compression in ("gzip", "xz"):
        assert read(data + bytes(5000), compression) == RAW
        assert read(COMPRESS[compression](RAW[:50]) + bytes(4) + data, compression) == RAW[:50] + RAW


def test_frames_that_are_to_be_skipped() -> None:
    skipped = struct.pack("<II", 0x184D2A50, 5) + b"hello"
    frame = COMPRESS["zstd"](RAW)
    assert read(skipped + frame + skipped + frame + skipped, "zstd") == RAW * 2


@pytest.mark.slow
@EVERY
def test_what_grows_much_takes_little_at_once(compression: str, tmp_path: Path) -> None:
    size = 50_000_000
    path = tmp_path / "a"
    path.write_bytes(COMPRESS[compression](bytes(size)))
    total = 0
    with open(path, "rb") as raw, open_compressed(raw, compression, "a") as file:
        room = bytearray(1 << 20)
        while count := file.readinto(room):  # type: ignore[attr-defined]
            total += count
    assert total == size
    assert raw.closed
