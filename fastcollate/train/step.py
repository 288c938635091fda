"""Batches into optimizer steps: as many on every rank, losses normalized by the trained tokens of the whole step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastcollate.collate import AnyBatch
from fastcollate.errors import InputError
from fastcollate.jit import clock
from fastcollate.load import BatchLoader
from fastcollate.plan import MixedStore
from fastcollate.store import TokenStore
from fastcollate.train.cuda.shapes import fill_packs as fill_packs
from fastcollate.train.cuda.shapes import round_up_width as round_up_width
from fastcollate.train.loss import IGNORE_INDEX, cell_losses, scaled_loss, trained_cells
from fastcollate.train.model import GPT2
from fastcollate.train.options import TrainOptions
from fastcollate.train.preference.dpo import DPOLoss, Judged
from fastcollate.train.preference.reference import Reference
from fastcollate.train.ranks import Ranks

Int64Array = npt.NDArray[np.int64]


class MicroBatch(NamedTuple):
    """A batch on its device, with its counts; the two in the middle are there in packed batches only."""

    inputs: Tensor  # int64 (rows, width)
    targets: Tensor  # int64 (rows, width), -100 where nothing is trained
    position_ids: Tensor | None  # int64 (packs, capacity)
    cu_seqlens: Tensor | None  # int32 bounds over the flattened batch
    num_useful: int  # input cells that hold a row's token
    num_trained: int  # targets that are not ignored
    sources: Tensor | None = None  # int64, of a mix: where each row, or segment, is from
    judged: Judged | None = None  # of pairs, which `num_trained` then counts


def empty_batch(device: torch.device) -> MicroBatch:
    """One cell without target: what a rank computes when the others have one batch more."""
    inputs = torch.zeros((1, 1), dtype=torch.int64, device=device)
    return MicroBatch(inputs, torch.full_like(inputs, IGNORE_INDEX), None, None, 0, 0)


def learning_rate_at(step: int, options: TrainOptions, total_steps: int) -> float:
    """The learning rate of step 1, 2, ...: linear warm-up, then constant, or a cosine down to a tenth."""
    peak = options.peak_learning_rate
    if step <= options.warmup:
        return peak * step / options.warmup
    if options.schedule == "constant":
        return peak
    done = min(1.0, (step - options.warmup) / max(1, total_steps - options.warmup))
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def sources_of_cells(batch: MicroBatch, cells: Tensor) -> Tensor | None:
    """Where cells, places in the flattened batch, are from."""
    if batch.sources is None:
        return None
    if batch.cu_seqlens is None:
        return batch.sources[cells // batch.targets.shape[1]]
    return batch.sources[torch.searchsorted(batch.cu_seqlens, cells.to(batch.cu_seqlens.dtype), right=True) - 1]


class _Loss(nn.Module):
    """What ranks share: from a batch to its part of the step's loss."""

    def __init__(self, model: GPT2, options: TrainOptions) -> None:
        super().__init__()
        self.model = model
        mode = "reduce-overhead" if options.cuda_graphs else None
        self.sums: Tensor | None = None  # by source: losses, and cells
        self._hidden: Any = torch.compile(model.hidden, mode=mode) if options.compile else model.hidden

    def forward(self, batch: MicroBatch, scale: float) -> Tensor:
        hidden = self._hidden(batch.inputs, batch.position_ids, batch.cu_seqlens)
        read, labels, groups = hidden.flatten(0, 1), batch.targets.flatten(), None
        if batch.num_trained < len(labels) or batch.sources is not None:
            cells, labels = trained_cells(labels, num_trained=batch.num_trained)
            read, groups = read.index_select(0, cells), sources_of_cells(batch, cells)
        return scaled_loss(read, self.model.head_weight, labels, scale, groups=groups, sums=self.sums)


