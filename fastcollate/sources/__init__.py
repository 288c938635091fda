"""Files, URLs and data sets -> blocks -> records, each with its place in the sources; the module `records` too."""

from typing import TYPE_CHECKING

from fastcollate.lazy import face

if TYPE_CHECKING:
    from fastcollate.sources.blocks import Block as Block
    from fastcollate.sources.blocks import Unit as Unit
    from fastcollate.sources.blocks import read_blocks as read_blocks
    from fastcollate.sources.blocks import read_units as read_units
    from fastcollate.sources.find import Source as Source
    from fastcollate.sources.find import find_sources as find_sources
    from fastcollate.sources.find import spooled as spooled
    from fastcollate.sources.remote import name_of as name_of
    from fastcollate.sources.sample import sample_records as sample_records

_MODULE_OF = {
    "Block": "blocks", "Source": "find", "Unit": "blocks", "find_sources": "find", "name_of": "remote",
    "read_blocks": "blocks", "read_units": "blocks", "sample_records": "sample", "spooled": "find",
}  # fmt: skip
__getattr__, __dir__ = face(__name__, _MODULE_OF)
