"""Lightning: a data module over stores, which a `Trainer` stops and resumes to the batch by its own checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from fastcollate.collate import AnyBatch
from fastcollate.errors import InputError, import_extra
from fastcollate.integrations.checks import check_model
from fastcollate.integrations.flow import FlowingSampler
from fastcollate.integrations.pytorch import BucketBatchSampler, StoreDataset
from fastcollate.load import LoaderKeywords, collate_keywords, order_keywords
from fastcollate.plan import MixedStore, OrderKeywords, split_rows
from fastcollate.store import TokenStore

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule
else:
    LightningDataModule = import_extra("lightning.pytorch", "lightning").LightningDataModule

Source = TokenStore | MixedStore | str | os.PathLike[str]


class StoreBatches:
    """Batches of a data set in the order of a sampler; Lightning saves and restores its position.

    Evaluation's are in the order of the first epoch each time.

    A batch is one kernel call on the loop's own thread, tens of microseconds.

    Example:
        >>> from fastcollate import BucketBatchSampler, StoreDataset
        >>> from fastcollate.integrations.lightning import StoreBatches
        >>> dataset = StoreDataset("store")
        >>> batches = StoreBatches(dataset, BucketBatchSampler(dataset, batch_size=8))
        >>> len(batches), next(iter(batches)).inputs.shape
        (75, torch.Size([8, 57]))
    """

    def __init__(self, dataset: StoreDataset, sampler: BucketBatchSampler, *, evaluates: bool = False) -> None:
        self.dataset = dataset
        self.batch_sampler = sampler  # Lightning looks here for what to tell the epoch
        self._evaluates = evaluates

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[AnyBatch]:
        if self._evaluates:
            self.batch_sampler.set_position(0, 0)
        return (self.dataset.collate(self.dataset.__getitems__(rows)) for rows in self.batch_sampler)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is."""
        return self.batch_sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there."""
        self.batch_sampler.load_state_dict(state)


class DataModule(LightningDataModule):  # type: ignore[misc]  # an optional package, Any where it is not installed
    """Training, validation and test batches of stores: `Trainer().fit(module, datamodule=DataModule(store, ...))`.

    A step gets `Batch(inputs, targets)`, targets shifted by one, or packs (`PackedBatch`, `ContextParallelBatch`).
    Ranks, epochs and the position within an epoch are handled here (by a `FlowingSampler`): leave
    `use_distributed_sampler` and `reload_dataloaders_every_n_epochs` alone.

    Args:
        train: a store, its directory, or a `MixedStore`.
        val: a store of its own, or `None`.
        test: a store of its own, or `None`.
        split: shares of `train`, such as `{"train": 0.9, "val": 0.1}`, instead of stores of their own.
        split_key: see `split_rows`.
        shuffle: not an option: `policy` says it.
        options: how rows make batches, see `PlanOptions`, and how these are collated, see `Collator`. Validation and
            test are bucketed, whatever the policy, and every row counts.

    Raises:
        InputError: there is no such store, or an option is wrong.

    Example:
        >>> from fastcollate.integrations.lightning import DataModule
        >>> data = DataModule("store", split={"train": 0.9, "val": 0.1}, batch_size=8, mask_prompt=True)
        >>> sorted(data.datasets)
        ['train', 'val']

        `lightning.pytorch.Trainer(max_epochs=1).fit(model, datamodule=data)` trains on it.
    """

    def __init__(
        self,
        train: Source,
        val: Source | None = None,
        test: Source | None = None,
        *,
        split: Mapping[str, float] | None = None,
        split_key: Any = "row",
        shuffle: bool | None = None,
        **options: Unpack[LoaderKeywords],
    ) -> None:
        super().__init__()
        stores = {"train": train, "val": val, "test": test}
        self.datasets = {
            name: StoreDataset(store, **collate_keywords(options))
            for name, store in stores.items()
            if store is not None
        }
        self._rows: dict[str, Any] = {}
        if split is not None:
            self._split(split, split_key, options.get("seed", 0))
        self._options = order_keywords(options)
        BucketBatchSampler(
            self.datasets["train"], rows=self._rows.get("train"), shuffle=shuffle, rank=0, world_size=1, **self._options
        )

    def _split(self, split: Mapping[str, float], key: Any, seed: int) -> None:
        dataset = self.datasets["train"]
        if "train" not in split or set(split) - {"train", "val", "test"}:
            raise InputError(f"split={dict(split)}: name its parts train, val and test; train is needed")
        twice = sorted((set(split) & set(self.datasets)) - {"train"})
        if twice or isinstance(dataset.store, MixedStore):
            raise InputError(
                f"split cannot be combined with a store of its own for {twice}"
                if twice
                else "split and a MixedStore: split each store with split_rows, and give MixedStore(rows=...) a part"
            )
        self._rows = dict(split_rows(dataset.store, split, key=key, seed=seed))
        self.datasets.update(dict.fromkeys(split, dataset))

    def setup(self, stage: str) -> None:
        """Compare the stores with the model.

        Raises:
            InputError: the model was made for another vocabulary.
        """
        module = self.trainer.lightning_module if self.trainer is not None else None
        if module is not None:
            for dataset in self.datasets.values():
                check_model(dataset.store, module)

    def _batches(self, name: str, options: OrderKeywords, *, evaluates: bool = False) -> StoreBatches:
        rank, world_size = self._share(options.get("cp_size") or 1)
        sampler = (BucketBatchSampler if evaluates else FlowingSampler)(
            self.datasets[name],
            rows=self._rows.get(name),
            rank=rank,
            world_size=world_size,
            **options,
        )
        return StoreBatches(self.datasets[name], sampler, evaluates=evaluates)

    def _share(self, cp_size: int) -> tuple[int, int]:
        """This process's rank among those that load data of their own, and their number, as the strategy says."""
        trainer = self.trainer
        assert trainer is not None
        told = trainer.distributed_sampler_kwargs or {"rank": trainer.global_rank, "num_replicas": trainer.world_size}
        if cp_size * told["num_replicas"] > trainer.world_size > 1:
            raise InputError(
                f"cp_size={cp_size}: {type(trainer.strategy).__name__} gives {told['num_replicas']} of "
                f"{trainer.world_size} ranks data of their own, and ranks that share rows want the same batches: use a "
                "strategy whose mesh has data-parallel ranks, or a BatchLoader with rank and world_size"
            )
        return told["rank"], told["num_replicas"]

    def train_dataloader(self) -> StoreBatches:
        """Training batches, from the current epoch on."""
        batches = self._batches("train", self._options)
        assert self.trainer is not None
        batches.batch_sampler.set_epoch(self.trainer.current_epoch)
        return batches

    def val_dataloader(self) -> StoreBatches | list[Any]:
        """Validation batches, the same in each epoch; none without a store or a share for them."""
        return self._evaluation("val")

    def test_dataloader(self) -> StoreBatches | list[Any]:
        """Test batches."""
        return self._evaluation("test")

    def _evaluation(self, name: str) -> StoreBatches | list[Any]:
        if name not in self.datasets:
            return []
        kept = ("batch_size", "max_tokens", "seed", "window", "max_length", "pad_to_multiple_of")
        options: Any = {name: value for name, value in self._options.items() if name in kept}
        return self._batches(name, options, evaluates=True)
