"""Records of which some answers are better than others -> rows of one prompt each, and a number a row.

The prompt of a record's rows is what they and the prompt, encoded by itself, begin with alike: the same tokens in both
rows, which is TRL's rule. Where it is not all of the prompt by itself, the row counts as a boundary mismatch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcollate.ingest.options import Counts
from fastcollate.ingest.spans import BadRecord, Rows, made_of_records, read_blocks
from fastcollate.sources import Unit
from fastcollate.text import BadRecordError, Rendered, Template, Texts, Tokenizer, UnencodableError, starts_of

Extra = dict[str, npt.NDArray[Any]]  # a number a row, by column
Check = Callable[[Rendered, Rendered], tuple[Rendered, Rendered]]  # what is asked, and the row whole


class JudgedRows(NamedTuple):
    """A unit's rows, the numbers of each row by column, each block's digest, the seconds in the tokenizer."""

    rows: Rows
    extra: Extra
    digests: list[bytes]
    seconds: float


class _Texts(NamedTuple):
    """What is asked, then each answer's row whole; the numbers of each answer."""

    texts: list[Rendered]
    numbers: dict[str, list[float]]


def read_judged(unit: Unit, tools: tuple[Tokenizer, Template], check: Check, lost: Any, counts: Counts) -> JudgedRows:
    """The rows of a unit of work; `check` refuses or mends texts, `lost` takes the records that give no row."""
    tokenizer, template = tools
    found: dict[int, _Texts] = {}
    digests: list[bytes] = []
    for block in read_blocks(unit, digests, lost.add_all):
        found |= made_of_records(*block, lambda record: _texts_of(record, template, check, counts))
    started = time.thread_time()
    while True:
        try:
            noted = Counts()
            rows = _rows(found, tokenizer, template.end, noted, seed=unit.index)
            break
        except UnencodableError as error:
            numbers = [number for number, record in found.items() for _ in record.texts]
            failed = {numbers[place]: reason for place, reason in sorted(error.reasons.items())}
            lost.add_rows([BadRecord(number, 0, reason) for number, reason in failed.items()])
            found = {number: record for number, record in found.items() if number not in failed}
    counts.add(noted)
    assert template.preference is not None
    extra = {
        name: np.array([value for record in found.values() for value in record.numbers[name]], dtype)
        for name, dtype in template.preference.columns.items()
    }
    return JudgedRows(rows, extra, digests, time.thread_time() - started)


def _texts_of(record: Any, template: Template, check: Check, counts: Counts) -> _Texts:
    """The texts of a record."""
    assert template.preference is not None
    judged = template.preference.read(record)
    pairs = [check(*template.asked_and_whole(answer)) for answer in judged.answers]
    if len({whole.text for _, whole in pairs}) < len(pairs):
        raise BadRecordError("chosen and rejected give the same text: neither is preferred")
    counts.add_dropped(template.dropped(record, "\0".join(whole.text for _, whole in pairs)))
    return _Texts([pairs[0][0], *(whole for _, whole in pairs)], judged.numbers)


def _rows(found: Mapping[int, _Texts], tokenizer: Tokenizer, end: str, counts: Counts, *, seed: int) -> Rows:
    texts = [text for record in found.values() for text in record.texts]
    if end == "in_row":
        ids, offsets, *_ = tokenizer.encode_chats(texts, seed=seed)
    else:
        plain = Texts([text.text for text in texts])
        encoded = tokenizer.encode_batch(plain)
        tokenizer.check(plain, encoded, seed=seed)
        ids, offsets = encoded
    kept, spans, source_row, asked = [ids[:0]], [], [], 0
    for number, record in found.items():
        bounds = offsets[asked : asked + len(record.texts) + 1].tolist()
        prompt, *answers = (ids[start:stop] for start, stop in pairwise(bounds))
        alike = min(_alike(prompt, answer) for answer in answers)
        counts.boundary_mismatches += len(answers) * (alike < len(prompt))
        kept += answers
        spans += [[alike, len(answer) - alike] for answer in answers]
        source_row += [number] * len(answers)
        asked += len(record.texts)
    return Rows(
        np.concatenate(kept),
        starts_of([len(answer) for answer in kept[1:]]),
        np.array(spans, np.uint32).reshape(-1),
        2 * np.arange(len(spans) + 1),
        np.array(source_row, np.uint64),
    )


def _alike(prompt: npt.NDArray[Any], row: npt.NDArray[Any]) -> int:
    """With how many tokens both begin alike."""
    shorter = min(len(prompt), len(row))
    differing = np.flatnonzero(prompt[:shorter] != row[:shorter])
    return int(differing[0]) if len(differing) else shorter
