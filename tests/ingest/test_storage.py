"""prepare into object storage: the local store's bytes, also after kills, faults of the server, beside other jobs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_prepare import SMALL, many, write_lines

from benchmarks.slow_proxy import SlowProxy
from fastcollate.errors import InputError, SourceReadError
from fastcollate.ingest import workers as workers_module
from fastcollate.ingest.job import prepare
from fastcollate.ingest.places import lock as lock_module
from fastcollate.ingest.places.lock import StorageLock
from fastcollate.ingest.places.storage import StorageJournal
from fastcollate.sources import blocks as sources_module
from fastcollate.store.remote import Objects

BAD = {"instruction": 5, "output": "x"}


class StopHere(BaseException):
    """As Ctrl-C or a kill may come, at any place."""


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "SIZES", SMALL)
    monkeypatch.setattr("fastcollate.sources.remote._WAITS", (0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(lock_module, "_POLL_S", 0.01)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Records of about ten shards."""
    return write_lines(tmp_path / "a.jsonl", many(1500, seed=3))


@pytest.fixture(params=["memory", "file", pytest.param("s3", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return "s3://bucket/a/store"
    return f"memory://{tmp_path}/store" if request.param == "memory" else f"file://{tmp_path}/remote/store"


def objects(url: str) -> dict[str, bytes]:
    """All that lies below a URL, but what names the sources for messages."""
    folder = Objects(url)
    names = [name for place in ("", ".job/", ".lock/") for name in folder.found(place) if name != "sources.json"]
    return {name: folder.get(name) or b"" for name in names}


def files(store: Path) -> dict[str, bytes]:
    names = [path for path in store.iterdir() if path.name not in ("sources.json", ".lock")]
    return {path.name: path.read_bytes() for path in names}


@pytest.fixture
def local(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """The same job's local store."""
    prepare(source, tmp_path / "local", workers=1)
    return files(tmp_path / "local")


def test_the_same_bytes_as_on_disk_and_found_again(source: Path, url: str, local: dict[str, bytes]) -> None:
    report = prepare(source, url, workers=1)
    assert report.store == url
    assert not report.reused
    assert objects(url) == local
    assert prepare(source, url, workers=1).reused
    assert objects(url) == local


@pytest.mark.slow
def test_workers_and_the_command_line(source: Path, s3: Any, local: dict[str, bytes]) -> None:
    del s3
    result = subprocess.run(command(source, "s3://bucket/store"), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert objects("s3://bucket/store") == local


@pytest.mark.slow
def test_workers_have_the_environment_of_their_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they are forked from begins once, perhaps before somebody in a notebook gave the credentials."""
    ended = threading.Event()
    other = threading.Thread(target=ended.wait)  # with a thread beside it, a process is not forked itself
    other.start()
    try:
        for value in ("none yet", "given"):
            monkeypatch.setenv("AWS_SESSION_TOKEN", value)
            with workers_module._pool(1) as pool:
                assert pool.submit(os.getenv, "AWS_SESSION_TOKEN").result() == value
    finally:
        ended.set()
        other.join()


def test_where_a_folder_for_temporary_files_has_a_long_name_workers_are_spawned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What they would be forked from listens on a socket there, whose path has at most 107 bytes."""
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    found = []
    for length in (70, 91):
        monkeypatch.setattr("multiprocessing.util.get_temp_dir", lambda length=length: "/" + length * "x")
        found.append(workers_module._start_method())
    assert found == ["forkserver", "spawn"]


def test_bad_records_are_listed_there_and_tokenizers_lie_there(tmp_path: Path, url: str) -> None:
    records: list[Any] = many(500)
    records[17] = records[300] = BAD
    source = write_lines(tmp_path / "b.jsonl", records)
    with pytest.raises(InputError, match=r"b\.jsonl, line 18, record 17"):
        prepare(source, url, workers=1)
    report = prepare(source, url, workers=1, on_error="skip")
    prepare(source, tmp_path / "local", workers=1, on_error="skip")
    assert report.skipped_report == f"{url}/skipped.txt"
    assert objects(url) == files(tmp_path / "local")
    with pytest.raises(InputError, match=r"2 bad records were left out of this store"):
        prepare(source, url, workers=1)


def test_a_job_that_finished_nothing_leaves_nothing(tmp_path: Path, url: str) -> None:
    source = write_lines(tmp_path / "b.jsonl", [BAD, *many(3)])
    with pytest.raises(InputError, match="record 0"):
        prepare(source, url, workers=1)
    assert objects(url) == {}


def test_another_job_is_refused_and_overwrite_makes_it_anew(tmp_path: Path, source: Path, url: str) -> None:
    prepare(source, url, workers=1, max_length=30, long_prompt="keep")
    with pytest.raises(InputError, match=r"store: holds a store that differs in option max_length"):
        prepare(source, url, workers=1)
    other = write_lines(tmp_path / "c.jsonl", many(100, seed=9))
    with pytest.raises(InputError, match=r"holds a store that differs in"):
        prepare(other, url, workers=1)
    prepare(other, url, workers=1, overwrite=True)
    prepare(other, tmp_path / "local", workers=1)
    assert objects(url) == files(tmp_path / "local")


def test_objects_that_are_no_stores_are_left_alone(source: Path, url: str) -> None:
    Objects(url).write("photo.png", b"1")
    with pytest.raises(InputError, match=r"holds files that are not of a store, such as photo\.png"):
        prepare(source, url, workers=1)
    assert objects(url) == {"photo.png": b"1"}


@pytest.mark.parametrize("method", ["take", "check", "finish"])
@pytest.mark.parametrize("error", [StopHere(), OSError(5, "Input/output error")], ids=["kill", "error"])
def test_a_stop_costs_only_what_was_not_finished(
    source: Path, tmp_path: Path, local: dict[str, bytes], method: str, error: BaseException
) -> None:
    url, dice, done = f"memory://{tmp_path}/store", random.Random(5), []
    act = getattr(StorageJournal, method)
    for left in (0, dice.randrange(1, 6), dice.randrange(1, 6)) if method == "take" else (0,):
        count = iter(range(left))

        def fails(self: Any, *rest: Any, count: Iterator[int] = count) -> None:
            if next(count, None) is None:
                raise error
            act(self, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StorageJournal, method, fails)
            with pytest.raises(type(error)):
                prepare(source, url, workers=1)
        if method != "finish":
            assert "manifest.json" not in objects(url)
        done.append(sum(name.startswith("shard-") for name in objects(url)))
    assert done == sorted(done), "nothing finished is done again"
    assert done[-1] > 0
    prepare(source, url, workers=1)
    assert objects(url) == local


def test_a_changed_source_is_not_taken_for_what_it_was(tmp_path: Path, source: Path) -> None:
    url, lines = f"memory://{tmp_path}/store", source.read_bytes().splitlines(keepends=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StorageJournal, "check", stop)
        with pytest.raises(StopHere):
            prepare(source, url, workers=1)
    lines[900] = json.dumps({"instruction": "another", "output": "one"}).encode() + b"\n"
    source.write_bytes(b"".join(lines))
    prepare(source, url, workers=1)
    prepare(source, tmp_path / "local", workers=1)
    assert objects(url) == files(tmp_path / "local")


def stop(*_: object) -> None:
    raise StopHere


@pytest.mark.parametrize("what", ["shard", "note", "header"])
def test_what_was_damaged_meanwhile_is_made_again_or_refused(
    source: Path, tmp_path: Path, local: dict[str, bytes], what: str
) -> None:
    url = f"memory://{tmp_path}/store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StorageJournal, "check", stop)
        with pytest.raises(StopHere):
            prepare(source, url, workers=1)
    folder = Objects(url)
    note = next(name for name in folder.found(".job/") if "00001-" in name)
    name = {"shard": "shard-00001.arrow", "note": note, "header": ".job/job.json"}[what]
    content = folder.get(name) or b""
    folder.write(name, content[:40] + bytes([content[40] ^ 1]) + content[41:])
    if what == "header":
        with pytest.raises(InputError, match="holds an unfinished job that differs in"):
            prepare(source, url, workers=1)
    prepare(source, url, workers=1, overwrite=what == "header")
    assert objects(url) == local


def test_a_shard_that_changes_before_the_commit_is_an_error_and_then_made_again(
    source: Path, tmp_path: Path, local: dict[str, bytes]
) -> None:
    url, check = f"memory://{tmp_path}/store", StorageJournal.check

    def other(self: Any, infos: Any) -> None:
        Objects(url).write("shard-00002.arrow", b"of another job")
        check(self, infos)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StorageJournal, "check", other)
        with pytest.raises(SourceReadError, match=r"shard-00002\.arrow: was changed meanwhile"):
            prepare(source, url, workers=1)
    assert "manifest.json" not in objects(url)
    prepare(source, url, workers=1)
    assert objects(url) == local


# Two jobs.


def test_two_jobs_at_once_one_makes_the_store_and_the_other_reuses_it(
    source: Path, url: str, local: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    reports: list[Any] = []
    with lock_at(url) as lock:
        threads = [threading.Thread(target=lambda: reports.append(prepare(source, url, workers=1))) for _ in range(2)]
        for thread in threads:
            thread.start()
        with pytest.raises(InputError, match=r"another job is writing this store \(process \d+ on .*, for \d+ s\)"):
            prepare(source, url, workers=1, wait=False)
        while capsys.readouterr().err.count("waiting for it") < 1:
            time.sleep(0.01)
        assert reports == []
        assert lock.number == 1
    for thread in threads:
        thread.join()
    assert sorted(report.reused for report in reports) == [False, True]
    assert objects(url) == local


def lock_at(url: str) -> StorageLock:
    return StorageLock(Objects(url), wait=True)


def test_a_job_that_died_elsewhere_is_taken_over_after_a_while(
    source: Path, url: str, local: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "DEAD_S", 0.2)
    sign = {"token": "x", "pid": 1, "host": "elsewhere", "process": ["boot", "pid:[1]", "1", "1"], "started": 0}
    Objects(url).write(".lock/000007", json.dumps(sign).encode())
    start = time.monotonic()
    prepare(source, url, workers=1)
    assert time.monotonic() - start > 0.2
    assert objects(url) == local


@pytest.mark.slow
def test_a_job_that_died_on_this_machine_is_taken_over_at_once(source: Path, url: str, local: dict[str, bytes]) -> None:
    code = f"""if True:
        import os
        from fastcollate.ingest.places.lock import StorageLock
        from fastcollate.store.remote import Objects
        StorageLock(Objects({url!r}), wait=True).__enter__()
        print(open("/proc/self/stat").read(), flush=True)
        os.kill(os.getpid(), 9)
    """
    if url.startswith("memory"):
        pytest.skip("which is one process's")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == -9
    assert [*Objects(url).found(".lock/")] == [".lock/000001"]
    prepare(source, url, workers=1, wait=False)
    assert objects(url) == local


def test_a_job_that_was_taken_over_stops_and_commits_nothing(source: Path, url: str) -> None:
    take, owners = StorageJournal.take, []

    def taken_over(self: Any, note: Any) -> None:
        if not owners:
            owners.append(Objects(url).write(".lock/000002", b"{}", create=True))
        take(self, note)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StorageJournal, "take", taken_over)
        with pytest.raises(SourceReadError, match="another job has taken this store over"):
            prepare(source, url, workers=1)
    assert owners == [True]
    assert "manifest.json" not in objects(url)
    assert ".lock/000002" in objects(url), "the new owner's lock stays"


@pytest.mark.slow
def test_a_lock_lives_by_its_beats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lock_module, "BEAT_S", 0.02)
    monkeypatch.setattr(lock_module, "DEAD_S", 0.5)
    monkeypatch.setattr(lock_module, "_is_gone", lambda content: False)  # as on another machine
    folder, seen = Objects(f"memory://{tmp_path}/store"), set()
    with StorageLock(folder, wait=True) as lock:
        second = threading.Thread(target=lambda: StorageLock(folder, wait=True).__enter__().__exit__())
        second.start()
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            seen.add(folder.get(".lock/000001"))
            assert second.is_alive(), "it is not taken over while it gives signs of life"
            time.sleep(0.01)
        lock.check()
        assert len(seen) > 5
    second.join(10)
    assert objects(folder.url) == {}


# Faults of the server, and kills.


@pytest.fixture
def proxy(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowProxy]:
    """A proxy before the S3 server, which injects faults."""
    import os

    del s3
    with SlowProxy(os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{found.address}")
        yield found


@pytest.mark.slow
def test_faults_of_the_server_cost_time_and_no_row(source: Path, proxy: SlowProxy, local: dict[str, bytes]) -> None:
    dice = random.Random(6)

    def faults(method: str, path: str) -> str | None:
        return dice.choice(["500", "503", "reset", "cut", "flip"]) if dice.random() < 0.1 else None

    proxy.faults = faults
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare(source, "s3://bucket/store", workers=1)
    proxy.faults = lambda method, path: None
    assert sum(proxy.counts[name] for name in ("500", "503", "reset", "cut", "flip")) > 3
    assert objects("s3://bucket/store") == local


@pytest.mark.slow
def test_a_server_that_stays_away_is_one_line_and_the_same_command_goes_on(
    source: Path, proxy: SlowProxy, local: dict[str, bytes]
) -> None:
    def faults(method: str, path: str) -> str | None:
        return "reset" if method == "PUT" and "shard-00004" in path else None

    proxy.faults = faults
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SourceReadError, match=r"s3://bucket/store/shard-00004\.arrow: "):
            prepare(source, "s3://bucket/store", workers=1)
    assert {f"shard-{number:05}.arrow" for number in range(4)} < {*objects("s3://bucket/store")}, "others go on"
    proxy.faults = lambda method, path: None
    prepare(source, "s3://bucket/store", workers=1)
    assert objects("s3://bucket/store") == local


def test_credentials_that_are_refused_are_a_clear_line_without_them(
    source: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(s3), "_pipe_file", denied)
    denial = r"s3://bucket/store/\S+: access denied; .*check the credentials"
    with pytest.raises(SourceReadError, match=denial) as found:
        prepare(source, "s3://bucket/store", workers=1)
    assert "SECRET" not in str(found.value)


async def denied(*_: object, **__: object) -> None:
    raise PermissionError("SECRET is not a key that we know")


def command(source: Path, url: str, *options: str) -> list[str]:
    """The command line on blocks of 20 kB, so that a small file has many shards."""
    start = "from fastcollate.sources import blocks; blocks.SIZES = blocks.Sizes(20_000, 60_000); "
    code = f"{start}from fastcollate.cli import main; main()"
    return [sys.executable, "-c", code, "prepare", str(source), url, "--workers", "2", *options]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "worker"])
def test_kills_at_random_moments(tmp_path: Path, s3: Any, victim: str) -> None:
    psutil = pytest.importorskip("psutil")
    del s3
    source, url = write_lines(tmp_path / "k.jsonl", many(4000, seed=4)), "s3://bucket/killed"
    prepare(source, tmp_path / "local", workers=1)
    dice, kills, folder = random.Random(8), 0, Objects("s3://bucket/killed")
    for at in (1, 2, 5, 9, 14):
        process = subprocess.Popen(command(source, url), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(folder.found(".job/")) <= at:
            pass
        time.sleep(dice.random() / 5)
        try:
            whom = psutil.Process(process.pid)
            (whom if victim == "driver" else whom.children(recursive=True)[-1]).kill()
            kills += 1
        except (psutil.Error, IndexError):
            pass  # it has finished
        process.wait()
    assert kills >= 1  # on a fast machine it may finish sooner
    result = subprocess.run(command(source, url, "--no-wait"), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert objects(url) == files(tmp_path / "local")
