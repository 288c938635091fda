"""Network sources: the whole content or one clear line, wherever the connection breaks, and never a secret."""

from __future__ import annotations

import gzip
import io
import json
import re
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastcollate.errors import InputError, SourceReadError
from fastcollate.ingest.job import prepare
from fastcollate.sources import remote
from fastcollate.sources.blocks import read_blocks
from fastcollate.sources.find import find_sources
from fastcollate.store.store import TokenStore

pytest.importorskip("aiohttp")
SECRET = "s3cr3t"
RECORDS = [{"instruction": f"Say {number}.", "output": f"{number}!"} for number in range(3000)]
LINES = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)


class Site:
    """A web server of this machine and how it behaves; `on_get` may change that at each request for content."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.statuses: list[int] = []  # of the next requests
        self.cut: int | None = None  # bytes after which each answer breaks
        self.has_ranges, self.has_lengths, self.is_gzip = True, True, False
        self.gets: list[str] = []  # the ranges asked for
        self.on_get: Callable[[], object] = lambda: None
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                site.answer(self, is_head=True)

            def do_GET(self) -> None:
                site.answer(self, is_head=False)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # the client went away
        self.address = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: Any, *, is_head: bool) -> None:
        request.close_connection = True
        status = self.statuses.pop(0) if self.statuses else 200
        path = request.path.partition("?")[0]
        data = self.files.get(request.path, self.files.get(path))
        if status == 200 and data is None:
            status = 404
        if status != 200:
            request.send_response(status)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")) if self.has_ranges else None
        start = int(wanted[1]) if wanted else 0
        body = gzip.compress(data) if self.is_gzip else data[start:]
        request.send_response(206 if wanted else 200)
        if wanted:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if self.is_gzip:
            request.send_header("Content-Encoding", "gzip")
        if self.has_lengths:
            request.send_header("Content-Length", str(len(body)))
        else:
            request.send_header("Transfer-Encoding", "chunked")
        if tag := self.tags.get(path):
            request.send_header("ETag" if tag[0] == '"' else "Last-Modified", tag)
        request.end_headers()
        if is_head:
            return
        self.gets.append(request.headers.get("Range", ""))
        sent = body if self.cut is None else body[: self.cut]
        if self.has_lengths:
            request.wfile.write(sent)
        else:
            request.wfile.write(b"".join(b"%x\r\n%b\r\n" % (len(sent[i : i + 999]), sent[i : i + 999])
                                         for i in range(0, len(sent), 999)))  # fmt: skip
            if len(sent) == len(body):
                request.wfile.write(b"0\r\n\r\n")
        request.wfile.flush()
        self.on_get()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(remote, "_TICK", 0.0)
    made = Site()
    yield made
    made.server.shutdown()
    made.server.server_close()


def content(sources: Any) -> bytes:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = b"".join(block.read() for block in read_blocks(find_sources(sources)))
    assert not any(SECRET in str(warning.message) for warning in said)
    return data


def refusal(sources: Any) -> str:
    """The error's message; nothing secret stands in it, in what its traceback prints, or in a warning."""
    with pytest.raises(InputError) as caught:
        content(sources)
    shown = "".join(traceback.format_exception(caught.value))
    assert SECRET not in shown
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://h/a.jsonl", "https://h/a.jsonl"),
        ("https://me:s3cr3t@h:81/a.jsonl", "https://h:81/a.jsonl"),
        ("https://s3cr3t@h/a.jsonl?x=s3cr3t&y#s3cr3t", "https://h/a.jsonl"),
        ("https://me:s3@cr3t@h/@scope/a.jsonl#s3cr3t?", "https://h/@scope/a.jsonl"),
        ("https://[::1]/a.jsonl?s3cr3t", "https://[::1]/a.jsonl"),
        ("HTTPS://h?s3cr3t", "HTTPS://h"),
        ("https://h/a?x=1\ns3cr3t", "https://h/a"),
        ("https:/me:s3cr3t@h/a", "https:/h/a"),
        ("simplecache::https://me:s3cr3t@h/a.jsonl?s3cr3t", "simplecache::https://h/a.jsonl"),
        ("zip://a.jsonl::https://h/a.zip?s3cr3t", "zip://a.jsonl::https://h/a.zip"),
        ("s3://bucket/a?.jsonl", "s3://bucket/a?.jsonl"),
        ("s3://bucket/a#1.jsonl?versionId=s3cr3t", "s3://bucket/a#1.jsonl"),
        ("sftp://me:s3cr3t@h/a.jsonl", "sftp://h/a.jsonl"),
        ("abfs://box@account.example/a.jsonl", "abfs://box@account.example/a.jsonl"),
        ("hf://datasets/me/set@main/a.jsonl", "hf://datasets/me/set@main/a.jsonl"),
        ("file:///a?b=c.jsonl", "file:///a?b=c.jsonl"),
        ("/a/b?c=d.jsonl", "/a/b?c=d.jsonl"),
    ],
)
def test_names(url: str, name: str) -> None:
    assert remote.name_of(url) == name


