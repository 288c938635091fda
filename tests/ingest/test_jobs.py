"""Several jobs on one folder: one makes the store, nobody's work is lost, and nobody leaves anything behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from test_prepare import many, store_hash, write_lines

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.prepare_race import race, run_kills, run_races
from fastcollate.errors import InputError, SourceReadError
from fastcollate.ingest import job as job_module
from fastcollate.ingest import lock as lock_module
from fastcollate.ingest.job import prepare
from fastcollate.ingest.journal import begin_anew, holder
from fastcollate.ingest.lock import JobLock
from fastcollate.ingest.options import PrepareKeywords, PrepareOptions
from fastcollate.sources import blocks
from fastcollate.store.store import TokenStore

START = (
    "import sys; from fastcollate.sources import blocks; blocks.SIZES = blocks.Sizes(20_000, 60_000); "
    "from fastcollate.cli import main; "
)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SIZES", blocks.Sizes(20_000, 60_000))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "a.jsonl", many(1500))


def command(source: Path, store: Path, *options: str, before: str = "") -> list[str]:
    code = f"{START}{before}main()"
    return [sys.executable, "-c", code, "prepare", str(source), str(store), "--workers", "2", "--json", *options]


@pytest.mark.slow
def test_jobs_that_begin_together_make_one_store(tmp_path: Path, source: Path) -> None:
    result = run_races(source, tmp_path, turns=8, workers=2)
    assert result["jobs"] == 20


@pytest.mark.slow
def test_a_new_job_at_once_after_its_leader_was_killed(tmp_path: Path, source: Path) -> None:
    result = run_kills(source, tmp_path, turns=8, seed=3, workers=2)
    assert result["turns"] == 8


@pytest.mark.slow
def test_jobs_that_overwrite_together_make_it_once(tmp_path: Path, source: Path) -> None:
    prepare(source, tmp_path / "plain")
    for _ in range(3):
        assert race(source, tmp_path / "s", 3, overwrite=True, workers=1).count("made") >= 1
        assert store_hash(tmp_path / "s") == store_hash(tmp_path / "plain")


@pytest.mark.slow
def test_jobs_that_ask_for_different_stores_do_not_take_each_others(tmp_path: Path, source: Path) -> None:
    other = write_lines(tmp_path / "b.jsonl", many(300, seed=3))
    first = subprocess.Popen(command(source, tmp_path / "s"), stderr=subprocess.PIPE, text=True)
    second = subprocess.Popen(command(other, tmp_path / "s"), stderr=subprocess.PIPE, text=True)
    errors = [job.communicate()[1].strip().splitlines() for job in (first, second)]
    assert sorted((first.returncode, second.returncode)) == [0, 1]
    lost = errors[first.returncode == 0][-1]
    assert lost.startswith(f"error: {tmp_path / 's'}: holds a store that differs in the content of ")
    prepare(other if second.returncode == 0 else source, tmp_path / "plain")
    assert store_hash(tmp_path / "s") == store_hash(tmp_path / "plain")


@pytest.mark.slow
def test_bad_sources_together_leave_no_folder(tmp_path: Path) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", [{"instruction": 5}])
    for _ in range(4):
        answers = race(bad, tmp_path / "runs" / "s", 3)
        assert all(answer.rstrip().splitlines()[-1].startswith("fastcollate.errors.InputError") for answer in answers)
        assert not (tmp_path / "runs" / "s").exists()


def hold(store: Path) -> JobLock:
    return JobLock(store, wait=False, holder=str)


@pytest.mark.slow
def test_jobs_that_fail_in_turn_leave_no_folder(tmp_path: Path) -> None:
    """One makes the folder that another has just removed, however their steps fall between each other."""
    store = tmp_path / "runs" / "s"

    def fail(_: int) -> None:
        with JobLock(store, wait=True, holder=str) as lock:
            lock.remove_folder()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fail, range(600)))
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("kind", ["file", "link to nothing", "below a file"])
def test_a_place_that_is_no_directory_is_refused(tmp_path: Path, source: Path, kind: str) -> None:
    place = tmp_path / "s"
    if kind == "link to nothing":
        place.symlink_to(tmp_path / "nowhere")
    else:
        place.write_text("x")
    with pytest.raises(InputError, match=r"/s(/t)?: is not a directory; choose another place"):
        prepare(source, place / "t" if kind == "below a file" else place)


def in_thread(run: Any) -> list[BaseException]:
    """What another thread raises; a lock's holder may not wait for itself."""
    found: list[BaseException] = []

    def call() -> None:
        try:
            run()
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return found


