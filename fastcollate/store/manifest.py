"""The manifest of a token store: what it was made from, and which files it has; read with distrust.

Its keys are those of format 2 (see `docs/store.md`); that of a format 1 store is presented in the same shape.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError
from fastcollate.store.files import FileInfo, HashedFile, describe, naming, write_file
from fastcollate.store.remote.objects import Objects, folder_of
from fastcollate.store.shards import EXTRA_DTYPES, ShardInfo, shard_lengths

FORMAT = "fastcollate-store"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
LENGTHS = "lengths.npy"
KINDS = ("rows", "pairs", "documents", "answers")
ENDS = ("append", "in_row")
_REMEDY = "prepare the store again"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of the store's own directory, never of another
_COMMON = {
    "format": str, "format_version": int, "fingerprint": str, "sources": dict, "tokenizer": dict, "template": dict,
    "options": dict, "num_rows": int, "num_tokens": int, "max_length": int, "summary": dict, "files": list,
    "shards": list, "checksum": str,
}  # fmt: skip
_KEYS = {
    1: {**_COMMON, "sources": list},
    2: {**_COMMON, "kind": str, "end": str, "columns": dict},
}
_NOT_OF_ROWS = ("on_error", "block_bytes")  # format 1 counted them among the options that change rows
_SOURCES = {"sha256": str, "num_sources": int, "num_records": int}
_TOKENIZER = {"name": str, "fingerprint": str, "vocab_size": int, "pad_token_id": int}
_FILE, _SHARD = ({f.name: str if f.type == "str" else int for f in fields(info)} for info in (FileInfo, ShardInfo))
_TOKENIZER_2 = {**_TOKENIZER, "end_token_id": int, "files": list}


@dataclass(frozen=True, slots=True)
class StoreIdentity:
    """What a store was made from; two stores of one identity hold the same rows.

    Attributes:
        sources: their content alone, see `sources_of`: no path, no time. One more key, `format` (1), says that the
            store was converted: its `sha256` is then the old fingerprint, and compares with no other.
        tokenizer: `name` (of an encoding, or of a file without its path), `fingerprint`, `vocab_size`,
            `pad_token_id`, `end_token_id`, `files` (names of its files in the store).
        template: `name` and whatever else decides the texts.
        options: the job's options that change rows.
        kind: `rows`; `pairs`, each of which is two neighbouring rows of one `source_row`, the chosen one first;
            `answers`, rows with a verdict each in a column `label` or `score`; or `documents`.
        end: `append`, where the collate appends the end-of-text to each row; or `in_row`, where rows hold their end.
        columns: further columns of the shards, by name: their NumPy types, such as `{"label": "int8"}`.
    """

    sources: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    template: Mapping[str, Any]
    options: Mapping[str, Any]
    kind: str = "rows"
    end: str = "append"
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything above."""
        return hashlib.sha256(canonical(asdict(self))).hexdigest()


def sources_of(digests: Iterable[str], num_records: int) -> dict[str, Any]:
    """What a manifest says of a job's sources: from each one's SHA-256 over its decompressed content, in order.

    `num_records` counts the records in all of them, good or bad.
    """
    digests = list(digests)
    total = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return {"sha256": total, "num_sources": len(digests), "num_records": num_records}


def write_manifest(
    directory: Path,
    identity: StoreIdentity,
    shards: Sequence[ShardInfo],
    *,
    files: Sequence[FileInfo] = (),
    summary: Mapping[str, Any] | None = None,
    fingerprint: str | None = None,
    lengths_of: Callable[[ShardInfo], npt.NDArray[np.integer[Any]]] | None = None,
) -> None:
    """Commit a store: write `lengths.npy` from finished shards, then the manifest. Shards without rows are left out.

    Nothing in `summary` may depend on time, machine or the number of workers. `files` come under checksums too;
    `fingerprint` is another than the identity's, for a converted store; `lengths_of` tells a shard's, where those do
    not lie in the directory.
    """
    shards = [shard for shard in shards if shard.num_rows]
    if not shards:
        raise InputError(f"{directory}: no row to store; the sources hold no usable record")
    lengths = _write_lengths(directory, shards, lengths_of or partial(shard_lengths, directory))
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": identity.fingerprint if fingerprint is None else fingerprint,
        **asdict(identity),
        "num_rows": sum(shard.num_rows for shard in shards),
        "num_tokens": sum(shard.num_tokens for shard in shards),
        "max_length": max(shard.max_length for shard in shards),
        "summary": dict(summary or {}),
        "files": [asdict(file) for file in (lengths, *files)],
        "shards": [asdict(shard) for shard in shards],
    }
    manifest["checksum"] = hashlib.sha256(canonical(manifest)).hexdigest()
    write_file(directory / MANIFEST, pretty(manifest))


