"""Moved to `fastcollate.plan.splits`; this file goes with the next release."""

import warnings

from fastcollate.plan.splits import split_rows as split_rows

warnings.warn(
    "fastcollate.splits has moved, and goes with the next release: from fastcollate import split_rows",
    FutureWarning,
    stacklevel=2,
)
