"""The small model that comes with this package, in `yuanmoe/small/`: its MODEL_CARD.md says what it is.

Not here: how it was made (`benchmarks/small_corpus.py`, `benchmarks/small_model.py`).
"""

from importlib.resources import files
from pathlib import Path

SMALL = "small"
CARD = "MODEL_CARD.md"


def small_folder() -> Path:
    """Where it is installed."""
    return Path(str(files("yuanmoe") / SMALL))


def model_folder(model: str | Path) -> Path:
    """The folder that is meant: this path or, where nothing is there and it says `small`, the shipped model."""
    path = Path(model)
    return small_folder() if str(path) == SMALL and not path.exists() else path
