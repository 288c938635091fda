"""Shared fixtures: the records beside the checkout, and the Hypothesis budget."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

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


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"needs shared/data/{name} beside the checkout")
    return path


@pytest.fixture(scope="session")
def instruction_data() -> Path:
    """The chapter's 1,100 records."""
    return _shared("instruction-data.json")


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """7,473 grade-school problems, `question` and `answer`."""
    return _shared("gsm8k_train.jsonl")


@pytest.fixture(scope="session")
def expected_widths() -> Path:
    """Batch widths that the chapter's own loader gives."""
    return _shared("expected_train_widths_seed123_bs8.json")


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
