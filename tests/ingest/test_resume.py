"""What is finished is never done again and never lost: after a bad record, a kill, a full disk, a power cut."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_prepare import many, store_hash, write_lines

from fastcollate.errors import InputError
from fastcollate.ingest.job import prepare
from fastcollate.ingest.journal import Journal
from fastcollate.ingest.places.folder import FolderPlace
from fastcollate.sources import blocks, find_sources
from fastcollate.store import shards as shards_module
from fastcollate.store.store import TokenStore

BAD = {"instruction": 5, "output": "x"}


class StopHere(BaseException):
    """As Ctrl-C or a kill may come, at any place."""


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SIZES", blocks.Sizes(8000, 30_000))


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The units that are encoded, in order."""
    found: list[int] = []
    encode = FolderPlace.work

    def noted(unit: blocks.Unit, *rest: Any) -> Any:
        found.append(unit.index)
        return encode(unit, *rest)

    monkeypatch.setattr(FolderPlace, "work", staticmethod(noted))
    return found


@contextlib.contextmanager
def stopped_after(count: int, error: BaseException) -> Iterator[None]:
    """An error before the leader notes one more unit than this."""
    add, left = Journal.add_unit, [count]

    def fails(self: Any, result: Any) -> None:
        if not left[0]:
            raise error
        left[0] -= 1
        add(self, result)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add_unit", fails)
        with pytest.raises(type(error)):
            yield


def num_units(source: Path) -> int:
    return len(list(blocks.read_units(find_sources(source))))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "a.jsonl", many(900, seed=1))


@pytest.fixture
def expected(tmp_path: Path, source: Path) -> str:
    prepare(source, tmp_path / "plain", workers=1)
    assert len(TokenStore(tmp_path / "plain").shards) > 4
    return store_hash(tmp_path / "plain")


