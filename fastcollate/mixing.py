"""Moved to `fastcollate.plan.mixing`; this file goes with the next release."""

import warnings

from fastcollate.plan.mixing import MixedStore as MixedStore

warnings.warn(
    "fastcollate.mixing has moved, and goes with the next release: from fastcollate import MixedStore",
    FutureWarning,
    stacklevel=2,
)
