"""The batch order for `Trainer` and TRL: a mixin that gives them the batches of a plan."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import DataLoader

from fastcollate.errors import InputError, import_extra
from fastcollate.integrations import checks
from fastcollate.integrations.flow import FlowingSampler
from fastcollate.integrations.hf.collator import DataCollator
from fastcollate.integrations.hf_datasets import lengths_of
from fastcollate.integrations.pytorch import StoreDataset
from fastcollate.load import trained_rows
from fastcollate.plan import MixedStore

Int64Array = np.ndarray[Any, np.dtype[np.int64]]


def _rows_with_labels(dataset: StoreDataset) -> Int64Array | None:
    """The rows that have a label, `None` where all have: a batch without one has the loss NaN in a `Trainer`."""
    limit, options, lengths = dataset.options["max_length"], dataset.options, lengths_of(dataset)
    if limit is None and not options["mask_prompt"] and int(lengths.min(initial=2)) > 1:
        return None
    labels = None if limit is None else limit - 1  # the first column's is ignored
    rows = np.arange(0) if labels == 0 else trained_rows(dataset.collator(labels), np.arange(len(dataset)))
    if not len(rows):
        raise InputError(
            f"no row of {dataset.store.path} has a label: every prompt fills max_length={limit}, or nothing is trained"
        )
    rows = rows[lengths[rows] > 1]  # an end alone is the first column, and no label
    return None if len(rows) == len(dataset) else rows


def _rows_per_rank(args: Any, batch_size: int) -> int:
    """Rows of a batch on one rank; with `split_batches` the training arguments' batch size is that of all of them."""
    if not getattr(getattr(args, "accelerator_config", None), "split_batches", False):
        return batch_size
    if batch_size % args.world_size:
        raise InputError(
            f"split_batches=True: the batch size of {batch_size} rows does not divide among {args.world_size} ranks"
        )
    return batch_size // int(args.world_size)


class BucketedTrainerMixin:
    """Gives a `Trainer` (or `SFTTrainer`) batches of similar length: `class Mine(BucketedTrainerMixin, Trainer): ...`.

    Works over a `StoreDataset` (with `DataCollator`) and over a tokenized `datasets.Dataset` (with any collator). The
    batch size, the seed (`data_seed`, else `seed`), the workers and the ranks are the training arguments'; an
    interrupted run continues with the batches that are left. Rows of a `StoreDataset` without any label are left out,
    for the loss of a batch of such rows is NaN. Over a `MixedStore` epochs draw its rows by weight, and a
    `LossBySource` among the callbacks logs the loss of each source.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
        >>> from fastcollate import StoreDataset
        >>> from fastcollate.integrations.huggingface import BucketedTrainerMixin, DataCollator
        >>> class BucketedTrainer(BucketedTrainerMixin, Trainer):
        ...     batching = {"max_tokens": 2048, "batch_size": None}  # leave it out: the training arguments' batch size
        >>> trainer = BucketedTrainer(
        ...     GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=1)),
        ...     TrainingArguments("runs", report_to=[], use_cpu=True),
        ...     train_dataset=StoreDataset("store", mask_prompt=True),
        ...     data_collator=DataCollator(),
        ... )
        >>> batch = next(iter(trainer.get_train_dataloader()))  # `trainer.train()` takes these
        >>> batch["input_ids"].numel() <= 2048
        True
    """

    batching: ClassVar[Mapping[str, Any]] = {}
    """Options of `BucketBatchSampler` to set or override, such as `{"max_tokens": 8192, "batch_size": None}`."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training batches, planned by `BucketBatchSampler`, as many in each epoch (see `FlowingSampler`).

        Raises:
            InputError: the data set is not tokenized, a `StoreDataset` meets another collator or a model of another
                vocabulary, or the training arguments ask for an order of their own.
        """
        trainer: Any = self
        args, dataset, collator = trainer.args, trainer.train_dataset, trainer.data_collator
        _refuse_another_order(args)
        source: Any = dataset
        if isinstance(dataset, StoreDataset):
            _check_of_store(dataset, collator, trainer.model)
            source, collator = self._of_store(dataset, collator)
        elif not isinstance(collator, DataCollator):  # which reads masks that no model takes
            dataset = trainer._remove_unused_columns(dataset, description="training")
            source = dataset
        sampler = FlowingSampler(
            source if isinstance(source, MixedStore) else lengths_of(dataset),
            **{
                "rows": source if isinstance(source, np.ndarray) else None,
                "batch_size": _rows_per_rank(args, trainer._train_batch_size),
                "drop_last": args.dataloader_drop_last,
                "seed": args.seed if args.data_seed is None else args.data_seed,
                "rank": args.process_index,
                "world_size": args.world_size,
                **self.batching,
            },
        )
        shard = import_extra("accelerate.data_loader", "hf").DataLoaderShard
        loader: DataLoader[Any] = shard(
            dataset,
            device=trainer.accelerator.device,
            batch_sampler=sampler,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return loader

    def _of_store(self, dataset: StoreDataset, collator: DataCollator) -> tuple[Any, DataCollator]:
        """What the sampler orders: a mix, or the rows that have a label, `None` for all; and the collator."""
        rows = None if "rows" in self.batching else _rows_with_labels(dataset)
        mix = dataset.store
        if not isinstance(mix, MixedStore):
            return rows, collator
        callbacks: list[Any] = self._callbacks_by_source()
        if callbacks:
            collator = copy.copy(collator)
            collator.sources = True
        for callback in callbacks:
            callback.connect(mix.names, self.accelerator.device)  # type: ignore[attr-defined]
        return (rows if "rows" in self.batching else mix.for_labels(rows)), collator

    def _callbacks_by_source(self) -> list[Any]:
        """The trainer's `LossBySource`, put before those that report what it adds."""
        from fastcollate.integrations.hf.by_source import LossBySource

        handler = self.callback_handler  # type: ignore[attr-defined]
        handler.callbacks.sort(key=lambda callback: not isinstance(callback, LossBySource))
        return [callback for callback in handler.callbacks if isinstance(callback, LossBySource)]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        """The trainer's own; of a batch that says where its rows are from, its `LossBySource` is told the losses."""
        sources = inputs.pop("sources", None)
        own: Any = super().compute_loss  # type: ignore[misc]
        if sources is None:
            return own(model, inputs, return_outputs=return_outputs, **more)
        labels = inputs["labels"]
        loss, outputs = own(model, inputs, return_outputs=True, **more)
        for callback in self._callbacks_by_source():
            callback.note(labels, sources, outputs)
        return (loss, outputs) if return_outputs else loss


def _refuse_another_order(args: Any) -> None:
    strategy = getattr(args, "train_sampling_strategy", "random")
    if strategy not in ("random", None) or getattr(args, "group_by_length", False):
        raise InputError(
            f"train_sampling_strategy={strategy!r} (or group_by_length) and BucketedTrainerMixin both decide the "
            "order: leave it out of the training arguments, or train with the plain Trainer"
        )


def _check_of_store(dataset: StoreDataset, collator: Any, model: Any) -> None:
    if not isinstance(collator, DataCollator):
        raise InputError(
            f"data_collator is a {type(collator).__name__}, which cannot read rows of a StoreDataset: "
            "give data_collator=fastcollate.integrations.huggingface.DataCollator()"
        )
    checks.check_model(dataset.store, model)
