"""What the commands that prove and show can be asked for; quick to import, for the command line's help."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from fastcollate.train.options import option

if TYPE_CHECKING:
    from fastcollate.collate.collator import Collator
    from fastcollate.store import TokenStore


@dataclass(frozen=True, slots=True)
class MaskOptions:
    """How rows become targets; each field's meaning is its `help`. Prompts are trained unless masked, as everywhere.

    Example:
        >>> MaskOptions(max_length=512).mask_prompt
        False
    """

    max_length: int | None = option(None, "Columns kept of a row; all by default.")
    mask_prompt: bool = option(False, "Train the responses only, or all (the default).", "--mask-prompt/--train-prompt")
    mode: str = option("reference", "reference (as the chapter's collate) or positional (what you mean).")

    def collator(self, store: TokenStore) -> Collator:
        """The fast path with these options; ignored targets are -100."""
        from fastcollate.load.options import collator_of

        return collator_of(store, asdict(self))

    def with_other_mask(self) -> MaskOptions:
        """The same with the other `mask_prompt`.

        Example:
            >>> MaskOptions(max_length=512).with_other_mask().mask_prompt
            True
        """
        return replace(self, mask_prompt=not self.mask_prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderOptions:
    """Which rows make a batch of one process; each field's meaning is its `help`.

    Example:
        >>> OrderOptions(policy="packed", capacity=1024).batch_size
        8
    """

    policy: str = option("bucketed", "Order: sequential, shuffled, bucketed, packed.")
    batch_size: int = option(8, "Rows (packs) in a batch of one process, as a loader counts (train: of all ranks).")
    capacity: int | None = option(
        None, "With --policy packed, cells a pack; --max-length or the longest row if not given."
    )
    seed: int = option(0, "Seed of the epoch's order.")
