"""Rows -> batches in one kernel call, and the plain reference beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcollate.lazy import face

if TYPE_CHECKING:
    from fastcollate.collate.batch import AnyBatch as AnyBatch
    from fastcollate.collate.batch import Batch as Batch
    from fastcollate.collate.batch import ContextParallelBatch as ContextParallelBatch
    from fastcollate.collate.batch import Counts as Counts
    from fastcollate.collate.batch import PackedBatch as PackedBatch
    from fastcollate.collate.collator import Collator as Collator
    from fastcollate.collate.drop_in import collate_fn as collate_fn

_MODULE_OF = {
    **dict.fromkeys(("AnyBatch", "Batch", "ContextParallelBatch", "Counts", "PackedBatch"), "batch"),
    "Collator": "collator",
    "collate_fn": "drop_in",
}
__getattr__, __dir__ = face(__name__, _MODULE_OF)
