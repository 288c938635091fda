"""fastcollate: the data pipeline for instruction fine-tuning.

The public names are imported on first use, so that `import fastcollate` and `fastcollate --help` answer at once.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastcollate.collate import Batch as Batch
    from fastcollate.collate import PackedBatch as PackedBatch
    from fastcollate.collate import collate_fn as collate_fn
    from fastcollate.integrations.pytorch import BucketBatchSampler as BucketBatchSampler
    from fastcollate.integrations.pytorch import StoreDataset as StoreDataset
    from fastcollate.loader import BatchLoader as BatchLoader
    from fastcollate.packing import pack_lengths as pack_lengths
    from fastcollate.plan import plan_epoch as plan_epoch
    from fastcollate.prepare import prepare as prepare
    from fastcollate.store import TokenStore as TokenStore

_MODULE_OF = {
    "Batch": "collate",
    "BatchLoader": "loader",
    "BucketBatchSampler": "integrations.pytorch",
    "PackedBatch": "collate",
    "StoreDataset": "integrations.pytorch",
    "TokenStore": "store",
    "collate_fn": "collate",
    "pack_lengths": "packing",
    "plan_epoch": "plan",
    "prepare": "prepare",
}

__all__ = [
    "Batch",
    "BatchLoader",
    "BucketBatchSampler",
    "PackedBatch",
    "StoreDataset",
    "TokenStore",
    "collate_fn",
    "pack_lengths",
    "plan_epoch",
    "prepare",
]
__version__ = "0.1.0"


class _Package(ModuleType):
    """Keeps `fastcollate.prepare` the function: importing the submodule of that name would overwrite it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> object:
    """Import a public name from the module it lives in, once."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fastcollate' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastcollate.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})


sys.modules[__name__].__class__ = _Package
