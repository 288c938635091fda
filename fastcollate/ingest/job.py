"""The job: sources -> store. It cannot lose or corrupt rows, and it continues where it was stopped.

The leading process cuts the sources into blocks and hands them to workers; a worker writes its block's shard; the
leader notes finished blocks in order in a journal. The manifest, written last, makes the store.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fastcollate.errors import InputError, import_extra
from fastcollate.ingest.encode import BlockResult, Counts, JobSpec, encode_block, warm_up
from fastcollate.ingest.journal import JobLock, Journal
from fastcollate.ingest.summary import length_summary
from fastcollate.progress import progress_bar
from fastcollate.sources.blocks import BLOCK_BYTES, Block, Source, SourceReadError, find_sources, read_blocks
from fastcollate.sources.records import BadRecord
from fastcollate.store.files import write_file
from fastcollate.store.manifest import StoreIdentity, pretty, sources_of
from fastcollate.store.store import ShardInfo, TokenStore, read_manifest, write_manifest
from fastcollate.text.templates import load_template
from fastcollate.text.tokenizer import load_tokenizer

SKIPPED = "skipped.txt"
SOURCES = "sources.json"  # names, sizes, times: no part of the store
_CHOICES = {
    "boundary": ("reference", "exact"),
    "on_error": ("raise", "skip"),
    "long_prompt": ("reject", "keep", "cut"),
    "special_text": ("reject", "encode"),
    "engine": ("local", "ray"),
}


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What a job did.

    Attributes:
        store: the store's directory.
        reused: whether a finished store of the same fingerprint was found and left as it is.
        seconds: time taken.
        tokenize_seconds: time inside the tokenizer, summed over workers; 0 for blocks of an earlier run.
        backend: what tokenized.
        summary: counts, length percentiles, padding to expect; as in the manifest.
        skipped_report: the file that lists skipped records, or `None`.
    """

    store: str
    reused: bool
    seconds: float
    tokenize_seconds: float
    backend: str
    summary: dict[str, Any]
    skipped_report: str | None

    @property
    def num_rows(self) -> int:
        """Rows stored."""
        return int(self.summary["num_rows"])

    def __str__(self) -> str:
        """A line a figure."""
        verb = "found unchanged" if self.reused else f"finished in {self.seconds:.1f} s"
        lines = [f"{self.store}: {verb}"]
        lines += [f"  {name.replace('_', ' ')}: {value}" for name, value in self.summary.items()]
        return "\n".join(lines)


