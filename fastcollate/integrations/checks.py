"""What several adapters check before training starts: that model, tokenizer and store speak of the same ids."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastcollate.errors import InputError
from fastcollate.ingest import columns_of_ids
from fastcollate.plan import MixedStore
from fastcollate.store import TokenStore
from fastcollate.text import load_tokenizer

MASKS = ("completion_mask", "assistant_masks", "loss_mask")
_PROBE = "Below is an instruction: add 12,345 and 67; spell 'naïve café'.\n\n### Response:\n"


def check_model(store: TokenStore | MixedStore, model: nn.Module) -> None:
    """Refuse a model whose token embedding has fewer entries than the store has ids."""
    num_ids = _num_embeddings(model)
    if num_ids is not None and num_ids < store.vocab_size:
        raise InputError(
            f"{store.path} is tokenized by {store.tokenizer_name} ({store.vocab_size:,} ids), but the model embeds "
            f"{num_ids:,} ids: it was made for another tokenizer; prepare the store again with the model's own "
            "(--tokenizer), or load the model that belongs to this one"
        )


def check_tokenizer(store: TokenStore | MixedStore, tokenizer: Any) -> None:
    """Refuse a tokenizer of Hugging Face that differs from the store's: by size, a probe text, or its added tokens."""
    found = tokenizer.encode(_PROBE, add_special_tokens=False)
    if len(tokenizer) >= store.vocab_size:
        try:
            own = load_tokenizer(store.tokenizer_name)
        except InputError:
            return  # its vocabulary cannot be had here; the sizes agree
        added = {} if own.json is None else own.json.added.control
        has_added = not added or tokenizer.convert_tokens_to_ids([*added]) == [*added.values()]
        if found == own.encode(_PROBE) and has_added:
            return
    raise InputError(
        f"{store.path} is tokenized by {store.tokenizer_name} ({store.vocab_size:,} ids), and the tokenizer given "
        f"({type(tokenizer).__name__}, {len(tokenizer):,} ids) encodes differently: prepare the store again with the "
        "model's own tokenizer.json (--tokenizer), or give the tokenizer that the store was made with"
    )


def check_unshifted(input_ids: torch.Tensor, labels: torch.Tensor) -> None:
    """Refuse labels that are shifted already, for a model that shifts them itself.

    They are where most trained ones (not -100) are the next input instead of the input at their own place.
    """
    labels, same, following = labels[:, :-1], input_ids[:, :-1], input_ids[:, 1:]
    trained = labels != -100
    moved = trained & (labels != same)
    if 2 * int(moved.sum()) > int(trained.sum()) and bool((labels == following)[moved].all()):
        raise InputError(
            "the labels are shifted by one already (label i is input i + 1), and models of Hugging Face shift them "
            "again: give labels at the place of their own token, or train with fastcollate.BatchLoader and your own "
            "cross-entropy, which want shifted targets"
        )


def columns_of(features: Sequence[Mapping[str, Any]]) -> set[str]:
    """The columns that make the rows of features, each with a value for every id of its row."""
    columns = columns_of_ids(list(features[0]), {}).keys() - {"seq_lengths"}
    if "spans" in columns:
        raise InputError("the rows have 'spans': they are a store's; give StoreDataset(store), or its open_dataset")
    for number, feature in enumerate(features):
        if feature.keys() != features[0].keys():
            raise InputError(f"row {number} of the batch has {sorted(feature)}, but row 0 has {sorted(features[0])}")
        num_ids = len(feature["input_ids"])
        for name in columns:
            if len(feature[name]) != num_ids:
                raise InputError(
                    f"row {number} of the batch: {num_ids} ids, but {len(feature[name])} values in {name!r}; labels, "
                    "masks and input_ids of a row must have the same length"
                )
    return columns


def warn_if_all_trained(columns: Collection[str]) -> None:
    """Say once that all tokens of features are trained: a mask may have been lost on the way to here."""
    if not {"labels", *MASKS}.intersection(columns):
        _tell_of_all_trained()


@functools.cache
def _tell_of_all_trained() -> None:
    warnings.warn(
        "the rows have neither labels nor a mask, so every token is trained; if the data set has a mask "
        f"({', '.join(MASKS)}), a Trainer has removed it: set remove_unused_columns=False in its arguments",
        stacklevel=4,
    )


def _num_embeddings(model: nn.Module) -> int | None:
    """Entries of the token embedding: what the model says, else its largest embedding."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if embedding is not None:
        return int(embedding.weight.shape[0])
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return max(sizes, default=None)
