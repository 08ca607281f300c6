"""Fixtures shared by all tests: the official test data where it is present, and fixed seeds."""

import signal
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples on every run, however slow the machine.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with golden checkpoints and the official tokenizer; tests that need it skip where it is absent."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("the golden checkpoints (../shared) are not on this machine")
    return SHARED


@pytest.fixture(autouse=True)
def _ctrl_c() -> None:
    """Heard, also where a shell started the tests in the background, or a test ended a server in this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small tensors gain nothing from two threads, and wait for each other by the second on a busy machine."""
    import torch

    torch.set_num_threads(1)