def prepare(
    sources: Any,
    store: str | os.PathLike[str],
    *,
    template: str = "alpaca",
    tokenizer: str = "gpt2",
    backend: str = "auto",
    fields: Mapping[str, str] | None = None,
    boundary: str = "reference",
    on_error: str = "raise",
    max_length: int | None = None,
    long_prompt: str = "reject",
    special_text: str = "reject",
    engine: str = "local",
    workers: int | None = None,
    progress: bool = False,
) -> PrepareReport:
    """Tokenize records once into a store.

    Args:
        sources: a path, URL or pattern, a `datasets.Dataset`, or a sequence of these.
        store: the store's directory; a finished store of the same fingerprint is reused, an unfinished one continued.
        template: `alpaca`, `phi3`, `completion`, `chat`, or a `.jinja` file.
        tokenizer: an encoding of tiktoken, or a `tokenizer.json`.
        backend: `auto`, `tiktoken` or `gigatoken`; the ids are the same.
        fields: where template fields come from, such as `{"instruction": "question"}`.
        boundary: `reference` takes the length of the prompt tokenized by itself; `exact` begins the response at the
            first token that holds a response character.
        on_error: `raise` stops at the first bad record; `skip` lists it in `skipped.txt` and goes on.
        max_length: the limit in columns that the counts and `long_prompt` refer to; rows are stored whole.
        long_prompt: a prompt that leaves no column within the limit makes a bad record (`reject`), is kept as it is
            (`keep`), or is cut from the left (`cut`).
        special_text: a text like `<|endoftext|>` makes a bad record (`reject`) or is ordinary text (`encode`).
        engine: `local` processes, or `ray` for a cluster.
        workers: worker processes; the usable cores by default.
        progress: show a progress bar.

    Raises:
        InputError: something given is wrong; names value, place and remedy.
        OSError: the store cannot be written; finished shards stay, and the same call continues.

    Example:
        >>> from fastcollate import prepare
        >>> report = prepare("records.jsonl", "my_store", workers=2)
        >>> report.num_rows, report.reused
        (600, False)
        >>> prepare("records.jsonl", "my_store").reused  # the same job again: the store is left as it is
        True
    """
    started = time.perf_counter()
    options = {"boundary": boundary, "on_error": on_error, "long_prompt": long_prompt, "special_text": special_text}
    for name, value in {**options, "engine": engine}.items():
        if value not in _CHOICES[name]:
            raise InputError(f"{name}={value!r}: choose one of {', '.join(_CHOICES[name])}")
    if workers is not None and workers < 1:
        raise InputError(f"workers={workers}: at least 1")
    found = find_sources(sources)
    fields = dict(fields or {})
    spec = JobSpec(template, tokenizer, backend, fields, boundary, max_length, long_prompt, special_text)
    job = _Job(found, Path(store), spec, on_error, progress)
    made = [folder for folder in (job.root, *job.root.parents) if not folder.exists()]
    try:
        with JobLock(job.root) as lock:
            reused = job.find_finished()
            if reused is None:
                runner = _ray_runner(workers) if engine == "ray" else _local_runner(workers, lock.descriptor)
                job.run(runner)
    except SourceReadError:
        raise
    except InputError:
        if made:
            shutil.rmtree(job.root, ignore_errors=True)
            with contextlib.suppress(OSError):  # somebody else has put something there
                for folder in made[1:]:
                    folder.rmdir()
        raise
    except OSError as error:
        reason = f"{error.strerror or error}; the finished shards are kept: mend that and run the same command again"
        raise OSError(error.errno, reason, str(error.filename or job.root)) from error
    return job.report(reused is not None, time.perf_counter() - started)


Results = Generator[tuple[Block, BlockResult], None, None]
Runner = Callable[[Iterator[Block], JobSpec, str], Results]


