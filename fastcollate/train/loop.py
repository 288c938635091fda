"""The training loop: batches in, a trained GPT-2, its metrics and its checkpoints out.

Under `torchrun -m fastcollate train` each rank runs this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from fastcollate.errors import InputError
from fastcollate.jit import clock, compiling
from fastcollate.plan import MixedStore
from fastcollate.progress import progress_bar, renamed_switch
from fastcollate.store import TokenStore
from fastcollate.train import files
from fastcollate.train.answers import continue_prompt
from fastcollate.train.cuda.attention import fastest_attention
from fastcollate.train.files import Checkpoint, Counters, TrainReport
from fastcollate.train.loss import Readback
from fastcollate.train.options import TrainOptions
from fastcollate.train.preference.reference import check_objective, reference_for
from fastcollate.train.ranks import Interrupts, Ranks, join_ranks, num_compilations, recycle_freed_memory
from fastcollate.train.step import (
    Feed,
    StepData,
    Stepper,
    learning_rate_at,
    make_loader,
    split_mix,
    split_rows,
    validation_batches,
)

if TYPE_CHECKING:
    from rich.progress import Progress

_OF_PAIRS = ("reward_margin", "reward_accuracy")  # means over a step's pairs
_FIRST_SKIPPED = 5  # so many steps without a trained token, from the first on, are said at once


class _Run:
    """One process's part of a run."""

    def __init__(
        self,
        source: TokenStore | MixedStore,
        options: TrainOptions,
        ranks: Ranks,
        saved: Checkpoint | None,
        progress: Progress,
    ) -> None:
        self.source, self.options, self.ranks, self.progress = source, options, ranks, progress
        self.mix = source if isinstance(source, MixedStore) else None
        self.store = store = source.stores[0] if isinstance(source, MixedStore) else source  # of a mix the first one
        self.splits = split_rows(len(store), options)
        rows: range | None = self.splits["train"]
        self.validation: range | npt.NDArray[np.int64] = self.splits["validation"]
        if self.mix is not None:
            source, self.validation = split_mix(self.mix, options)
            rows = None
        torch.manual_seed(options.seed)
        model = files.make_model(store, options, saved)
        self.names = self.mix.names if self.mix is not None else ()
        num_sums = 1 if options.objective == "dpo" else len(self.names)
        self.stepper = Stepper(model.to(ranks.device), options, ranks, num_sums)
        torch.manual_seed(options.seed + ranks.rank)  # the same weights, each rank its own dropout
        loader = make_loader(
            source, options, ranks, rows, model.config.context_length, width=model.config.width,
            balance=saved is None or bool(saved.loader.get("balance", False)),  # a run goes on as it began
        )  # fmt: skip
        self.reference = reference_for(store, options, ranks, model.config.context_length, self.say)
        self.feed = Feed(loader, options.accumulate, ranks, self.reference)
        self.counters = Counters(total_steps=self._plan_steps())
        if saved is not None:
            self._continue_from(saved)
        with files.writing(options.out):
            options.out.mkdir(parents=True, exist_ok=True)
        self.log = None
        if ranks.is_first:
            self.log = files.RunLog(options.out, first_step=self.counters.step, tensorboard=options.tensorboard)
        self.report = TrainReport(out=str(options.out))
        # A step whose loss may still be under way on a GPU; it is read when the next step has been started.
        self.pending: tuple[Readback | None, Readback | None, dict[str, Any]] | None = None
        self.recent: list[float] = []
        self.useful_here = 0
        self.wait_s = 0.0
        self.steps_in_epoch = 0
        self.compiled_before = num_compilations() if options.compile else 0

    def _plan_steps(self) -> int:
        """Optimizer steps of the whole run, for the learning rate and the progress bar."""
        options = self.options
        limits = [options.max_steps] if options.max_steps is not None else []
        if options.epochs is not None or options.max_steps is None:
            limits.append((options.epochs or 1) * self.feed.steps_an_epoch())
        return min(limits)

    def _continue_from(self, saved: Checkpoint) -> None:
        if saved.data["fingerprint"] != self.store.fingerprint:
            raise InputError(
                f"{self.options.out}: the run was started on other data (store {saved.data['store']}); "
                "resume it with the same sources, or choose another --out"
            )
        if self.reference is not None and saved.data.get("reference") != self.reference.model:
            raise InputError(
                f"{self.options.out}: the model in {self.options.reference_checkpoint} is another one than when the "
                "run was started; bring that back, or choose another --out"
            )
        self.stepper.optimizer.load_state_dict(dict(saved.optimizer))
        self.feed.load_state_dict(dict(saved.loader))
        total = self.counters.total_steps
        self.counters = Counters(**{**saved.progress, "epoch": self.feed.epoch, "total_steps": total})
        if len(saved.random) == self.ranks.world_size:
            files.set_random_states(saved.random[self.ranks.rank], self.ranks.device)
        else:
            torch.manual_seed(self.options.seed + self.counters.step * 1_000_003 + self.ranks.rank)
        self.say(files.how_it_goes_on(saved, self.options, total))

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _ending(self) -> str | None:
        counters = self.counters
        return self.options.ending(
            step=counters.step, epoch=counters.epoch, evaluations_since_best=counters.evaluations_since_best
        )

    def loop(self, interrupts: Interrupts) -> None:
        """Train until done, or until somebody asks to stop."""
        options, counters = self.options, self.counters
        task = self.progress.add_task("training", total=counters.total_steps, **self._shown())
        while (ending := self._ending()) is None:
            start = clock()
            data = self.feed.next_step(stop=interrupts.asked)
            if data.total.stop:
                ending = "interrupted"
                break
            counters.epoch = self.feed.epoch
            if not data.batches:
                self._end_epoch()
                continue
            self._step(data, start)
            self.progress.update(task, **self._shown())
            if options.eval_every and counters.step % options.eval_every == 0:
                self._evaluate()
            if options.checkpoint_every and counters.step % options.checkpoint_every == 0:
                self._save(files.CHECKPOINT)
        self.report.ended = ending
        self._flush()
        if ending != "interrupted":
            self._require_trained_steps()
            if self.steps_in_epoch:
                self._print_sample(f"after step {counters.step}")
        self.progress.update(task, **self._shown())

    def _step(self, data: StepData, start: float) -> None:
        counters = self.counters
        counters.step += 1
        self.steps_in_epoch += 1
        rate = learning_rate_at(counters.step, self.options, counters.total_steps)
        loss = self.stepper.step(data.batches, data.total.num_trained, rate) if data.total.num_trained else None
        counters.skipped_steps += loss is None
        counters.tokens_seen += data.total.num_useful
        self._flush()
        wait_s = data.wait_s if self.useful_here else 0.0  # a first batch cannot overlap with a step
        step_s = max(0.0, clock() - start - (data.wait_s - wait_s))
        self.useful_here += data.total.num_useful
        self.wait_s += wait_s
        self.report.seconds += step_s
        values = {
            "step": counters.step, "loss": None, "learning_rate": rate, "useful_tokens": data.total.num_useful,
            "wait_s": round(wait_s, 6), "step_s": round(step_s, 6),
        }  # fmt: skip
        if self.reference is not None:
            values["pairs"] = data.total.num_trained
        sums = None if loss is None else self.stepper.sums_by_source()
        self.pending = None if loss is None else Readback(loss), None if sums is None else Readback(sums), values
        if counters.skipped_steps == counters.step == _FIRST_SKIPPED:
            self.say(f"note: {self._why_nothing_is_trained()}")

    def _flush(self) -> None:
        """Read, check and log the loss of the step before."""
        if self.pending is None:
            return
        (readback, by_source, values), self.pending = self.pending, None
        if readback is not None:
            own = [] if by_source is None else by_source.read_all()
            loss, *sums = self.ranks.sum([readback.read(), *own])
            if not abs(loss) < float("inf"):
                raise InputError(
                    f"the loss became {loss} at step {values['step']}; lower --learning-rate, or raise --warmup; the "
                    "last checkpoint is from before"
                )
            values["loss"] = loss
            if sums and self.names:
                values["sources"] = _by_source(self.names, sums)
            elif sums:
                values |= {name: part / values["pairs"] for name, part in zip(_OF_PAIRS, sums, strict=True)}
            self.recent = [*self.recent[-9:], loss]
            if self.report.first_loss is None:
                self.report.first_loss = loss
        if self.log is not None:
            self.log.write(files.METRICS, values)

    def _shown(self) -> dict[str, Any]:
        seconds = max(self.report.seconds, 1e-9)
        return {
            "completed": self.counters.step,
            "loss": f"loss {self.recent[-1]:.3f}" if self.recent else "",
            "rate": f"{self.useful_here / seconds:,.0f} tok/s",
            "waiting": f"wait {100 * self.wait_s / seconds:.1f}%",
        }

    def _evaluate(self) -> None:
        self._flush()
        counters, options = self.counters, self.options
        counters.last_evaluation = counters.step
        losses, trained, context = 0.0, 0, self.stepper.model.config.context_length
        for batch in validation_batches(self.source, options, self.ranks, self.validation, context, self.reference):
            losses += self.stepper.sum_of_losses(batch)
            trained += batch.num_trained
        losses, total = self.ranks.sum([losses, trained])
        if not total:
            return
        loss = counters.validation_loss = losses / total
        self.say(f"step {counters.step:,}: validation loss {loss:.3f}")
        if counters.best_loss is None or loss < counters.best_loss:
            counters.best_loss, counters.evaluations_since_best = loss, 0
            if options.patience is not None:
                self._save(files.BEST)
        else:
            counters.evaluations_since_best += 1
        if self.log is not None:
            counted = "trained_tokens" if self.reference is None else "pairs"
            values = {"step": counters.step, "validation_loss": loss, counted: int(total)}
            self.log.write(files.EVALUATIONS, values)

    def _end_epoch(self) -> None:
        if not self.steps_in_epoch and self.report.epochs:
            raise InputError("an epoch has no batch; give more rows, or a smaller --global-batch-size")
        self._require_trained_steps()
        self.steps_in_epoch = 0
        self.report.epochs = self.feed.epoch
        self._print_sample(f"after epoch {self.feed.epoch}")

    def _require_trained_steps(self) -> None:
        if self.counters.step and self.counters.skipped_steps == self.counters.step:
            raise InputError(f"nothing was trained: {self._why_nothing_is_trained()}")

    def _why_nothing_is_trained(self) -> str:
        """All steps so far were skipped."""
        limit = self.options.max_length
        cut = f"or --max-length {limit} cuts them away" if limit else "or the rows hold no response"
        return (
            f"none of the {self.counters.step} steps so far had a trained token: every target is masked, {cut}; look "
            f"at: fastcollate inspect {self.store.path}{' --mask-prompt' if self.options.mask_prompt else ''}"
            f"{f' --max-length {limit}' if limit else ''}"
        )

    def _print_sample(self, when: str) -> None:
        """Show how the model now continues a row's prompt."""
        if not self.options.sample_tokens or not self.ranks.is_first:
            return
        rows = self.splits["validation"] or self.splits["train"]
        self.stepper.model.eval()
        text = continue_prompt(self.stepper.model, self.store, rows.start, self.options.sample_tokens)
        self.say(f"--- sample {when}\n{text}\n---")

    def _save(self, name: str) -> None:
        self._flush()
        states = self.ranks.gather(files.random_states(self.ranks.device))
        if not self.ranks.is_first:
            return
        out = self.options.out
        files.save_checkpoint(
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
                    "store": self.store.seen_from(out),
                    "fingerprint": self.store.fingerprint,
                    "tokenizer": self.store.tokenizer_name,
                    "template": str(self.store.manifest["template"].get("name", "")),
                    "mask_heading": bool(self.store.manifest["template"].get("mask_heading")),
                    "reference": None if self.reference is None else self.reference.model,
                    "splits": {split: [rows.start, rows.stop] for split, rows in self.splits.items()},
                },
            ),
        )

    def finish(self) -> TrainReport:
        """Evaluate, save, plot, and sum up."""
        report, counters, options = self.report, self.counters, self.options
        if report.ended != "interrupted" and options.eval_every and counters.last_evaluation != counters.step:
            self._evaluate()
        self._save(files.CHECKPOINT)
        if self.log is not None:
            self.log.close()
            plot = files.plot_losses(options.out)
            report.plot = str(plot) if plot is not None else None
        report.steps, report.skipped_steps = counters.step, counters.skipped_steps
        report.epochs, report.tokens_seen = self.feed.epoch, counters.tokens_seen
        recent = self.recent or [line["loss"] for line in files.read_lines(options.out / files.METRICS)[-10:]]
        recent = [loss for loss in recent if loss is not None]
        report.last_loss = sum(recent) / len(recent) if recent else None
        report.validation_loss = counters.validation_loss
        report.tokens_per_second = round(self.useful_here / max(report.seconds, 1e-9), 1)
        report.wait_share = round(self.wait_s / max(report.seconds, 1e-9), 6)
        report.compilations = num_compilations() - self.compiled_before if options.compile else 0
        return report


