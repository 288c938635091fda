"""Moved to `fastcollate.train.model`; this file goes with the next release."""

from fastcollate.lazy import warn_moved
from fastcollate.train.model import GPT2 as GPT2
from fastcollate.train.model import GPT2Config as GPT2Config

warn_moved(__name__, "from fastcollate.train.model import GPT2, GPT2Config")
