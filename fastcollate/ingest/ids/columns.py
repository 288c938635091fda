"""Which columns of a record that holds ids make its row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fastcollate.errors import InputError

MASKS = ("completion_mask", "assistant_masks", "loss_mask")  # 0 where not trained
PER_TOKEN = ("labels", *MASKS, "attention_mask", "position_ids")  # a value for each id
COUNTS = ("spans", "seq_lengths")  # that sum up to the number of ids
KNOWN = ("input_ids", *PER_TOKEN, *COUNTS)
_HARMLESS = ("special_tokens_mask", "token_type_ids")
_SUSPECT = re.compile("mask|weight|labels|target")


def columns_of_ids(names: Sequence[str], fields: Mapping[str, str]) -> dict[str, str]:
    """The columns that make the row of a record which has these: what each is, and its name.

    `fields` says which columns are meant; others are taken by their known names.

    Raises:
        InputError: a column is not there, or seems to say what is trained in a way that is not known.

    Example:
        >>> columns_of_ids(["input_ids", "my_mask", "text"], {"loss_mask": "my_mask"})
        {'input_ids': 'input_ids', 'loss_mask': 'my_mask'}
    """
    if unknown := [key for key in fields if key not in KNOWN]:
        raise InputError(f"field {unknown[0]!r}: records that hold ids have the fields {', '.join(KNOWN)}")
    found = {key: fields.get(key, key) for key in KNOWN if key in fields or key in names or key == "input_ids"}
    for key, name in found.items():
        if name not in names:
            have = ", ".join(map(repr, names[:12])) or "none"
            raise InputError(f"no column {name!r} (columns here: {have}); map it with --field {key}=NAME")
    for name in names:
        if _SUSPECT.search(name) and name not in found.values() and name not in _HARMLESS:
            raise InputError(
                f"column {name!r} may say what is trained, and is not known: map it, such as --field "
                f"loss_mask={name} (0 where not trained), or leave it out of the records"
            )
    return found