def _by_source(names: Sequence[str], sums: Sequence[float]) -> dict[str, dict[str, float | int | None]]:
    """What a step trained of each source of a mix: the mean loss, `None` where there was none, and its tokens."""
    parts = zip(names, sums[: len(names)], map(int, sums[len(names) :]), strict=True)
    return {name: {"loss": loss / count if count else None, "trained_tokens": count} for name, loss, count in parts}


def train(
    store: TokenStore | MixedStore | str | Path,
    options: TrainOptions,
    *,
    ranks: Ranks | None = None,
    progress: bool = True,
    show: bool | None = None,
) -> TrainReport:
    """Train GPT-2 on the rows of a store.

    Args:
        store: an open store, its path, or a `MixedStore`, each of whose sources is split alike; `metrics.jsonl` then
            has loss and trained tokens of each, and the first one's rows are sampled and evaluated.
        options: see `TrainOptions`.
        ranks: who trains together; by default what `torchrun` started, or this process alone.
        progress: show progress (`show` is the old name).

    Returns:
        What was done; everything else is under `options.out`: `metrics.jsonl`, `evaluations.jsonl`,
        `checkpoint.pt`, `loss.png`.

    Raises:
        InputError: an option does not fit the data, the directory or the machine, no step had a trained token, or the
            loss is not finite.

    Example:
        >>> report = train("store", TrainOptions(out=Path("runs/second"), max_steps=2), progress=False)
        >>> report.steps, report.ended
        (2, 'finished')
    """
    progress = renamed_switch(progress, old="show", given=show)
    store = store if isinstance(store, (TokenStore, MixedStore)) else TokenStore(store)
    joined = ranks or join_ranks(options.device)
    try:
        return _train(store, options, joined, progress=progress and joined.is_first)
    finally:
        if ranks is None:
            joined.close()


def _train(store: TokenStore | MixedStore, options: TrainOptions, ranks: Ranks, *, progress: bool) -> TrainReport:
    if ranks.device.type == "cpu":
        recycle_freed_memory()
    check_objective(store, options)
    saved = files.find_checkpoint(options)
    options = options.with_precision(ranks.device.type, saved.options if saved is not None else None)
    options = options.of(store, saved.options if saved is not None else None)
    with (
        fastest_attention(ranks.device),
        Interrupts() as interrupts,
        progress_bar("loss", "rate", "waiting", unit="steps", progress=progress) as bar,
    ):
        run = _Run(store, options, ranks, saved, bar)
        with compiling(lambda: run.say("compiling kernels (once)")):
            run.loop(interrupts)
        return run.finish()