def test_a_password_that_was_not_escaped_is_not_shown() -> None:
    for url in ("https://me:s3cr3t/x@h/a.jsonl", "https://me:s3cr3t?x@h/a.jsonl", "https://me:s3cr3t#x@h/a.jsonl"):
        assert SECRET not in remote.name_of(url)
        assert SECRET not in refusal(url)


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("has_lengths", [True, False])
@pytest.mark.parametrize("cut", [None, 1, 1000, 70_000])
def test_a_broken_connection_goes_on_where_it_broke(
    site: Site, has_ranges: bool, has_lengths: bool, cut: int | None
) -> None:
    site.files["/a.jsonl"] = LINES
    site.has_ranges, site.has_lengths, site.cut = has_ranges, has_lengths, cut

    def mend() -> None:  # after some breaks
        if len(site.gets) == 4:
            site.cut = None

    site.on_get = mend
    assert content(f"http://{site.address}/a.jsonl?sig={SECRET}") == LINES
    assert len(site.gets) >= (1 if cut is None else 5) or cut == 70_000


def test_a_connection_that_always_breaks_goes_on(site: Site) -> None:
    site.files["/a.jsonl"] = LINES * 40
    site.cut = 1_000_000
    assert content(f"http://{site.address}/a.jsonl") == LINES * 40
    starts = [int(wanted[6:-1] or 0) for wanted in site.gets]
    assert starts == sorted(starts)
    assert len(set(starts)) >= len(LINES * 40) // site.cut
    site.has_ranges = False  # it never comes to the end then
    assert refusal(f"http://{site.address}/a.jsonl").endswith("(tried 5 times)")


def test_no_more_tries_than_are_said(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.files["/a.jsonl"] = LINES
    site.cut = 0
    message = refusal(f"http://{site.address}/a.jsonl?sig={SECRET}")
    assert message == f"http://{site.address}/a.jsonl: the connection broke; try again later (tried 5 times)"
    assert len(site.gets) == 5
    site.files["/a.jsonl"], site.cut, site.gets[:] = LINES * 40, 500_000, []
    monkeypatch.setattr(remote, "_MOST_OPENINGS", 7)
    message = refusal(f"http://{site.address}/a.jsonl")
    if "tried 5 times" in message:  # a busy client, whose connections break before it has read anything of them
        assert 5 <= len(site.gets) <= 7
    else:
        assert "the connection broke 7 times" in message
        assert len(site.gets) == 7


@pytest.mark.parametrize("is_gzip", [False, True])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl", "a.csv", "a.parquet.gz"])
def test_every_format_over_a_bad_line(site: Site, tmp_path: Path, name: str, is_gzip: bool) -> None:
    table, path = pa.Table.from_pylist(RECORDS), io.BytesIO()
    pq.write_table(table, path)
    csv = "instruction,output\n" + "".join(f"{r['instruction']},{r['output']}\n" for r in RECORDS)
    data = {"parquet": path.getvalue(), "jsonl": LINES, "csv": csv.encode()}[name.split(".")[1]]
    data = gzip.compress(data) if name.endswith(".gz") else data
    (tmp_path / name).write_bytes(data)
    site.files[f"/{name}"], site.is_gzip = data, is_gzip
    site.cut, site.has_ranges = 2500, not is_gzip

    def mend() -> None:
        site.cut = None if len(site.gets) == 3 else site.cut

    site.on_get = mend
    assert content(f"http://{site.address}/{name}?download=true") == content(str(tmp_path / name))


STATUSES = {
    401: "HTTP 401, access denied", 403: "HTTP 403, access denied", 404: "no such file", 410: "no such file",
    429: "the server answers HTTP 429; try again later (tried 5 times)",
    400: "the server answers HTTP 400; check the address", 500: "the server answers HTTP 500; try again later (tried 5",
    503: "the server answers HTTP 503; try again later (tried 5 times)",
}  # fmt: skip


@pytest.mark.parametrize("status", sorted(STATUSES))
def test_statuses(site: Site, status: int) -> None:
    site.files["/a.jsonl"] = LINES
    site.statuses = [status] * 100
    message = refusal(f"http://me:{SECRET}@{site.address}/a.jsonl?sig={SECRET}")
    assert message.startswith(f"http://{site.address}/a.jsonl: {STATUSES[status]}")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_waited_for(site: Site, status: int) -> None:
    site.files["/a.jsonl"] = LINES
    site.statuses = [status] * 5  # a file is asked for by HEAD, then by GET
    assert content(f"http://{site.address}/a.jsonl") == LINES


def test_nobody_listens() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "_WAITS", (0.0,) * 4)
        message = refusal(f"http://me:{SECRET}@127.0.0.1:1/a.jsonl?{SECRET}")
    assert message.startswith("http://127.0.0.1:1/a.jsonl: no connection to the server; check the address")


