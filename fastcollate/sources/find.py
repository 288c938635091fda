"""What a user's words mean: the files, URLs and data sets to read, and what tells that they have not changed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat as stat_module
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from fastcollate.errors import InputError, import_extra, nearest, shown
from fastcollate.progress import progress_bar
from fastcollate.sources.compression import COMPRESSIONS
from fastcollate.sources.remote import attempt, name_of

_FORMATS = {
    ".json": "json", ".jsonl": "lines", ".jsonlines": "lines", ".ndjson": "lines", ".csv": "csv", ".tsv": "tsv",
    ".txt": "text",
    ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow",
}  # fmt: skip
_EXTRAS = {"s3": "s3", "http": "http", "https": "http", "hf": "hf"}  # what to install for a kind of URL
_SAVED = ("state.json", "dataset_dict.json")  # what tells a directory that a data set was saved to
_LIBRARIES = {  # how their objects are read; no library is imported to find out
    "datasets.Dataset": "dataset", "datasets.IterableDataset": "records",
    "pandas.DataFrame": "pandas", "polars.DataFrame": "frame", "polars.LazyFrame": "frame",
    "pyarrow.Table": "table", "pyarrow.RecordBatch": "frame", "pyarrow.Dataset": "table",
}  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOLD = 1000  # records between two signs of progress
_SETTLED_NS = 2_000_000_000  # a file that was changed later than so long ago may change again within one tick


@dataclass(frozen=True, slots=True)
class Source:
    """One file or data set to read.

    Attributes:
        name: as the user named it, or the file that a pattern found; of a URL without user, password and query.
        format: `json`, `lines`, `text`, `csv`, `tsv`, `parquet`, `arrow`; in memory `dataset` or `table`; `records` or
            `stream`, which can be read only once.
        compression: `gzip`, `zstd`, `bz2`, `xz` or `None`.
        num_bytes: its size as stored; 0 where unknown.
        stamp: what changes whenever the content does: a file's size, times and inode, an object's size and ETag, and
            how it is read, which its name says; empty where nothing does.
        is_settled: whether the stamp can be trusted: a file that was changed just now may change again within one tick
            of its clock.
        local: its path, where it is a plain local file.
        is_empty: whether the file holds no byte.
        url: what opens it, where it is remote; it may hold a secret and is never shown.
        dataset: what lies in memory: a `datasets.Dataset`, a table of Arrow, the records of an iterable.
    """

    name: str
    format: str
    compression: str | None = None
    num_bytes: int = 0
    stamp: tuple[int | str, ...] = ()
    is_settled: bool = True
    local: str | None = None
    is_empty: bool = False
    url: str = field(default="", repr=False)
    dataset: Any = field(default=None, compare=False)

    def stamp_now(self) -> tuple[int | str, ...]:
        """The stamp as it is now; empty where there is none, or it can no longer be had."""
        try:
            found = _find_files(self.local or self.url or self.name) if self.stamp else []
        except InputError:
            return ()
        return found[0].stamp if len(found) == 1 else ()


def find_sources(sources: Any, *, keep_empty: bool = False, split: str | None = None) -> list[Source]:
    """The files, data sets and tables that the user's words mean, patterns in alphabetical order.

    They may be a path, a URL that fsspec knows, a pattern, a `datasets.Dataset`, a table (of pyarrow, pandas, polars,
    or whatever gives Arrow's stream), a sequence of these, or an iterable of records (mappings). With `keep_empty` a
    file without a byte is one more source, of one bad record. `split` is taken of dictionaries of data sets.

    Raises:
        InputError: nothing there, a directory, an empty file, a format that is not known, or no such split.
    """
    if isinstance(sources, str | os.PathLike) or _kind(sources):
        sources = [sources]
    if not isinstance(sources, Iterable) and hasattr(sources, "__getitem__") and hasattr(sources, "__len__"):
        sources = map(sources.__getitem__, range(len(sources)))  # a map-style data set of PyTorch
    if not isinstance(sources, Iterable) or isinstance(sources, Mapping):
        remedy = "a data set, a table (of columns: pyarrow.table(columns)) or a list of records"
        raise InputError(f"sources: a single {type(sources).__name__}; name files, or give {remedy}")
    given = iter(sources)
    first = list(islice(given, 1))
    if first and isinstance(first[0], Mapping) and not _kind(first[0]):
        return [_unsplit(Source("the records given", "records", dataset=chain(first, given)), split)]
    found: list[Source] = []
    names = _names(sources) if isinstance(sources, list | tuple) else {}
    for source in chain(first, given):
        if kind := _kind(source):
            found.append(_in_memory(source, kind, split))
        elif isinstance(source, str | os.PathLike):
            found += _find_files(os.fspath(source), names.get(source), split)
        else:
            remedy = "; give turns as records: {'messages': turns}" if isinstance(source, list) else ""
            what = f"source {shown(source)}: neither a path, a URL, a data set, a table, nor a record"
            raise InputError(f"{what}{remedy}")
    if not found:
        raise InputError("no source given; name at least one file of records")
    if (empty := [source.name for source in found if source.is_empty]) and not keep_empty:
        more = f" (and {len(empty) - 1} more of the files)" if len(empty) > 1 else ""
        raise InputError(f"{empty[0]}{more}: is empty; leave it out, or have it skipped and listed by --on-error skip")
    return found


def _names(sources: Sequence[Any]) -> dict[Any, str]:
    """Names of URLs that differ only in what a name leaves out, by the URL."""
    same: dict[str, list[str]] = {}
    for url in dict.fromkeys(source for source in sources if isinstance(source, str) and "://" in source):
        same.setdefault(name_of(url), []).append(url)
    return {
        url: f"{name} (query {number} of {len(urls)})"
        for name, urls in same.items()
        if len(urls) > 1
        for number, url in enumerate(urls, 1)
    }


def _kind(given: Any) -> str:
    """How an object of a library is read; empty for anything else."""
    if isinstance(given, Mapping):
        return "splits" if given and all(map(_kind, given.values())) else ""
    kinds = (_LIBRARIES.get(f"{kind.__module__.partition('.')[0]}.{kind.__name__}") for kind in type(given).__mro__)
    return next(filter(None, kinds), "stream" if hasattr(given, "__arrow_c_stream__") else "")


def _in_memory(given: Any, kind: str, split: str | None, name: str = "") -> Source:
    name = name or f"{type(given).__module__.partition('.')[0]}.{type(given).__name__}"
    if kind == "splits":
        chosen = _split_of(name, given, split)
        return _in_memory(chosen, _kind(chosen), None, f"{name}[{split!r}]")
    if kind == "dataset" and (given.format or {}).get("type") == "custom":
        raise InputError(
            f"{name}: has a transform (set_transform or with_transform), which is not stored; apply it once "
            "with dataset.map, or take it off with dataset.reset_format()"
        )
    if kind in ("frame", "pandas"):
        kind, given = _from_pandas(given, name) if kind == "pandas" else ("table", _table(given))
    return _unsplit(Source(name, kind, dataset=given), split)


def _table(frame: Any) -> pa.Table:
    if isinstance(frame, pa.RecordBatch):
        return pa.Table.from_batches([frame])
    frame = frame.collect() if hasattr(frame, "collect") else frame
    return frame.to_arrow() if hasattr(frame, "to_arrow") else pa.table(frame)


def _from_pandas(frame: Any, name: str) -> tuple[str, Any]:
    """A frame as a table; as records where it holds objects, which a table would give each other's keys, or mixes."""
    if not frame.columns.is_unique:
        raise InputError(f"{name}: two columns are named {frame.columns[frame.columns.duplicated()][0]!r}")
    with contextlib.suppress(pa.ArrowException, TypeError, ValueError, OverflowError):
        table = pa.Table.from_pandas(frame, preserve_index=False)
        if not any(_holds_objects(column.type) for column in table.schema):
            return "table", table
    names, plain = [*map(str, frame.columns)], frame.astype(object).where(frame.notna(), None)
    return "records", (dict(zip(names, row, strict=True)) for row in plain.itertuples(index=False, name=None))


def _holds_objects(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) or any(_holds_objects(kind.field(i).type) for i in range(kind.num_fields))


def _split_of(name: str, splits: Mapping[str, Any], split: str | None) -> Any:
    if split is not None and split in splits:
        return splits[split]
    known = ", ".join(map(str, splits))
    what = f"has no split {shown(split)}" if split is not None else "holds several splits"
    example = next(iter(splits))
    raise InputError(f"{name}: {what}; choose one of {known}, such as split={shown(example)} (--split {example})")


def _unsplit(source: Source, split: str | None) -> Source:
    if split is not None:
        raise InputError(f"{source.name}: is no dictionary of splits; leave out split={shown(split)} (--split)")
    return source


@contextlib.contextmanager
def spooled(sources: Sequence[Source], *, is_shared: bool, progress: bool = False) -> Iterator[list[Source]]:
    """The sources, those that can be read only once as temporary files: they must be read more often.

    `is_shared` says that other machines do the work, which cannot read that file themselves.
    """
    once = [source for source in sources if source.format in ("records", "stream")]
    with contextlib.ExitStack() as stack:
        with progress_bar(unit="records", progress=progress and bool(once)) as bar:
            task = bar.add_task("reading", total=None)
            files = {id(source): _spool(source, stack, is_shared, partial(bar.advance, task)) for source in once}
        yield [files.get(id(source), source) for source in sources]


def _spool(source: Source, stack: contextlib.ExitStack, is_shared: bool, advance: Callable[[int], object]) -> Source:
    kind, write = ("lines", _write_lines) if source.format == "records" else ("arrow", _write_batches)
    descriptor, path = tempfile.mkstemp(prefix="fastcollate-")
    stack.callback(os.unlink, path)
    with open(descriptor, "wb") as file:
        write(source, file, advance)
    num_bytes = os.path.getsize(path)
    return Source(path if is_shared else source.name, kind, num_bytes=num_bytes, local=None if is_shared else path)


def _write_batches(source: Source, file: IO[bytes], advance: Callable[[int], object]) -> None:
    try:
        batches = pa.RecordBatchReader.from_stream(source.dataset)
        with batches, pa.ipc.new_stream(file, batches.schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
                advance(batch.num_rows)
    except pa.ArrowException as error:
        raise InputError(f"{source.name}: cannot be read ({error})") from error


def _write_lines(source: Source, file: IO[bytes], advance: Callable[[int], object]) -> None:
    for number, record in enumerate(source.dataset):
        if number % _TOLD == _TOLD - 1:
            advance(_TOLD)
        try:
            line = _line(dict(record) if isinstance(record, Mapping) else record)
        except (TypeError, ValueError, RecursionError) as error:
            fields = record.items() if isinstance(record, Mapping) else ()
            where = next((f", field {name!r}" for name, value in fields if not _is_json(value)), "")
            raise InputError(
                f"{source.name}, record {number}{where}: cannot be written as JSON ({error}); leave it out"
            ) from error
        file.write(_SURROGATE.sub(lambda match: f"\\u{ord(match[0]):x}", line).encode() + b"\n")


def _line(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False, default=_plain)


def _is_json(value: Any) -> bool:
    try:
        return bool(_line(value))
    except (TypeError, ValueError, RecursionError):
        return False


def _plain(value: Any) -> Any:
    """An array or tensor as lists, one number as a plain one, a mapping as a dictionary, a time as text."""
    if isinstance(value, Mapping):
        return dict(value)
    for method in ("tolist", "isoformat"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"a value of type {type(value).__name__}")


def _find_files(url: str, name: str | None = None, split: str | None = None) -> list[Source]:
    """The files that a path, URL or pattern means; `name` is for messages, of a URL that needs another than its own."""
    if "://" not in url and "::" not in url and any((Path(url).expanduser() / file).is_file() for file in _SAVED):
        return [_saved_dataset(Path(url).expanduser(), split)]
    return [_unsplit(source, split) for source in _plain_files(url, name)]


def _plain_files(url: str, name: str | None) -> list[Source]:
    if "://" not in url and "::" not in url:
        url = os.path.expanduser(url)
        if not _is_pattern(url) or os.path.exists(url):
            return [_local_file(url, url)]
    name = name or name_of(url)
    try:
        files, path = attempt(name, url, lambda: fsspec.core.url_to_fs(url))
    except ImportError as error:
        extra = _EXTRAS.get(url.split("://")[0])
        remedy = f"pip install 'fastcollate[{extra}]'" if extra else error
        raise InputError(f"{name}: this kind of URL needs another package ({remedy})") from None
    is_local = isinstance(files, LocalFileSystem)
    if not is_local:
        files.invalidate_cache()  # it may remember what was there before
    if _is_pattern(path) and not attempt(name, url, lambda: files.exists(path)):
        if not (found := sorted(attempt(name, url, lambda: files.glob(path)))):
            raise InputError(f"{name}: no file matches this pattern; check the folder, and the ending")
        if is_local:
            return [_local_file(path, path) for path in found]
        urls = [str(files.unstrip_protocol(path)) for path in found]
        return [_remote_file(files, *pair, name_of(pair[1])) for pair in zip(found, urls, strict=True)]
    return [_local_file(path, url.removeprefix("file://")) if is_local else _remote_file(files, path, url, name)]


def _is_pattern(name: str) -> bool:
    is_web = name.startswith(("http://", "https://"))  # where a question mark begins the query
    return any(mark in (name.split("?")[0] if is_web else name) for mark in "*?[")


def _saved_dataset(path: Path, split: str | None) -> Source:
    """What `datasets.Dataset.save_to_disk` wrote."""
    datasets = import_extra("datasets", "hf")
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # the package raises whatever a damaged file makes it stumble over
        raise InputError(f"{path}: cannot be read as a saved data set ({type(error).__name__}: {error})") from error
    found = _in_memory(dataset, _kind(dataset), split, str(path))
    return replace(found, num_bytes=sum(file.stat().st_size for file in (path / (split or "")).glob("*.arrow")))


def _local_file(path: str, name: str) -> Source:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        if _HUB_NAME.fullmatch(name) and _ending(name)[0] not in _FORMATS and not os.path.isdir(os.path.dirname(name)):
            raise InputError(
                f"{name}: no such file; a data set of the hub is not looked up: online, write it to a file, "
                f"python -c \"from datasets import load_dataset as load; load('{name}', split='train')"
                ".to_json('NEW.jsonl')\", and give NEW.jsonl"
            ) from None
        hint = nearest(path)
        if name.endswith(".jsonl"):
            hint += f"{' To' if hint.endswith('?') else '; to'} try things: fastcollate sample {name}"
        raise InputError(f"{name}: no such file; {hint}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if stat_module.S_ISDIR(stat.st_mode):
        raise _is_directory(name)
    kind, compression = _format(path, name)
    is_settled = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) >= _SETTLED_NS
    stamp = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, kind, compression or "")
    local = os.path.abspath(path) if compression is None else None
    return Source(name, kind, compression, stat.st_size, stamp, is_settled, local, is_empty=not stat.st_size)


def _remote_file(files: Any, path: str, url: str, name: str) -> Source:
    info = attempt(name, url, lambda: files.info(path))
    if info["type"] == "directory":
        raise _is_directory(name)
    plain = name_of(url)
    kind, compression = _format(plain, name, url)
    tag = info.get("ETag") or info.get("etag")
    size = int(info.get("size") or 0)
    stamp = (size, str(tag), kind, compression or "", plain) if tag else ()
    # what the name leaves out may name another file, of which the same tag tells nothing
    return Source(name, kind, compression, size, stamp, plain == url, is_empty=info.get("size") == 0, url=url)


def _is_directory(name: str) -> InputError:
    if os.path.isfile(os.path.join(name, "manifest.json")):
        return InputError(f"{name}: is a token store, not records; train on it with: fastcollate train --store {name}")
    return InputError(f"{name}: is a directory; name files in it, such as {name.rstrip('/')}/*.jsonl")


def _format(path: str, name: str, other: str = "") -> tuple[str, str | None]:
    """A file's format and compression, by its ending, or that of `other`."""
    suffix, compression = _ending(path)
    if suffix not in _FORMATS and _ending(other)[0] in _FORMATS:
        suffix, compression = _ending(other)
    if compression == "zstd":
        import_extra("zstandard", "zstd")
    kind = _FORMATS.get(suffix)
    if kind is None:
        raise InputError(
            f"{name}: the ending {suffix or '(none)'} is not known; use one of {', '.join(_FORMATS)}, "
            f"each also with {', '.join(COMPRESSIONS)}"
        )
    return kind, compression


def _ending(path: str) -> tuple[str, str | None]:
    stem, suffix = os.path.splitext(path)
    compression = COMPRESSIONS.get(suffix.lower())
    return (os.path.splitext(stem)[1] if compression else suffix).lower(), compression
