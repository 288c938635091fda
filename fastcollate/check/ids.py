"""Records that hold ids against the rows of a store, in plain Python, a token at a time: the rule once more, slowly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastcollate.sources import records
from fastcollate.store import TokenStore

Row = tuple[list[int], list[bool]]
"""Ids, and which of them, and of an end that is appended, are trained."""


def differing_rows(
    store: TokenStore, row: int, position: int, chunk: records.Records, number: int
) -> tuple[int, list[str]]:
    """How many rows of the store, from `row` on, come of a record, at `position` in all sources; what differs."""
    try:
        expected = list(_expected(store.manifest, chunk[number]))
    except (LookupError, TypeError, ValueError) as error:
        return 1, [f"row {row}: record {position} of the sources holds no such ids ({error})"]
    problems: list[str] = []
    for number, (ids, trained) in enumerate(expected, row):
        if number == len(store) or store[number].source_row != position:
            return number - row, [*problems, f"row {number}: record {position} of the sources gives one more row"]
        example = store[number]
        stored = [i % 2 == 1 for i, count in enumerate(example.spans.tolist()) for _ in range(count)]
        if len(stored) < len(trained):
            stored.append(len(example.spans) % 2 == 0)  # an appended end goes with the last response
        if example.input_ids.tolist() != ids:
            problems.append(f"row {number}: other ids than record {position} of the sources holds")
        elif stored != trained:
            problems.append(f"row {number}: other ids are trained than record {position} of the sources says")
    return len(expected), problems


def _expected(manifest: Mapping[str, Any], record: Any) -> Iterator[Row]:
    """The rows that a record gives, cut or left out by the job's limit."""
    fields, options = manifest["template"]["fields"], manifest["options"]
    of = {key: record[name] for key, name in fields.items()}
    limit, appends = options.get("max_length"), manifest["end"] == "append"
    for ids, trained in _sequences(of):
        if appends and ids[-1] == manifest["tokenizer"]["end_token_id"]:
            ids = ids[:-1]
        elif appends:
            trained = [*trained, trained[-1]]
        prompt = trained.index(True) if True in trained else len(trained)
        is_long, room = limit is not None and prompt - 1 >= limit, (limit or 0) + (not appends)
        if is_long and options.get("long_prompt") == "reject":
            continue
        cut = max(0, min(prompt - 1, len(ids) - 1, len(ids) - room))
        cut = cut if is_long and options.get("long_prompt") == "cut" else 0
        yield ids[cut:], trained[cut:]


def _sequences(of: Mapping[str, list[int]]) -> Iterator[Row]:
    """The sequences of a record, without padding."""
    begins, total = set(), 0
    for length in of.get("seq_lengths", []):
        begins.add(total)
        total += length
    in_response = [i % 2 == 1 for i, count in enumerate(of.get("spans", [])) for _ in range(count)]
    ids: list[int] = []
    trained: list[bool] = []
    for place, token in enumerate(of["input_ids"]):
        if not of.get("attention_mask", {place: 1})[place]:
            continue
        if ids and (place in begins or ("position_ids" in of and of["position_ids"][place] == 0)):
            yield ids, trained
            ids, trained = [], []
        said = [bool(of[mask][place]) for mask in ("completion_mask", "assistant_masks", "loss_mask") if mask in of]
        said += [of["labels"][place] != -100] if "labels" in of else []
        said += [in_response[place]] if "spans" in of else []
        ids.append(token)
        trained.append(all(said))
    if ids:
        yield ids, trained
