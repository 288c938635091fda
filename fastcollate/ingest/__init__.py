"""The job behind `prepare`: sources -> store."""

from typing import TYPE_CHECKING

from fastcollate.lazy import face

if TYPE_CHECKING:
    from fastcollate.ingest.ids.columns import columns_of_ids as columns_of_ids
    from fastcollate.ingest.ids.rows import rows_of_ids as rows_of_ids
    from fastcollate.ingest.ids.rows import with_end_appended as with_end_appended
    from fastcollate.ingest.job import prepare as prepare
    from fastcollate.ingest.options import PrepareOptions as PrepareOptions
    from fastcollate.ingest.options import summary_in_words as summary_in_words
    from fastcollate.ingest.spec import source_names as source_names

_MODULE_OF = {
    "PrepareOptions": "options", "columns_of_ids": "ids.columns", "prepare": "job", "rows_of_ids": "ids.rows",
    "source_names": "spec", "summary_in_words": "options", "with_end_appended": "ids.rows",
}  # fmt: skip
__getattr__, __dir__ = face(__name__, _MODULE_OF)
