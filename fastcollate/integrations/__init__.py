"""Adapters to other people's training loops, one file each; none is imported unless it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcollate.lazy import face

if TYPE_CHECKING:
    from fastcollate.integrations.huggingface import BucketedTrainerMixin as BucketedTrainerMixin
    from fastcollate.integrations.huggingface import DataCollator as DataCollator
    from fastcollate.integrations.lightning import DataModule as DataModule
    from fastcollate.integrations.pytorch import BucketBatchSampler as BucketBatchSampler
    from fastcollate.integrations.pytorch import StoreDataset as StoreDataset

_MODULE_OF = {
    "BucketBatchSampler": "pytorch", "BucketedTrainerMixin": "huggingface", "DataCollator": "huggingface",
    "DataModule": "lightning", "StoreDataset": "pytorch",
}  # fmt: skip
__getattr__, __dir__ = face(__name__, _MODULE_OF)
