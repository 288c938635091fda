"""The training loop: batches in, a trained GPT-2, its metrics and its checkpoints out.

Under `torchrun -m fastcollate train` each rank runs this.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcollate.errors import InputError
from fastcollate.progress import progress_bar
from fastcollate.store.store import TokenStore
from fastcollate.text.tokenizer import load_tokenizer
from fastcollate.train.answers import generate, prompt_and_answer
from fastcollate.train.files import (
    BEST,
    CHECKPOINT,
    Checkpoint,
    RunLog,
    find_checkpoint,
    plot_losses,
    random_states,
    save_checkpoint,
    set_random_states,
)
from fastcollate.train.model import GPT2, config_of, load_published, num_compilations
from fastcollate.train.options import TrainOptions
from fastcollate.train.ranks import Ranks, join_ranks, recycle_freed_memory
from fastcollate.train.step import (
    Feed,
    StepData,
    Stepper,
    learning_rate_at,
    make_loader,
    split_rows,
    validation_batches,
)

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(slots=True)
class TrainReport:
    """What a run has done, resumed parts included unless said otherwise.

    Attributes:
        steps: optimizer steps.
        skipped_steps: steps without a trained token.
        epochs: whole passes over the training rows.
        tokens_seen: useful input tokens, padding not counted.
        first_loss: the loss of this process's first step.
        last_loss: the mean loss of the last ten steps at most.
        validation_loss: of the last evaluation, `None` without one.
        seconds: time of this process's steps, without evaluation and checkpoints.
        tokens_per_second: useful tokens a second of that time.
        wait_share: the part of that time spent waiting for data.
        compilations: graphs that `--compile` compiled.
        ended: `finished`, `early stop` or `interrupted`.
        out: the run's directory.
        plot: the loss plot, `None` without matplotlib.
    """

    steps: int = 0
    skipped_steps: int = 0
    epochs: int = 0
    tokens_seen: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    validation_loss: float | None = None
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    wait_share: float = 0.0
    compilations: int = 0
    ended: str = "finished"
    out: str = ""
    plot: str | None = None


@dataclass(slots=True)
class _Counters:
    """What a checkpoint keeps besides states."""

    step: int = 0
    tokens_seen: int = 0
    skipped_steps: int = 0
    total_steps: int = 0
    best_loss: float | None = None
    evaluations_since_best: int = 0
    last_evaluation: int = 0
    validation_loss: float | None = None


@dataclass(slots=True)
class _Pending:
    """A step whose loss may still be under way on a GPU; it is read when the next step has been started."""

    loss: Tensor | None
    values: dict[str, float | int | None] = field(default_factory=dict)


class _Run:
    """One process's part of a run."""

    def __init__(self, store: TokenStore, options: TrainOptions, ranks: Ranks) -> None:
        self.store, self.options, self.ranks = store, options, ranks
        saved = find_checkpoint(options)
        self.splits = split_rows(len(store), options)
        torch.manual_seed(options.seed)
        model = _make_model(store, options, saved)
        self.stepper = Stepper(model.to(ranks.device), options, ranks)
        torch.manual_seed(options.seed + ranks.rank)  # the same weights, each rank its own dropout
        loader = make_loader(store, options, ranks, self.splits["train"], model.config.context_length)
        self.feed = Feed(loader, options.accumulate, ranks)
        self.counters = _Counters(total_steps=self._plan_steps())
        if saved is not None:
            self._continue_from(saved)
        options.out.mkdir(parents=True, exist_ok=True)
        self.log = (
            RunLog(options.out, first_step=self.counters.step, tensorboard=options.tensorboard)
            if ranks.is_first
            else None
        )
        self.report = TrainReport(out=str(options.out))
        self.pending: _Pending | None = None
        self.recent: list[float] = []
        self.useful_here = 0
        self.wait_s = 0.0
        self.steps_in_epoch = 0

    def _plan_steps(self) -> int:
        """Optimizer steps of the whole run, for the learning rate and the progress bar."""
        options = self.options
        limits = [options.max_steps] if options.max_steps is not None else []
        if options.epochs is not None or options.max_steps is None:
            limits.append((options.epochs or 1) * self.feed.steps_an_epoch())
        return min(limits)

    def _continue_from(self, saved: Checkpoint) -> None:
        self.options.check_against(dict(saved.options))
        if saved.data["fingerprint"] != self.store.fingerprint:
            raise InputError(
                f"{self.options.out}: the run was started on other data (store {saved.data['store']}); "
                "resume it with the same sources, or choose another --out"
            )
        self.stepper.optimizer.load_state_dict(dict(saved.optimizer))
        self.feed.load_state_dict(dict(saved.loader))
        self.counters = _Counters(**{**saved.progress, "total_steps": self.counters.total_steps})
        if len(saved.random) == self.ranks.world_size:
            set_random_states(saved.random[self.ranks.rank], self.ranks.device)
        else:
            torch.manual_seed(self.options.seed + self.counters.step * 1_000_003 + self.ranks.rank)

    def is_done(self) -> bool:
        """Whether the run has all its steps or epochs, or stops early."""
        options, counters = self.options, self.counters
        if options.max_steps is not None and counters.step >= options.max_steps:
            return True
        epochs = options.epochs if options.epochs is not None or options.max_steps is not None else 1
        if epochs is not None and self.feed.epoch >= epochs:
            return True
        if options.patience is not None and counters.evaluations_since_best >= options.patience:
            self.report.ended = "early stop"
            return True
        return False

    def loop(self, interrupts: _Interrupts, progress: Progress) -> None:
        """Train until done, or until somebody asks to stop."""
        options, counters = self.options, self.counters
        task = progress.add_task(
            "training", total=counters.total_steps, completed=counters.step, loss="", rate="", waiting=""
        )
        while not self.is_done():
            start = time.perf_counter()
            data = self.feed.next_step(stop=interrupts.asked)
            if data.is_stopped:
                self.report.ended = "interrupted"
                break
            if not data.batches:
                self._end_epoch(progress)
                continue
            self._step(data, start)
            progress.update(task, completed=counters.step, **self._shown())
            if options.eval_every and counters.step % options.eval_every == 0:
                self._evaluate()
            if options.checkpoint_every and counters.step % options.checkpoint_every == 0:
                self._save(CHECKPOINT)
        if self.steps_in_epoch and self.report.ended != "interrupted":
            self._print_sample(progress, f"after step {counters.step}")
        self._flush()
        progress.update(task, completed=counters.step, **self._shown())

    def _step(self, data: StepData, start: float) -> None:
        counters = self.counters
        counters.step += 1
        self.steps_in_epoch += 1
        rate = learning_rate_at(counters.step, self.options, counters.total_steps)
        loss = self.stepper.step(data.batches, data.num_trained, rate) if data.num_trained else None
        counters.skipped_steps += loss is None
        counters.tokens_seen += data.num_useful
        self._flush()
        step_s = time.perf_counter() - start
        self.useful_here += data.num_useful
        self.wait_s += data.wait_s
        self.report.seconds += step_s
        values = {
            "step": counters.step,
            "loss": None,
            "learning_rate": rate,
            "useful_tokens": data.num_useful,
            "wait_s": round(data.wait_s, 6),
            "step_s": round(step_s, 6),
        }
        self.pending = _Pending(loss, values)

    def _flush(self) -> None:
        """Read, check and log the loss of the step before."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        if pending.loss is not None:
            (loss,) = self.ranks.sum([pending.loss.item()])
            if not abs(loss) < float("inf"):
                raise InputError(
                    f"the loss became {loss} at step {pending.values['step']}; lower --learning-rate, or raise "
                    "--warmup; the last checkpoint is from before"
                )
            pending.values["loss"] = loss
            self.recent = [*self.recent[-9:], loss]
            if self.report.first_loss is None:
                self.report.first_loss = loss
        if self.log is not None:
            self.log.step(pending.values)

    def _shown(self) -> dict[str, Any]:
        seconds = max(self.report.seconds, 1e-9)
        return {
            "loss": f"loss {self.recent[-1]:.3f}" if self.recent else "",
            "rate": f"{self.useful_here / seconds:,.0f} useful tok/s",
            "waiting": f"wait {100 * self.wait_s / seconds:.1f}%",
        }

    def _evaluate(self) -> None:
        self._flush()
        counters, options = self.counters, self.options
        counters.last_evaluation = counters.step
        losses, trained = 0.0, 0
        for batch in validation_batches(self.store, options, self.ranks, self.splits["validation"], self.context):
            losses += self.stepper.sum_of_losses(batch)
            trained += batch.num_trained
        losses, total = self.ranks.sum([losses, trained])
        if not total:
            return
        loss = counters.validation_loss = losses / total
        if counters.best_loss is None or loss < counters.best_loss:
            counters.best_loss, counters.evaluations_since_best = loss, 0
            if options.patience is not None:
                self._save(BEST)
        else:
            counters.evaluations_since_best += 1
        if self.log is not None:
            self.log.evaluation({"step": counters.step, "validation_loss": loss, "trained_tokens": int(total)})

    @property
    def context(self) -> int:
        """The model's longest input."""
        return self.stepper.model.config.context_length

    def _end_epoch(self, progress: Progress) -> None:
        if not self.steps_in_epoch and self.report.epochs:
            raise InputError("an epoch has no batch; give more rows, or a smaller --batch-size")
        self.steps_in_epoch = 0
        self.report.epochs = self.feed.epoch
        self._print_sample(progress, f"after epoch {self.feed.epoch}")

    def _print_sample(self, progress: Progress, when: str) -> None:
        """Show how the model now continues a row's prompt."""
        if not self.options.sample_tokens or not self.ranks.is_first:
            return
        rows = self.splits["validation"] or self.splits["train"]
        prompt, _ = prompt_and_answer(self.store[rows.start])
        stop_at = self.store.pad_token_id
        self.stepper.model.eval()
        answer = generate(
            self.stepper.model, prompt or [stop_at], max_new_tokens=self.options.sample_tokens, stop_at=stop_at
        )
        text = load_tokenizer(self.store.tokenizer_name).decode([*prompt, *answer])
        progress.console.print(f"--- sample {when}\n{text}\n---", markup=False, highlight=False)

    def _save(self, name: str) -> None:
        self._flush()
        states = self.ranks.gather(random_states(self.ranks.device))
        if not self.ranks.is_first:
            return
        out = self.options.out
        save_checkpoint(
            out / name,
            Checkpoint(
                step=self.counters.step,
                config=self.stepper.model.config,
                model=self.stepper.model.state_dict(),
                optimizer=self.stepper.optimizer.state_dict(),
                loader=self.feed.state_dict(),
                random=states,
                progress=asdict(self.counters),
                options=self.options.plain(),
                data={
                    "store": os.path.relpath(self.store.path, out),
                    "fingerprint": self.store.fingerprint,
                    "tokenizer": self.store.tokenizer_name,
                    "template": str(self.store.manifest["template"].get("name", "")),
                    "splits": {split: [rows.start, rows.stop] for split, rows in self.splits.items()},
                },
            ),
        )

    def finish(self) -> TrainReport:
        """Evaluate, save, plot, and sum up."""
        report, counters, options = self.report, self.counters, self.options
        if report.ended != "interrupted" and options.eval_every and counters.last_evaluation != counters.step:
            self._evaluate()
        self._save(CHECKPOINT)
        if self.log is not None:
            self.log.close()
            plot = plot_losses(options.out)
            report.plot = str(plot) if plot is not None else None
        report.steps, report.skipped_steps = counters.step, counters.skipped_steps
        report.epochs, report.tokens_seen = self.feed.epoch, counters.tokens_seen
        report.last_loss = sum(self.recent) / len(self.recent) if self.recent else None
        report.validation_loss = counters.validation_loss
        report.tokens_per_second = round(self.useful_here / max(report.seconds, 1e-9), 1)
        report.wait_share = round(self.wait_s / max(report.seconds, 1e-9), 6)
        report.compilations = num_compilations() if options.compile else 0
        return report