@pytest.mark.slow
def test_who_does_not_wait_is_refused(tmp_path: Path, source: Path) -> None:
    with hold(tmp_path / "s"):
        [error] = in_thread(lambda: prepare(source, tmp_path / "s", wait=False))
        assert isinstance(error, InputError)
        assert "another job is writing this store; wait for it, or stop it first" in str(error)
        result = subprocess.run(
            command(source, tmp_path / "s", "--no-wait"), capture_output=True, text=True, check=False
        )
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 's'}: another job is writing this store")
    assert not prepare(source, tmp_path / "s", wait=False).reused


@pytest.mark.slow
def test_who_waits_says_so_and_for_whom(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock_module, "_LINE_SECONDS", 0.2)
    first = subprocess.Popen(command(source, tmp_path / "s", before=SLOW), stdout=subprocess.PIPE)
    while not holder(tmp_path / "s"):  # its journal may be there before it says whose it is
        time.sleep(0.005)
    assert prepare(source, tmp_path / "s").reused
    assert first.wait() == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if "another job" in line]
    assert len(lines) >= 2
    assert all(line.startswith(f"{tmp_path / 's'}: another job is writing this store (process ") for line in lines)
    assert all(f"process {first.pid} on " in line and line.endswith("; waiting for it") for line in lines)


def test_a_folder_that_vanishes_under_who_waits_is_made_again(tmp_path: Path) -> None:
    first = hold(tmp_path / "s")
    with first:
        assert first.made == [tmp_path / "s"]
        got: list[bool] = []

        def second() -> None:
            with JobLock(tmp_path / "s", wait=True, holder=str) as lock:
                got.append(lock.waited and (tmp_path / "s" / ".lock").exists())

        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        first.remove_folder()
        assert not (tmp_path / "s").exists()
    thread.join(10)
    assert got == [True]


@pytest.mark.slow
def test_a_store_in_use_is_read_to_its_end_while_it_is_made_anew(tmp_path: Path, source: Path) -> None:
    from fastcollate.store.store import TokenStore

    prepare(source, tmp_path / "s")
    opened = TokenStore(tmp_path / "s")
    expected = [row.input_ids.tolist() for row in opened]
    prepare(write_lines(tmp_path / "b.jsonl", many(100, seed=2)), tmp_path / "s", overwrite=True)
    assert [row.input_ids.tolist() for row in opened] == expected


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_workers_end_with_their_leader(tmp_path: Path, source: Path) -> None:
    psutil = pytest.importorskip("psutil")
    leader = subprocess.Popen(command(source, tmp_path / "s", before=SLOW), stdout=subprocess.PIPE)
    while not (workers := psutil.Process(leader.pid).children()):
        time.sleep(0.01)
    leader.kill()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive
    leader.wait()