class Stepper:
    """Model and optimizer, a step at a time."""

    def __init__(self, model: GPT2, options: TrainOptions, ranks: Ranks, num_sources: int = 0) -> None:
        self.model = model
        self.num_sources = num_sources
        self.options = options.with_precision(ranks.device.type)
        self.ranks = ranks
        self._own_loss = DPOLoss(model, options) if options.objective == "dpo" else _Loss(model, options)
        self._loss = ranks.share(self._own_loss)
        self.optimizer = make_optimizer(model, options.weight_decay)
        self._most_packs = self._most_bounds = 0  # of the packed batches so far

    def step(self, batches: Sequence[MicroBatch], num_trained: int, learning_rate: float) -> Tensor:
        """Train on micro-batches: as many on every rank, `empty_batch` where it has none.

        `num_trained` counts the trained tokens in all batches of all ranks, not 0. Returned is this rank's part of the
        mean loss per trained token, on the device; the ranks' parts add up to it.
        """
        assert num_trained > 0
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        scale = self.ranks.world_size / num_trained  # gradients are averaged over ranks, and we want their sum
        total = torch.zeros((), device=batches[0].inputs.device)
        if self.num_sources:
            self._own_loss.sums = torch.zeros((2, self.num_sources), dtype=torch.float64, device=total.device)
        for index, batch in enumerate(batches):
            with self._no_sync(index < len(batches) - 1):
                with self.autocast():
                    loss = self._loss(self._shaped(batch), scale)
                loss.backward()
            if self.options.cuda_graphs and index == 0 < len(batches) - 1:
                self._keep_gradients()
            total += loss.detach()
        if self.options.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total / self.ranks.world_size

    def sums_by_source(self) -> Tensor | None:
        """Of the last step's own batches, float64 `(2, num_sources)`: the sum of losses, and the trained tokens."""
        return self._own_loss.sums

    @torch.no_grad()
    def sum_of_losses(self, batch: MicroBatch) -> float:
        """The sum of the batch's losses, for evaluation."""
        self.model.eval()
        if batch.judged is not None:
            self._own_loss.sums = None
            with self.autocast():
                return float(self._own_loss(batch, 1.0))
        with self.autocast():
            hidden = self.model.hidden(batch.inputs, batch.position_ids, batch.cu_seqlens)
            cells, labels = trained_cells(batch.targets, num_trained=batch.num_trained)
            return float(cell_losses(hidden.flatten(0, 1)[cells], self.model.head_weight, labels).double().sum())

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the run."""
        if self.options.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16)

    def _shaped(self, batch: MicroBatch) -> Any:
        if not self.options.compile:
            return batch
        if batch.cu_seqlens is None:
            return round_up_width(batch, self.options.width_multiple)
        self._most_packs = max(self._most_packs, len(batch.inputs))
        if self.options.cuda_graphs:  # a graph is recorded for each size; without, empty segments cost time
            bounds = len(batch.cu_seqlens) + self._most_packs - len(batch.inputs)
            self._most_bounds = max(self._most_bounds, 1 << (bounds - 1).bit_length())
        batch = fill_packs(batch, self._most_packs, self._most_bounds)
        torch._dynamo.maybe_mark_dynamic(batch.cu_seqlens, 0)
        return batch

    def _keep_gradients(self) -> None:
        """Out of the memory of a recorded graph, which the next micro-batch's would write over."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()

    def _no_sync(self, more_to_come: bool) -> contextlib.AbstractContextManager[Any]:
        if more_to_come and isinstance(self._loss, nn.parallel.DistributedDataParallel):
            return self._loss.no_sync()
        return contextlib.nullcontext()


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, fused; matrices decay, biases and norms do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


class Offer(NamedTuple):
    """What one rank has for the next optimizer step."""

    num_batches: int  # micro-batches, at most `accumulate`
    num_trained: int  # trained tokens in them
    num_useful: int  # useful tokens in them
    epoch: int  # whole epochs that its loader has handed over
    stop: bool  # whether somebody asked this rank to stop


