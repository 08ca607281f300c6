"""Yuan 2.0-M32 and its family: load a checkpoint and let it answer.

    import yuanmoe
    model = yuanmoe.load("path/to/checkpoint")
    print(model.generate("def fibonacci(n):").text)

Importing this package imports no torch; `load` and `LanguageModel` do when they are first touched.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yuanmoe.lm import Completion, LanguageModel, load

    __version__: str

__all__ = ["Completion", "LanguageModel", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("yuanmoe")
    if name in __all__:
        from yuanmoe import lm

        return getattr(lm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