SLOW = "import time; from fastcollate.ingest import encode; real = encode._encode; "
SLOW += "encode._encode = lambda *all: (time.sleep(0.1), real(*all))[1]; "


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_is_the_leaders_alone(tmp_path: Path, source: Path) -> None:
    """A terminal sends it to all: workers, idle or not, say nothing, and the leader one line."""
    psutil = pytest.importorskip("psutil")
    prepare(source, tmp_path / "plain")
    for sent_to in ("workers", "all"):
        job = subprocess.Popen(
            command(source, tmp_path / "s", before=SLOW), stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        while not (workers := psutil.Process(job.pid).children()) or not list((tmp_path / "s").glob(".part-*")):
            time.sleep(0.01)
        if sent_to == "workers":
            for worker in workers:
                worker.send_signal(signal.SIGINT)
        else:
            os.killpg(job.pid, signal.SIGINT)
        error = job.communicate()[1]
        says = "error: interrupted; what was finished is kept, and the same command goes on\n"
        assert (job.returncode, error) == ((0, "") if sent_to == "workers" else (130, says))
        assert (tmp_path / "s" / "manifest.json").exists() == (sent_to == "workers")
        assert subprocess.run(command(source, tmp_path / "s"), check=True, capture_output=True).stderr == b""
        assert store_hash(tmp_path / "s") == store_hash(tmp_path / "plain")
        shutil.rmtree(tmp_path / "s")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("where", ["after_in_parent", "after_in_child"])
def test_ctrl_c_while_a_worker_starts_is_not_lost(tmp_path: Path, source: Path, where: str) -> None:
    sends = f"import os, signal; os.register_at_fork({where}=lambda: signal.raise_signal(signal.SIGINT)); "
    job = subprocess.run(command(source, tmp_path / "s", before=sends), capture_output=True, text=True, check=False)
    assert "Traceback" not in job.stderr
    assert job.returncode == (130 if where == "after_in_parent" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["file", "stdin", "-c"])
def test_a_script_that_guards_nothing_may_call_it(tmp_path: Path, source: Path, how: str) -> None:
    """Where a thread is alive, and on other systems, workers are spawned: they may not run the script again."""
    (tmp_path / "script.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "from fastcollate import prepare\n"
        "from fastcollate.sources import blocks\n"
        "blocks.SIZES = blocks.Sizes(20_000, 60_000)\n"
        "prepare('a.jsonl', 's', workers=2)\n"
        "print('once', __spec__, '__file__' in globals())\n"
    )
    script = (tmp_path / "script.py").read_text()
    arguments, given = {"file": (["script.py"], None), "stdin": (["-"], script), "-c": (["-c", script], None)}[how]
    ran = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, input=given, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.stdout, ran.stderr) == (f"once None {how != '-c'}\n", "")
    prepare(source, tmp_path / "plain")
    assert store_hash(tmp_path / "s") == store_hash(tmp_path / "plain")


@pytest.mark.slow
def test_the_process_that_workers_are_forked_from_may_be_killed_as_it_starts(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: int) -> int:
        raise EOFError("unexpected EOF")

    monkeypatch.setattr("multiprocessing.forkserver.read_signed", killed)
    with ThreadPoolExecutor(1) as pool:  # with a thread, workers are not forked from this process
        job = pool.submit(prepare, source, tmp_path / "s", workers=2)
        with pytest.raises(SourceReadError, match="a worker process was killed"):
            job.result()


def test_the_keywords_are_the_options(tmp_path: Path) -> None:
    assert get_type_hints(PrepareKeywords) == get_type_hints(PrepareOptions)
    for item in fields(PrepareOptions):
        assert f"{item.name}: {item.metadata['help']}" in str(PrepareOptions.__doc__)
    with pytest.raises(TypeError, match="tempalte"):
        prepare(write_lines(tmp_path / "a.jsonl", many(2)), tmp_path / "s", tempalte="alpaca")  # type: ignore[call-arg]


@pytest.mark.slow
def test_a_store_that_is_made_anew_at_this_moment_is_waited_for(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever wants to reuse it has read its manifest, and then its files go."""
    store, find, calls = tmp_path / "s", job_module.find_finished, []
    prepare(source, store)

    def find_while_it_goes(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            begin_anew(store, {})
            raise InputError("missing or damaged")
        return find(*arguments, **options)

    monkeypatch.setattr(job_module, "find_finished", find_while_it_goes)
    assert not prepare(source, store).reused
    assert prepare(source, store).reused
    assert len(calls) == 3


def test_a_store_at_home(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    report = prepare(source, "~/s")
    assert report.store == str(tmp_path / "s")
    assert len(TokenStore("~/s")) == report.num_rows
    assert not Path("~").exists()
