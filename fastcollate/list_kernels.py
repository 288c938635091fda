"""A Numba loop that reads token ids from text; see `jit.py` for how it is compiled."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastcollate.jit import kernel


@kernel
def parse_rows(text: Any, pairs: bool, tokens: Any, bounds: Any, prompts: Any) -> bool:
    """Read rows of integers from compact JSON: `[[1,2],[3]]`, or `[[9,[1,2]],[8,[3]]]` with prompt lengths.

    Args:
        text: uint8, the JSON.
        pairs: whether each row is a pair of prompt length and ids.
        tokens: int64, written; at least one cell per two characters.
        bounds: int64 `(num_rows + 1,)`, written: where each row starts in `tokens`.
        prompts: int64 `(num_rows,)`, written where `pairs`.

    Returns:
        Whether the text was of that form, in integers of 64 bits.
    """
    innermost = 3 if pairs else 2
    depth = row = count = digits = num_prompts = 0
    value = np.int64(0)
    negative = False
    bounds[0] = 0
    for i in range(np.uint64(len(text))):
        byte = text[i]
        if 48 <= byte <= 57:
            value = value * 10 + (np.int64(byte) - 48)
            digits += 1
            if digits > 18:
                return False
            continue
        if byte == 45:
            negative = True
            continue
        if digits > 0:
            value = -value if negative else value
            if depth == innermost:
                tokens[count] = value
                count += 1
            elif depth == 2 and num_prompts == row and row < len(prompts):
                prompts[row] = value
                num_prompts += 1
            else:
                return False
            value = np.int64(0)
            digits = 0
            negative = False
        if byte == 91:  # [
            depth += 1
            if depth > innermost:
                return False
        elif byte == 93:  # ]
            if depth == innermost:
                if row >= len(prompts):
                    return False
                row += 1
                bounds[row] = count
            elif depth == 2 and num_prompts != row:
                return False
            depth -= 1
        elif byte != 44:  # a comma; anything else (a float, a string, null) is no row of ids
            return False
    return row == len(prompts)
