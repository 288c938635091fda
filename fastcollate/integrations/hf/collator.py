"""Rows of a store, or tokenized features, as batches for models of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fastcollate.collate import collate_fn, settings
from fastcollate.errors import InputError, choice, integer, shown
from fastcollate.integrations import checks
from fastcollate.integrations.pytorch import PackedRows, StoreDataset, StoreRow, packs_of, row_numbers
from fastcollate.plan import MixedStore

Int64Array = np.ndarray[Any, np.dtype[np.int64]]
IGNORE = -100
LAYOUTS = ("padded", "flattened")


class DataCollator:
    """The `data_collator` of a `Trainer`: over rows of a `StoreDataset` in one kernel call, or over tokenized features.

    The labels are unshifted, as models of Hugging Face want them: label `i` belongs to token `i`.

    From a `StoreDataset` each row is exactly its ids, with the end-of-text where the store says that one is appended;
    its options (`mask_prompt`, `max_length`, ...) decide the labels and the cut, `max_length` counting columns of
    `input_ids`. Features are mappings with `input_ids`, and with `labels`, `completion_mask`, `assistant_masks`,
    `loss_mask` (those are trained that all of them train), or nothing more: then all tokens are, and a warning says so
    once, since a `Trainer` removes masks unless its `remove_unused_columns` is false. With `seq_lengths`, as
    `trl.pack_dataset` gives, or `position_ids` that restart, each of a pack's sequences is a row of the flattened form;
    the padded one refuses packs.
    Other keys are left out, and refused where they may say what is trained. The first column's label is -100: it is no
    target, and a loss that is divided by the number of labels would come out too small.

    Args:
        layout: `"padded"` gives `input_ids`, `labels` and `attention_mask`, int64 `(rows, width)`, as
            `DataCollatorForSeq2Seq` does; `"flattened"` gives one long row without padding, `input_ids`, `labels`
            (-100 where a row begins) and `position_ids` (from 0 in each row), int64 `(1, num_tokens)`, with
            `cu_seq_lens_q` and `cu_seq_lens_k` (int32 `(rows + 1,)`), `max_length_q` and `max_length_k` (int) and
            `seq_idx` (int32 `(1, num_tokens)`, the row of each token), as `DataCollatorWithFlattening` does.
        pad_token_id: what fills `input_ids`; by default the tokenizer's, else the store's, else 0 (the attention mask
            excludes it).
        pad_to_multiple_of: the width is a multiple of this, by default that of the `StoreDataset`; the padding of a
            flattened batch is a row of its own at its end, without labels.
        max_segments: rows of each flattened batch, the rest of them empty, so that `cu_seq_lens` have one size; by
            default that of the `StoreDataset`; a batch of more is refused.
        tokenizer: the model's; a store made with another one is refused.
        sources: of a `MixedStore`, give `sources` too, int64, the place in `mix.names` of what each cell is from:
            `(rows, 1)`, flattened `(1, num_tokens)` with -1 for padding. No model takes it: your loop takes it out.

    Raises:
        InputError: an unknown layout, or an option that it does not have.

    Example:
        >>> from fastcollate import StoreDataset
        >>> from fastcollate.integrations.huggingface import DataCollator
        >>> dataset = StoreDataset("store", mask_prompt=True)
        >>> batch = DataCollator()([dataset[3], dataset[5]])
        >>> {name: tuple(tensor.shape) for name, tensor in batch.items()}
        {'input_ids': (2, 77), 'labels': (2, 77), 'attention_mask': (2, 77)}

        Over tokenized features, with labels or a `completion_mask`:

        >>> features = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
        >>> DataCollator(pad_token_id=0)(features)["labels"]
        tensor([[-100,    6,    7],
                [-100, -100, -100]])
    """

    def __init__(
        self,
        layout: str = "padded",
        *,
        pad_token_id: int | None = None,
        pad_to_multiple_of: int | None = None,
        max_segments: int | None = None,
        tokenizer: Any = None,
        sources: bool = False,
    ) -> None:
        choice("layout", layout, LAYOUTS)
        for name, value in (("pad_to_multiple_of", pad_to_multiple_of), ("max_segments", max_segments)):
            if value is not None:
                integer(name, value, 1)
        if max_segments is not None and layout != "flattened":
            raise InputError(f"max_segments={max_segments}: for layout='flattened' only")
        self.layout = layout
        self.max_segments = max_segments
        self.pad_token_id = getattr(tokenizer, "pad_token_id", None) if pad_token_id is None else pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.tokenizer, self.sources = tokenizer, sources
        self._checked: set[str] = set()

    def __call__(self, features: Sequence[Any], return_tensors: str = "pt") -> dict[str, Any]:
        """Collate a batch.

        Raises:
            InputError: the batch is empty or of something else, its labels are shifted already, or the store was made
                with another tokenizer.
        """
        if return_tensors != "pt":
            raise InputError(f"return_tensors={shown(return_tensors)}: only 'pt'")
        if not len(features):
            raise InputError("the batch has no rows; a data set of length 0, or a sampler that yields nothing")
        lengths = None
        if isinstance(features[0], StoreRow):
            input_ids, labels, mask = self._from_store(features)
        elif isinstance(features[0], Mapping):
            input_ids, labels, mask = self._from_features(features)
            lengths = self._lengths_in_packs(features)
        else:
            raise InputError(
                f"the batch holds {type(features[0]).__name__}: give rows of a StoreDataset, or mappings with "
                "'input_ids' (inputs and targets of fastcollate.collate_fn are shifted already; do not pass them here)"
            )
        labels[:, :1] = IGNORE  # no model trains it, and a count of the labels would be too large by one a row
        found = {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
        if self.layout == "flattened":
            lengths, step = mask.sum(1) if lengths is None else lengths, self._multiple(features)
            most = self.max_segments or _of_store(features, "max_segments")
            found = _flatten(input_ids, labels, mask, lengths, step, self._pad_of(features), most)
        if self.sources:
            sources = _sources_of(features)[:, None]
            if self.layout == "flattened":
                of_tokens = sources.expand(mask.shape)[mask.bool()]
                sources = functional.pad(of_tokens, (0, found["labels"].shape[1] - len(of_tokens)), value=-1)[None]
            found["sources"] = sources
        return found

    def _from_store(self, features: Sequence[StoreRow]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dataset, rows = row_numbers(features)
        if self.tokenizer is not None and "tokenizer" not in self._checked:
            checks.check_tokenizer(dataset.store, self.tokenizer)
            self._checked.add("tokenizer")
        limit, appended = dataset.options["max_length"], dataset.appended(rows)
        packs = packs_of(features)
        if packs is not None:
            limit = dataset.limit_of(packs)
            self._check_packs(packs, np.minimum(dataset.lengths[rows].astype(np.int64) + appended, limit))
        pad, kinds = self._pad_of(features), np.unique(appended).tolist()
        parts = [_whole_rows(dataset, rows[appended == kind], limit, kind, pad) for kind in kinds]
        width = _rounded_up(max(part[0].shape[1] for part in parts), self._multiple(features))
        input_ids, labels, mask = (torch.full((len(rows), width), fill, device="cpu") for fill in (pad, IGNORE, 0))
        for kind, part in zip(kinds, parts, strict=True):
            own = torch.from_numpy(appended == kind)
            for whole, values in zip((input_ids, labels, mask), part, strict=True):
                whole[own, : values.shape[1]] = values
        return input_ids, labels, mask

    def _check_packs(self, packs: PackedRows, lengths: Int64Array) -> None:
        if self.layout != "flattened" or packs.starts or packs.cp_size:
            what = f"layout={self.layout!r}" if not packs.cp_size else f"cp_size={packs.cp_size}"
            what = "long_rows='split'" if packs.starts else what
            raise InputError(
                f"{what} with packed rows: here a batch's packs become one long row of whole rows; use "
                "DataCollator('flattened') and long_rows='truncate' or 'drop', or StoreDataset.collate"
            )
        longest = int(np.add.reduceat(lengths, packs.bounds[:-1]).max())
        if longest > packs.capacity:
            raise InputError(
                f"a pack of {longest:,} tokens with capacity={packs.capacity}: the sampler counted rows without their "
                "end, which labels of Hugging Face have a column for; give BucketBatchSampler(lengths_of(dataset), ...)"
            )

    def _from_features(self, features: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if "input_ids" not in features[0]:
            raise InputError(f"the rows have {sorted(features[0])} and no 'input_ids': tokenize the data set first")
        columns = checks.columns_of(features)
        checks.warn_if_all_trained(columns)
        rows = [feature["input_ids"] for feature in features]
        input_ids = _pad(rows, self.pad_token_id or 0)
        lengths = torch.tensor([len(row) for row in rows], device="cpu")
        mask = (torch.arange(input_ids.shape[1], device="cpu") < lengths[:, None]).long()
        if "attention_mask" in columns:
            mask = _pad([feature["attention_mask"] for feature in features], 0)
        if "labels" in columns:
            labels = _pad([feature["labels"] for feature in features], IGNORE)
        else:
            labels = input_ids.masked_fill(mask == 0, IGNORE)
        for name in checks.MASKS:
            if name in columns:
                labels = labels.masked_fill(_pad([feature[name] for feature in features], 0) == 0, IGNORE)
        if "shift" not in self._checked:
            checks.check_unshifted(input_ids, labels)
            self._checked.add("shift")
        missing = _rounded_up(input_ids.shape[1], self._multiple(features)) - input_ids.shape[1]
        fills = (self.pad_token_id or 0, IGNORE, 0)
        input_ids, labels, mask = (
            functional.pad(tensor, (0, missing), value=value)
            for tensor, value in zip((input_ids, labels, mask), fills, strict=True)
        )
        return input_ids, labels, mask

    def _lengths_in_packs(self, features: Sequence[Mapping[str, Any]]) -> torch.Tensor | None:
        """Tokens of each sequence, where the features are packs of them."""
        if "seq_lengths" in features[0]:
            lengths = [torch.as_tensor(feature["seq_lengths"], dtype=torch.int64, device="cpu") for feature in features]
        elif "position_ids" in features[0]:
            lengths = [_lengths_by_positions(feature["position_ids"]) for feature in features]
        else:
            return None
        if self.layout != "flattened" and any(len(of_pack) > 1 for of_pack in lengths):
            raise InputError(
                f"layout={self.layout!r} with packs (seq_lengths, or position_ids that restart): a pack's sequences "
                "would see each other; give DataCollator('flattened')"
            )
        for of_pack, feature in zip(lengths, features, strict=True):
            if int(of_pack.sum()) != sum(feature.get("attention_mask", [1] * len(feature["input_ids"]))):
                raise InputError(
                    f"sequences of {of_pack.tolist()} in a pack of {len(feature['input_ids'])} tokens: they must add "
                    "up to those that an attention_mask does not leave out"
                )
        return torch.cat(lengths)

    def _multiple(self, features: Sequence[Any]) -> int:
        return self.pad_to_multiple_of or _of_store(features, "pad_to_multiple_of") or 1

    def _pad_of(self, features: Sequence[Any]) -> int:
        """What fills `input_ids`."""
        if self.pad_token_id is None and isinstance(features[0], StoreRow):
            return int(features[0].dataset.collator(whole=True).settings[settings.PAD])
        return self.pad_token_id or 0


def _of_store(features: Sequence[Any], name: str) -> Any:
    """An option of the `StoreDataset` whose rows these are."""
    return features[0].dataset.options.get(name) if isinstance(features[0], StoreRow) else None


def _whole_rows(
    dataset: StoreDataset, rows: Int64Array, limit: int | None, appended: int, pad: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, labels and mask of rows that all hold their end, or get one `appended` (1)."""
    cut = limit
    if appended and limit is not None and dataset.options["truncation"] == "left":
        cut = limit - 1  # the last column is the end's
    inputs, targets = _no_columns(len(rows)) if cut == 0 else dataset.collator(max_length=cut, whole=True)(rows)
    width = inputs.shape[1] + appended if limit is None else min(inputs.shape[1] + appended, limit)
    end = int(dataset.collator(whole=True).settings[settings.END_ID])
    input_ids = torch.full((len(rows), width), end, device="cpu")
    input_ids[:, : inputs.shape[1]] = inputs[:, :width]
    labels = torch.full_like(input_ids, IGNORE)
    labels[:, 1:] = targets[:, : width - 1]
    lengths = torch.from_numpy(dataset.lengths[rows].astype(np.int64)) + appended
    mask = (torch.arange(width, device="cpu") < lengths.clamp(max=width)[:, None]).long()
    if not appended:
        labels[mask == 0] = IGNORE  # where an end would be
    input_ids[mask == 0] = pad
    return input_ids, labels, mask


