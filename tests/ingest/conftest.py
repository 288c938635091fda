"""A job of these tests does its work in this process, unless the test says how many workers it wants."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastcollate.ingest import workers


@pytest.fixture(scope="session", autouse=True)
def one_core() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "_usable_cores", lambda: 1)
        yield
