"""Epochs of one length, for trainers that ask for the length once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastcollate.errors import LARGEST, InputError, integer
from fastcollate.integrations.pytorch import BucketBatchSampler
from fastcollate.plan import position as places

MOST_TURNS = 100_000  # of epochs that differ in batches: each is planned to find where a turn begins


class FlowingSampler(BucketBatchSampler):
    """A `BucketBatchSampler` whose epochs have as many batches as its first, and flow into each other.

    With `max_tokens`, and packed, the planned epochs differ in batches. A trainer that takes their number once would
    leave out the last batches of the longer ones. So here an epoch of the trainer, a *turn*, is the next so many
    batches of planned epochs one after another: each row comes once a planned epoch, wherever the turns begin. With
    `batch_size` both are the same.

    Args:
        source: see `BucketBatchSampler`.
        options: see `BucketBatchSampler`; not `tail="uneven"` on several ranks, whose numbers of batches then differ.

    Raises:
        InputError: an option is wrong.

    Example:
        >>> from fastcollate.integrations.flow import FlowingSampler
        >>> lengths = [9, 1, 8, 2, 7, 3, 6, 4]
        >>> sampler = FlowingSampler(lengths, max_tokens=10, policy="shuffled", seed=3)
        >>> len(sampler), [len(list(sampler)) for turn in range(3)]
        (5, [5, 5, 5])
    """

    _repeats = False

    def __init__(self, source: Any, **options: Any) -> None:
        super().__init__(source, **options)
        own = self._plan_options
        if own.tail == "uneven" and own.world_size > 1:
            raise InputError(
                "tail='uneven' gives the ranks different numbers of batches, and this trainer waits for all of them: "
                "leave it out (some rows then come twice), or give drop_last=True"
            )
        self._length = super().__len__()
        self._is_even = self._order.plan(own, 0).plan.has_even_windows
        self._turn = self._num_done = 0  # batches of the turn that were handed over
        self._starts = {0: places.Position(0)}
        self._is_loaded = False

    def _take_share(self) -> None:
        before = self._plan_options.world_size
        super()._take_share()
        if self._plan_options.world_size != before:
            raise InputError(
                f"a FlowingSampler was made for world_size={before}, and the process group has "
                f"{self._plan_options.world_size} ranks: make it once the group is there, or give rank and world_size"
            )

    def __len__(self) -> int:
        """Batches in a turn."""
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Choose the turn that the next iteration runs; setting the current one keeps a loaded position.

        Raises:
            InputError: it is no turn, or comes before a loaded one, whose position would be lost.
        """
        turn = integer("epoch", epoch, 0, LARGEST)
        if self._is_loaded and turn < self._turn:
            raise InputError(
                f"set_epoch({turn}), and a position in epoch {self._turn} was loaded: earlier rows would be trained "
                f"again. Begin with set_epoch({self._turn}) (under accelerate, of the prepared loader)"
            )
        if turn != self._turn:
            self.set_position(turn, 0)

    def set_position(self, epoch: int, step: int) -> None:
        """Start the next iteration in this turn behind its first `step` batches.

        Raises:
            InputError: a turn has fewer batches.
        """
        turn, step = integer("epoch", epoch, 0, LARGEST), integer("step", step, 0)
        if step > self._length:
            raise InputError(f"step={step}: epoch {turn} has {self._length} batches")
        self._move(self._after(self._start_of(turn), step), starts_here=True)
        self._turn, self._num_done, self._is_loaded = turn, step, False

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of the current turn; from a loaded position on, once. The end advances the turn by one."""
        if not self._starts_here:
            self.set_position(self._turn, 0)
        self._is_loaded = False
        while self._num_done < self._length:
            for rows in super().__iter__():
                self._num_done += 1
                yield rows
                if self._num_done == self._length:
                    break
        self._turn, self._num_done, self._starts_here = self._turn + 1, 0, True
        self._starts[self._turn] = self._after(self._position, 0)

    def _start_of(self, turn: int) -> places.Position:
        """Where a turn begins; the turns before it are counted once."""
        if self._is_even:
            return places.Position(turn)
        integer("epoch", turn, 0, MOST_TURNS)
        known = max(known for known in self._starts if known <= turn)
        while known < turn:
            self._starts[known + 1] = self._after(self._starts[known], self._length)
            known += 1
        return self._starts[turn]

    def _after(self, position: places.Position, steps: int) -> places.Position:
        """The position so many batches later, in the window of the next batch."""
        epoch, first, batch = position
        rest = batch + steps
        while True:
            plan = self._order.plan(self._plan_options, epoch).plan
            for window in range(first, plan.num_windows):
                num_batches = plan.num_batches(window)
                if rest < num_batches:
                    return places.Position(epoch, window, rest)
                rest -= num_batches
            epoch, first = epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is, of the planned epochs and of the turns."""
        return {**super().state_dict(), "turn": self._turn, "turn_batches": self._num_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position, also one of a `BucketBatchSampler` of even epochs.

        Raises:
            InputError: see `BucketBatchSampler`; or turns of another length led to the position.
        """
        position, source_rows = places.SavedState(state, self._kind).read(self._order, self._plan_options)
        turn, done = state.get("turn"), state.get("turn_batches")
        if turn is None and done is None and self._is_even:  # a BucketBatchSampler's
            turn, done = position.epoch, self._batches_before(position)
        turn, done = integer("turn", turn, 0, LARGEST), integer("turn_batches", done, 0, self._length)
        if self._after(self._start_of(turn), done) != self._after(position, 0):
            raise InputError(
                f"the saved sampler state has turn={turn}, turn_batches={done}, and that is not at its position "
                f"{tuple(position)}: it is damaged, or of turns of another length; start afresh"
            )
        self._continue_at(position, source_rows)
        self._turn, self._num_done, self._is_loaded = turn, done, True

    def _batches_before(self, position: places.Position) -> int:
        plan = self._order.plan(self._plan_options, position.epoch).plan
        return sum(map(plan.num_batches, range(position.window))) + position.batch
