"""What a job is asked for and what it is made of, which of that a store records, and whether a finished store is that.

Identity is content; a source's stamp (size, times, inode, ETag) is only a shortcut to "unchanged".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fastcollate.errors import InputError, SourceReadError
from fastcollate.ingest.ids.columns import columns_of_ids
from fastcollate.ingest.options import Counts as Counts
from fastcollate.ingest.options import PrepareOptions
from fastcollate.progress import progress_bar
from fastcollate.sources import Block, Source, Unit, read_blocks, records
from fastcollate.store import files, remote, shards
from fastcollate.store import manifest as manifests
from fastcollate.text import Template, Tokenizer, choose_template, load_template, load_tokenizer

SIDE_FILE = "sources.json"
TOKENIZED = "tokenized"  # the template of records that hold ids
PREFERENCE = "preference"  # the one of records whose answers are better or worse
_FIELDS = {
    "text": ("text",),
    "document": ("text",),
    **dict.fromkeys(("alpaca", "phi3", "completion"), ("instruction", "input", "output")),
}
_SIDE_VERSION = 1
_REMEDY = "choose another directory, or make this one anew with prepare --overwrite (overwrite=True)"
_RECORDED = ("boundary", "max_length", "long_prompt", "special_text")  # of the options: those that change rows


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What decides the rows of a job, besides its sources; picklable.

    `why` says which template was chosen, and for what; `seal` tells a worker what the leader has found in the
    tokenizer's and the template's files; see `sealed`.
    """

    options: PrepareOptions
    fields: Mapping[str, str] = field(default_factory=dict)
    template_args: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    seal: str = ""

    def chosen(self, sources: Sequence[Source]) -> JobSpec:
        """The same job with what its first record decides: the template, and which columns of ids are taken."""
        asked, fields, why = self.options, self.fields, self.options.template
        prefers = asked.template.partition(":")[0] == PREFERENCE
        first = _first_record(sources) if prefers or asked.template in ("auto", TOKENIZED, *_FIELDS) else None
        lower = None if first is None else {**{name.casefold(): value for name, value in first.items()}, **first}
        if asked.template == "auto" or prefers:
            name, why, fields = choose_template(
                first if prefers else lower, fields, self._tokenizer, asked.end, asked.template
            )
            asked, why = replace(asked, template=name), f"{name} ({why})"
        for name, value in (("boundary", "exact"), ("long_prompt", "cut"), ("train_on", "last")):
            if prefers and getattr(asked, name) == value:
                raise InputError(
                    f"{name}={value!r}: answers that are compared have one prompt, and are compared whole; leave it out"
                )
        if asked.template == TOKENIZED:
            if asked.tokenizer == "auto":
                raise InputError("tokenizer='auto': records that hold ids need the one that made them (--tokenizer)")
            if first is not None:
                fields = columns_of_ids(list(first), fields)
        if other := _in_other_capitals(first or {}, asked.template, fields):
            fields, why = {**fields, **other}, f"{why}; with the fields {', '.join(other.values())}"
        return replace(self, options=asked, fields=fields, why=why)

    def _tokenizer(self) -> Tokenizer:
        asked = self.options
        return load_tokenizer("gpt2" if asked.tokenizer == "auto" else asked.tokenizer, asked.backend)

    def tools(self) -> tuple[Tokenizer, Template]:
        """The tokenizer and the template, loaded once in a process for a sealed job.

        Raises:
            SourceReadError: a file of theirs is no longer what it was when the job was sealed.
        """
        if not self.seal or self.seal not in _LOADED:
            asked = self.options
            tokenizer = self._tokenizer()
            template = load_template(
                asked.template,
                self.fields,
                tokenizer,
                arguments=self.template_args,
                allowed=None if asked.allow_special is None else asked.allow_special.split(),
                **{name: getattr(asked, name) for name in ("date", "train_on", "end", "mask_heading")},
            )
            tools = tokenizer, template
            if self.seal and self._digest(*tools) != self.seal:
                raise SourceReadError(
                    f"the file of tokenizer {asked.tokenizer!r} or template {asked.template!r} was changed while the "
                    "job was running; run it again when they are at rest"
                )
            _LOADED.clear()
            _LOADED[self.seal] = tools
        return _LOADED[self.seal]

    def sealed(self) -> JobSpec:
        """The same job; all who work at it take the tokenizer and the template that are there now, or fail."""
        tools = self.tools()
        found = replace(self, seal=self._digest(*tools))
        _LOADED.clear()
        _LOADED[found.seal] = tools
        return found

    def _digest(self, tokenizer: Tokenizer, template: Template) -> str:
        what = [self.options.backend, tokenizer.identity(), template.identity()]
        return hashlib.sha256(manifests.canonical(what)).hexdigest()

    def told(self) -> str:
        """The template, why it was chosen, and the token that it does not begin rows with."""
        tokenizer, template = self.tools()
        if template.end == "in_row" or template.name in (TOKENIZED, "document") or not tokenizer.begin_text:
            return self.why
        return f"{self.why}; no {tokenizer.begin_text} begins a row, though this tokenizer's texts begin with it"

    def identity(self) -> dict[str, Any]:
        """What a store records of a job besides its sources: nothing that changes no row, and no path."""
        preference = self.tools()[1].preference
        found = [tool.identity() for tool in self.tools()]
        tokenizer, template = ({**identity, "name": Path(identity["name"]).name} for identity in found)
        if (end := self.tools()[1].end) == "append":
            tokenizer["pad_token_id"] = tokenizer["end_token_id"]  # such rows are filled up with their end
        return {
            "kind": self.tools()[1].kind if preference is None else preference.kind,
            "end": end,
            "tokenizer": tokenizer,
            "template": template,
            "options": {name: getattr(self.options, name) for name in _RECORDED},
            "columns": {} if preference is None else preference.columns,
        }