def decide(offers: Sequence[Offer]) -> Offer:
    """What every rank does next; a pure function of what all ranks know, so that none gathers while others reduce.

    A rank whose loader has ended an epoch (its last batches may be fewer) waits for the others: an epoch is over when
    all have ended it. Given what each rank offers, in any order, the step of all together is: micro-batches that each
    rank runs (0: the epoch is over), tokens of all ranks, epochs that all have ended, whether to stop before this step.

    Example:
        >>> decide([Offer(1, 30, 40, epoch=0, stop=False), Offer(0, 0, 0, epoch=1, stop=False)])
        Offer(num_batches=1, num_trained=30, num_useful=40, epoch=0, stop=False)
    """
    batches, trained, useful, epochs, stops = zip(*offers, strict=True)
    return Offer(max(batches), sum(trained), sum(useful), min(epochs), any(stops))


class StepData(NamedTuple):
    """What one optimizer step trains on."""

    batches: list[MicroBatch]  # this rank's, as many as every other rank's; none at the end of an epoch
    total: Offer  # what was decided for all ranks
    wait_s: float  # seconds that this rank waited for its batches, compiling not counted


class Feed:
    """A loader's batches, `accumulate` of them a step, as many on all ranks."""

    def __init__(self, loader: BatchLoader, accumulate: int, ranks: Ranks, reference: Reference | None = None) -> None:
        self._loader, self._reference = loader, reference
        self._accumulate = accumulate
        self._ranks = ranks
        self._batches: Iterator[AnyBatch] | None = None
        self._state: dict[str, Any] = loader.state_dict()
        self.epoch = loader.epoch  # whole epochs that all ranks have handed over

    def steps_an_epoch(self) -> int:
        """Optimizer steps of the current epoch, the same answer on every rank (the first has most batches)."""
        (batches,) = self._ranks.sum([len(self._loader) if self._ranks.is_first else 0])
        return -(-int(batches) // self._accumulate)

    def next_step(self, *, stop: bool = False) -> StepData:
        """The next step's batches; with `stop`, where this rank was asked to, all ranks stop before the same step."""
        start = clock()
        own = [] if stop else self._take()
        wait_s = max(0.0, clock() - start)
        found = self._ranks.exchange(self._offer(own, stop))
        offers = [Offer(int(b), int(t), int(u), int(e), bool(asked)) for b, t, u, e, asked in found]
        return self._accept(own, decide(offers), wait_s)

    def _offer(self, own: list[MicroBatch], stop: bool) -> Offer:
        trained, useful = sum(batch.num_trained for batch in own), sum(batch.num_useful for batch in own)
        return Offer(len(own), trained, useful, self._loader.epoch, stop)

    def _accept(self, own: list[MicroBatch], step: Offer, wait_s: float) -> StepData:
        if step.stop:
            return StepData([], step, wait_s)
        self._state, self.epoch = self._loader.state_dict(), step.epoch
        if not step.num_batches:
            self._batches = None
        return StepData(own + [empty_batch(self._ranks.device)] * (step.num_batches - len(own)), step, wait_s)

    def _take(self) -> list[MicroBatch]:
        if self._batches is None:
            self._batches = iter(self._loader)
        asked = () if self._reference is None else (self._reference,)
        return [as_micro_batch(batch, *asked) for batch in islice(self._batches, self._accumulate)]

    def state_dict(self) -> dict[str, Any]:
        """Where the loader was after the last step's batches."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position, also with another number of ranks that share batches of the same rows."""
        self._loader.load_state_dict(state)
        self._state = self._loader.state_dict()
        self.epoch = self._loader.epoch
        self._batches = None


def as_micro_batch(batch: Any, reference: Reference | None = None) -> MicroBatch:
    """A loader's batch with its counts."""
    counts = batch.counts
    assert counts is not None  # it is a loader's
    if reference is not None:
        judged = reference.judged(batch)
        place = batch.position_ids, batch.cu_seqlens
        num_pairs = judged.reference.shape[1]
        return MicroBatch(batch.inputs, batch.targets, *place, counts.real_cells, num_pairs, judged=judged)
    inputs, targets, *packed = batch
    position_ids, cu_seqlens = packed or (None, None)
    sources = None if batch.sources is None else batch.sources.to(inputs.device, non_blocking=True)
    return MicroBatch(inputs, targets, position_ids, cu_seqlens, counts.real_cells, counts.trained_tokens, sources)


def split_rows(num_rows: int, options: TrainOptions) -> dict[str, range]:
    """The rows of `train`, `test` and `validation`: contiguous, in file order, as the chapter splits; pairs whole."""
    together = 2 if options.objective == "dpo" else 1
    num_parts = num_rows // together
    train = max(1, int(num_parts * options.train_share))
    test = min(train + int(num_parts * (options.test_share or 0.0)), num_parts)
    bounds = {"train": (0, train), "test": (train, test), "validation": (test, num_parts)}
    return {name: range(together * start, together * stop) for name, (start, stop) in bounds.items()}


def split_mix(mix: MixedStore, options: TrainOptions) -> tuple[MixedStore, Int64Array]:
    """The mix of each source's training rows, and the rows of all validation splits; each source is split alike."""
    if sum(map(len, mix.rows.values())) < len(mix):
        raise InputError(
            "the mix draws from a part of its stores' rows, which training splits by itself: leave rows out"
        )
    parts = [split_rows(len(rows), options) for rows in mix.rows.values()]
    training = {name: rows[part["train"]] for (name, rows), part in zip(mix.rows.items(), parts, strict=True)}
    held = [
        start + rows[part["validation"]]
        for start, rows, part in zip(mix.starts.tolist(), mix.rows.values(), parts, strict=False)
    ]
    return mix.with_rows(training), np.concatenate(held)


def make_loader(
    store: TokenStore | MixedStore,
    options: TrainOptions,
    ranks: Ranks,
    rows: range | Int64Array | None,
    context: int,
    *,
    policy: str | None = None,
    balance: bool | None = None,
    width: int = 768,
) -> BatchLoader:
    """This rank's loader over some rows; refuses what ranks cannot divide, or the model's context cannot hold.

    `balance` is for packs, whose cost the model's width decides: then an optimizer step's packs cost alike.
    """
    max_length = options.max_length
    packed = (policy or options.policy) == "packed"
    if max_length is None and (packed or store.max_length > context):
        max_length = context
    if max_length is not None and max_length > context:
        raise InputError(f"--max-length {max_length}: the model's context is {context}; give at most that")
    nodes = options.nodes if policy is None else 1
    batch_size, capacity = options.batch_size, options.capacity
    if options.objective == "dpo" and capacity is None and max_length is not None:
        capacity = 2 * max_length  # any two rows fit
    if batch_size is None and options.max_tokens is None:
        batch_size = ranks.world_size if packed else 8
    return BatchLoader(
        store,
        policy=policy or options.policy,
        batch_size=_share("--batch-size", batch_size, ranks.world_size),
        max_tokens=_share("--max-tokens", options.max_tokens, ranks.world_size),
        max_length=max_length,
        capacity=capacity if packed else None,
        long_rows=options.long_rows if packed else "truncate",
        packing=options.packing if packed else "best_fit",
        mask_boundaries=options.mask_boundaries or not packed,
        mask_prompt=options.mask_prompt or options.objective == "dpo",
        mode=options.mode,
        seed=options.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
        order=options.order if policy is None else "rows",
        nodes=nodes,
        # every row once an epoch, whatever the number of ranks
        tail="uneven" if nodes == 1 else "repeat",
        balance=balance if packed else None,
        accumulation=options.accumulate if packed else 1,
        cost=6 * width,
        rows=rows,
    )


def _share(flag: str, total: int | None, world_size: int) -> int | None:
    if total is not None and total % world_size:
        raise InputError(f"{flag} {total}: is for all {world_size} ranks together; give a multiple of {world_size}")
    return None if total is None else total // world_size


def validation_batches(
    store: TokenStore | MixedStore, options: TrainOptions, ranks: Ranks, rows: range | Int64Array, context: int,
    reference: Reference | None = None,
) -> Iterator[MicroBatch]:  # fmt: skip
    """This rank's batches of the validation rows, always the same ones."""
    if len(rows):
        policy = "packed" if options.policy == "packed" else "sequential"
        loader = make_loader(store, options, ranks, rows, context, policy=policy, balance=False)
        yield from (as_micro_batch(batch, reference) for batch in islice(loader, options.eval_batches or None))
