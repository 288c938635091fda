"""How many batches a second this store gives, next to the reference loop and torch's DataLoader, and the verdict."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, pairwise
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from fastcollate.check.counts import TrainedByMask, order_of, packed_batches, plan_of_store, trained_by_mask
from fastcollate.check.imbalance import Imbalance, imbalance_of
from fastcollate.collate import reference
from fastcollate.errors import InputError
from fastcollate.load import BatchLoader
from fastcollate.progress import progress_bar, renamed_switch
from fastcollate.store import TokenStore
from fastcollate.train import GPT2, MaskOptions, OrderOptions

PIPELINE = "fastcollate"
REFERENCE = "reference loop"
WORKERS = (0, 1, 2, 4)
DATA_BOUND = 0.05  # waiting for more than this share of the loop is worth mending
_LEAST_STEPS = 12  # that a loop's waiting is told from
_FILLED_AHEAD = 2 * max(WORKERS) + 1  # batches that torch's workers have ready when the first is handed over
_MANY_WORKERS = "This DataLoader will create"  # more than there are cores
_MOST_OVERHEAD = 4  # times what is counted
_SPIN_S = 0.002  # a sleep that is shorter takes longer than it says


@dataclass(frozen=True, slots=True)
class Verdict:
    """One loop: batches one after the other, a step for each."""

    name: str
    batches_per_s: float  # with nothing else to do, the median of the rounds
    ms_per_batch: float
    wait_share: float | None = None  # of the time of a loop that ran with such steps; `None` without step time
    data_bound: bool | None = None  # whether that is worth mending


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Everything `fastcollate bench` prints."""

    policy: str
    batch_size: int
    step_ms: float | None  # `None` if neither given nor measured
    contenders: list[Verdict]  # the pipeline first
    advice: list[str]
    masks: TrainedByMask
    imbalance: Imbalance


class _Rows(Dataset[Any]):
    """The store as the chapter's data set: lists of token ids, where prompts are masked with the prompt's length.

    By position: rows that hold their end, and with masked prompts all spans of each.
    """

    def __init__(self, store: TokenStore, options: MaskOptions) -> None:
        self._rows, spans = [row.input_ids.tolist() for row in store], [row.spans.tolist() for row in store]
        if options.mode == "positional" and store.end == "append":
            for row, counts in zip(self._rows, spans, strict=True):
                row.append(store.end_token_id)
                counts += [len(row) - sum(counts)] if len(counts) % 2 else [0, len(row) - sum(counts)]
        self._prompts = None
        if options.mask_prompt:
            self._prompts = spans if options.mode == "positional" else [counts[0] for counts in spans]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, list):  # a pack
            return [self[row] for row in index]
        return self._rows[index] if self._prompts is None else (self._prompts[index], self._rows[index])


def bench(
    store: TokenStore,
    options: MaskOptions | None = None,
    order: OrderOptions | None = None,
    *,
    step_ms: float | None = None,
    model: str | None = None,
    rounds: int = 5,
    seconds: float = 0.5,
    ranks: int = 8,
    progress: bool = True,
    silent: bool | None = None,
) -> BenchReport:
    """Measure on the CPU, the contenders in turn, each on the same batches; the first batches are compared before.

    With a step's time each contender then runs beside steps of that length, which sleep: what it waits is measured.

    Args:
        store: the store, whose rows are taken one by one, pairs too.
        options: how rows become targets.
        order: which rows make a batch; packs by default hold what `pack_capacity` says.
        step_ms: a training step's time in milliseconds, for the verdict; or
        model: the bundled GPT-2 (`tiny`, ...) whose training step is measured on this store's batches.
        rounds: turns of each contender, of `seconds` each; the median counts.
        ranks: how many ranks' balance is told, each with batches of that size.
        progress: show progress (`silent` is the old name, the other way round).

    Raises:
        InputError: a value is wrong.

    Example:
        >>> report = bench(store, step_ms=40.0, rounds=1, seconds=0.05, progress=False)
        >>> report.contenders[0].name
        'fastcollate'
    """
    progress = renamed_switch(progress, old="silent", given=silent)
    options, store = (options or MaskOptions()).of(store), store.as_rows()
    if step_ms is not None and not step_ms > 0:
        raise InputError(f"step_ms={step_ms}: give a step's time in milliseconds, above 0")
    if rounds < 1 or not seconds > 0:
        raise InputError(f"rounds={rounds}, seconds={seconds}: give at least one round of more than 0 seconds")
    chosen = order_of(store, options, order)
    sources = _contenders(store, options, chosen)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _MANY_WORKERS, UserWarning)
        _check_equal(sources)
    if step_ms is None and model is not None:
        step_ms = measure_step(model, islice(sources[PIPELINE](), 8))
    speeds: dict[str, list[float]] = {name: [] for name in sources}
    waits: dict[str, float | None] = dict.fromkeys(sources)
    with warnings.catch_warnings(), progress_bar(unit="turns", progress=progress) as bar:
        warnings.filterwarnings("ignore", _MANY_WORKERS, UserWarning)
        task = bar.add_task("bench", total=(rounds + (step_ms is not None)) * len(sources))
        for _ in range(rounds):
            for name, source in sources.items():
                speeds[name].append(_batches_per_second(source, seconds))
                bar.update(task, advance=1)
        for name, source in sources.items() if step_ms is not None else ():
            waits[name] = wait_share(source, (step_ms or 0.0) / 1000, seconds=rounds * seconds)
            bar.update(task, advance=1)
    contenders = [_judge(name, statistics.median(found), waits[name]) for name, found in speeds.items()]
    advice = _advice(contenders, step_ms, chosen["policy"])
    masks = trained_by_mask(store, options)
    imbalance = imbalance_of(store, ranks, max_length=options.max_length, **chosen)
    return BenchReport(chosen["policy"], chosen["batch_size"], step_ms, contenders, advice, masks, imbalance)