class _Job:
    """One job's state in the leading process."""

    def __init__(self, sources: list[Source], root: Path, spec: JobSpec, on_error: str, progress: bool) -> None:
        self.sources = sources
        self.root = root
        self.spec = spec
        self._on_error = on_error
        self._progress = progress
        self._tokenizer = load_tokenizer(spec.tokenizer, spec.backend)
        self._tokenizer.check_before_start()
        self._template = load_template(spec.template, spec.fields)
        self._digests = [hashlib.sha256() for _ in sources]
        self._counts = Counts()
        self._shards: list[ShardInfo] = []
        self._num_skipped = 0
        self._tokenize_seconds = 0.0

    def _identity(self) -> dict[str, Any]:
        """What is known of the job before its sources are read."""
        return {
            "sources": [source.identity() for source in self.sources],
            "tokenizer": self._tokenizer.identity(),
            "template": self._template.identity(),
            "options": {**self.spec.options(), "on_error": self._on_error, "block_bytes": BLOCK_BYTES},
        }

    def find_finished(self) -> dict[str, Any] | None:
        """The manifest of a finished store of the same identity, or `None` where there is none.

        Raises:
            InputError: a store of another identity lies here, or files that are not of a store.
        """
        manifest = read_manifest(self.root)
        if manifest is None:
            return None
        wanted = self._identity()
        side = self.root / SOURCES
        sources = json.loads(side.read_bytes()) if side.is_file() else [{**s, "sha256": ""} for s in wanted["sources"]]
        found = {"sources": sources, **{key: manifest[key] for key in ("tokenizer", "template", "options")}}
        differences = _differences(found, {**wanted, "options": self.spec.options()})
        if not differences:
            hashes = self._hash_sources()
            stored = [source["sha256"] for source in sources]
            differences = [
                f"the content of {s.name}" for s, a, b in zip(self.sources, hashes, stored, strict=True) if a != b
            ]
        if differences:
            raise InputError(
                f"{self.root}: holds a store that differs in {'; '.join(differences)}; "
                "choose another directory, or delete this one"
            )
        Journal.remove(self.root)
        return manifest

    def _hash_sources(self) -> list[str]:
        digests = [hashlib.sha256() for _ in self.sources]
        for block in read_blocks(self.sources):
            digests[block.source].update(hashlib.sha256(block.read()).digest())
        return [digest.hexdigest() for digest in digests]

    def run(self, runner: Runner) -> None:
        """Encode all blocks that the journal does not hold, then commit."""
        with Journal(self.root, self._identity(), _differences) as journal:
            results = runner(self._skip_finished(read_blocks(self.sources), journal), self.spec, str(self.root))
            # Closed here and now, also after an error: left to the garbage collector, which may run in any thread, the
            # workers' pool could wait for itself.
            with contextlib.closing(results):
                self._accept_all(results, journal)
            self._commit(journal)
        Journal.remove(self.root)

    def _accept_all(self, results: Results, journal: Journal) -> None:
        total = sum(source.num_bytes for source in self.sources)
        started, num_bytes = time.perf_counter(), 0
        head = list(islice(results, 1))  # workers are forked by now: the bar has a thread, which no fork may copy
        with progress_bar("rate", unit="MB", progress=self._progress) as bar:
            task = bar.add_task("prepare", total=(total + 999_999) // 1_000_000 or None, rate="")
            for block, result in chain(head, results):
                self._accept(block, result)
                journal.add(result)
                num_bytes += block.num_bytes
                seconds = time.perf_counter() - started
                rate = f"{num_bytes / 1e6 / seconds:.1f} MB/s {self._counts.num_tokens / 1e6 / seconds:.2f}M tokens/s"
                bar.update(task, completed=block.source_bytes // 1_000_000, rate=rate)

    def _skip_finished(self, blocks: Iterator[Block], journal: Journal) -> Iterator[Block]:
        """Blocks that are still to do; those in the journal are compared with what it says of them."""
        for block in blocks:
            result = journal.finished(block.index)
            if result is not None and result.sha256 == hashlib.sha256(block.read()).hexdigest():
                self._accept(block, result)
                continue
            if result is not None:
                raise InputError(
                    f"{block.name}: has changed since the unfinished job in {self.root} began; delete that directory "
                    "and start again"
                )
            yield block

    def _accept(self, block: Block, result: BlockResult) -> None:
        if result.bad and self._on_error == "raise":
            raise InputError(f"{_place(block.name, result.bad[0])}: {result.bad[0].reason}")
        self._digests[block.source].update(bytes.fromhex(result.sha256))
        self._counts.add(result.counts)
        self._num_skipped += len(result.bad)
        self._tokenize_seconds += result.tokenize_seconds
        if result.shard is not None:
            self._shards.append(result.shard)

    def _commit(self, journal: Journal) -> None:
        if not self._shards:
            raise InputError(f"{self.sources[0].name}: no usable record ({self._num_skipped} skipped)")
        files = []
        if self._num_skipped:
            names = [source.name for source in self.sources]
            files.append(write_file(self.root / SKIPPED, _report_lines(journal, names)))
        summary = {**asdict(self._counts), "num_skipped": self._num_skipped}
        summary |= length_summary(self.root, self._shards)
        hashes = [digest.hexdigest() for digest in self._digests]
        known = self._identity()
        sources = [{**source, "sha256": sha} for source, sha in zip(known["sources"], hashes, strict=True)]
        write_file(self.root / SOURCES, pretty(sources))
        num_records = self._counts.num_rows + self._num_skipped
        identity = StoreIdentity(
            sources_of(hashes, num_records), known["tokenizer"], known["template"], self.spec.options()
        )
        write_manifest(self.root, identity, self._shards, files=files, summary=summary)

    def report(self, reused: bool, seconds: float) -> PrepareReport:
        """What the finished job did."""
        summary = dict(TokenStore(self.root).manifest["summary"])
        skipped = self.root / SKIPPED
        return PrepareReport(
            str(self.root),
            reused,
            round(seconds, 3),
            round(self._tokenize_seconds, 3),
            self._tokenizer.backend,
            summary,
            str(skipped) if summary["num_skipped"] else None,
        )


def _place(name: str, bad: BadRecord) -> str:
    return f"{name}, line {bad.line}, record {bad.row}" if bad.line else f"{name}, record {bad.row}"


def _report_lines(journal: Journal, names: Sequence[str]) -> Iterator[str]:
    """The report of skipped records: file, line, record, reason, separated by tabs."""
    yield "file\tline\trecord\treason"
    for source, bad in journal.skipped():
        reason = bad.reason.replace("\t", " ").replace("\n", " ")
        yield f"{names[source]}\t{bad.line or '-'}\t{bad.row}\t{reason.encode('utf-8', 'replace').decode()}"


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words; a hash on one side only does not count."""
    differences = []
    if [s["name"] for s in found["sources"]] != [s["name"] for s in wanted["sources"]]:
        differences.append("its sources")
    else:
        for old, new in zip(found["sources"], wanted["sources"], strict=True):
            differences += [
                f"the {'size' if key == 'num_bytes' else key} of {old['name']} ({old[key]!r}, now {new[key]!r})"
                for key in ("num_bytes", "time")
                if old[key] != new[key]
            ]
    for group in ("tokenizer", "template", "options"):
        keys = {**found[group], **wanted[group]}
        differences += [
            f"{group} {key} ({found[group].get(key)!r}, now {wanted[group].get(key)!r})"
            for key in keys
            if found[group].get(key) != wanted[group].get(key)
        ]
    return differences


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _local_runner(workers: int | None, lock: int) -> Runner:
    """Worker processes; one block alone, or one worker, is done in this process."""

    def run(blocks: Iterator[Block], spec: JobSpec, root: str) -> Results:
        head = [block for _, block in zip(range(2), blocks, strict=False)]
        count = workers or _usable_cores()
        if count == 1 or len(head) < 2:
            for block in chain(head, blocks):
                yield block, encode_block(block, spec, root)
            return
        warm_up(spec)
        is_safe = sys.platform == "linux" and threading.active_count() == 1
        context = multiprocessing.get_context("fork" if is_safe else "spawn")
        with ProcessPoolExecutor(count, context, _begin_worker, (lock if is_safe else -1,)) as pool:
            try:
                yield from _in_order(chain(head, blocks), count, lambda b: pool.submit(encode_block, b, spec, root))
            except BrokenProcessPool as error:
                raise SourceReadError(
                    f"{root}: a worker process was killed, perhaps for want of memory; the finished shards are kept: "
                    "run the same command again, with fewer workers if need be"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)

    return run


def _in_order(
    blocks: Iterator[Block], workers: int, submit: Callable[[Block], Future[BlockResult]]
) -> Iterator[tuple[Block, BlockResult]]:
    """Results in the order of the blocks, with as many blocks waiting as are at work."""
    running: deque[tuple[Block, Future[BlockResult]]] = deque()
    for block in blocks:
        running.append((block, submit(block)))
        if len(running) >= 2 * workers:
            first, future = running.popleft()
            yield first, future.result()
    while running:
        first, future = running.popleft()
        yield first, future.result()


def _begin_worker(lock: int) -> None:
    """Let go of the job's lock, and end when the leader ends, however it does."""
    if lock >= 0:
        os.close(lock)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _ray_runner(workers: int | None) -> Runner:
    """The same block function as tasks of a Ray cluster; Ray runs a lost task again."""
    ray = import_extra("ray", "ray")

    def run(blocks: Iterator[Block], spec: JobSpec, root: str) -> Results:
        if not ray.is_initialized():
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
        task = ray.remote(num_cpus=1, max_retries=5)(encode_block)
        count = workers or int(ray.cluster_resources().get("CPU", 1))
        running: deque[tuple[Block, Any]] = deque()
        for block in blocks:
            running.append((block, task.remote(block, spec, os.path.abspath(root))))
            if len(running) > count:
                first, reference = running.popleft()
                yield first, _ray_result(ray, reference)
        while running:
            first, reference = running.popleft()
            yield first, _ray_result(ray, reference)

    return run


def _ray_result(ray: Any, reference: Any) -> BlockResult:
    try:
        result: BlockResult = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except ray.exceptions.RayError as error:
        raise SourceReadError(f"Ray gave a block up ({error}); finished shards are kept: run it again") from error
    return result
