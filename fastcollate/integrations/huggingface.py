"""Hugging Face: a collator, the batch order for `Trainer` and TRL, loss by source, and `datasets` in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcollate.integrations.hf.collator import DataCollator as DataCollator
from fastcollate.integrations.hf.trainer import BucketedTrainerMixin as BucketedTrainerMixin
from fastcollate.integrations.hf_datasets import lengths_of as lengths_of
from fastcollate.integrations.hf_datasets import open_dataset as open_dataset
from fastcollate.integrations.hf_datasets import store_from_dataset as store_from_dataset
from fastcollate.lazy import face

if TYPE_CHECKING:
    from fastcollate.integrations.hf.by_source import LossBySource as LossBySource

__getattr__, _ = face("fastcollate.integrations.hf", {"LossBySource": "by_source"})  # it imports transformers
