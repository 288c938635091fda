"""One unit of work -> one part of a shard: parse, apply the template, tokenize, spans, counts: what a worker does."""

from __future__ import annotations

import gc
import re
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcollate.ingest.ids.rows import read_rows, with_begin, with_end_appended
from fastcollate.ingest.pairs.rows import Check, Extra, read_judged
from fastcollate.ingest.spans import (
    BadRecord,
    Parts,
    Rows,
    count,
    encode_parts,
    limit_prompts,
    made_of_records,
    read_blocks,
)
from fastcollate.ingest.spec import TOKENIZED, Counts, JobSpec, LostRecord, UnitResult, unit_digest
from fastcollate.sources import Block, Unit, records
from fastcollate.store import shards
from fastcollate.text import BadRecordError, Rendered, Template, Texts, Tokenizer, UnencodableError, starts_of

_IS_SPECIAL = "holds the special token {!r} as text; store it as ordinary text with --special-text encode"


class Encoded(NamedTuple):
    """What a worker gives back: what is left of a unit, and the digest of each of its blocks."""

    result: UnitResult
    digests: list[bytes]


def encode_unit(unit: Unit, spec: JobSpec, directory: str, token: str) -> Encoded:
    """Turn a unit of work into a part of a shard of the store in `directory`.

    The part's name begins with the job's `token` and is no other's: whoever writes it, and however late, touches no
    file of another job.

    Raises:
        SourceReadError: the source cannot be read any more.
        RuntimeError: the backend's ids differ from tiktoken's.
    """
    collects = gc.isenabled()
    gc.disable()  # a unit makes a hundred thousand objects and no cycle
    try:
        encoded = _encode(unit, spec, directory, token)
    finally:
        if collects:
            gc.enable()
    spec.tools()[0].trim()  # now that the unit's own memory is free
    return encoded


def _encode(unit: Unit, spec: JobSpec, directory: str, token: str) -> Encoded:
    tokenizer, template = spec.tools()
    lost, counts, seconds = _Lost(unit), Counts(), 0.0
    extra: Extra = {}
    if template.preference is not None:
        rows, extra, digests, seconds = read_judged(unit, (tokenizer, template), _check_of(spec), lost, counts)
    elif template.name == TOKENIZED:
        rows, digests = read_rows(unit, template.settings["fields"], tokenizer.vocab_size, lost.add_all)
        rows = with_end_appended(rows, tokenizer.end_token_id) if template.end == "append" else rows
    else:
        make = _encoded_rows if template.end == "append" else _encoded_chats
        rows, digests, seconds = make(unit, spec, lost, counts)
    rows = with_begin(rows, tokenizer.begin_token_id) if template.kind == "documents" else rows
    too_long: list[BadRecord] = []
    before = rows.source_row
    rows = limit_prompts(rows, spec.options, counts, too_long, end=template.end)
    lost.add_rows(too_long)
    extra = {name: values[np.isin(before, rows.source_row)] for name, values in extra.items()}
    count(rows, tokenizer, spec.options, counts, end=template.end)
    part = None
    if len(rows.source_row):
        columns = shards.ShardColumns(
            rows.ids.astype(shards.token_dtype(tokenizer.vocab_size), copy=False), *rows[1:], extra
        )
        name = f".part-{token}-{unit.index:05d}-{secrets.token_hex(3)}.arrow"
        part = shards.write_shard(Path(directory), name, columns, sync=False)
    return Encoded(UnitResult(unit.index, unit_digest(unit, digests), part, counts, lost.sorted(), seconds), digests)


def _encoded_rows(unit: Unit, spec: JobSpec, lost: _Lost, counts: Counts) -> tuple[Rows, list[bytes], float]:
    """A unit's rows from its records' texts, each block's digest, the seconds in the tokenizer."""
    tokenizer, template = spec.tools()
    parts, digests = _read(unit, spec, lost, counts)
    while True:
        found, started = Counts(), time.thread_time()
        try:
            rows = encode_parts(parts, tokenizer, template, spec.options, found, seed=unit.index)
            break
        except UnencodableError as error:
            parts = _without(parts, error, lost)
    counts.add(found)
    return rows, digests, time.thread_time() - started


def _encoded_chats(unit: Unit, spec: JobSpec, lost: _Lost, counts: Counts) -> tuple[Rows, list[bytes], float]:
    """As `_encoded_rows`, where the template writes whole texts."""
    (tokenizer, template), policy = spec.tools(), spec.options.special_text
    chats: dict[int, Rendered] = {}
    digests: list[bytes] = []
    for block in read_blocks(unit, digests, lost.add_all):
        chats |= made_of_records(*block, lambda record: _rendered(record, template, policy, counts))
    started = time.thread_time()
    while True:
        try:
            encoded = tokenizer.encode_chats([*chats.values()], seed=unit.index)
            break
        except UnencodableError as error:
            numbers = [*chats]
            failed = {numbers[place]: reason for place, reason in sorted(error.reasons.items())}
            lost.add_rows([BadRecord(number, 0, reason) for number, reason in failed.items()])
            chats = {number: chat for number, chat in chats.items() if number not in failed}
    rows = Rows(*encoded, np.fromiter(chats, np.uint64, len(chats)))
    return rows, digests, time.thread_time() - started


