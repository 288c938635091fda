"""Rows of pairs, and of answers with verdicts, against their records: read again, encoded by the reference."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import numpy as np

from fastcollate.check.chat.rows import how_ids_differ
from fastcollate.store import TokenStore
from fastcollate.text import BadRecordError, Rendered, Template, Tokenizer, load_tokenizer


def judged_differences(
    store: TokenStore, row: int, record: Any, template: Template, tokenizer: Tokenizer
) -> tuple[int, list[str]]:
    """How many rows, from this one on, a record gives, and what differs between them and it."""
    assert template.preference is not None
    try:
        judged = template.preference.read(record)
        texts = [template.asked_and_whole(answer) for answer in judged.answers]
    except BadRecordError as error:
        return 1 + (template.preference.kind == "pairs"), [f"row {row}: its record gives no text ({error})"]
    if store.manifest["options"].get("special_text") == "strip-end":
        texts = [_without_end(*pair, tokenizer) for pair in texts]
    prompt, *rows = _ids([texts[0][0], *(whole for _, whole in texts)], store, tokenizer)
    alike = min(
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids, strict=False))) for ids in rows
    )
    found = [problem for place, ids in enumerate(rows) for problem in _compared(store, row + place, ids, alike)]
    for name, numbers in judged.numbers.items():
        stored = store.column(name)[row : row + len(rows)]
        if stored.tolist() != np.array(numbers, stored.dtype).tolist():
            found.append(f"row {row}: {name} is {stored.tolist()}, but its record says {numbers}")
    return len(rows), found


def _ids(texts: list[Rendered], store: TokenStore, tokenizer: Tokenizer) -> list[list[int]]:
    if store.end == "append":
        return [tokenizer.encode(text.text) for text in texts]
    encoded = load_tokenizer(store.tokenizer_name, "tokenizers").encode_chats(texts)
    return [ids.tolist() for ids in np.split(encoded.ids, encoded.offsets[1:-1])]


def _without_end(asked: Rendered, whole: Rendered, tokenizer: Tokenizer) -> tuple[Rendered, Rendered]:
    parts = tokenizer.without_end([asked.text, whole.text[len(asked.text) :]])
    return Rendered(parts[0], [], []), Rendered("".join(parts), [], [])


def _compared(store: TokenStore, row: int, wanted: list[int], prompt: int) -> Iterator[str]:
    if row >= len(store):
        yield f"row {row}: is missing"
        return
    ids, spans = store[row].input_ids.tolist(), store[row].spans.tolist()
    if ids != wanted:
        yield how_ids_differ(row, ids, wanted, "its record")
    elif spans != [prompt, len(wanted) - prompt]:
        yield f"row {row}: its spans are {spans}, but {[prompt, len(wanted) - prompt]} is right"
