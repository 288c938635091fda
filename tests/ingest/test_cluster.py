"""The ray engine on several nodes and no shared disk: a node that dies costs its shards only."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_prepare import SMALL, many, write_lines
from test_storage import files, objects

from fastcollate.errors import InputError
from fastcollate.ingest.job import prepare
from fastcollate.ingest.places.storage import StoragePlace
from fastcollate.sources import blocks as sources_module
from fastcollate.sources import find_sources, read_units
from fastcollate.store.remote import Objects

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def cluster(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that works not, and three nodes of one processor each."""
    ray, utils = pytest.importorskip("ray"), pytest.importorskip("ray.cluster_utils")
    del s3
    monkeypatch.setattr(sources_module, "SIZES", SMALL)
    found = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 10**8})
    found.three = [found.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(3)]
    ray.init(address=found.address, log_to_driver=False)
    try:
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


def test_a_node_that_dies_changes_no_byte(tmp_path: Path, cluster: Any) -> None:
    source, url = write_lines(tmp_path / "a.jsonl", many(2000)), "s3://bucket/store"
    prepare(source, tmp_path / "local", workers=1)
    struck: list[int] = []

    def strike() -> None:
        folder = Objects(url)
        while len(folder.found(".job/")) < 4:
            time.sleep(0.02)
        cluster.remove_node(cluster.three[1], allow_graceful=False)
        struck.append(len(folder.found(".job/")))

    thread = threading.Thread(target=strike)
    thread.start()
    report = prepare(source, url, engine="ray")
    thread.join()
    assert struck
    assert struck[0] < 11, "it died while there was work"
    assert report.num_rows == 2000
    assert objects(url) == files(tmp_path / "local")


def test_an_error_of_a_node_comes_to_the_driver_and_blocks_travel(tmp_path: Path, cluster: Any) -> None:
    del cluster
    records: list[Any] = many(600)
    records[500] = {"instruction": 5, "output": "x"}
    source, url = write_lines(tmp_path / "b.jsonl", records), "s3://bucket/store"
    with pytest.raises(InputError, match=r"b\.jsonl, line 501, record 500: field 'instruction'"):
        prepare(source, url, engine="ray")
    prepare(iter(records), url, engine="ray", on_error="skip", overwrite=True)
    prepare(iter(records), tmp_path / "local", workers=1, on_error="skip")
    assert objects(url) == files(tmp_path / "local")


def test_blocks_travel_with_their_content(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", many(3000))  # larger than a file that always does
    units = list(read_units(find_sources(str(source))))
    assert not all(block.data for unit in units for block in unit.blocks)
    place = StoragePlace(Objects(f"memory://{tmp_path}/store"))
    sent = [packed.unit() for task in place.tasks(iter(units)) for packed in place.packed(task)]
    assert not any(block.data for task in place.tasks(iter(sent)) for unit in place.bare(task) for block in unit.blocks)
    assert all(block.data is not None and not block.path for unit in sent for block in unit.blocks)
    contents = [[block.read() for unit in given for block in unit.blocks] for given in (units, sent)]
    assert contents[0] == contents[1]
