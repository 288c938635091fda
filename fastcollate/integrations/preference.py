"""TRL's `DPOTrainer`, `KTOTrainer` and `RewardTrainer`: a collator that gives what theirs give, and rows of a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastcollate.errors import InputError, choice, import_extra, integer, shown
from fastcollate.store import TokenStore, require_served

_FILLED = (("", "completion_ids"), ("KL_", "KL_completion_ids"))


@dataclass
class PreferenceCollator:
    """In place of the collators of TRL's `DPOTrainer`, `KTOTrainer` and `RewardTrainer`: the same tensors, key by key.

    Which one follows from the features that a trainer prepares: `prompt_ids`, `chosen_ids` and `rejected_ids` (DPO),
    `prompt_ids` and `completion_ids` with a `label` (KTO), `chosen_ids` and `rejected_ids` alone (reward). Reference
    log-probabilities and margins are passed on.

    Args:
        pad_token_id: the padding.
        max_length: ids kept of a row; `None` keeps all. `RewardTrainer` filters rows instead, and has none.
        truncation_mode: `keep_start` or `keep_end`.
        pad_to_multiple_of: the width is a multiple of this.

    Raises:
        InputError: an option is wrong, or a batch is of other features.

    Example:
        >>> from fastcollate.integrations.preference import PreferenceCollator
        >>> collator = PreferenceCollator(pad_token_id=0)
        >>> batch = collator([{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}])
        >>> batch["input_ids"], batch["completion_mask"]
        (tensor([[1, 2, 3, 0],
                [1, 2, 4, 5]]), tensor([[0, 0, 1, 0],
                [0, 0, 1, 1]]))
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        choice("truncation_mode", self.truncation_mode, ("keep_start", "keep_end"))
        for name in ("max_length", "pad_to_multiple_of"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), 1)

    def __call__(self, features: Sequence[Mapping[str, Any]], return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        """Collate a batch."""
        if return_tensors != "pt":
            raise InputError(f"return_tensors={shown(return_tensors)}: only 'pt'")
        if not len(features):
            raise InputError("the batch has no rows; a data set of length 0, or a sampler that yields nothing")
        first = features[0]
        if "completion_ids" in first and "prompt_ids" in first:
            return self._answers(features)
        if "chosen_ids" not in first or "rejected_ids" not in first:
            raise InputError(
                f"the batch holds {', '.join(map(repr, list(first)[:8]))}: give prompt_ids, chosen_ids and "
                "rejected_ids, or prompt_ids and completion_ids, as TRL's trainers prepare them"
            )
        names, with_prompt = ("chosen_ids", "rejected_ids"), "prompt_ids" in first
        prompts = [feature["prompt_ids"] if with_prompt else [] for feature in features]
        output = self._filled(prompts * 2, [feature[name] for name in names for feature in features])
        if not with_prompt:
            del output["completion_mask"]
            if "margin" in first:
                output["margin"] = torch.tensor([feature["margin"] for feature in features], dtype=torch.float)
        return output | _numbers(features, "ref_chosen_logps", "ref_rejected_logps")

    def _answers(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        prompts = [feature["prompt_ids"] for feature in features]
        output: dict[str, torch.Tensor] = {}
        for prefix, name in _FILLED:
            if name in features[0]:
                filled = self._filled(prompts, [feature[name] for feature in features])
                output |= {prefix + key: value for key, value in filled.items()}
        return output | _numbers(features, "ref_logps", "ref_KL_logps", "label")

    def _filled(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Prompts and answers end to end, a line each."""
        sizes = np.array([(len(prompt), len(answer)) for prompt, answer in zip(prompts, answers, strict=True)])
        totals = sizes.sum(1)
        kept = totals if self.max_length is None else np.minimum(totals, self.max_length)
        keeps_end = self.truncation_mode == "keep_end"
        multiple = self.pad_to_multiple_of or 1
        shape = (len(totals), -(-int(kept.max()) // multiple) * multiple)
        ids = np.full(shape, self.pad_token_id, np.int64)
        for line, (prompt, answer, total, count) in enumerate(zip(prompts, answers, totals, kept, strict=True)):
            row = [*prompt, *answer]
            ids[line, :count] = row[total - count :] if keeps_end else row[:count]
        place = np.arange(shape[1])
        begins = sizes[:, 0] - (totals - kept) * keeps_end
        attended = place < kept[:, None]
        found = {"input_ids": ids, "attention_mask": attended, "completion_mask": attended & (place >= begins[:, None])}
        return {name: torch.from_numpy(values.astype(np.int64)) for name, values in found.items()}


def _numbers(features: Sequence[Mapping[str, Any]], *names: str) -> dict[str, torch.Tensor]:
    there = [name for name in names if name in features[0]]
    return {name: torch.tensor([feature[name] for feature in features]) for name in there}


def preference_dataset(store: TokenStore | str, *, prompts: bool = True) -> Any:
    """A store of pairs, or of answers with verdicts, as the `datasets.Dataset` that TRL's trainers make of its records.

    Of pairs `prompt_ids`, `chosen_ids`, `rejected_ids` and perhaps `margin`; of answers `prompt_ids`, `completion_ids`
    and `label`. Without `prompts` the ids of pairs are whole rows, which is what `RewardTrainer` takes as it is.

    Raises:
        InputError: the store holds neither.

    Example:
        >>> from fastcollate import prepare
        >>> from fastcollate.integrations.preference import preference_dataset
        >>> _ = prepare([{"prompt": "Is it?", "chosen": " Yes.", "rejected": " No."}], "one", template="preference")
        >>> preference_dataset("one")[0]
        {'prompt_ids': [3792, 340, 30], 'chosen_ids': [3363, 13, 50256], 'rejected_ids': [1400, 13, 50256]}
    """
    datasets = import_extra("datasets", "hf")
    store = store if isinstance(store, TokenStore) else TokenStore(store)
    require_served(store, ("pairs", "answers"))
    end = [store.end_token_id] * (store.end == "append")
    rows = [(example.input_ids.tolist() + end, int(example.spans[0])) for example in store]
    asked = [ids[:place] for ids, place in rows]
    answers = [ids[place:] if prompts else ids for ids, place in rows]
    if store.kind == "answers":
        columns: dict[str, Any] = {"prompt_ids": asked, "completion_ids": [ids[place:] for ids, place in rows]}
        if "label" in store.manifest["columns"]:
            columns["label"] = store.column("label").astype(bool)
        return datasets.Dataset.from_dict(columns)
    columns = {"prompt_ids": asked[::2]} if prompts else {}
    columns |= {"chosen_ids": answers[::2], "rejected_ids": answers[1::2]}
    if "margin" in store.manifest["columns"]:
        columns["margin"] = store.column("margin")[::2]
    return datasets.Dataset.from_dict(columns)