def _in_other_capitals(first: Mapping[str, Any], template: str, fields: Mapping[str, str]) -> dict[str, str]:
    """Fields of a template that the first record holds under a known name in other capitals only."""
    found: dict[str, str] = {}
    if template in _FIELDS:
        for field, names in zip(_FIELDS[template], load_template(template, fields).names or (), strict=True):
            if field not in fields and not any(name in first for name in names):
                found.update((field, name) for name in first if name.casefold() in names)
    return found


def _first_record(sources: Sequence[Source]) -> Any:
    """The first record that is an object, of those that are read first; `None` where there is none."""
    with contextlib.suppress(InputError):  # of the storage or a record: the job says so in its turn
        for block in islice(read_blocks(sources), 1):
            for chunk in records.read_records(block, block.read()):
                for number in range(len(chunk)):
                    with contextlib.suppress(ValueError):
                        if isinstance(record := chunk[number], dict):
                            return record
    return None


_LOADED: dict[str, tuple[Tokenizer, Template]] = {}


class LostRecord(NamedTuple):
    """A record that gives no row: the index of its source, its position in all sources, its line (0: none), why."""

    source: int
    row: int
    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class UnitResult:
    """What is left of a unit of work.

    Attributes:
        sha256: see `unit_digest`.
        part: the file with its rows, or `None` where it has none.
        counts: sums over its rows.
        bad: the records that were no good.
    """

    index: int
    sha256: str
    part: shards.ShardInfo | None
    counts: Counts
    bad: list[LostRecord]
    tokenize_seconds: float


def unit_digest(unit: Unit, digests: Iterable[bytes]) -> str:
    """SHA-256 of what a unit's rows, and what is said of its bad records, come from, by its blocks' digests."""
    digest = hashlib.sha256(b"%d %d\n" % (unit.blocks[0].first_row, len(unit.blocks)))
    for block, content in zip(unit.blocks, digests, strict=True):
        digest.update(b"%d " % block.source + content)
    return digest.hexdigest()


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between what two jobs are besides their sources, in words."""
    differing = [name for name in ("kind", "end") if found.get(name) != wanted[name]]
    told = [f"{name} ({found.get(name)!r}, now {wanted[name]!r})" for name in differing]
    for group, word in (("tokenizer", "tokenizer"), ("template", "template"), ("options", "option")):
        old, new = found.get(group, {}), wanted[group]
        told += [
            f"{word} {key} ({_short(old.get(key))}, now {_short(new.get(key))})"
            for key in {**old, **new}
            if old.get(key) != new.get(key)
        ]
    return told


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a source that was read; its stamp is empty where its content may change without it."""

    name: str
    stamp: tuple[int | str, ...]
    sha256: str
    num_records: int


def find_finished(
    root: Path | remote.Objects, sources: Sequence[Source], identity: Mapping[str, Any], *, progress: bool
) -> dict[str, Any] | None:
    """The manifest of the finished store in a folder, or `None` where there is none.

    Raises:
        InputError: the store is of another identity or content, or a file of it is missing; says what differs.
    """
    manifest = manifests.read_manifest(root)
    if manifest is None:
        return None
    if manifest["format_version"] == 1 or "format" in manifest["sources"]:
        raise InputError(f"{root}: holds a store of format 1, whose sources cannot be compared any more; {_REMEDY}")
    different = differences(manifest, identity)
    different = different or _source_differences(root, manifest["sources"], sources, progress=progress)
    if different:
        raise InputError(f"{root}: holds a store that differs in {'; '.join(different)}; {_REMEDY}")
    found = _sizes(root)
    for entry in [*manifest["files"], *manifest["shards"]]:
        if found.get(entry["name"]) != entry["num_bytes"]:
            name = root / entry["name"]
            raise InputError(f"{name}: missing or damaged; make the store anew with --overwrite (overwrite=True)")
    return manifest