def _contenders(
    store: TokenStore, options: MaskOptions, order: dict[str, Any]
) -> dict[str, Callable[[], Iterable[Any]]]:
    plan = plan_of_store(store, {**order, "max_length": options.max_length})
    rows = _Rows(store, options)
    collate = _reference_of(store, options)
    batches: list[list[Any]]
    if plan.capacity is None:
        batches = [batch.tolist() for batch in plan]
    else:  # each batch's packs, each pack's rows
        batches = [
            [packs.rows[start:stop].tolist() for start, stop in pairwise(packs.bounds.tolist())]
            for packs in packed_batches(plan)
        ]

    def by_reference(batch: list[Any]) -> Any:
        if plan.capacity is None:
            return collate(batch, options.max_length)
        limit = min(options.max_length or plan.capacity, plan.capacity)
        packs = [[collate([row], limit) for row in pack] for pack in batch]
        return reference.put_end_to_end(packs, plan.capacity, limit, store.pad_token_id)

    def pipeline() -> Iterable[Any]:
        return BatchLoader(store, **asdict(options), **order)

    def loop() -> Iterator[Any]:
        return (by_reference([rows[row] for row in batch]) for batch in batches)

    sources: dict[str, Callable[[], Iterable[Any]]] = {PIPELINE: pipeline, REFERENCE: loop}
    for workers in WORKERS:
        sources[f"DataLoader, {workers} workers"] = partial(
            DataLoader, rows, batch_sampler=batches, collate_fn=by_reference, num_workers=workers
        )
    return sources


def _reference_of(store: TokenStore, options: MaskOptions) -> Callable[[list[Any], int | None], Any]:
    """The plain Python collate of rows, and of the columns to keep."""
    if options.mode == "positional":

        def collate(batch: list[Any], limit: int | None) -> Any:
            spans, rows = zip(*batch, strict=True) if options.mask_prompt else (None, batch)
            return reference.collate_in_row(rows, spans, store.pad_token_id, max_length=limit)

        return collate
    if store.pad_token_id != store.end_token_id:
        raise InputError(
            f"{store.path}: pads with id {store.pad_token_id} and ends rows with {store.end_token_id}; the chapter's "
            "collate has one id for both, and bench compares equal work: give --mode positional"
        )
    chapter = reference.custom_collate_with_masking_fn if options.mask_prompt else reference.custom_collate_fn
    return lambda batch, limit: chapter(batch, pad_token_id=store.pad_token_id, allowed_max_length=limit)


def _check_equal(sources: dict[str, Callable[[], Iterable[Any]]]) -> None:
    wanted = list(islice(sources[REFERENCE](), 3))
    for name, source in sources.items():
        for got, expected in zip(islice(source(), 3), wanted, strict=True):
            if not all(torch.equal(one, other) for one, other in zip(got, expected, strict=True)):
                raise RuntimeError(f"{name} gives other batches than the reference; run: fastcollate verify")


def _batches_per_second(source: Callable[[], Iterable[Any]], seconds: float) -> float:
    """Batches a second for about `seconds`, over epochs; starting workers and first batches are not counted.

    Of a store so small that starting takes most of the time, fewer.
    """
    count, spent, until = 0, 0.0, time.perf_counter() + _MOST_OVERHEAD * seconds
    while spent < seconds and (not count or time.perf_counter() < until):
        batches = iter(source())
        if next(batches, None) is None:
            continue
        start = time.perf_counter()
        for _ in batches:
            count += 1
            if count % 16 == 0 and spent + time.perf_counter() - start > seconds:
                break
        spent += time.perf_counter() - start
        if count == 0:  # an epoch of a single batch: the batch with everything around it
            start = time.perf_counter()
            next(iter(source()))
            return 1 / max(time.perf_counter() - start, 1e-9)
    return count / spent


