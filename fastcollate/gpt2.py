"""Moved to `fastcollate.train.model`; this file goes with the next release."""

import warnings

from fastcollate.train.model import GPT2 as GPT2
from fastcollate.train.model import GPT2Config as GPT2Config

warnings.warn(
    "fastcollate.gpt2 has moved, and goes with the next release: from fastcollate.train.model import GPT2, GPT2Config",
    FutureWarning,
    stacklevel=2,
)
