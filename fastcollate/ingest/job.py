"""The job: sources -> store. It cannot lose or corrupt rows, and it continues where it was stopped.

The leading process holds the lock on the store's folder, cuts the sources into units of work and hands them to workers;
a worker writes its unit's rows as a part of a shard; the leader notes finished units in a journal, and puts a shard's
parts together as soon as all are there. The manifest, written last, makes the store.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from fastcollate.errors import InputError, SourceReadError
from fastcollate.ingest.encode import Encoded
from fastcollate.ingest.journal import place_of, report_lines
from fastcollate.ingest.options import PrepareKeywords, PrepareOptions, PrepareReport
from fastcollate.ingest.places import Place, place_at
from fastcollate.ingest.places.summary import length_summary
from fastcollate.ingest.spec import (
    Counts,
    JobSpec,
    UnitResult,
    find_finished,
    seen_of,
    unit_digest,
    write_side_file,
)
from fastcollate.ingest.workers import Results, Runner, runner
from fastcollate.progress import progress_bar
from fastcollate.sources import Source, Unit, find_sources, read_units, spooled
from fastcollate.store import files, remote, shards
from fastcollate.store import manifest as manifests
from fastcollate.text import Template

SKIPPED = "skipped.txt"
_FIRST_ROWS = 1000


def prepare(
    sources: Any,
    store: str | os.PathLike[str],
    *,
    fields: Mapping[str, str] | None = None,
    template_args: Mapping[str, Any] | None = None,
    progress: bool = False,
    **options: Unpack[PrepareKeywords],
) -> PrepareReport:
    """Tokenize records once into a store.

    Any number of processes may ask for the same store at once: one makes it, the others wait and reuse it.

    Args:
        sources: a path, URL or pattern, a `datasets.Dataset`, a table or frame, a sequence of these, or records.
        store: the store's directory, or its URL in object storage, such as `s3://bucket/store`; a finished store of
            the same content is reused, an unfinished one continued.
        fields: where template fields come from, such as `{"instruction": "question"}`.
        template_args: further arguments of a chat template, such as `{"enable_thinking": False}`.
        options: see `fastcollate.ingest.PrepareOptions`.

    Raises:
        InputError: something given is wrong; names value, place and remedy.
        OSError: the store cannot be written; what is finished stays, and the same call continues.

    Example:
        >>> from fastcollate import prepare
        >>> report = prepare("records.jsonl", "my_store", workers=2)
        >>> report.num_rows, report.reused
        (600, False)
        >>> prepare("records.jsonl", "my_store").reused  # the same job again: the store is left as it is
        True
    """
    started = time.perf_counter()
    asked, root = PrepareOptions(**options), remote.folder_of(store)
    given = find_sources(sources, keep_empty=asked.on_error == "skip", split=asked.split)
    is_shared = asked.engine == "ray" and isinstance(root, Path)
    with place_at(root) as place, spooled(given, is_shared=is_shared, progress=progress) as found:
        spec = JobSpec(asked, dict(fields or {}), dict(template_args or {})).chosen(found).sealed()
        job = _Job(found, place, spec, progress)
        manifest = None if asked.overwrite else _find_at_rest(job)
        reused = manifest is not None
        if manifest is None:
            manifest, reused = _under_lock(job, runner(asked.engine, asked.workers), asked)
        else:
            place.tidy()
    return job.report(manifest, reused, time.perf_counter() - started)


def _under_lock(job: _Job, run: Runner, asked: PrepareOptions) -> tuple[dict[str, Any], bool]:
    """The manifest of the store, and whether another job has made it while this one waited."""
    before = job.place.version()
    with job.place.lock(wait=asked.wait) as lock:
        try:
            manifest = None
            if not asked.overwrite:
                manifest = job.find_finished()
            elif lock.waited and job.place.version() != before:
                with contextlib.suppress(InputError):  # another store lies here
                    manifest = job.find_finished()
            if manifest is not None:
                return manifest, True
            job.refuse_own_files()
            if asked.overwrite:
                job.place.begin_anew(job.identity)
            return job.run(run), False
        except SourceReadError:
            raise
        except InputError:
            if not job.has_finished:
                lock.remove_folder()
            raise
        except OSError as error:
            reason = f"{error.strerror or error}; what is finished is kept: mend that and run the same command again"
            raise OSError(error.errno, reason, str(error.filename or job.root)) from error


def _find_at_rest(job: _Job) -> dict[str, Any] | None:
    """As `find_finished`; `None` too where another job has begun to make the store anew meanwhile."""
    before = job.place.version()
    try:
        return job.find_finished()
    except InputError:
        if job.place.version() == before:
            raise
        return None


class _Job:
    """One job's state in the leading process."""

    def __init__(self, sources: list[Source], place: Place, spec: JobSpec, progress: bool) -> None:
        self.sources = sources
        self.place, self.root = place, place.root
        self.spec = spec
        self.has_finished = True
        self._progress = progress
        self._tokenizer, _ = spec.tools()
        self._tokenizer.check_before_start()
        self.identity = spec.identity()
        self._starts = [0, *itertools.accumulate(source.num_bytes for source in sources)]
        self._ready: dict[int, tuple[Unit, Encoded]] = {}
        self._next = 0
        self._open: list[UnitResult] = []
        self._open_number = 0
        self._shards: list[shards.ShardInfo] = []
        self._digests = [hashlib.sha256() for _ in sources]
        self._num_records = [0] * len(sources)
        self._counts = Counts()
        self._num_skipped = self._unproved = 0
        self._tokenize_seconds = 0.0

    def find_finished(self) -> dict[str, Any] | None:
        """The manifest of a finished store that is what this job asks for, or `None` where there is none.

        Raises:
            InputError: another store lies here; says what differs.
        """
        manifest = find_finished(self.root, self.sources, self.identity, progress=self._progress)
        num_skipped = manifest["summary"].get("num_skipped", 0) if manifest is not None else 0
        if num_skipped and self.spec.options.on_error == "raise":
            raise InputError(
                f"{self.root}: {num_skipped} bad records were left out of this store (see {self.root / SKIPPED}); "
                "take it as it is with --on-error skip, or mend the sources"
            )
        return manifest

    def refuse_own_files(self) -> None:
        """Refuse what is read from the store's folder: it would be removed as an earlier job's."""
        for path in [*(source.local or source.name for source in self.sources), self._tokenizer.name]:
            if self.place.holds(path):
                raise InputError(
                    f"{path}: lies in the folder of the store, which is written anew; copy it elsewhere first"
                )

    def run(self, run: Runner) -> dict[str, Any]:
        """Encode all units that the journal does not hold, then commit; returns the manifest."""
        asked = self.spec.options
        with self.place.journal(self.identity, anew=asked.overwrite) as journal:
            self._journal = journal
            try:
                units = self._unfinished(read_units(self.sources))
                results = run(self.place.tasks(units), self.place, self.spec, journal.token)
                # Closed here and now, also after an error: left to the garbage collector, which may run in any thread,
                # the workers' pool could wait for itself.
                with contextlib.closing(results):
                    self._collect(results)
                return self._commit()
            finally:
                self.has_finished = journal.has_finished

    def _collect(self, results: Results) -> None:
        total = self._starts[-1]
        started, num_bytes = time.perf_counter(), 0
        head = list(islice(results, 1))  # workers are forked by now: the bar has a thread, which no fork may copy
        with progress_bar("rate", unit="MB", progress=self._progress) as bar:
            task = bar.add_task("prepare", total=(total + 999_999) // 1_000_000 or None, rate="")
            done = (self.place.taken(self._journal, *result) for result in chain(head, results))
            for unit, encoded in chain.from_iterable(done):
                self._put(unit, encoded)
                num_bytes += unit.num_bytes
                seconds = time.perf_counter() - started
                rate = f"{num_bytes / 1e6 / seconds:.1f} MB/s {self._counts.num_tokens / 1e6 / seconds:.2f}M tokens/s"
                last = unit.blocks[-1]
                bar.update(task, completed=(self._starts[last.source] + last.source_bytes) // 1_000_000, rate=rate)
            bar.update(task, completed=bar.tasks[task].total)  # of the last million bytes, too

    def _unfinished(self, units: Iterator[Unit]) -> Iterator[Unit]:
        """Units that are still to do; those that the journal holds are compared with what it says of them."""
        for number, group in itertools.groupby(units, key=lambda unit: unit.shard):
            shard = self._journal.shards.get(number)
            if shard is None:
                for unit in group:
                    encoded = self._finished(unit)
                    if encoded is None or not self._journal.has_part(unit.index):
                        yield unit
                    else:
                        self._put(unit, encoded)
                continue
            of_shard = list(group)
            finished = [(unit, encoded) for unit in of_shard if (encoded := self._finished(unit)) is not None]
            bounds = of_shard[0].index, of_shard[-1].index
            if len(finished) == len(of_shard) and (shard.first, shard.last) == bounds:
                for unit, encoded in finished:
                    self._put(unit, encoded)
            else:  # not all of its units are any more what they were: it is made again
                del self._journal.shards[number]
                yield from of_shard

    def _finished(self, unit: Unit) -> Encoded | None:
        """What the journal says of a unit, if the unit's content is still what it was."""
        known = self._journal.units.get(unit.index)
        if known is None:
            return None
        digests = [block.digest(block.read()) for block in unit.blocks]
        if unit_digest(unit, digests) == known.sha256:
            return Encoded(known, digests)
        if not unit.index and not known.bad and not self.spec.options.overwrite:
            raise InputError(
                f"{self.root}: holds an unfinished job whose sources began otherwise than {unit.blocks[0].name}; "
                "choose another directory, or begin anew with --overwrite (overwrite=True)"
            )
        return None

    def _put(self, unit: Unit, encoded: Encoded) -> None:
        """Take a finished unit, in any order."""
        self._ready[unit.index] = unit, encoded
        while (ready := self._ready.pop(self._next, None)) is not None:
            self._next += 1
            self._accept(*ready)

    def _accept(self, unit: Unit, encoded: Encoded) -> None:
        """Take the next unit."""
        result = encoded.result
        if result.bad and self.spec.options.on_error == "raise":
            reason, num_records = result.bad[0].reason, sum(block.num_rows for block in unit.blocks)
            alike = sum(bad.reason == reason for bad in result.bad)
            more = f" (the same in {alike} of the {num_records} records that were read with it)" if alike > 1 else ""
            remedy = "mend it, or have such records skipped and listed with --on-error skip"
            raise InputError(f"{place_of(self.sources, result.bad[0])}: {reason}{more}; {remedy}")
        self._check_proved(result)
        if unit.shard != self._open_number:
            self._close_shard()
            self._open_number = unit.shard
        self._open.append(result)
        for block, digest in zip(unit.blocks, encoded.digests, strict=True):
            self._digests[block.source].update(digest)
            self._num_records[block.source] += block.num_rows
        self._counts.add(result.counts)
        self._num_skipped += len(result.bad)
        self._tokenize_seconds += result.tokenize_seconds

    def _check_proved(self, result: UnitResult) -> None:
        """Stop where more than 1% of the first thousand chats do not show which of them is trained."""
        self._unproved += sum(bad.row < _FIRST_ROWS and Template.unproved in bad.reason for bad in result.bad)
        if self._unproved > _FIRST_ROWS // 100:
            first = next(bad.reason for bad in result.bad if Template.unproved in bad.reason)
            raise InputError(f"{self._unproved} of the first {_FIRST_ROWS} records are no good: {first}")

    def _close_shard(self) -> None:
        """Put the parts of a shard together, all of which are there."""
        if not self._open:
            return
        shard = self._journal.shards.get(self._open_number)
        if shard is None:
            parts = [result.part for result in self._open if result.part is not None]
            name = shards.shard_name(self._open_number)
            info = shards.merge_shards(self.place.stage, parts, self.place.stage, name) if parts else None
            shard = self._journal.add_shard(self._open_number, self._open, info)
        if shard.info is not None:
            self._shards.append(shard.info)
        self._open = []

    def _commit(self) -> dict[str, Any]:
        """Write what makes the shards a store; returns the manifest."""
        self._close_shard()
        stage = self.place.stage
        if not self._shards:
            raise InputError(f"{self.sources[0].name}: no usable record ({self._common_fault() or 'none at all'})")
        if 2 * self._num_skipped > sum(self._num_records):
            warnings.warn(self._common_fault(), stacklevel=5)
        self._check_trained()
        contents = zip(self.sources, self._digests, self._num_records, strict=True)
        seen = [seen_of(source, digest.hexdigest(), num_records) for source, digest, num_records in contents]
        self._journal.remove_all_but(self._shards)
        if self._num_skipped:
            files.write_file(stage / SKIPPED, report_lines(self._journal.skipped(self._next), self.sources))
        kept = [files.write_file(stage / name, content) for name, content in self._tokenizer.files.items()]
        write_side_file(stage, seen)
        content = manifests.sources_of([entry.sha256 for entry in seen], sum(self._num_records))
        summary = {**asdict(self._counts), "num_skipped": self._num_skipped}
        lengths = map(self.place.lengths, self._shards)
        summary |= length_summary(lengths, self._counts.num_rows, self.identity["end"])
        if not summary["dropped_fields"]:
            del summary["dropped_fields"]
        identity = manifests.StoreIdentity(content, **self.identity)
        manifests.write_manifest(
            stage, identity, self._shards, files=kept, summary=summary, lengths_of=self.place.lengths
        )
        self.place.publish(self._journal, self._shards)
        self._journal.finish()
        manifest = manifests.read_manifest(stage)
        assert manifest is not None
        return manifest

    def _common_fault(self) -> str:
        """How many records are skipped, and why the most of them."""
        for reason, count in Counter(bad.reason for bad in self._journal.skipped(self._next)).most_common(1):
            total = f"{self._num_skipped} of {sum(self._num_records)} records skipped"
            return f"{total}, {'all' if count == self._num_skipped else count} for this reason: {reason}"
        return ""

    def _check_trained(self) -> None:
        """Rows that train nothing are mostly a template without marks, or a limit that cuts the responses away."""
        untrained, num_rows = self._counts.untrained_rows, self._counts.num_rows
        if 2 * untrained <= num_rows:
            return
        limit = f" within max_length={self.spec.options.max_length}" if self.spec.options.max_length is not None else ""
        message = (
            f"{untrained} of {num_rows} rows train nothing{limit}: raise the limit, give each record a response, or in "
            "a .jinja template put responses between {% generation %} and {% endgeneration %}"
        )
        if untrained == num_rows:
            raise InputError(f"{self.sources[0].name}: {message}")
        warnings.warn(message, stacklevel=6)

    def report(self, manifest: Mapping[str, Any], reused: bool, seconds: float) -> PrepareReport:
        """What the finished job did."""
        summary = dict(manifest["summary"])
        is_listed = summary["num_skipped"] and remote.get(self.root, SKIPPED) is not None
        return PrepareReport(
            str(self.root),
            reused,
            round(seconds, 3),
            round(self._tokenize_seconds, 3),
            self._tokenizer.backend,
            summary,
            str(self.root / SKIPPED) if is_listed else None,
            self.spec.told(),
        )
