"""Shared fixtures: the records beside the checkout, and the Hypothesis budget."""

from __future__ import annotations

import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, settings

from tests.forks import Forks

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell's job in the background has it, and its children
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"

settings.register_profile(
    "default",
    max_examples=int(os.environ.get("HYPOTHESIS_MAX_EXAMPLES", "100")),
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")


RECORDS = {  # fixtures of files that a cloner need not have
    "instruction_data": "instruction-data.json",
    "gsm8k": "gsm8k_train.jsonl",
    "expected_widths": "expected_train_widths_seed123_bs8.json",
}


@pytest.fixture(scope="session")
def instruction_data() -> Path:
    """The chapter's 1,100 records."""
    return SHARED / RECORDS["instruction_data"]


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """7,473 grade-school problems, `question` and `answer`."""
    return SHARED / RECORDS["gsm8k"]


@pytest.fixture(scope="session")
def expected_widths() -> Path:
    """Batch widths that the chapter's own loader gives."""
    return SHARED / RECORDS["expected_widths"]


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs scripts of a test in processes that need not import torch."""
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A file system on an S3 server of this machine, with an empty `bucket`."""
    pytest.importorskip("s3fs")
    pytest.importorskip("flask")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    fsspec.config.conf.pop("s3", None)
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.mkdir("bucket")
    try:
        yield files
    finally:
        fsspec.filesystem("s3").clear_instance_cache()
        server.stop()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the records beside the checkout are marked so, and deselected where those are missing."""
    missing = []
    for item in items:
        files = [SHARED / RECORDS[name] for name in getattr(item, "fixturenames", ()) if name in RECORDS]
        if files:
            item.add_marker("real_records")
        if not all(file.is_file() for file in files):
            missing.append(item)
    if missing:
        config.hook.pytest_deselected(items=missing)
        items[:] = [item for item in items if item not in missing]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `cuda` run where there is a device."""
    if item.get_closest_marker("cuda") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, object]) -> None:
    """A saved baseline says what kind of machine it is from, not which one."""
    machine_info.pop("node", None)
