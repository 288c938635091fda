"""Batches filled ahead and copied to the device: the loader."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcollate.lazy import face

if TYPE_CHECKING:
    from fastcollate.load.loader import BatchLoader as BatchLoader
    from fastcollate.load.options import CollateKeywords as CollateKeywords
    from fastcollate.load.options import LoaderKeywords as LoaderKeywords
    from fastcollate.load.options import collate_keywords as collate_keywords
    from fastcollate.load.options import collator_of as collator_of
    from fastcollate.load.options import mode_of as mode_of
    from fastcollate.load.options import open_store as open_store
    from fastcollate.load.options import order_keywords as order_keywords
    from fastcollate.load.options import row_reports as row_reports
    from fastcollate.load.options import trained_rows as trained_rows

_OPTIONS = (
    "CollateKeywords", "LoaderKeywords", "collate_keywords", "collator_of", "mode_of", "open_store", "order_keywords",
    "row_reports", "trained_rows",
)  # fmt: skip
_MODULE_OF = {"BatchLoader": "loader", **dict.fromkeys(_OPTIONS, "options")}
__getattr__, __dir__ = face(__name__, _MODULE_OF)
