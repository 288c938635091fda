"""Loader batches in optimizer steps: as many on every rank, with the counts of all ranks together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from fastcollate.collate.batch import Batch, PackedBatch
from fastcollate.errors import InputError
from fastcollate.load.loader import BatchLoader
from fastcollate.store.store import TokenStore
from fastcollate.train.options import TrainOptions
from fastcollate.train.ranks import Ranks
from fastcollate.train.step import MicroBatch, empty_batch


class StepData(NamedTuple):
    """What one optimizer step trains on.

    Attributes:
        batches: this rank's, as many as every other rank's; none at the end of an epoch.
        num_trained: trained tokens of all ranks.
        num_useful: useful tokens of all ranks.
        wait_s: seconds that this rank waited for its batches.
        is_stopped: some rank was asked to stop; nothing is trained then.
    """

    batches: list[MicroBatch]
    num_trained: int
    num_useful: int
    wait_s: float
    is_stopped: bool


class Feed:
    """A loader's batches, `accumulate` of them a step.

    Args:
        loader: of this rank.
        accumulate: batches an optimizer step.
        ranks: who trains together.
    """

    def __init__(self, loader: BatchLoader, accumulate: int, ranks: Ranks) -> None:
        self._loader = loader
        self._accumulate = accumulate
        self._ranks = ranks
        self._batches: Iterator[Batch | PackedBatch] | None = None
        self._state: dict[str, Any] = loader.state_dict()

    @property
    def epoch(self) -> int:
        """Whole epochs handed over."""
        return int(self._state["epoch"])

    def steps_an_epoch(self) -> int:
        """Optimizer steps of the current epoch, the same answer on every rank (the first has most batches)."""
        (batches,) = self._ranks.sum([len(self._loader) if self._ranks.is_first else 0])
        return -(-int(batches) // self._accumulate)

    def next_step(self, *, stop: bool = False) -> StepData:
        """The next step's batches.

        Args:
            stop: this rank was asked to stop; then all of them do, before the same step.
        """
        start = time.perf_counter()
        own: list[MicroBatch] = []
        if not stop:
            own = self._take()
        wait_s = time.perf_counter() - start
        counts = self._ranks.sum(
            [
                float(stop),
                sum(batch.num_trained for batch in own),
                sum(batch.num_useful for batch in own),
                *(float(index < len(own)) for index in range(self._accumulate)),
            ]
        )
        if counts[0]:
            return StepData([], 0, 0, wait_s, True)
        self._state = self._loader.state_dict()
        num_batches = sum(ranks_with_one > 0 for ranks_with_one in counts[3:])
        if not num_batches:
            self._batches = None
        own += [empty_batch(self._ranks.device)] * (num_batches - len(own))
        return StepData(own, int(counts[1]), int(counts[2]), wait_s, False)

    def _take(self) -> list[MicroBatch]:
        if self._batches is None:
            self._batches = iter(self._loader)
        taken: list[MicroBatch] = []
        while len(taken) < self._accumulate:
            stats = self._loader.stats
            useful, trained = stats.real_cells, stats.trained_tokens
            batch = next(self._batches, None)
            if batch is None:
                break
            stats = self._loader.stats
            taken.append(as_micro_batch(batch, stats.real_cells - useful, stats.trained_tokens - trained))
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Where the loader was after the last step's batches."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position, also with another number of ranks that share batches of the same rows.

        Raises:
            InputError: the state is of another run.
        """
        self._loader.load_state_dict(state)
        self._state = self._loader.state_dict()
        self._batches = None


def as_micro_batch(batch: Batch | PackedBatch, num_useful: int, num_trained: int) -> MicroBatch:
    """A loader's batch with its counts."""
    if isinstance(batch, PackedBatch):
        return MicroBatch(*batch, num_useful, num_trained)
    return MicroBatch(batch.inputs, batch.targets, None, None, num_useful, num_trained)


def split_rows(num_rows: int, options: TrainOptions) -> dict[str, range]:
    """The rows of `train`, `test` and `validation`: contiguous, in file order, as the chapter splits."""
    train = max(1, int(num_rows * options.train_share))
    test = min(train + int(num_rows * options.test_share), num_rows)
    return {"train": range(train), "test": range(train, test), "validation": range(test, num_rows)}


def make_loader(
    store: TokenStore, options: TrainOptions, ranks: Ranks, rows: range, context: int, *, policy: str | None = None
) -> BatchLoader:
    """This rank's loader over some rows.

    Raises:
        InputError: a batch cannot be divided among the ranks, or a limit is beyond the model's context.
    """
    max_length = options.max_length
    packed = (policy or options.policy) == "packed"
    if max_length is None and (packed or store.max_length > context):
        max_length = context
    if max_length is not None and max_length > context:
        raise InputError(f"--max-length {max_length}: the model's context is {context}; give at most that")
    batch_size = options.batch_size
    if batch_size is None and options.max_tokens is None:
        batch_size = ranks.world_size if packed else 8
    return BatchLoader(
        store,
        policy=policy or options.policy,
        batch_size=_share("--batch-size", batch_size, ranks.world_size),
        max_tokens=_share("--max-tokens", options.max_tokens, ranks.world_size),
        max_length=max_length,
        capacity=options.capacity if packed else None,
        long_rows=options.long_rows if packed else "truncate",
        mask_prompt=options.mask_prompt,
        mode=options.mode,
        seed=options.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
        tail="uneven",  # every row once an epoch, whatever the number of ranks
        rows=rows,
    )


def _share(flag: str, total: int | None, world_size: int) -> int | None:
    if total is not None and total % world_size:
        raise InputError(f"{flag} {total}: is for all {world_size} ranks together; give a multiple of {world_size}")
    return None if total is None else total // world_size


def validation_batches(
    store: TokenStore, options: TrainOptions, ranks: Ranks, rows: range, context: int
) -> Iterator[MicroBatch]:
    """This rank's batches of the validation rows, always the same ones."""
    if not rows:
        return
    policy = "packed" if options.policy == "packed" else "sequential"
    loader = make_loader(store, options, ranks, rows, context, policy=policy)
    useful = trained = 0
    for number, batch in enumerate(loader):
        if options.eval_batches and number >= options.eval_batches:
            return
        yield as_micro_batch(batch, loader.stats.real_cells - useful, loader.stats.trained_tokens - trained)
        useful, trained = loader.stats.real_cells, loader.stats.trained_tokens