def wait_share(source: Callable[[], Iterable[Any]], step_s: float, *, seconds: float) -> float:
    """What a loop waits for its batches, of its time, beside steps that sleep so long.

    For about `seconds`, and at least some steps, over epochs. Not counted: starting workers, first batches, and those
    that were ready then, as far as an epoch has more.

    Example:
        >>> wait_share(lambda: iter([1] * 100), 0.01, seconds=0.05) < 0.05
        True
    """
    waited = spent = 0.0
    steps = 0
    while spent < seconds or steps < _LEAST_STEPS:
        turns = _turns(iter(source()), step_s, seconds - spent)
        if not turns:  # an epoch of a single batch: the batch with everything around it
            start = time.perf_counter()
            next(iter(source()))
            found = time.perf_counter() - start
            return found / (found + step_s)
        counted = turns[min(_FILLED_AHEAD, len(turns) // 2) :]
        waited += sum(wait for wait, _ in counted)
        spent += sum(turn for _, turn in counted)
        steps += len(counted)
    return waited / spent


def _turns(batches: Iterator[Any], step_s: float, seconds: float) -> list[tuple[float, float]]:
    """Of each batch but the first, what was waited for it, and that with the step before; for about so long."""
    turns: list[tuple[float, float]] = []
    next(batches)
    begun, until = time.perf_counter(), float("inf")
    while begun < until:
        _sleep(step_s)
        asked = time.perf_counter()
        if next(batches, None) is None:
            break
        now = time.perf_counter()
        turns.append((now - asked, now - begun))
        begun = now
        if len(turns) == _FILLED_AHEAD + _LEAST_STEPS:
            until = now + seconds
    return turns


def _sleep(seconds: float) -> None:
    if seconds >= _SPIN_S:
        time.sleep(seconds)
        return
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        time.sleep(0)


def measure_step(model: str, batches: Iterable[Any]) -> float:
    """The median time of a training step of a bundled model on this machine's CPU, in milliseconds."""
    network = GPT2.of(model)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
    times = []
    for inputs, targets, *segments in batches:
        start = time.perf_counter()
        optimizer.zero_grad()
        logits = network(inputs, *segments)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:] or times)


def _judge(name: str, speed: float, wait: float | None) -> Verdict:
    return Verdict(name, speed, 1000 / speed, wait, None if wait is None else wait > DATA_BOUND)


def _advice(contenders: list[Verdict], step_ms: float | None, policy: str) -> list[str]:
    if step_ms is None:
        return ["give --step-ms, or --model to measure the bundled GPT-2, for a verdict"]
    own, *others = contenders
    assert own.wait_share is not None
    beside = f"beside steps of {step_ms:.3g} ms the loop waits for data {own.wait_share:.1%} of its time"
    if own.data_bound:
        advice = [f"data-bound: {beside}; raise the batch size, or let several ranks load"]
    else:
        advice = [f"not data-bound: {beside}; look elsewhere"]
    for found in others:
        if found.data_bound and found.wait_share is not None and found.wait_share > own.wait_share:
            faster = (1 - own.wait_share) / (1 - found.wait_share)
            advice.append(
                f"{found.name} waits {found.wait_share:.0%} of the loop: with fastcollate that loop is {faster:.2f} "
                "times as fast"
            )
    if policy not in ("bucketed", "packed"):
        advice.append("bucketed batches hold less padding, which shortens the step itself: see inspect --report")
    return advice


def print_report(report: BenchReport) -> None:
    """A line a contender, then the advice."""
    table = Table(
        title=f"{report.policy}, {report.batch_size} {'packs' if report.policy == 'packed' else 'rows'} a batch",
        title_justify="left",
    )
    table.add_column("")
    for name in ("batches/s", "ms a batch", "waiting", "data-bound"):
        table.add_column(name, justify="right")
    for found in report.contenders:
        wait = "" if found.wait_share is None else f"{found.wait_share:.1%}"
        bound = "" if found.data_bound is None else ("yes" if found.data_bound else "no")
        table.add_row(found.name, f"{found.batches_per_s:,.0f}", f"{found.ms_per_batch:.3f}", wait, bound)
    console = Console()
    console.print(table)
    console.print(report.masks.sentence, highlight=False)
    console.print(report.imbalance.sentence, highlight=False)
    if report.step_ms is not None:
        console.print(f"step: {report.step_ms:.3f} ms")
    for sentence in report.advice:
        console.print(sentence, highlight=False)