def _rendered(record: Any, template: Template, special_text: str, counts: Counts) -> Rendered:
    """A record as text."""
    chat = template.render(record)
    _refuse_protected(chat, special_text)
    counts.add_dropped(template.dropped(record, chat.text))
    return chat


def _without(parts: Parts, error: UnencodableError, lost: _Lost) -> Parts:
    """The texts of the rows that the tokenizer does not fail on; those that it does are lost."""
    failed = {int(np.searchsorted(parts.starts, text, side="right")) - 1: r for text, r in error.reasons.items()}
    lost.add_rows([BadRecord(int(parts.rows[row]), 0, reason) for row, reason in sorted(failed.items())])
    kept = [row for row in range(len(parts.rows)) if row not in failed]
    return _parts(
        [parts.texts.strings(int(parts.starts[row]), int(parts.starts[row + 1])) for row in kept], parts.rows[kept]
    )


def _parts(texts: Sequence[Sequence[str]], rows: npt.ArrayLike) -> Parts:
    """The texts of rows, a list for each."""
    starts = starts_of(np.array([len(of_row) for of_row in texts], np.int64))
    return Parts(Texts([text for of_row in texts for text in of_row]), starts, np.asarray(rows, np.uint64))


def _read(unit: Unit, spec: JobSpec, lost: _Lost, counts: Counts) -> tuple[Parts, list[bytes]]:
    """The texts of a unit's records, of which is counted what they leave out; each block's digest."""
    tokenizer, template = spec.tools()
    special = _SpecialTexts.of(tokenizer, spec.options.special_text)
    digests: list[bytes] = []
    found = [
        _texts(block, data, template, special, bad, counts)
        for block, data, bad in read_blocks(unit, digests, lost.add_all)
    ]
    return _joined(found), digests


class _Lost:
    """The records of a unit that give no row."""

    def __init__(self, unit: Unit) -> None:
        self._blocks = unit.blocks
        self._found: list[LostRecord] = []
        self._starts = np.array([block.first_row for block in unit.blocks])

    def add_all(self, block: Block, data: bytes, bad: Sequence[BadRecord]) -> None:
        """Records of a block, with the lines that they stand on."""
        unplaced = {record.row for record in bad if not record.line}
        lines = records.lines_of(block, data, unplaced) if unplaced else {}
        self._found += [LostRecord(block.source, r.row, lines.get(r.row, r.line), r.reason) for r in bad]

    def add_rows(self, bad: Sequence[BadRecord]) -> None:
        """Records of any block, ascending."""
        numbers = np.searchsorted(self._starts, [record.row for record in bad], side="right") - 1
        for number in np.unique(numbers).tolist():
            block = self._blocks[number]
            self.add_all(block, block.read(), [bad[i] for i in np.flatnonzero(numbers == number).tolist()])

    def sorted(self) -> list[LostRecord]:
        """All of them, in order, each once: of a pair both rows may be no good."""
        return sorted({record[:2]: record for record in reversed(self._found)}.values())


def _check_of(spec: JobSpec) -> Check:
    """What texts like tokens' become by the option `special_text`, or are refused for."""
    tokenizer, template = spec.tools()
    policy = spec.options.special_text
    special = _SpecialTexts.of(tokenizer, policy)

    def check(asked: Rendered, whole: Rendered) -> tuple[Rendered, Rendered]:
        if template.end == "in_row":
            _refuse_protected(whole, policy)
            return asked, whole
        parts = special.checked([asked.text, whole.text[len(asked.text) :]])
        return Rendered(parts[0], [], []), Rendered("".join(parts), [], [])

    return check


def _refuse_protected(chat: Rendered, policy: str) -> None:
    if chat.protected and policy != "encode":
        start, stop, _ = chat.protected[0]
        raise BadRecordError(_IS_SPECIAL.format(chat.text[start:stop]))


def _texts(
    block: Block, data: bytes, template: Template, special: _SpecialTexts, bad: list[BadRecord], counts: Counts
) -> Parts:
    """The rows' texts; records that give none go to `bad`."""
    names, row = template.names, block.first_row
    found: list[Parts] = []
    for chunk in records.read_records(block, data):
        parts_of = _PartsOf(chunk, row, template, special, bad, counts)
        found.append(_single_texts(parts_of) if names is None else _column_texts(parts_of, names))
        row += len(chunk)
    return _joined(found)


