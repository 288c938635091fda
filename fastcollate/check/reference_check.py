"""Proof on the user's own store: the fast path against the plain Python reference, the ids against tiktoken."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fastcollate.check.chat.judged import judged_differences
from fastcollate.check.chat.rows import ChatRows
from fastcollate.check.counts import (
    TrainedByMask,
    order_of,
    packed_batches,
    plan_of_store,
    tokenizer_of,
    trained_by_mask,
)
from fastcollate.check.ids import differing_rows
from fastcollate.collate import reference
from fastcollate.errors import InputError
from fastcollate.load import BatchLoader
from fastcollate.plan import EpochPlan
from fastcollate.progress import progress_bar, renamed_switch
from fastcollate.sources import find_sources, read_blocks, records
from fastcollate.store import Example, TokenStore
from fastcollate.store import manifest as manifests
from fastcollate.text import BadRecordError, Template, Tokenizer, load_template
from fastcollate.train import MaskOptions, OrderOptions

_MOST_PROBLEMS = 20
_SETTINGS = ("arguments", "date", "train_on", "allowed", "mask_heading", "source")
PREFERENCE = "preference"  # records of pairs, or of answers with verdicts
TOKENIZED = "tokenized"  # records that hold ids: no text is tokenized again


@dataclass(slots=True)
class Verification:
    """What was compared, and what differs."""

    batches: int = 0  # compared bit for bit
    rows: int = 0  # in them
    cells: int = 0  # in them: inputs and targets, and positions and bounds of packed ones
    digest: str = ""  # SHA-256 over the shapes and cells of all batches in order; equal runs give equal digests
    records: int | None = None  # tokenized again; `None` without a source
    files: int | None = None  # whose checksums were computed; `None` if they were not
    masks: TrainedByMask | None = None
    num_problems: int = 0  # differences found
    problems: list[str] = field(default_factory=list)  # the first of them, a line each

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return self.num_problems == 0

    def summary(self) -> dict[str, object]:
        """What `print_summary` shows of it."""
        shown = {
            "batches": self.batches, "rows": self.rows, "cells": self.cells,
            "trained": self.masks and self.masks.in_words, "digest": self.digest,
            "records tokenized again": self.records, "files with the right checksum": self.files,
            "differences": self.num_problems,
        }  # fmt: skip
        return {name: value for name, value in shown.items() if value is not None}

    def note(self, problem: str) -> None:
        """Count a difference and keep the first ones."""
        self.num_problems += 1
        if len(self.problems) < _MOST_PROBLEMS:
            self.problems.append(problem)

    def note_all(self, problems: Iterable[str]) -> None:
        """Count differences as they are found."""
        for problem in problems:
            self.note(problem)


def verify(
    store: TokenStore,
    options: MaskOptions | None = None,
    order: OrderOptions | None = None,
    *,
    epoch: int = 0,
    sources: Sequence[str] = (),
    checksums: bool = False,
    progress: bool = True,
    silent: bool | None = None,
) -> Verification:
    """Compare an epoch of batches with the reference, and more where asked.

    Args:
        store: the store.
        options: how rows become targets.
        order: which rows make a batch; packs by default hold what `pack_capacity` says.
        epoch: which epoch's batches.
        sources: what the store was prepared from; every record is tokenized again with tiktoken.
        checksums: read every file of the store and compare its checksum.
        progress: show progress (`silent` is the old name, the other way round).

    Raises:
        InputError: an option is wrong, or the sources or the vocabulary cannot be had.

    Example:
        >>> verify(store, order=OrderOptions(policy="shuffled", batch_size=16), progress=False).ok
        True
    """
    progress, store = renamed_switch(progress, old="silent", given=silent), store.as_rows()
    options = (options or MaskOptions()).of(store)
    again = _Records(store, sources) if sources else None
    found = Verification(masks=trained_by_mask(store, options))
    if checksums:
        found.files = len(store.manifest["files"]) + len(store.manifest["shards"])
        for problem in manifests.verify_checksums(store.path):
            found.note(problem)
    _compare_batches(store, options, order_of(store, options, order), epoch, found, progress=progress)
    if again is not None:
        again.compare(found, progress=progress)
    return found


# ------------------------------------------------------------------------------------------------------- batches


def _compare_batches(
    store: TokenStore, options: MaskOptions, order: dict[str, Any], epoch: int, found: Verification, *, progress: bool
) -> None:
    loader = BatchLoader(store, **asdict(options), **order)
    loader.set_epoch(epoch)
    plan = plan_of_store(store, {**order, "max_length": options.max_length}, epoch)
    seen = np.zeros(len(store), bool)
    digest = hashlib.sha256()
    with progress_bar(unit="batches", progress=progress) as bar:
        task = bar.add_task("verify", total=len(plan))
        expected = (_expected_packs if order["policy"] == "packed" else _expected_batches)(store, plan, options)
        for number, ((rows, lines, wanted), batch) in enumerate(zip(expected, loader, strict=True)):
            for name, got, tensor in zip(batch._fields, batch, wanted, strict=True):
                _compare_cells(f"batch {number}, {name}", lines, got, tensor, found)
                digest.update(repr(tuple(got.shape)).encode())
                digest.update(np.ascontiguousarray(got.numpy()).tobytes())
                found.cells += got.numel()
            seen[rows] = True
            found.batches += 1
            found.rows += len(rows)
            bar.update(task, advance=1)
    for row in np.flatnonzero(~seen).tolist():
        found.note(f"row {row} is in no batch of the epoch")
    found.digest = digest.hexdigest()


class _Expected(NamedTuple):
    """One batch of the plan, as the reference makes it."""

    rows: npt.NDArray[np.int64]
    lines: Sequence[str]  # what a line of its tensors is called
    tensors: tuple[torch.Tensor, ...]


def _expected_batches(store: TokenStore, plan: EpochPlan, options: MaskOptions) -> Iterator[_Expected]:
    for rows in plan:
        tensors = expected_batch([store[int(row)] for row in rows], store, options)
        yield _Expected(rows, [f"row {row}" for row in rows], tensors)


def _expected_packs(store: TokenStore, plan: EpochPlan, options: MaskOptions) -> Iterator[_Expected]:
    assert plan.capacity is not None
    limit = min(options.max_length or plan.capacity, plan.capacity)
    alone = replace(options, max_length=limit)
    for rows, _, bounds in packed_batches(plan):
        cells = [expected_batch([store[int(row)]], store, alone) for row in rows]
        packs = [cells[start:stop] for start, stop in pairwise(bounds.tolist())]
        end_to_end = reference.put_end_to_end(packs, plan.capacity, limit, store.pad_token_id)
        yield _Expected(rows, [f"pack {pack}" for pack in range(len(packs))], end_to_end)


def _compare_cells(
    where: str, lines: Sequence[str], got: torch.Tensor, wanted: torch.Tensor, found: Verification
) -> None:
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        found.note(f"{where}: {got.dtype} {tuple(got.shape)}, but the reference gives {wanted.dtype} {wanted.shape}")
        return
    for *place, column in torch.nonzero(got != wanted).tolist():
        line, cell = f"{lines[place[0]]} " if place else "", (*place, column)
        found.note(f"{where}: {line}column {column} is {int(got[cell])}, but the reference gives {int(wanted[cell])}")


def expected_batch(
    examples: Sequence[Example], store: TokenStore, options: MaskOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs and targets that the reference makes of some rows, int64 `(rows, width)` each, in plain Python.

    Single turns in reference mode go through the chapter's functions as they stand. The chapter has neither several
    turns nor a positional mode: for those its inputs are taken, and targets are told token by token. It has one id for
    the end and the padding: where these are two, the padding takes the place of the end in inputs that no row's id is.
    """
    options = options.of(store)
    rows = [example.input_ids.tolist() for example in examples]
    spans = [example.spans.tolist() for example in examples]
    if store.end == "in_row":
        return reference.collate_in_row(
            rows, spans if options.mask_prompt else None, store.pad_token_id, max_length=options.max_length
        )
    inputs, targets = _with_end_appended(rows, spans, store.end_token_id, options)
    for place, row in enumerate(rows):
        inputs[place, len(row) :] = store.pad_token_id
    return inputs, targets


