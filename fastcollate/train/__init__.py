"""GPT-2 and its training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcollate.lazy import face

if TYPE_CHECKING:
    from fastcollate.train.answers import answer as answer
    from fastcollate.train.answers import answer_split as answer_split
    from fastcollate.train.files import find_checkpoint as find_checkpoint
    from fastcollate.train.loop import train as train
    from fastcollate.train.model import GPT2 as GPT2
    from fastcollate.train.options import AnswerOptions as AnswerOptions
    from fastcollate.train.options import MaskOptions as MaskOptions
    from fastcollate.train.options import OrderOptions as OrderOptions
    from fastcollate.train.options import TrainOptions as TrainOptions
    from fastcollate.train.ranks import join_ranks as join_ranks

_MODULE_OF = {
    "AnswerOptions": "options", "GPT2": "model", "MaskOptions": "options", "OrderOptions": "options",
    "TrainOptions": "options", "answer": "answers", "answer_split": "answers", "find_checkpoint": "files",
    "join_ranks": "ranks", "train": "loop",
}  # fmt: skip
__getattr__, __dir__ = face(__name__, _MODULE_OF)
