"""Moved to `fastcollate.plan.splits`; this file goes with the next release."""

from fastcollate.lazy import warn_moved
from fastcollate.plan.splits import split_rows as split_rows

warn_moved(__name__, "from fastcollate import split_rows")