def _with_end_appended(
    rows: Sequence[Sequence[int]], spans: Sequence[Sequence[int]], pad: int, options: MaskOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    limit = options.max_length
    if max(map(len, rows)) == 0:  # the chapter's function gives float32 here
        empty = torch.zeros((len(rows), 0), dtype=torch.int64)
        return empty, empty
    if options.mode == "reference" and options.mask_prompt and max(map(len, spans)) <= 2:
        pairs = [(counts[0], row) for counts, row in zip(spans, rows, strict=True)]
        return reference.custom_collate_with_masking_fn(pairs, pad_token_id=pad, allowed_max_length=limit)
    inputs, targets = reference.custom_collate_fn(rows, pad_token_id=pad)
    for place, (counts, row) in enumerate(zip(spans, rows, strict=True)):
        if options.mode == "positional":
            shifted = [*row[1:], pad] if row else []
            targets[place] = torch.tensor(shifted + [-100] * (targets.shape[1] - len(shifted)))
        if options.mask_prompt and options.mode == "reference" and len(counts) <= 2:
            targets[place, : counts[0] - 1] = -100
        elif options.mask_prompt:
            for token in _prompt_tokens(counts, len(row)):
                if 1 <= token <= targets.shape[1]:
                    targets[place, token - 1] = -100
    return inputs[:, :limit], targets[:, :limit]


def _prompt_tokens(spans: Sequence[int], length: int) -> Iterator[int]:
    """The tokens of all prompts; a last turn without a response also covers the end-of-text."""
    start = 0
    for index, count in enumerate(spans):
        if index % 2 == 0:
            yield from range(start, start + count)
            if len(spans) > 2 and index == len(spans) - 1:
                yield from range(start + count, length + 1)
        start += count


# ----------------------------------------------------------------------------------------------------------- ids


class _Records:
    """The sources' records, to be rendered and tokenized again, whole, with tiktoken.

    Raises:
        InputError: sources, vocabulary or template cannot be had; said before anything is compared.
    """

    def __init__(self, store: TokenStore, sources: Sequence[str]) -> None:
        self.store = store
        self.sources = find_sources(list(sources), keep_empty=True)
        tokenizer, problem = tokenizer_of(store)
        if tokenizer is None and store.manifest["template"].get("name") != TOKENIZED:
            raise InputError(f"{store.path}: its ids cannot be checked, {problem}")
        self.tokenizer = tokenizer
        saved = store.manifest["template"]
        is_chat = store.end == "in_row" and "source" in saved
        if not is_chat and saved["name"].endswith(".jinja") and not Path(saved["name"]).is_file():
            raise InputError(
                f"template {saved['name']!r}, by which {store.path} was prepared, is not in this folder (a store keeps "
                "a template's name and content's hash, not its path): run verify where the template lies"
            )
        asked = {key: saved[key] for key in _SETTINGS if key in saved and (is_chat or key != "source")}
        end = "in_row" if is_chat else "append"
        name, fields = saved["name"], saved.get("fields")
        if PREFERENCE in saved:
            name, fields = f"{PREFERENCE}:{name}", {**fields, **saved[PREFERENCE]["fields"]}
        self.template: Template = load_template(name, fields, tokenizer, end=end, **asked)
        if self.template.identity() != saved:
            raise InputError(f"template {saved['name']!r} is not the one that {store.path} was prepared with")
        self.chats = ChatRows(store, self.template) if is_chat else None

    def compare(self, found: Verification, *, progress: bool) -> None:
        """Compare ids, and what is trained."""
        store = self.store
        row = found.records = 0
        before, place = found.num_problems, len(found.problems)
        with progress_bar(unit="rows", progress=progress) as bar:
            task = bar.add_task("tokenize", total=len(store))
            for block in read_blocks(self.sources):
                parsed = ((chunk, i) for chunk in records.read_records(block, block.read()) for i in range(len(chunk)))
                for position, (chunk, number) in enumerate(parsed, block.first_row):
                    if row < len(store) and int(store[row].source_row) == position:  # else skipped in the job
                        row += self._compare_record(row, position, chunk, number, found)
                        found.records += 1
                bar.update(task, completed=row)
        if row < len(store):
            where = int(store[row].source_row)
            found.note(
                f"row {row}: there is no record {where} in the sources; name them in the order they were prepared"
            )
        if 2 * (found.num_problems - before) > len(store):
            names = ", ".join(source.name for source in self.sources)
            most = f"{names}: most records are others than those {store.path} was prepared from"
            found.problems.insert(place, f"{most}; give the same files, in the same order")

    def _compare_record(self, row: int, position: int, chunk: Any, number: int, found: Verification) -> int:
        """Note what differs between a record, of a chunk, and its rows from `row` on; returns how many these are."""
        if self.tokenizer is None or self.template.name == TOKENIZED:
            num_rows, problems = differing_rows(self.store, row, position, chunk, number)
            found.note_all(problems)
            return num_rows
        num_rows = 1
        try:
            record = chunk[number]
            if self.template.preference is not None:
                num_rows, problems = judged_differences(self.store, row, record, self.template, self.tokenizer)
                found.note_all(problems)
            elif self.chats is not None:
                found.note_all(self.chats.differences(row, record))
            else:
                parts = self.template.parts(record)
                _compare_row(self.store, row, parts, self.tokenizer, self.template.single_turn, found)
        except (BadRecordError, ValueError) as error:
            found.note(f"row {row}: record {position} of the sources gives no text ({error})")
        return num_rows


def _compare_row(
    store: TokenStore, row: int, parts: Sequence[str], tokenizer: Tokenizer, single_turn: bool, found: Verification
) -> None:
    """One row against its record's texts: ids, and which of them and of the end-of-text are trained."""
    example, by_reference = store[row], single_turn and store.manifest["options"].get("boundary") == "reference"
    if store.manifest["options"].get("special_text") == "strip-end":
        parts = tokenizer.without_end(parts)
    ids, spans = example.input_ids.tolist(), example.spans.tolist()
    wanted, is_trained, prompt = _expected_row(parts, tokenizer, by_reference=by_reference)
    if store.manifest["kind"] == "documents":
        wanted, is_trained = [tokenizer.begin_token_id, *wanted], [True, *is_trained]
    cut = _cut_of(prompt, len(wanted), store.manifest["options"])
    wanted, is_trained = wanted[cut:], is_trained[cut:]
    if ids != wanted:
        pairs = enumerate(zip(ids, wanted, strict=False))
        place = next((i for i, (a, b) in pairs if a != b), min(len(ids), len(wanted)))
        found.note(
            f"row {row}: {len(ids)} ids, tiktoken gives {len(wanted)}; from token {place} on they are "
            f"{ids[place : place + 5]}, but {wanted[place : place + 5]} is right"
        )
        return
    stored = [number % 2 == 1 for number, span in enumerate(spans) for _ in range(span)]
    if len(stored) == len(ids):
        stored.append(len(spans) % 2 == 0)  # the end-of-text goes with the last response
    if by_reference and stored != is_trained:
        kept = is_trained.index(True) if True in is_trained else len(is_trained)
        found.note(f"row {row}: a prompt of {spans[0] if spans else 0} tokens, but tiktoken gives {kept}")
    elif stored != is_trained:
        place = next((i for i, (a, b) in enumerate(zip(stored, is_trained, strict=False)) if a != b), len(ids))
        what = f"token {place}" if place < len(ids) else "the end-of-text"
        found.note(f"row {row}: {what} counts as {'prompt' if is_trained[place] else 'response'}, which it is not")


def _expected_row(
    parts: Sequence[str], tokenizer: Tokenizer, *, by_reference: bool
) -> tuple[list[int], list[bool], int]:
    """The ids of a record's texts; which of them, and of the end-of-text, are trained; the first prompt's length."""
    text = "".join(parts)
    ids = tokenizer.encode(text)
    if by_reference:
        prompt = min(len(tokenizer.encode(parts[0])), len(ids) + 1)
        return ids, [token >= prompt for token in range(len(ids) + 1)], prompt
    sizes = [len(part.encode()) if tokenizer.bounds_in_bytes else len(part) for part in parts]
    is_response = np.repeat(np.arange(len(parts)) % 2 == 1, sizes)
    before = np.concatenate([[0], np.cumsum(is_response)])
    starts, ends = tokenizer.token_bounds(text, np.array(ids, np.int64))
    is_trained = [*(before[ends] > before[starts]).tolist(), len(parts) % 2 == 0]
    prompt = int(np.count_nonzero(ends <= sizes[0])) if len(parts) > 1 else len(ids) + 1
    return ids, is_trained, prompt


def _cut_of(prompt: int, length: int, options: Mapping[str, Any]) -> int:
    """How many tokens a long prompt has lost at its beginning; one of it stays."""
    limit: int | None = options.get("max_length")
    if options.get("long_prompt") != "cut" or limit is None or prompt <= limit:
        return 0
    return max(0, min(prompt - 1, length - 1, length - limit))
