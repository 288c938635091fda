"""fastcollate: the data pipeline for instruction fine-tuning.

The public names are imported on first use, so that `import fastcollate` and `fastcollate --help` answer at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcollate.lazy import face

if TYPE_CHECKING:
    from fastcollate.collate.batch import Batch as Batch
    from fastcollate.collate.batch import ContextParallelBatch as ContextParallelBatch
    from fastcollate.collate.batch import PackedBatch as PackedBatch
    from fastcollate.collate.drop_in import collate_fn as collate_fn
    from fastcollate.collate.pairs.batch import AnswerBatch as AnswerBatch
    from fastcollate.collate.pairs.batch import PreferenceBatch as PreferenceBatch
    from fastcollate.ingest.job import prepare as prepare
    from fastcollate.integrations.pytorch import BucketBatchSampler as BucketBatchSampler
    from fastcollate.integrations.pytorch import StoreDataset as StoreDataset
    from fastcollate.load.loader import BatchLoader as BatchLoader
    from fastcollate.plan.cost.parts import balance as balance
    from fastcollate.plan.mixing import MixedStore as MixedStore
    from fastcollate.plan.packing import pack_lengths as pack_lengths
    from fastcollate.plan.plan import plan_epoch as plan_epoch
    from fastcollate.plan.splits import split_rows as split_rows
    from fastcollate.store.store import TokenStore as TokenStore

_MODULE_OF = {
    "Batch": "collate.batch", "BatchLoader": "load.loader", "BucketBatchSampler": "integrations.pytorch",
    "ContextParallelBatch": "collate.batch", "MixedStore": "plan.mixing", "PackedBatch": "collate.batch",
    "AnswerBatch": "collate.pairs.batch", "PreferenceBatch": "collate.pairs.batch",
    "StoreDataset": "integrations.pytorch", "TokenStore": "store.store", "balance": "plan.cost.parts",
    "collate_fn": "collate.drop_in", "pack_lengths": "plan.packing", "plan_epoch": "plan.plan",
    "prepare": "ingest.job", "split_rows": "plan.splits",
}  # fmt: skip

__all__ = list(_MODULE_OF)
__version__ = "0.2.0"
__getattr__, __dir__ = face(__name__, _MODULE_OF)
