"""Fixtures shared by all tests: the official test data where it is present, and fixed seeds."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with golden checkpoints and the official tokenizer; tests that need it skip where it is absent."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("the golden checkpoints (../shared) are not on this machine")
    return SHARED


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    import torch

    torch.manual_seed(0)