@pytest.mark.parametrize("error", [StopHere(), OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_stop_costs_only_what_was_not_finished(
    tmp_path: Path, source: Path, expected: str, done: list[int], error: BaseException
) -> None:
    total = num_units(source)
    for count in (1, 7, 20):
        with stopped_after(count, error):
            prepare(source, tmp_path / "s", workers=1)
    noted = len([1 for line in (tmp_path / "s" / ".journal").read_bytes().splitlines() if b'"unit"' in line])
    assert noted == 28
    done.clear()
    prepare(source, tmp_path / "s", workers=1)
    assert done == list(range(28, total))
    assert store_hash(tmp_path / "s") == expected


@pytest.mark.slow
def test_a_bad_record_at_the_end_costs_nothing_and_skipping_goes_on(
    tmp_path: Path, source: Path, done: list[int]
) -> None:
    with open(source, "a") as file:
        file.write(json.dumps(BAD) + "\n")
    total = num_units(source)
    for _ in range(2):
        with pytest.raises(InputError, match=r"a\.jsonl, line 901, record 900: field 'instruction' is a number"):
            prepare(source, tmp_path / "s", workers=1)
        assert len(done) == total
    report = prepare(source, tmp_path / "s", workers=1, on_error="skip")
    assert len(done) == total
    assert (report.num_rows, report.summary["num_skipped"]) == (900, 1)
    prepare(source, tmp_path / "t", workers=1, on_error="skip")
    assert store_hash(tmp_path / "s") == store_hash(tmp_path / "t")


@pytest.mark.slow
def test_a_mended_record_costs_its_unit_and_what_follows(tmp_path: Path, source: Path, done: list[int]) -> None:
    records = many(900, seed=1)
    expected = None
    for place in (0, 450, 899):
        write_lines(source, [*records[:place], BAD, *records[place + 1 :]])
        with pytest.raises(InputError, match=rf"record {place}: field 'instruction'"):
            prepare(source, tmp_path / "s", workers=1)
        finished = max(done)
        done.clear()
        write_lines(source, records)
        prepare(source, tmp_path / "s", workers=1)
        assert place < 450 or min(done) == finished
        expected = expected or store_hash(tmp_path / "s")
        assert store_hash(tmp_path / "s") == expected
        shutil.rmtree(tmp_path / "s")
        done.clear()


def test_a_fresh_folder_goes_only_where_nothing_was_finished(tmp_path: Path) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", [BAD])
    with pytest.raises(InputError, match="record 0"):
        prepare(bad, tmp_path / "runs" / "first" / "s")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="record 0"):
        prepare(bad, tmp_path / "mine")
    assert (tmp_path / "mine").exists()
    late = write_lines(tmp_path / "late.jsonl", [*many(100), BAD])
    with pytest.raises(InputError, match="record 100"):
        prepare(late, tmp_path / "runs" / "s")
    assert (tmp_path / "runs" / "s" / ".journal").exists()


def unfinished(source: Path, store: Path, count: int) -> None:
    with stopped_after(count, StopHere()):
        prepare(source, store, workers=1)


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_journal_costs_what_its_lines_told(
    tmp_path: Path, source: Path, expected: str, done: list[int], seed: int
) -> None:
    dice = random.Random(seed)
    unfinished(source, tmp_path / "s", 21)
    journal = tmp_path / "s" / ".journal"
    raw = bytearray(journal.read_bytes())
    if seed % 3 == 0:
        raw = raw[: dice.randrange(len(raw))]
    elif seed % 3 == 1:
        place = dice.randrange(len(raw))
        raw[place : place + 700] = bytes(len(raw[place : place + 700]))  # a block that never reached the disk
    else:
        for _ in range(3):
            raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
    journal.write_bytes(raw)
    done.clear()
    prepare(source, tmp_path / "s", workers=1)
    assert store_hash(tmp_path / "s") == expected
    assert len(done) == len(set(done))


@pytest.mark.parametrize("depth", [900, 930, 940, 950, 970, 990, 5_000, 200_000])
def test_files_beside_a_store_that_are_nested_too_deeply(
    tmp_path: Path, source: Path, expected: str, depth: int
) -> None:
    """A journal's line whose checksum is right, and the side file: they count as damaged, and the job goes on."""
    unfinished(source, tmp_path / "s", 21)
    journal, deep = tmp_path / "s" / ".journal", '{"line": ' * depth + "1" + "}" * depth
    with open(journal, "ab") as file:
        file.write(b"%08x %b\n" % (zlib.crc32(deep.encode()), deep.encode()))
    if depth >= 5_000:
        prepare(source, tmp_path / "s", workers=1)
        assert store_hash(tmp_path / "s") == expected
    else:
        with contextlib.suppress(InputError):
            prepare(source, tmp_path / "s", workers=1)
    prepare(source, tmp_path / "s", workers=1)
    (tmp_path / "s" / "sources.json").write_text(deep)
    assert prepare(source, tmp_path / "s", workers=1).reused
    assert store_hash(tmp_path / "s") == expected


@pytest.mark.parametrize("damage", ["cut", "zeroed", "missing", "flipped"])
def test_a_part_that_a_power_cut_spoilt_is_made_again_and_no_other(
    tmp_path: Path, source: Path, expected: str, done: list[int], damage: str
) -> None:
    unfinished(source, tmp_path / "s", 24)
    parts = sorted((tmp_path / "s").glob(".part-*"), key=lambda path: path.name.split("-")[2])
    assert len(parts) >= 2
    raw = parts[0].read_bytes()
    if damage == "missing":
        parts[0].unlink()
    else:
        changed = (
            raw[:-9] if damage == "cut" else bytes(len(raw)) if damage == "zeroed" else raw[:-40] + b"?" + raw[-39:]
        )
        parts[0].write_bytes(changed)
    done.clear()
    prepare(source, tmp_path / "s", workers=1)
    assert done == [int(parts[0].name.split("-")[2]), *range(24, num_units(source))]
    assert store_hash(tmp_path / "s") == expected


@pytest.mark.slow
def test_a_finished_shard_that_is_gone_or_short_is_made_again_and_no_other(
    tmp_path: Path, source: Path, expected: str, done: list[int]
) -> None:
    for spoil in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])):
        unfinished(source, tmp_path / "s", 24)
        spoil(tmp_path / "s" / "shard-00001.arrow")
        units = [u.index for u in blocks.read_units(find_sources(source)) if u.shard == 1]
        done.clear()
        prepare(source, tmp_path / "s", workers=1)
        assert done == [*units, *range(24, num_units(source))]
        assert store_hash(tmp_path / "s") == expected
        shutil.rmtree(tmp_path / "s")