def _sources_of(features: Sequence[Any]) -> torch.Tensor:
    """Of a mix's rows, where each is from."""
    mix = features[0].dataset.store if isinstance(features[0], StoreRow) else None
    if not isinstance(mix, MixedStore):
        raise InputError("sources=True: for rows of a StoreDataset over a MixedStore; leave it out")
    return torch.from_numpy(mix.source_of(row_numbers(features)[1]))


def _rounded_up(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def _pad(rows: Sequence[Any], value: int) -> torch.Tensor:
    """The rows, padded on the right: what the kernel gives as inputs."""
    return collate_fn(rows, pad_token_id=value).inputs


def _lengths_by_positions(positions: Any) -> torch.Tensor:
    """Tokens of each sequence in a pack: where a position does not follow the one before, the next begins."""
    found = torch.as_tensor(positions, dtype=torch.int64, device="cpu")
    starts = (found.diff() != 1).nonzero().flatten() + 1
    return torch.tensor([0, *starts.tolist(), len(found)], device="cpu").diff()


def _no_columns(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    empty = torch.empty((num_rows, 0), dtype=torch.int64, device="cpu")
    return empty, empty


def _flatten(
    input_ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor, multiple: int, pad: int,
    max_segments: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Rows of these lengths end to end, and a row of padding where their tokens are no multiple."""
    real, lengths = mask.bool(), lengths[lengths > 0]
    ids, flat = input_ids[real], labels[real]
    if missing := _rounded_up(len(ids), multiple) - len(ids):
        ids, flat = (functional.pad(part, (0, missing), value=fill) for part, fill in ((ids, pad), (flat, IGNORE)))
        lengths = functional.pad(lengths, (0, 1), value=missing)
    bounds = functional.pad(lengths.cumsum(0), (1, 0))
    flat[bounds[:-1]] = IGNORE
    longest = int(lengths.max())
    number = torch.repeat_interleave(torch.arange(len(lengths), device="cpu"), lengths)
    position_ids = torch.arange(len(flat), device="cpu") - bounds[number]
    if max_segments is not None:
        if len(lengths) > max_segments:
            raise InputError(
                f"a batch has {len(lengths)} rows (padding is one), more than max_segments={max_segments}: raise that, "
                "or give smaller batches"
            )
        bounds = functional.pad(bounds, (0, max_segments - len(lengths)), value=len(flat))
    return {
        "input_ids": ids[None],
        "labels": flat[None],
        "position_ids": position_ids[None],
        "cu_seq_lens_q": bounds.to(torch.int32),
        "cu_seq_lens_k": bounds.to(torch.int32),
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": number.to(torch.int32)[None],
    }