def _write_lengths(
    directory: Path, shards: Sequence[ShardInfo], lengths_of: Callable[[ShardInfo], npt.NDArray[np.integer[Any]]]
) -> FileInfo:
    num_rows = sum(shard.num_rows for shard in shards)
    dtype = np.dtype("<u2" if max(shard.max_length for shard in shards) < 1 << 16 else "<u4")
    header = {"descr": dtype.str, "fortran_order": False, "shape": (num_rows,)}

    def fill(file: HashedFile) -> None:
        np.lib.format.write_array_header_1_0(file, header)
        for shard in shards:
            file.write(lengths_of(shard).astype(dtype).tobytes())

    return write_file(directory / LENGTHS, fill)


def read_manifest(path: Path | Objects) -> dict[str, Any] | None:
    """The manifest of a finished store in the shape of format 2, or `None` where there is no store."""
    raw = None
    if isinstance(path, Objects):
        raw = path.get(MANIFEST)
    else:
        with naming(path / MANIFEST), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            raw = (path / MANIFEST).read_bytes()
    if raw is None:
        return None
    try:
        return _parsed(raw, path)
    except RecursionError:
        raise InputError(f"{path / MANIFEST}: damaged (nested too deeply); {_REMEDY}") from None


def _parsed(raw: bytes, path: Path | Objects) -> dict[str, Any]:
    try:
        manifest = json.loads(raw)
        if manifest["format"] != FORMAT:
            raise KeyError("format")
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / MANIFEST}: damaged, or not of a token store; {_REMEDY}") from error
    if type(version) is not int or version not in _KEYS:
        raise InputError(
            f"{path}: format {version!r:.20}; this release reads {' and '.join(map(str, _KEYS))}: "
            "upgrade with: pip install --upgrade fastcollate"
        )
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    if manifest.get("checksum") != hashlib.sha256(canonical(body)).hexdigest() or raw != pretty(manifest):
        raise InputError(f"{path / MANIFEST}: damaged (its checksum differs); {_REMEDY}")
    _check(manifest, version, path / MANIFEST)
    return dict(manifest) if version == FORMAT_VERSION else _from_format_1(manifest)


def _check(manifest: Mapping[str, Any], version: int, path: Path | str) -> None:
    """Refuse a manifest without all that a store is opened by, of the right type, and of this directory."""
    _check_keys(manifest, _KEYS[version], "manifest", path)
    _check_keys(manifest["tokenizer"], _TOKENIZER if version == 1 else _TOKENIZER_2, "tokenizer", path)
    for part, wanted in (("files", _FILE), ("shards", _SHARD)):
        for entry in manifest[part]:
            _check_keys(entry, wanted, "file", path)
            if not _FILE_NAME.fullmatch(entry["name"]):
                name = f"{entry['name']!r:.80}"
                raise InputError(f"{path}: names a file outside its own directory ({name}); do not trust it")
    for name in ("num_rows", "num_tokens"):
        if manifest[name] != sum(shard[name] for shard in manifest["shards"]) or not manifest["shards"]:
            raise InputError(f"{path}: damaged ({name} is {manifest[name]}, but its shards have others); {_REMEDY}")
    if version == FORMAT_VERSION:
        _check_new_parts(manifest, path)