def _sizes(root: Path | remote.Objects) -> dict[str, int]:
    """The files of a folder, in bytes."""
    if isinstance(root, remote.Objects):
        return {name: found.num_bytes for name, found in root.found().items()}
    return {path.name: path.stat().st_size for path in root.iterdir() if path.is_file()}


def _source_differences(
    root: Path | remote.Objects, stored: Mapping[str, Any], sources: Sequence[Source], *, progress: bool
) -> list[str]:
    """What differs in the sources' content, in words."""
    seen = _read_side_file(root, stored)
    if seen is not None and len(seen) == len(sources) and all(map(_is_unchanged, sources, seen)):
        return []
    known = {old.stamp: old for old in seen or () if old.stamp}
    found = _read_again(sources, known, progress=progress)
    if manifests.sources_of([new.sha256 for new in found], 0)["sha256"] == stored["sha256"]:
        with contextlib.suppress(OSError, SourceReadError):  # only the shortcut is lost: it may be read-only
            write_side_file(root, found)
        return []
    if stored["num_sources"] != len(sources):
        return [f"its sources ({stored['num_sources']}, now {len(sources)})"]
    if seen is None:
        return ["the content of its sources"]
    if Counter(old.sha256 for old in seen) == Counter(new.sha256 for new in found):
        return ["the order of its sources"]
    names = [new.name for old, new in zip(seen, found, strict=True) if old.sha256 != new.sha256]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"the content of {', '.join(names[:3])}{more}"]


def _is_unchanged(source: Source, seen: Seen) -> bool:
    return source.is_settled and bool(source.stamp) and source.stamp == seen.stamp


def _read_again(
    sources: Sequence[Source], known: Mapping[tuple[int | str, ...], Seen], *, progress: bool
) -> list[Seen]:
    """What the sources are, by reading those whose stamp is not `known`.

    Raises:
        InputError: one cannot be read to its end.
    """
    found: list[Seen] = []
    total = sum(source.num_bytes for source in sources) // 1_000_000
    with progress_bar(unit="MB", progress=progress) as bar:
        task, start = bar.add_task("comparing", total=total or None), 0

        def show(block: Block) -> None:
            bar.update(task, completed=(start + block.source_bytes) // 1_000_000)

        for source in sources:
            old = known.get(source.stamp) if source.is_settled else None
            new = seen_of(source, *_read(source, show)) if old is None else replace(old, name=source.name)
            found.append(new)
            start += source.num_bytes
    return found


def seen_of(source: Source, sha256: str, num_records: int) -> Seen:
    """What was just read of a source.

    Raises:
        SourceReadError: it was changed while it was read.
    """
    now = source.stamp_now()
    if now != source.stamp:  # perhaps it was only touched
        found = _read(source)
        if found != (sha256, num_records):
            raise SourceReadError(f"{source.name}: was changed while it was read; start again when it is at rest")
    return Seen(source.name, source.stamp if source.is_settled and now == source.stamp else (), sha256, num_records)


def _read(source: Source, on_block: Callable[[Block], object] = lambda block: None) -> tuple[str, int]:
    """A source's content as a digest, and its number of records."""
    digest, num_records = hashlib.sha256(), 0
    for block in read_blocks([source]):
        digest.update(block.digest(block.read()))
        num_records += block.num_rows
        on_block(block)
    return digest.hexdigest(), num_records


def write_side_file(root: Path | remote.Objects, seen: Sequence[Seen]) -> None:
    """Write what was seen of the sources beside the store."""
    content = json.dumps({"format": _SIDE_VERSION, "sources": msgspec.to_builtins(seen)}, ensure_ascii=False)
    raw = content.encode("utf-8", "surrogatepass")
    if isinstance(root, remote.Objects):
        root.write(SIDE_FILE, raw)
    else:
        files.write_file(root / SIDE_FILE, raw, sync=False)


def source_names(root: Path | remote.Objects, stored: Mapping[str, Any]) -> list[str] | None:
    """The names of a store's sources; `None` where the side file is missing, damaged, or of another store.

    Example:
        >>> source_names(store.path, store.manifest["sources"])
        ['records.jsonl']
    """
    seen = _read_side_file(root, stored)
    return None if seen is None else [entry.name for entry in seen]


def _read_side_file(root: Path | remote.Objects, stored: Mapping[str, Any]) -> list[Seen] | None:
    """What was seen of the sources, or `None` where that is missing, damaged, or not of this store's content."""
    try:
        content = json.loads(remote.get(root, SIDE_FILE) or b"")
        seen = msgspec.convert(content["sources"], list[Seen])
        content_of = manifests.sources_of([entry.sha256 for entry in seen], 0)["sha256"]
        return seen if (content["format"], content_of) == (_SIDE_VERSION, stored["sha256"]) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError, msgspec.MsgspecError):
        return None
