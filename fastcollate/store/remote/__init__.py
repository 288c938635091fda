"""Stores in object storage: the objects of one, on any file system that `fsspec` knows."""

from typing import TYPE_CHECKING

from fastcollate.lazy import face

if TYPE_CHECKING:
    from fastcollate.store.remote.copy import push as push
    from fastcollate.store.remote.download import pull as pull
    from fastcollate.store.remote.objects import AT_ONCE as AT_ONCE
    from fastcollate.store.remote.objects import Found as Found
    from fastcollate.store.remote.objects import Objects as Objects
    from fastcollate.store.remote.objects import folder_of as folder_of
    from fastcollate.store.remote.objects import get as get

_MODULE_OF = {
    "pull": "download",
    "push": "copy",
    **dict.fromkeys(("AT_ONCE", "Found", "Objects", "folder_of", "get"), "objects"),
}
__getattr__, __dir__ = face(__name__, _MODULE_OF)
