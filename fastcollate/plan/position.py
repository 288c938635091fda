"""Planned epochs one after another, and where in them the next batch is; saved, and restored after every check.

`BatchLoader` and `BucketBatchSampler` are `Epochs`: what one can, the other can, and their states exchange.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastcollate.errors import LARGEST, InputError, integer
from fastcollate.plan.options import Int64Array, OrderKeywords, PlanOptions
from fastcollate.plan.orders.order import Order, OrderedPlan
from fastcollate.plan.saved import STATE_VERSION, of_all_ranks
from fastcollate.plan.saved import Position as Position
from fastcollate.plan.saved import SavedState as SavedState
from fastcollate.ranks import own_share, times_dealt, warn_of_a_missing_group


class Epochs:
    """Epochs of one order of rows by one set of options, and the position of the next batch.

    Where `rank` and `world_size` are not given they are the process group's: as it is when an iteration starts, the
    length is asked for, or a position set or loaded.
    """

    _kind = "loader"
    _repeats = False  # whether it can give each batch to each rank of `accelerate`

    def __init__(self, order: Order, options: OrderKeywords, rank: int | None, world_size: int | None) -> None:
        self._order = order
        self._asked, self._share_asked = options, (rank, world_size)
        self._saved_balance: bool | None = None  # of a loaded state, where none was asked for
        alone = 0 if rank is None else rank, 1 if world_size is None else world_size
        self._plan_options = self._planned_by(own_share(rank, world_size, options.get("cp_size")) or alone)
        order.check(self._plan_options)
        self._has_told_length = self._has_told_nesting = False
        self._place: tuple[int, int, int] = Position(0)  # the position, as a plain tuple: it is written once a batch
        self._starts_here = False  # the next iteration starts at the position, not at its epoch's first batch
        self._is_told = True  # where to start, since the last iteration began
        self._num_changes = 0  # of the position, from outside
        self._stamp = 0  # goes up with each change, and each iteration that moves the position
        self._mover: weakref.ref[Iteration] | None = None  # the iteration that does
        self._source_rows = np.zeros(len(order.names), np.int64)  # without those of the position's window
        self._window_sources: Int64Array | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._place[0]

    @property
    def _position(self) -> Position:
        return Position._make(self._place)

    def __len__(self) -> int:
        """Batches in the current epoch, exactly; with `max_tokens`, and packed, this plans the epoch once."""
        self._take_share()
        self._has_told_length = True
        return len(self._order.plan(self._plan_options, self.epoch).plan)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mover": None}

    def _planned_by(self, share: tuple[int, int], *, forget_saved: bool = False) -> PlanOptions:
        asked = self._asked.copy()
        if asked.get("balance") is None and not forget_saved:
            asked["balance"] = self._saved_balance
        return PlanOptions(**asked, rank=share[0], world_size=share[1]).checked()

    def _take_share(self) -> None:
        """Take the share that this process has now; of a process group that is gone, the last one stays."""
        before, share = self._plan_options, own_share(*self._share_asked, self._plan_options.cp_size)
        if share is None or share == (before.rank, before.world_size):
            return
        options = self._planned_by(share)
        self._order.check(options)
        self._plan_options = options
        if self._has_told_length and options.world_size != before.world_size:
            warnings.warn(
                f"the process group has {options.world_size} ranks, and the {self._kind} has told its length for "
                f"{before.world_size}: ask for it again",
                stacklevel=4,
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration runs; setting the current one keeps a loaded position.

        Raises:
            InputError: it is no epoch, or comes before a loaded one, whose position would be lost.
        """
        epoch = integer("epoch", epoch, 0, LARGEST)
        self._is_told = True
        if epoch == self.epoch:
            return
        if self._starts_here and epoch < self.epoch:
            raise InputError(
                f"set_epoch({epoch}), and a position in epoch {self.epoch} was loaded: earlier rows would be trained "
                f"again. Begin with set_epoch({self.epoch}) (under accelerate, of the prepared loader), or say "
                f"set_position({epoch}, 0)"
            )
        self._move(Position(epoch), starts_here=False)

    def set_position(self, epoch: int, step: int) -> None:
        """Start the next iteration in this epoch behind its first `step` batches.

        Raises:
            InputError: the epoch has fewer batches.
        """
        epoch, rest = integer("epoch", epoch, 0, LARGEST), integer("step", step, 0)
        self._take_share()
        plan = self._order.plan(self._plan_options, epoch).plan
        for window in range(plan.num_windows):
            num_batches = plan.num_batches(window)
            if rest < num_batches or (rest == num_batches and window == plan.num_windows - 1):
                self._move(Position(epoch, window, rest), starts_here=True)
                return
            rest -= num_batches
        raise InputError(f"step={step}: epoch {epoch} has {step - rest} batches")

    def _move(self, position: Position, *, starts_here: bool) -> None:
        self._leave_window()
        self._place, self._starts_here, self._is_told = position, starts_here, True
        self._num_changes += 1
        self._stamp += 1

    def _begin(self) -> Iteration:
        """Begin an iteration: at the position if that was loaded or set, else at the epoch's first batch.

        One that begins while another runs, such as an evaluation within a training loop, leaves the position to that.
        """
        before = of_all_ranks(self._plan_options)
        self._take_share()
        warn_of_a_missing_group(*self._share_asked)
        if self._starts_here and self._place[1:] != (0, 0) and of_all_ranks(self._plan_options) != before:
            raise InputError(
                f"the {self._kind} was put to its position before the process group was there, and a step holds other "
                f"rows now, of world_size={self._plan_options.world_size}: load the state once the group is there"
            )
        if self._mover is not None and self._mover() is not None and not (self._is_told or self._starts_here):
            return self._begin_beside()
        if not self._starts_here:
            self._leave_window()
            if not self._is_told and self._is_at_the_end():  # of one that was asked for as many batches as there are
                self._place = Position(self.epoch + 1)
            elif not self._is_told and self._position != Position(self.epoch):
                warnings.warn(
                    f"epoch {self.epoch} starts again with the same batches, since the iteration before was left "
                    f"early: say {self._kind}.set_epoch(epoch) before each iteration, or load_state_dict to go on",
                    stacklevel=3,
                )
            self._place = Position(self.epoch)
        self._starts_here = self._is_told = False
        self._stamp += 1
        planned = self._order.plan(self._plan_options, self.epoch)
        iteration = Iteration(self, planned, self._position, self._stamp)
        self._mover = weakref.ref(iteration)
        return iteration

    def _is_at_the_end(self) -> bool:
        """Whether all batches of the epoch were handed over."""
        epoch, window, batch = self._place
        plan = self._order.plan(self._plan_options, epoch).plan
        return batch > 0 and window == plan.num_windows - 1 and batch == plan.num_batches(window)

    def _begin_beside(self) -> Iteration:
        """Begin an iteration that leaves the position to the one that runs."""
        if not self._has_told_nesting:
            self._has_told_nesting = True
            warnings.warn(
                f"an iteration over the {self._kind} begins while another one runs: it gives epoch {self.epoch} from "
                "its first batch on, and the position stays the other's. If that one is over, say "
                f"{self._kind}.set_epoch(epoch) before each iteration; this is said once",
                stacklevel=4,
            )
        return Iteration(self, self._order.plan(self._plan_options, self.epoch), Position(self.epoch), 0)

    def _times(self) -> int:
        """How often each batch is given here."""
        return times_dealt(self._plan_options.world_size, self._kind, can_repeat=self._repeats)

    def _counted_sources(self) -> Int64Array:
        counts = self._window_sources
        return self._source_rows if counts is None else self._source_rows + counts[self._place[2]]

    def _leave_window(self) -> None:
        self._source_rows, self._window_sources = self._counted_sources(), None

    @property
    def source_rows(self) -> dict[str, int]:
        """Rows handed over so far, on this rank, from each source of a `MixedStore`, by name."""
        return dict(zip(self._order.names, self._counted_sources().tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is, plain values; exact to the batch, the same on every rank but for `source_rows`."""
        epoch, window, batch = self._place
        if (window, batch) == (0, 0):
            self._take_share()
        options = self._plan_options.plain()
        del options["rank"]
        return {
            "version": STATE_VERSION,
            "epoch": epoch,
            "next_window": window,
            "next_batch": batch,
            "source_rows": self._counted_sources().tolist(),
            **self._order.identity(self._plan_options),
            **options,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position: the next iteration starts there.

        The world size may be another one, with the same `batch_size * world_size`; or the same `max_tokens *
        world_size` and `shares`. All ranks together then give exactly the rows that were not yet given. Where `balance`
        is, the product is that with `accumulation`, of `batch_size` or beside the same `max_tokens`; where `balance`
        was not said, the run goes on as it began.

        Raises:
            InputError: the state is damaged, or of another version, store or order of rows; it says what differs.
        """
        self._take_share()
        saved = SavedState(state, self._kind)
        own = self._planned_by((self._plan_options.rank, self._plan_options.world_size), forget_saved=True)
        options = saved.with_balance(own) if self._asked.get("balance") is None else own
        found = saved.read(self._order, options)
        self._plan_options, self._saved_balance = options, options.balance
        self._continue_at(*found)

    def _continue_at(self, position: Position, source_rows: Int64Array) -> None:
        self._move(position, starts_here=True)
        self._source_rows = source_rows


class Iteration:
    """One iteration over an epoch's batches. It moves the position while its stamp is the newest."""

    def __init__(self, epochs: Epochs, planned: OrderedPlan, first: Position, stamp: int) -> None:
        self._epochs = epochs
        self._stamp, self._num_changes = stamp, epochs._num_changes
        self.planned = planned
        self.first = first
        self.has_ended = threading.Event()  # nobody waits for its windows any more
        self._epoch, self._window = self.first.epoch, -1

    def hand_over(self, window: int, batch: int) -> None:
        """Move the position behind a batch of a window: `batch` is the number of the next one.

        This iteration is refused where the position was set or loaded while it ran.
        """
        epochs = self._epochs
        if epochs._stamp != self._stamp:
            if epochs._num_changes != self._num_changes:
                raise InputError(
                    f"set_epoch, set_position or load_state_dict was called while an iteration over the {epochs._kind} "
                    "ran, which ends here; what was set stands, for the next iteration"
                )
            return
        if window != self._window:
            self._enter(window)
        epochs._place = (self._epoch, window, batch)

    def _enter(self, window: int) -> None:
        """Count the rows of each source from this window's on."""
        self._window, sources = window, self.planned.take_sources(window)
        if sources is not None:
            self._epochs._leave_window()
            self._epochs._window_sources = sources
            self._epochs._source_rows -= sources[self.first.batch if window == self.first.window else 0]

    def end(self) -> None:
        """The epoch is over: the next one begins."""
        epochs = self._epochs
        if epochs._stamp == self._stamp:
            epochs._leave_window()
            epochs._place, epochs._is_told, epochs._mover = Position(self._epoch + 1), True, None
