"""The manifest of a token store: what it was made from, and which files it has; read with distrust."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastcollate.errors import InputError

FORMAT = "fastcollate-store"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_REMEDY = "prepare the store again"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of the store's own directory, never of another
_PARTS = {
    "fingerprint": str, "sources": list, "tokenizer": dict, "template": dict, "options": dict, "num_rows": int,
    "num_tokens": int, "max_length": int, "summary": dict, "files": list, "shards": list,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A finished file of a store: its name, its size in bytes, its SHA-256."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What the manifest says of a shard: the file, and counts that its buffers must agree with."""

    name: str
    num_bytes: int
    sha256: str
    num_rows: int
    num_tokens: int
    num_spans: int
    max_length: int


@dataclass(frozen=True, slots=True)
class StoreIdentity:
    """What a store was made from; two stores of one identity hold the same rows.

    Attributes:
        sources: a mapping a source: name, size, time, content hash.
        tokenizer: `name`, `fingerprint` (hash of the ranks), `vocab_size`, `pad_token_id` (the end-of-text).
        template: `name` and whatever else decides the texts.
        options: the job's options that change rows.
    """

    sources: Sequence[Mapping[str, Any]]
    tokenizer: Mapping[str, Any]
    template: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything above."""
        return hashlib.sha256(canonical(asdict(self))).hexdigest()


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a finished store, or `None` where there is none.

    Raises:
        InputError: the manifest is damaged, or of a format version that this release does not read.
    """
    try:
        raw = (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path / MANIFEST}: cannot be read ({error.strerror or error})") from error
    try:
        manifest = json.loads(raw)
        if manifest["format"] != FORMAT:
            raise KeyError("format")
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / MANIFEST}: damaged, or not of a token store; {_REMEDY}") from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {version}, but this release reads version {FORMAT_VERSION}; "
            "prepare the store again, or use the release that wrote it"
        )
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    if manifest.get("checksum") != hashlib.sha256(canonical(body)).hexdigest() or raw != pretty(manifest):
        raise InputError(f"{path / MANIFEST}: damaged (its checksum differs); {_REMEDY}")
    _check(manifest, path / MANIFEST)
    return dict(manifest)


def _check(manifest: Mapping[str, Any], path: Path) -> None:
    """Whether everything that a store is opened by is there, of the right type, and of this directory.

    Raises:
        InputError: it is not; names what is wrong.
    """
    for name, kind in _PARTS.items():
        if not _is_a(manifest.get(name), kind):
            raise InputError(f"{path}: damaged ({name} is {manifest.get(name)!r:.80}); {_REMEDY}")
    for name, kind in (("name", str), ("vocab_size", int), ("pad_token_id", int)):
        if not _is_a(manifest["tokenizer"].get(name), kind):
            found = manifest["tokenizer"].get(name)
            raise InputError(f"{path}: damaged (tokenizer {name} is {found!r:.80}); {_REMEDY}")
    for part, info in (("files", FileInfo), ("shards", ShardInfo)):
        for entry in manifest[part]:
            _check_entry(entry, info, path)


def _check_entry(entry: Any, info: type[FileInfo] | type[ShardInfo], path: Path) -> None:
    wanted = {field.name: str if field.type in (str, "str") else int for field in fields(info)}
    if not isinstance(entry, dict) or set(entry) != set(wanted):
        keys = sorted(set(entry) ^ set(wanted)) if isinstance(entry, dict) else entry
        raise InputError(f"{path}: damaged (a file's entry has other keys than it should: {keys!r:.80}); {_REMEDY}")
    for name, kind in wanted.items():
        if not _is_a(entry[name], kind):
            raise InputError(f"{path}: damaged (a file's {name} is {entry[name]!r:.80}); {_REMEDY}")
    if not _FILE_NAME.fullmatch(entry["name"]):
        raise InputError(f"{path}: names a file outside its own directory ({entry['name']!r:.80}); do not trust it")


def _is_a(value: Any, kind: type) -> bool:
    """`True` is no number here, and no number is below zero."""
    return type(value) is kind and (not isinstance(value, int) or value >= 0)


def canonical(value: object) -> bytes:
    """What is hashed of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def pretty(value: object) -> bytes:
    """What is written of a value."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
