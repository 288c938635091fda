"""Moved to `fastcollate.plan.mixing`; this file goes with the next release."""

from fastcollate.lazy import warn_moved
from fastcollate.plan.mixing import MixedStore as MixedStore

warn_moved(__name__, "from fastcollate import MixedStore")