class _PartsOf(NamedTuple):
    """The texts of records one by one."""

    chunk: records.Records
    first_row: int
    template: Template
    special: _SpecialTexts
    bad: list[BadRecord]
    counts: Counts

    def __call__(self, number: int) -> list[str] | None:
        """A record's texts, or `None` where it has none, which is noted in `bad`."""
        try:
            record = self.chunk[number]
            parts = self.special.checked(self.template.parts(record))
            self.counts.add_dropped(self.template.dropped(record, "".join(parts)))
            return parts
        except (BadRecordError, ValueError) as error:
            self.bad.append(BadRecord(self.first_row + number, 0, str(error)))
            return None


def _single_texts(parts_of: _PartsOf) -> Parts:
    """Texts record by record."""
    found = {i: parts for i in range(len(parts_of.chunk)) if (parts := parts_of(i)) is not None}
    return _parts([*found.values()], [number + parts_of.first_row for number in found])


def _column_texts(parts_of: _PartsOf, names: Sequence[Sequence[str]]) -> Parts:
    """Texts made of whole columns, two a record; those of irregular records one by one."""
    count = len(parts_of.chunk)
    template, (columns, others) = parts_of.template, parts_of.chunk.columns(names)
    texts, irregular = template.columns(columns)
    special = np.searchsorted(texts.offsets[::2], parts_of.special.places(texts.data), side="right") - 1
    rows = np.arange(parts_of.first_row, parts_of.first_row + count, dtype=np.uint64)
    looked_at = {*irregular, *special.tolist(), *template.refused_for(others)}
    for number, dropped in template.dropped_by_record(others, columns).items():
        if number not in looked_at:
            parts_of.counts.add_dropped(dropped)
    if not looked_at:
        return Parts(texts, np.arange(count + 1) * 2, rows)
    pairs: list[list[str] | None] = [[*pair] for pair in zip(*[iter(texts.strings())] * 2, strict=True)]
    for number in sorted(looked_at):
        pairs[number] = parts_of(number)
    return _parts([pair for pair in pairs if pair is not None], rows[[pair is not None for pair in pairs]])


_NONE = np.zeros(0, np.int64)


def _joined(found: Sequence[Parts]) -> Parts:
    """The texts of some records and of those that follow them."""
    if len(found) == 1:
        return found[0]
    texts = Texts(
        data=b"".join([parts.texts.data for parts in found]),
        offsets=starts_of(np.concatenate([_NONE, *(np.diff(parts.texts.offsets) for parts in found)])),
    )
    starts = starts_of(np.concatenate([_NONE, *(np.diff(parts.starts) for parts in found)]))
    return Parts(texts, starts, np.concatenate([_NONE.astype(np.uint64), *(parts.rows for parts in found)]))


class _SpecialTexts:
    """Looks for texts like `<|endoftext|>`.

    Args:
        texts: them.
        without_end: takes one off the end of a row; see `Tokenizer.without_end`.
        strips: whether that is done, or only said to be possible.
    """

    def __init__(
        self,
        texts: Collection[str],
        without_end: Callable[[Sequence[str]], list[str]] = list,
        *,
        strips: bool = False,
    ) -> None:
        pattern = "|".join(map(re.escape, texts)) or "(?!)"  # matches nothing
        self._texts = re.compile(pattern)
        self._bytes = re.compile(pattern.encode())
        self._firsts = {text.encode()[0] for text in texts}
        self._without_end = without_end
        self._strips = strips

    @classmethod
    def of(cls, tokenizer: Tokenizer, policy: str) -> _SpecialTexts:
        """What is looked for by the option `special_text`."""
        strips = policy == "strip-end"
        texts = () if policy == "encode" else {*tokenizer.special_texts, *[tokenizer.end_text] * strips}
        return cls(texts, tokenizer.without_end, strips=strips)

    def checked(self, parts: list[str]) -> list[str]:
        """A row's texts, as they are to be tokenized.

        Raises:
            BadRecordError: there is one in them.
        """
        found, rest = self._texts.search("".join(parts)), self._without_end(parts)
        if found is None:
            return parts
        if self._texts.search("".join(rest)) is None:
            if self._strips:
                return rest
            reason = (
                f"ends in {found.group()!r} as text; drop it with --special-text strip-end, or store it as text with"
            )
        else:
            raise BadRecordError(_IS_SPECIAL.format(found.group()))
        raise BadRecordError(f"{reason} --special-text encode")

    def places(self, data: bytes) -> list[int]:
        """Where those in UTF-8 text begin; to look for their first bytes alone is much faster."""
        if not any(first in data for first in self._firsts):
            return []
        return [match.start() for match in self._bytes.finditer(data)]
