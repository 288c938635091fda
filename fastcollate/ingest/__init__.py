"""The job behind `prepare`: sources -> store."""

from typing import TYPE_CHECKING

from fastcollate.lazy import face

if TYPE_CHECKING:
    from fastcollate.ingest.job import prepare as prepare
    from fastcollate.ingest.options import PrepareOptions as PrepareOptions

__getattr__, __dir__ = face(__name__, {"PrepareOptions": "options", "prepare": "job"})
