"""The token store: shards and manifest, written atomically, opened by memory map.

Its face: `TokenStore`, its rows and what is refused of it; the modules that write a store (`shards`, `manifest`,
`files`); those that kernels read it by (`layout`, `pages`).
"""

from typing import TYPE_CHECKING

from fastcollate.lazy import face

if TYPE_CHECKING:
    from fastcollate.store.older import convert as convert
    from fastcollate.store.shards import ShardInfo as ShardInfo
    from fastcollate.store.store import Example as Example
    from fastcollate.store.store import TokenStore as TokenStore
    from fastcollate.store.store import require_served as require_served

_MODULE_OF = {
    "Example": "store", "ShardInfo": "shards", "TokenStore": "store", "convert": "older", "require_served": "store",
}  # fmt: skip
__getattr__, __dir__ = face(__name__, _MODULE_OF)
