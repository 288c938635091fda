"""Rows of chats against their records: rendered again, encoded by the reference, a sample of them by `transformers`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastcollate.store import TokenStore
from fastcollate.text import BadRecordError, Template, load_tokenizer

_SAMPLE = 200  # rows that `apply_chat_template` gives again


class ChatRows:
    """A store of chats; `template` is the one that it was prepared with."""

    def __init__(self, store: TokenStore, template: Template) -> None:
        self._store, self._template = store, template
        self._tokenizer = load_tokenizer(store.tokenizer_name, "tokenizers")
        self._is_cut = store.manifest["options"].get("long_prompt") == "cut"
        self._every = max(len(store) // _SAMPLE, 1)
        self.theirs: Any = None  # the date is another there
        is_dated = "strftime_now" in template.settings["source"]
        if importlib.util.find_spec("transformers") and not is_dated and not template.of_records:
            from transformers import PreTrainedTokenizerFast

            self.theirs = PreTrainedTokenizerFast.from_pretrained(Path(store.tokenizer_name).parent)

    def differences(self, row: int, record: Any) -> Iterator[str]:
        """What differs between a row and its record's chat."""
        example = self._store[row]
        ids, mask = example.input_ids.tolist(), _mask_of(example.spans.tolist())
        try:
            chat = self._template.render(record)
        except BadRecordError as error:
            yield f"row {row}: its record gives no text ({error})"
            return
        encoded = self._tokenizer.encode_chats([chat])
        yield from self._compared(row, ids, mask, encoded.ids.tolist(), _mask_of(encoded.spans.tolist()), "tokenizers")
        if self.theirs is not None and row % self._every == 0 and not chat.protected:
            variables = self._template.variables_of(record)
            found = self.theirs.apply_chat_template(
                variables.pop("messages"),
                chat_template=self._template.settings["source"],
                return_dict=True,
                return_assistant_tokens_mask=True,
                **variables,
            )
            masks = found["assistant_masks"] if self._template.trains_all(record) else _mask_of(encoded.spans.tolist())
            yield from self._compared(row, ids, mask, found["input_ids"], masks, "apply_chat_template")

    def _compared(
        self, row: int, ids: list[int], mask: list[int], wanted: list[int], wanted_mask: list[int], name: str
    ) -> Iterator[str]:
        if self._is_cut:
            wanted, wanted_mask = wanted[-len(ids) :], wanted_mask[-len(ids) :]
        if ids != wanted:
            yield how_ids_differ(row, ids, wanted, name)
        elif mask != wanted_mask:
            place = next(i for i, (a, b) in enumerate(zip(mask, wanted_mask, strict=True)) if a != b)
            yield f"row {row}: token {place} is {'not ' * (not mask[place])}trained, by {name} it is the other way"


def _mask_of(spans: list[int]) -> list[int]:
    return [number % 2 for number, span in enumerate(spans) for _ in range(span)]


def how_ids_differ(row: int, ids: list[int], wanted: list[int], name: str) -> str:
    """From where on a row's ids are others than `name` gives."""
    pairs = enumerate(zip(ids, wanted, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(ids), len(wanted)))
    return (
        f"row {row}: {len(ids)} ids, {name} gives {len(wanted)}; from token {place} on they are "
        f"{ids[place : place + 5]}, but {wanted[place : place + 5]} is right"
    )