def _check_new_parts(manifest: Mapping[str, Any], path: Path | str) -> None:
    """What format 1 does not have."""
    sources = manifest["sources"]
    _check_keys(sources, {**_SOURCES, "format": int} if "format" in sources else _SOURCES, "sources", path)
    for name, known in (("kind", KINDS), ("end", ENDS)):
        if manifest[name] not in known:
            raise InputError(f"{path}: {name} is {manifest[name]!r:.40}, but this release knows {', '.join(known)}")
    for name, kind in manifest["columns"].items():
        if kind not in EXTRA_DTYPES or not name.isidentifier():
            raise InputError(f"{path}: damaged (column {name!r:.40} is of type {kind!r:.40}); {_REMEDY}")
    if set(map(str, manifest["tokenizer"]["files"])) - {entry["name"] for entry in manifest["files"]}:
        raise InputError(f"{path}: damaged (the tokenizer's files are not among the store's); {_REMEDY}")
    identity = StoreIdentity(**{part.name: manifest[part.name] for part in fields(StoreIdentity)})
    if "format" not in sources and identity.fingerprint != manifest["fingerprint"]:
        raise InputError(f"{path}: damaged (its fingerprint is not that of what it was made from); {_REMEDY}")


def _check_keys(part: Any, wanted: Mapping[str, type], what: str, path: Path | str) -> None:
    """Each key of its type, and no other key: it could change what the others mean."""
    if not isinstance(part, dict):
        raise InputError(f"{path}: damaged ({what} is {part!r:.80}); {_REMEDY}")
    for name, kind in wanted.items():
        if not _is_a(part.get(name), kind):
            raise InputError(f"{path}: damaged ({what} {name} is {part.get(name)!r:.80}); {_REMEDY}")
    unknown = sorted(set(part) - set(wanted))
    if unknown:
        raise InputError(f"{path}: {what} has a key that this release does not know ({unknown[0]!r:.80}); {_REMEDY}")


def _from_format_1(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A format 1 manifest in the shape of format 2: rows to which the collate appends the one id that also pads."""
    sources, tokenizer = manifest["sources"], manifest["tokenizer"]
    num_skipped = manifest["summary"].get("num_skipped", 0)
    return {
        **manifest,
        "sources": {
            "sha256": manifest["fingerprint"],
            "num_sources": len(sources),
            "num_records": manifest["num_rows"] + (num_skipped if _is_a(num_skipped, int) else 0),
            "format": 1,
        },
        "tokenizer": {**tokenizer, "end_token_id": tokenizer["pad_token_id"], "files": []},
        "options": {key: value for key, value in manifest["options"].items() if key not in _NOT_OF_ROWS},
        "kind": "rows",
        "end": "append",
        "columns": {},
    }


def _is_a(value: Any, kind: type) -> bool:
    """`True` is no number here, and no number is below zero."""
    return type(value) is kind and (not isinstance(value, int) or value >= 0)


def canonical(value: object) -> bytes:
    """What is hashed of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def pretty(value: object) -> bytes:
    """What is written of a value."""
    plain = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    try:
        return msgspec.json.format(plain, indent=1) + b"\n"  # in a third of the time: 10,000 shards are 3 MB of it
    except msgspec.DecodeError:  # NaN
        return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def verify_checksums(path: str | Path | Objects) -> list[str]:
    """Read every file of a store and compare it with the manifest; a line for each that is damaged or missing."""
    root = folder_of(path) if isinstance(path, str) else path
    manifest = read_manifest(root)
    if manifest is None:
        raise InputError(f"{root}: no finished token store here (no {MANIFEST})")
    problems = []
    for entry in [*manifest["files"], *manifest["shards"]]:
        file = root / entry["name"]
        try:
            found = describe(file) if isinstance(file, Path) else root.describe(entry["name"])  # type: ignore[union-attr]
        except OSError as error:
            problems.append(f"{file}: {error.strerror or error}")
            continue
        if found.num_bytes != entry["num_bytes"]:
            problems.append(f"{file}: {found.num_bytes} bytes, but {entry['num_bytes']} were written")
        elif found.sha256 != entry["sha256"]:
            problems.append(f"{file}: damaged, its SHA-256 is {found.sha256}, but {entry['sha256']} was written")
    return problems
