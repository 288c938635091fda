"""An old store in today's format: the same rows in few shards, checked on the way."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastcollate.errors import InputError
from fastcollate.options import local_path
from fastcollate.progress import progress_bar
from fastcollate.store.files import FileInfo, describe, naming, write_file
from fastcollate.store.manifest import FORMAT_VERSION, LENGTHS, StoreIdentity, read_manifest, write_manifest
from fastcollate.store.shards import ShardInfo, merge_shards, shard_name
from fastcollate.store.store import TokenStore

SHARD_BYTES = 64 << 20  # a merged shard's, at most, where one old shard is not larger
_TOKENIZER, _CONFIG = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What `convert` did."""

    old: str
    store: str
    num_rows: int
    old_shards: int
    new_shards: int
    has_tokenizer: bool  # the vocabulary needs no file outside the new store
    seconds: float

    def __str__(self) -> str:
        """What came of it, and what to do next."""
        lines = [
            f"{self.store}: converted in {self.seconds:.1f} s; {self.num_rows:,} rows; "
            f"{self.old_shards:,} shards before, {self.new_shards:,} now"
        ]
        if not self.has_tokenizer:
            lines.append("note: its tokenizer.json is not where it was; ids cannot be shown as texts without it")
        return "\n".join([*lines, f"next: fastcollate verify --checksums {self.store}, then delete {self.old}"])


def convert(old: str | Path, new: str | Path, *, progress: bool = False) -> ConvertReport:
    """Write a format 1 store's rows as a store of today's format; the old one is left as it is.

    Each old file's checksum is compared before its rows are taken. One old shard is open at a time, and one new shard
    (`SHARD_BYTES`) is in memory. The manifest comes last: until then `new` is no store, and where something fails it
    is removed. The fingerprint stays, so what was trained on the old store goes on with the new one.

    Args:
        old: the directory of a finished format 1 store.
        new: the directory to write; it does not exist, or is empty.
        progress: show a progress bar.

    Raises:
        InputError: `old` is no store, is of this format already, or is damaged; or `new` holds something.
        OSError: `new` cannot be written.

    Example:
        >>> from fastcollate.store import convert
        >>> convert("store", "new")  # made by this release
        Traceback (most recent call last):
            ...
        fastcollate.errors.InputError: store: of format 2 already; there is nothing to convert: use it as it is
    """
    started = time.perf_counter()
    root, target = local_path(old), local_path(new)
    manifest = read_manifest(root)
    if manifest is None:
        raise InputError(f"{root}: no finished token store here; give the directory of the store to convert")
    if manifest["format_version"] == FORMAT_VERSION:
        raise InputError(f"{root}: of format {FORMAT_VERSION} already; there is nothing to convert: use it as it is")
    _make_empty(target)
    try:
        infos = [ShardInfo(**entry) for entry in manifest["shards"]]
        with progress_bar(unit="shards", progress=progress) as bar:
            task = bar.add_task("convert", total=len(infos))
            shards = list(_merge(root, target, infos, lambda: bar.advance(task)))
        others = [FileInfo(**entry) for entry in manifest["files"] if entry["name"] != LENGTHS]
        files = [write_file(target / file.name, _checked(root, file).read_bytes()) for file in others]
        identity = StoreIdentity(**{part.name: manifest[part.name] for part in fields(StoreIdentity)})
        tokenizer, vocabulary = _keep_tokenizer(target, identity.tokenizer)
        template = {**identity.template}
        if "name" in template:
            template["name"] = Path(str(template["name"])).name
        write_manifest(
            target,
            replace(identity, tokenizer=tokenizer, template=template),
            shards,
            files=[*files, *vocabulary],
            summary=manifest["summary"],
            fingerprint=manifest["fingerprint"],
        )
        num_rows = len(TokenStore(target))
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    has_tokenizer = bool(vocabulary) or not tokenizer["name"].endswith(".json")
    seconds = round(time.perf_counter() - started, 3)
    return ConvertReport(str(root), str(target), num_rows, len(infos), len(shards), has_tokenizer, seconds)


def _make_empty(target: Path) -> None:
    """Make the directory; of two processes that want it, one does."""
    try:
        if target.is_dir():
            target.rmdir()  # fails where there is anything in it
        target.mkdir(parents=True)
    except OSError as error:
        if not target.exists():
            raise
        raise InputError(f"{target}: is there already and not empty; choose another directory, or delete it") from error


def _merge(root: Path, target: Path, infos: Sequence[ShardInfo], advance: Callable[[], object]) -> Iterator[ShardInfo]:
    """Write neighbours as one shard each."""
    for index, group in enumerate(_groups(infos)):
        for info in group:
            _checked(root, FileInfo(info.name, info.num_bytes, info.sha256))
            advance()
        yield merge_shards(root, group, target, shard_name(index))


def _groups(infos: Sequence[ShardInfo]) -> Iterator[list[ShardInfo]]:
    """Runs of shards whose columns have at most `SHARD_BYTES`, were all ids of 32 bits; one at least."""
    group: list[ShardInfo] = []
    num_bytes = 0
    for info in infos:
        size = 4 * info.num_tokens + 4 * info.num_spans + 24 * info.num_rows
        if group and num_bytes + size > SHARD_BYTES:
            yield group
            group, num_bytes = [], 0
        group.append(info)
        num_bytes += size
    yield group


def _checked(root: Path, info: FileInfo) -> Path:
    """A file's path; a damaged one must not get a new checksum that is right."""
    path = root / info.name
    with naming(path):
        if describe(path) != info:
            raise InputError(f"{path}: damaged (its size or checksum differs); prepare the store again")
    return path


def _keep_tokenizer(target: Path, tokenizer: Mapping[str, Any]) -> tuple[dict[str, Any], list[FileInfo]]:
    """The tokenizer's identity without a path, and its file as the store's own, where it is still what it was."""
    path = Path(tokenizer["name"])
    if path.suffix != ".json":
        return dict(tokenizer), []
    files: list[FileInfo] = []
    if path.is_file() and describe(path).sha256 == tokenizer["fingerprint"]:
        files.append(write_file(target / _TOKENIZER, path.read_bytes()))
        beside = path.parent / _CONFIG  # names the end-of-text
        if beside.is_file():
            files.append(write_file(target / _CONFIG, beside.read_bytes()))
    return {**tokenizer, "name": path.name, "files": [file.name for file in files]}, files