def train(
    store: TokenStore | str | Path, options: TrainOptions, *, ranks: Ranks | None = None, show: bool = True
) -> TrainReport:
    """Train GPT-2 on the rows of a store.

    Args:
        store: an open store or its path.
        options: see `TrainOptions`.
        ranks: who trains together; by default what `torchrun` started, or this process alone.
        show: show progress.

    Returns:
        What was done; everything else is under `options.out`: `metrics.jsonl`, `evaluations.jsonl`,
        `checkpoint.pt`, `loss.png`.

    Raises:
        InputError: an option does not fit the data, the directory or the machine, or the loss is not finite.
    """
    store = store if isinstance(store, TokenStore) else TokenStore(store)
    joined = ranks or join_ranks(options.device)
    try:
        return _train(store, options, joined, show=show and joined.is_first)
    finally:
        if ranks is None:
            joined.close()


def _train(store: TokenStore, options: TrainOptions, ranks: Ranks, *, show: bool) -> TrainReport:
    if ranks.device.type == "cpu":
        recycle_freed_memory()
    run = _Run(store, options, ranks)
    with (
        _Interrupts() as interrupts,
        progress_bar("loss", "rate", "waiting", unit="steps", disable=not show) as progress,
    ):
        run.loop(interrupts, progress)
        return run.finish()


class _Interrupts:
    """Turns the first Ctrl-C (or SIGTERM) into a wish, so that a step is never cut in half; the second one stops."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def _make_model(store: TokenStore, options: TrainOptions, saved: Checkpoint | None) -> GPT2:
    config = config_of(options.model, dropout=options.dropout, tie_weights=options.tie_weights)
    if store.vocab_size > config.vocab_size:
        raise InputError(
            f"{store.path}: token ids up to {store.vocab_size - 1}, the model knows {config.vocab_size}; "
            "prepare the data with the gpt2 tokenizer"
        )
    if saved is not None:
        model = GPT2(saved.config)
        model.load_state_dict(saved.model)
        return model
    return load_published(options.weights, config) if options.weights is not None else GPT2(config)