def test_a_kill_between_a_shard_and_its_line_costs_nothing(
    tmp_path: Path, source: Path, expected: str, done: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise StopHere

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add_shard", stop)
        with pytest.raises(StopHere):
            prepare(source, tmp_path / "s", workers=1)
    assert (tmp_path / "s" / "shard-00000.arrow").exists()
    finished = len(done)
    prepare(source, tmp_path / "s", workers=1)
    assert done == list(range(num_units(source)))[: len(done)]
    assert len(done) == num_units(source) > finished
    assert store_hash(tmp_path / "s") == expected


@pytest.mark.parametrize("step", ["remove_all_but", "finish"])
def test_a_kill_at_the_last_steps(
    tmp_path: Path, source: Path, expected: str, done: list[int], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    real = getattr(Journal, step)

    def stop(self: Any, *rest: Any) -> None:
        real(self, *rest) if step == "remove_all_but" else None
        raise StopHere

    with monkeypatch.context() as patch:
        patch.setattr(Journal, step, stop)
        with pytest.raises(StopHere):
            prepare(source, tmp_path / "s", workers=1)
    leave_behind(tmp_path / "s")
    done.clear()
    assert prepare(source, tmp_path / "s", workers=1).reused == (step == "finish")
    assert done == []
    assert store_hash(tmp_path / "s") == expected


def leave_behind(store: Path) -> None:
    """What jobs leave that are killed while they write."""
    for name in (".part-dead-00000-beef.arrow", "manifest.json", "shard-00007.arrow", "lengths.npy", "sources.json"):
        (store / f".{name}.0123456789ab.tmp").write_bytes(b"x")
    (store / ".part-dead-00000-beef.arrow").write_bytes(b"x")


def test_nothing_of_a_killed_job_is_left_behind(tmp_path: Path, source: Path, expected: str) -> None:
    unfinished(source, tmp_path / "s", 9)
    leave_behind(tmp_path / "s")
    prepare(source, tmp_path / "s", workers=1)
    assert store_hash(tmp_path / "s") == expected


def test_sources_that_shrank_leave_no_shard_behind(tmp_path: Path, source: Path) -> None:
    with open(source, "a") as file:
        file.write(json.dumps(BAD) + "\n")
    with pytest.raises(InputError, match="record 900"):
        prepare(source, tmp_path / "s", workers=1)
    write_lines(source, many(900, seed=1)[:200])
    prepare(source, tmp_path / "s", workers=1, on_error="skip")
    prepare(source, tmp_path / "t", workers=1)
    assert store_hash(tmp_path / "s") == store_hash(tmp_path / "t")


@pytest.mark.slow
def test_a_change_inside_a_finished_shard_is_noticed(
    tmp_path: Path, source: Path, done: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(source, tmp_path / "s", 24)
    records = many(900, seed=1)
    changed = next(u for u in blocks.read_units(find_sources(source)) if u.index == 10)
    assert (tmp_path / "s" / f"shard-{changed.shard:05d}.arrow").exists()
    row = changed.blocks[0].first_row
    text = records[row]["output"]
    records[row] = {**records[row], "output": text[::-1] if text != text[::-1] else "x" * len(text)}
    write_lines(source, records)
    units = [u for u in blocks.read_units(find_sources(source)) if u.shard == changed.shard]
    done.clear()
    with stopped_after(2, StopHere()):  # a kill while the shard is made again must not pass the old one off for it
        prepare(source, tmp_path / "s", workers=1)
    prepare(source, tmp_path / "s", workers=1)
    prepare(source, tmp_path / "t", workers=1)
    assert store_hash(tmp_path / "s") == store_hash(tmp_path / "t")
    assert done[0] == units[0].index


def test_another_jobs_unfinished_work_is_not_taken_away(tmp_path: Path, source: Path) -> None:
    unfinished(source, tmp_path / "s", 9)
    other = write_lines(tmp_path / "b.jsonl", many(100, seed=5))
    for options, message in (
        ({"template": "phi3"}, r"holds an unfinished job that differs in template name"),
        ({}, r"holds an unfinished job whose sources began otherwise than .*b\.jsonl; .*--overwrite"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(other, tmp_path / "s", **options)
    assert (tmp_path / "s" / ".journal").exists()
    prepare(other, tmp_path / "s", overwrite=True)
    prepare(other, tmp_path / "t")
    assert store_hash(tmp_path / "s") == store_hash(tmp_path / "t")


def test_a_journal_of_an_older_release_is_told(tmp_path: Path, source: Path, expected: str) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / ".journal.jsonl").write_text("{}\n")
    (tmp_path / "s" / "shard-00000.arrow").write_bytes(b"old")
    with pytest.raises(InputError, match="unfinished job of an older release"):
        prepare(source, tmp_path / "s")
    assert (tmp_path / "s" / "shard-00000.arrow").read_bytes() == b"old"
    prepare(source, tmp_path / "s", overwrite=True)
    assert store_hash(tmp_path / "s") == expected


def test_a_full_disk_keeps_what_is_finished(
    tmp_path: Path, source: Path, expected: str, done: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = shards_module.write_file
    for full in (".part-", "shard-"):
        calls: list[str] = []

        def fails(path: Path, *rest: Any, calls: list[str] = calls, full: str = full, **options: Any) -> Any:
            calls.append(path.name)
            if len([name for name in calls if name.startswith(full)]) == 3:
                raise OSError(28, "No space left on device", str(path))
            return write(path, *rest, **options)

        monkeypatch.setattr(shards_module, "write_file", fails)
        with pytest.raises(OSError, match="No space left on device; what is finished is kept"):
            prepare(source, tmp_path / "s", workers=1)
        monkeypatch.setattr(shards_module, "write_file", write)
    prepare(source, tmp_path / "s", workers=1)
    assert store_hash(tmp_path / "s") == expected
    assert len(done) == num_units(source) + 1  # the one whose part did not fit


def open_paths() -> set[str]:
    """The files that this process has open or mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(None, 5)[5].strip() for line in lines if len(line.split(None, 5)) == 6}
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            paths.add(str(descriptor.readlink()))
    return paths


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="tells open files by /proc")
def test_no_open_file_is_removed_or_replaced_as_windows_forbids_it(
    tmp_path: Path, source: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    touched = []

    def guarded(real: Any) -> Any:
        def call(*paths: Any, **options: Any) -> Any:
            names = [os.path.abspath(path) for path in paths]
            busy = open_paths() & set(names)
            touched.append(names)
            if busy:
                raise PermissionError(13, "The process cannot access the file because it is being used", *busy)
            return real(*paths, **options)

        return call

    for name in ("unlink", "remove", "replace", "rename"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: _unlink(self, missing_ok))
    unfinished(source, tmp_path / "s", 9)
    unfinished(source, tmp_path / "s", 12)
    prepare(source, tmp_path / "s", workers=1)
    prepare(source, tmp_path / "s", workers=1, overwrite=True)
    assert store_hash(tmp_path / "s") == expected
    assert len(touched) > 50


def _unlink(path: Path, missing_ok: bool) -> None:
    import os

    try:
        os.unlink(path)
    except FileNotFoundError:
        if not missing_ok:
            raise


@pytest.mark.parametrize("stop", [7, 8, 13, 14])
@pytest.mark.parametrize("size", [100, 3200, 5900, 7000])
def test_a_unit_that_comes_to_another_shard_is_made_again(tmp_path: Path, stop: int, size: int) -> None:
    """Its rows are in the shard in which it was, which is to be made again: another file there grew or shrank."""
    folder, store = tmp_path / "files", tmp_path / "s"
    folder.mkdir()

    def write(number: int, size: int) -> None:
        write_lines(folder / f"{number:03}.jsonl", [{"instruction": "word " * (size // 5), "output": str(number)}])

    for number in range(20):
        write(number, 4800)  # a unit each, six a shard
    with stopped_after(stop, StopHere()):
        prepare(str(folder / "*.jsonl"), store, workers=1)
    write(2, size)
    prepare(str(folder / "*.jsonl"), store, workers=1)
    prepare(str(folder / "*.jsonl"), tmp_path / "plain", workers=1)
    assert store_hash(store) == store_hash(tmp_path / "plain")


@pytest.mark.slow
def test_what_an_overwrite_has_finished_is_kept_too(
    tmp_path: Path, source: Path, expected: str, done: list[int]
) -> None:
    """The same command goes on where it was stopped, and begins anew again once it has come to its end."""
    prepare(source, tmp_path / "s", workers=1)
    total = num_units(source)
    for stop in (7, 3):
        done.clear()
        with stopped_after(stop, StopHere()):
            prepare(source, tmp_path / "s", workers=1, overwrite=True)
    assert 7 in done
    assert 6 not in done
    done.clear()
    prepare(source, tmp_path / "s", workers=1, overwrite=True)
    assert done == list(range(10, total))
    assert store_hash(tmp_path / "s") == expected
    prepare(source, tmp_path / "s", workers=1, overwrite=True)
    assert done == [*range(10, total), *range(total)]


@pytest.mark.slow
def test_an_overwrite_begins_anew_where_another_job_was_stopped(
    tmp_path: Path, source: Path, expected: str, done: list[int]
) -> None:
    other = write_lines(tmp_path / "b.jsonl", many(900, seed=2))
    for options in ({}, {"overwrite": True, "template": "phi3"}, {"overwrite": True}):
        with stopped_after(5, StopHere()):
            prepare(other if options == {"overwrite": True} else source, tmp_path / "s", workers=1, **options)
        with contextlib.nullcontext() if options else stopped_after(5, StopHere()):
            done.clear()
            prepare(source, tmp_path / "s", workers=1, overwrite=True)
        assert done[:6] == list(range(6))  # nothing of what the other job, or one without overwrite, had finished
    assert store_hash(tmp_path / "s") == expected


@pytest.mark.slow
def test_what_lies_in_memory_goes_on_where_it_was(tmp_path: Path, done: list[int]) -> None:
    records = many(900, seed=1)
    columns = {name: [record[name] for record in records] for name in records[0]}
    for number, give in enumerate(
        (lambda: iter(records), lambda: pa.table(columns), lambda: pa.table(columns).to_reader(7))
    ):
        plain, store = tmp_path / f"plain{number}", tmp_path / f"store{number}"
        prepare(give(), plain, workers=1)
        expected = done.copy()
        done.clear()
        with stopped_after(5, StopHere()):
            prepare(give(), store, workers=1)
        prepare(give(), store, workers=1)
        assert sorted(done) == sorted([*expected, 5])  # the one whose end was not noted is done again
        assert store_hash(store) == store_hash(plain)
        done.clear()
