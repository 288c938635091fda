"""Files, URLs and data sets -> blocks -> records, each with its place in the sources; the module `records` too."""

from typing import TYPE_CHECKING

from fastcollate.lazy import face

if TYPE_CHECKING:
    from fastcollate.sources.blocks import Block, Unit, read_blocks, read_units
    from fastcollate.sources.find import Source, find_sources, spooled
    from fastcollate.sources.remote import name_of
    from fastcollate.sources.sample import sample_records

__all__ = [
    "Block",
    "Source",
    "Unit",
    "find_sources",
    "name_of",
    "read_blocks",
    "read_units",
    "sample_records",
    "spooled",
]
_MODULE_OF = {
    **dict.fromkeys(("Block", "Unit", "read_blocks", "read_units"), "blocks"),
    **dict.fromkeys(("Source", "find_sources", "spooled"), "find"),
    "name_of": "remote",
    "sample_records": "sample",
}
__getattr__, __dir__ = face(__name__, _MODULE_OF)