@pytest.mark.parametrize("link", ["__cause__", "__context__"])
def test_a_host_that_is_not_known_is_said_at_once(link: str) -> None:
    """However deep a package hides it; and it is no missing file."""
    error = type("ConnectError", (FileNotFoundError,), {})("no")
    setattr(error, link, socket.gaierror(-2, "Name or service not known"))

    def ask() -> None:
        raise error

    with pytest.raises(SourceReadError, match="no such host, or this machine is offline; check") as caught:
        remote.attempt("hf://a/b.json", "hf://a/b.json", ask)
    assert "tried" not in str(caught.value)


@pytest.mark.parametrize("tags", [('"1"', '"2"'), ("Mon, 01 Jan 2024 00:00:00 GMT", "Mon, 01 Jan 2024 00:00:09 GMT")])
@pytest.mark.parametrize("cut", [None, 5000])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_change_while_it_is_read(site: Site, tags: tuple[str, str], cut: int | None, name: str) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(RECORDS), sink)
    site.files[f"/{name}"] = LINES if name == "a.jsonl" else sink.getvalue()
    site.tags[f"/{name}"], site.cut = tags[0], cut

    def change() -> None:
        site.tags[f"/{name}"] = tags[1]

    found = find_sources(f"http://{site.address}/{name}?sig={SECRET}")
    site.on_get = change
    with pytest.warns() if cut else warnings.catch_warnings(), pytest.raises(InputError) as caught:
        list(read_blocks(found))
    assert str(caught.value) == (
        f"http://{site.address}/{name}: was changed while it was read; start again when it is at rest"
    )


def test_a_change_of_size_while_it_is_read(site: Site) -> None:
    site.files["/a.jsonl"] = LINES

    def change() -> None:
        site.files["/a.jsonl"] = LINES + LINES

    site.on_get = change
    assert "was changed while it was read" in refusal(f"http://{site.address}/a.jsonl")


def test_a_time_that_is_another_at_each_question_is_no_change(site: Site) -> None:
    site.files["/a.jsonl"] = LINES
    clock = iter(range(10, 60))
    answer = site.answer

    def ticking(request: Any, *, is_head: bool) -> None:
        site.tags["/a.jsonl"] = f"Mon, 01 Jan 2024 00:00:{next(clock)} GMT"
        answer(request, is_head=is_head)

    site.answer = ticking  # type: ignore[method-assign]
    assert content(f"http://{site.address}/a.jsonl") == LINES


