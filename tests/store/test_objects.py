"""Objects below a URL: what was written is what is there, of several creators one wins, no secret is told."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import fsspec
import pytest

from fastcollate.errors import InputError, SourceReadError
from fastcollate.store.remote import objects as module
from fastcollate.store.remote.objects import Objects, folder_of, is_url

SECRET = "s3cr3t"


@pytest.fixture(params=["memory", "file", pytest.param("s3", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    """An empty folder of objects of each kind."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return Objects("s3://bucket/a/store")
    return Objects(f"memory://{tmp_path}/store" if request.param == "memory" else f"file://{tmp_path}/store")


def test_what_was_written_is_there_whole_in_ranges_and_in_the_listing(folder: Objects, tmp_path: Path) -> None:
    assert folder.found() == {}
    assert folder.get("a") is None
    assert folder.find("a") is None
    content = bytes(range(256)) * 9
    (tmp_path / "b").write_bytes(content)
    assert folder.write("a", b"")
    assert folder.upload(tmp_path / "b")
    assert folder.write(".job/c", b"c")
    assert folder.get("b") == content
    assert folder.read("b", 255, 300) == content[255:300]
    assert {name: found.num_bytes for name, found in folder.found().items()} == {"a": 0, "b": len(content)}
    assert folder.found(".job/") == {".job/c": folder.find(".job/c")}, "a listing tells of an object what asking does"
    before = folder.find("b")
    assert folder.write("b", content[::-1])
    assert folder.get("b") == content[::-1]
    assert folder.find("b") != before, "another content has another tag"
    folder.remove(["a", "b", "none", ".job/c"])
    assert folder.found() == {}


def test_a_part_that_is_not_there_is_an_error_and_so_is_a_missing_object(folder: Objects) -> None:
    folder.write("a", b"123")
    with pytest.raises(SourceReadError, match=r"store/none: no such file"):
        folder.read("none", 0, 1)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr("fastcollate.sources.remote._WAITS", (0.0, 0.0, 0.0, 0.0))
        with pytest.raises(SourceReadError, match="store/a: "):
            folder.read("a", 0, 5)


def test_of_several_who_create_one_object_one_wins(folder: Objects) -> None:
    assert folder.write("lock", b"me", create=True)
    assert folder.write("lock", b"me", create=True), "an answer that was lost: it lies there as asked"
    assert not folder.write("lock", b"another", create=True)
    start, won = threading.Barrier(8), []

    def create(number: int) -> None:
        mine = Objects(folder.url)
        start.wait()
        if mine.write("race", b"%d" % number, create=True):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not folder.url.startswith("memory"):  # which is one process's, and knows no lock
        assert [b"%d" % number for number in won] == [folder.get("race")]


def test_a_large_object_goes_in_parts_and_what_was_begun_and_not_ended_is_aborted(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART", 5 << 20)
    folder, content = Objects("s3://bucket/store"), bytes(range(256)) * (48 << 10)
    reads: list[str] = []
    monkeypatch.setattr(Objects, "get", lambda self, name: reads.append(name))
    assert folder.write("large", content)
    assert folder.find("large").tag.endswith("-3"), "three parts"  # type: ignore[union-attr]
    assert reads == [], "the storage's own checksum tells that it is whole"
    assert s3.cat("bucket/store/large") == content
    for key in ("store/shard", "store", "storehouse/shard"):
        s3.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
    assert folder.abort_uploads() == 1
    assert folder.abort_uploads() == 0


@pytest.mark.usefixtures("s3")
def test_where_uploads_may_not_be_listed_it_is_said_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    folder = Objects("s3://bucket/store")
    monkeypatch.setattr(folder._files, "call_s3", denied)
    with pytest.warns(UserWarning, match="s3://bucket/store: access denied; .*let a lifecycle rule of the bucket end"):
        assert folder.abort_uploads() == 0


def test_what_arrives_damaged_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcollate.sources.remote._WAITS", (0.0, 0.0, 0.0, 0.0))
    folder, puts = Objects("memory://damaged/store"), []
    put = Objects._put

    def damages(self: Objects, path: str, content: bytes, *, create: bool) -> bool:
        puts.append(path)
        return put(self, path, content[:-1] + b"?" if len(puts) < 3 else content, create=create)

    monkeypatch.setattr(Objects, "_put", damages)
    with pytest.warns(RuntimeWarning, match="the connection broke"):
        assert folder.write("a", b"1234")
    assert folder.get("a") == b"1234"
    assert len(puts) == 3


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(f"https://u:{SECRET}@h/?sig={SECRET}"), "access denied"),
        (OSError(5, f"s3://{SECRET}@x/y"), "cannot be read"),
    ],
)
def test_no_secret_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    folder = Objects(f"memory://user:{SECRET}@bucket/store")
    assert str(folder) == "memory://bucket/store"

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(type(folder._files), "cat_file", fails)
    with pytest.raises(SourceReadError, match=said) as found:
        folder.get("a")
    link: BaseException | None = found.value
    while link is not None:
        assert SECRET not in str(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


@pytest.mark.slow
def test_a_bucket_that_is_not_there(s3: Any) -> None:
    with pytest.raises(InputError, match=r"s3://none/store: no such bucket or container; make it first"):
        Objects("s3://none/store").write("a", b"1")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://example.org/store", "no store can lie there"),
        ("zip://a::s3://bucket/b.zip", "no store can lie there"),
        ("s3://", "name a folder of the storage"),
        ("s3://bucket/store?X-Amz-Signature=x", r"^s3://bucket/store: a store's URL has no query"),
        ("nosuch://bucket/store", "not a path or URL"),
        ("store", r"^store: not a URL of object storage; give one, such as s3://"),
        ("s3:/bucket/store", r"^s3:/bucket/store: not a URL of object storage"),
        (f"s3://user:{SECRET}@bucket/store", r"^s3://bucket/store: s3 takes no user and password in a URL"),
        (f"gs://{SECRET}@bucket", r"^gs://bucket: gs takes no user and password in a URL"),
    ],
)
def test_urls_where_no_store_can_lie(url: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Objects(url)


def test_what_is_a_url_and_what_a_path() -> None:
    assert is_url("s3://bucket/store")
    assert not is_url("C:/store")
    assert not is_url("a/b")
    assert folder_of("a/b") == Path("a/b")
    with pytest.raises(InputError, match="cannot stand here"):
        folder_of("s3:/bucket/store")  # what a Path makes of it
    assert isinstance(fsspec.filesystem("memory"), type(Objects("memory://a/b")._files))
