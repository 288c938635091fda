"""Where a job's store goes: a folder of this machine, or object storage; what differs between them is here."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from fastcollate.ingest.places.folder import FolderPlace as FolderPlace
from fastcollate.ingest.places.storage import StoragePlace
from fastcollate.store import remote

Place: TypeAlias = FolderPlace | StoragePlace


def place_at(root: Path | remote.Objects) -> Place:
    """The place of a store."""
    return StoragePlace(root) if isinstance(root, remote.Objects) else FolderPlace(root)
