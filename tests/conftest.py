"""Fixtures shared by all tests: golden checkpoints and tokenizers, and fixed seeds."""

import signal
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples on every run, however slow the machine.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")

DATA = Path(__file__).parent / "golden_data"
SHARED = Path(__file__).resolve().parents[2] / "shared"
"""A folder beside the repository's with larger test data, which few have."""
HAS_GOLDEN = (SHARED / "golden").is_dir()
HAS_TOKENIZER = (SHARED / "tokenizer" / "tokenizer.model").is_file()


@pytest.fixture(scope="session", params=["repository", *(["shared"] if HAS_GOLDEN else [])])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with golden checkpoints: those of the repository, and the complete files where somebody has them."""
    if request.param == "shared":
        return SHARED / "golden"
    from golden_data.drawn import write_golden

    return write_golden(tmp_path_factory.mktemp("golden"))


@pytest.fixture
def exact_weights(golden: Path, name: str) -> None:
    """For tests in which the last bits of a weight may decide between two experts, and so the tokens after them."""
    from safetensors.torch import load_file

    from golden_data.drawn import BITS, sums

    if name in BITS and sums(load_file(golden / name / "model.safetensors")) != BITS[name]:
        pytest.skip(f"{name} is drawn with other last bits on this processor; run the test on x86 with AVX2")


@pytest.fixture(scope="session")
def released_tokenizer() -> Path:
    """The folder with the released tokenizer, for tests of its published ids."""
    if not HAS_TOKENIZER:
        pytest.skip(f"put tokenizer.model of a released Yuan 2.0 checkpoint into {SHARED / 'tokenizer'}")
    return SHARED / "tokenizer"


@pytest.fixture(scope="session", params=["small", *(["released"] if HAS_TOKENIZER else [])])
def sentencepiece_folder(request: pytest.FixtureRequest) -> Path:
    """A folder with a SentencePiece file: the small one of the repository, or the released one."""
    return SHARED / "tokenizer" if request.param == "released" else DATA / "tokenizer"


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