def test_a_file_in_another_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_WAITS", (0.0,) * 4)
    monkeypatch.setattr(remote, "_TICK", 0.0)
    files = fsspec.filesystem("memory")
    files.pipe("/remote/a.jsonl", LINES)
    breaks, opened = [5, 3, 3], []

    class Breaking(io.BytesIO):
        """Breaks after some reads, in each of the ways in which libraries say so."""

        reads = 0

        def read(self, size: int | None = -1, /) -> bytes:
            self.reads += 1
            if breaks and self.reads > breaks[0]:
                breaks.pop(0)
                raise (ConnectionResetError(f"?{SECRET}"), TimeoutError(f"https://h?{SECRET}"))[len(breaks) % 2]
            return super().read(min(size or 0, 999))

    def open_breaking(path: str, mode: str, **options: Any) -> Breaking:
        opened.append(Breaking(LINES))
        return opened[-1]

    monkeypatch.setattr(files, "open", open_breaking)
    assert content("memory://remote/a.jsonl") == LINES
    assert len(opened) == 4
    monkeypatch.undo()
    monkeypatch.setattr(remote, "_TICK", 0.0)
    blocks = read_blocks(find_sources("memory://remote/a.jsonl"))
    next(blocks)
    files.pipe("/remote/a.jsonl", LINES[::-1])
    with pytest.raises(InputError, match=r"^memory://remote/a\.jsonl: was changed while it was read"):
        list(blocks)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (type("NoCredentialsError", (Exception,), {})(f"{SECRET}"), "no credentials found; give"),
        (
            type("OfflineModeIsEnabled", (ConnectionError,), {})(f"https://h?{SECRET}"),
            "the Hugging Face hub is set off",
        ),
        (PermissionError(13, SECRET), "access denied"),
        (RuntimeError(f"https://h/?{SECRET}"), r"cannot be read \(RuntimeError"),
        (ValueError(f"memory://me:{SECRET}@h/"), r"not a path or URL that can be read \(ValueError"),
    ],
)
def test_errors_of_libraries(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def fail(path: str) -> None:
        raise error

    monkeypatch.setattr(fsspec.filesystem("memory"), "info", fail)
    for url in (f"memory://me:{SECRET}@remote/a.jsonl", "memory://remote/a.jsonl"):
        if SECRET in url or SECRET not in str(error) or "://" in str(error):
            assert re.match(rf"memory://remote/a\.jsonl: {said}", refusal(url))


@pytest.mark.slow
def test_no_secret_in_the_store_and_urls_are_told_apart(site: Site, tmp_path: Path) -> None:
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    site.files[f"/get.jsonl?part=1&sig={SECRET}"] = LINES[:half]
    site.files[f"/get.jsonl?part=2&sig={SECRET}"] = LINES[half:] + b'{"instruction": 1}\n'
    site.tags["/get.jsonl"] = '"a"'  # the same of both
    urls = [f"http://{site.address}/get.jsonl?part={part}&sig={SECRET}" for part in (1, 2)]
    assert prepare(urls, tmp_path / "s", workers=1, on_error="skip").num_rows == 3000
    written = b"".join(path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file())
    assert SECRET.encode() not in written
    assert b"/get.jsonl (query 2 of 2)" in (tmp_path / "s" / "skipped.txt").read_bytes()
    assert prepare(urls, tmp_path / "s", workers=1, on_error="skip").reused
    with pytest.raises(InputError, match=r"/get\.jsonl \(query 2 of 2\), line \d+"):
        prepare(urls, tmp_path / "t", workers=1)
    prepare(urls[0], tmp_path / "u", workers=1)
    site.files[f"/get.jsonl?part=3&sig={SECRET}"] = LINES[: half - 1].replace(b"Say", b"Ask") + b"\n"
    with pytest.raises(InputError, match="differs in the content of"):
        prepare(urls[0].replace("part=1", "part=3"), tmp_path / "u", workers=1)
    assert prepare(urls[0], tmp_path / "u", workers=1).reused
    assert len(TokenStore(tmp_path / "u")) == LINES[:half].count(b"\n")


def test_the_ending_may_stand_in_the_query(site: Site) -> None:
    site.files["/get?file=a.jsonl"] = LINES
    assert content(f"http://{site.address}/get?file=a.jsonl") == LINES
    site.files["/get"] = LINES
    assert "/get: the ending (none) is not known" in refusal(f"http://{site.address}/get?sig=.{SECRET}")


@pytest.mark.slow
def test_the_command_line_shows_no_secret(site: Site, tmp_path: Path) -> None:
    site.statuses = [403] * 100
    url = f"http://me:{SECRET}@{site.address}/a.jsonl?sig={SECRET}"
    for arguments in ([url, str(tmp_path / "s")], [url]):
        command = [sys.executable, "-m", "fastcollate", "prepare", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert SECRET not in result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        assert result.stderr.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("error", "most", "tries"), [(TimeoutError, 60.0, 5), (TimeoutError, 0.0, 1), (ConnectionError, 0.0, 5)]
)
@pytest.mark.filterwarnings("ignore:.*try . of 5:RuntimeWarning")
def test_a_server_without_an_answer_is_not_asked_for_ever(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], most: float, tries: int
) -> None:
    """A library has waited for minutes, with tries of its own."""
    monkeypatch.setattr(remote, "_WAITS", (0.0,) * 4)
    monkeypatch.setattr(remote, "_MOST_SILENCE_S", most)
    asked = []

    def action() -> None:
        asked.append(1)
        raise error

    with pytest.raises(SourceReadError, match=r"no answer in time|the connection broke"):
        remote.attempt("a", "s3://a", action)
    assert len(asked) == tries
