"""Yuan 2.0-M32 and its family: load a checkpoint and let it answer.

    import yuanmoe
    model = yuanmoe.load("small")  # the model that comes with this package, or a folder with any released format
    print(model.generate("def fibonacci(n):").text)

The names in `__all__` are the public ones, and stay as `docs/api.md` promises. Importing this package imports no torch;
each name brings what it depends on when it is first touched.
`yuanmoe.plan` and `yuanmoe.train` are functions and folders of modules at once: `yuanmoe.plan("M32")` plans, and
`yuanmoe.plan.cost` is the module.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yuanmoe.checkpoint.quantize.quantize import quantize_checkpoint as quantize
    from yuanmoe.checkpoint.write.convert import convert_checkpoint as convert
    from yuanmoe.config import ModelConfig
    from yuanmoe.engine.engine import Engine
    from yuanmoe.engine.requests import Request, TokenRouting
    from yuanmoe.engine.sampling import SamplingParams
    from yuanmoe.errors import (
        CheckpointError,
        ConfigError,
        ContextLengthError,
        DataError,
        ResourceError,
        TokenizerError,
        TrainingError,
        UsageError,
        YuanError,
    )
    from yuanmoe.estimate import plan_model as plan
    from yuanmoe.lm import Completion, LanguageModel, Stream, load
    from yuanmoe.presets import preset
    from yuanmoe.train.run import Run, train

    __version__: str

__all__ = [
    "CheckpointError",
    "Completion",
    "ConfigError",
    "ContextLengthError",
    "DataError",
    "Engine",
    "LanguageModel",
    "ModelConfig",
    "Request",
    "ResourceError",
    "Run",
    "SamplingParams",
    "Stream",
    "TokenRouting",
    "TokenizerError",
    "TrainingError",
    "UsageError",
    "YuanError",
    "__version__",
    "convert",
    "load",
    "plan",
    "preset",
    "quantize",
    "train",
]

_PLACES = {
    **dict.fromkeys(("Completion", "LanguageModel", "Stream", "load"), "lm"),
    **dict.fromkeys(("Request", "TokenRouting"), "engine.requests"),
    **dict.fromkeys(("Run", "train"), "train.run"),
    "Engine": "engine.engine",
    "ModelConfig": "config",
    "SamplingParams": "engine.sampling",
    "convert": "checkpoint.write.convert",
    "plan": "estimate",
    "preset": "presets",
    "quantize": "checkpoint.quantize.quantize",
}
"""The module of each name; errors are in `errors`."""
_OWN_NAMES = {"convert": "convert_checkpoint", "plan": "plan_model", "quantize": "quantize_checkpoint"}
"""What these are called where they are defined."""
_FOLDERS = frozenset({"plan", "train"})


def _public(name: str) -> Any:
    module = import_module(f"{__name__}.{_PLACES.get(name, 'errors')}")
    return getattr(module, _OWN_NAMES.get(name, name))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("yuanmoe")
    if name in _FOLDERS:
        return import_module(f"{__name__}.{name}")
    if name in __all__:
        return _public(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallableFolder(ModuleType):
    """A folder of modules that is also the public function of its name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _public(self.__name__.rpartition(".")[2])(*arguments, **options)


class _Face(ModuleType):
    """This package. Python sets a folder as its attribute on import, which would hide the function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FOLDERS and isinstance(value, ModuleType):
            value.__class__ = _CallableFolder
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
