"""An OpenAI endpoint over the engine: text and JSON outside, token ids inside. The only place that knows HTTP.

An extra: nothing else in this package needs what it is built on.
"""

from importlib.metadata import PackageNotFoundError, version

from yuanmoe.errors import MissingExtraError

for _name in ("fastapi", "uvicorn", "pydantic", "prometheus-client", "llguidance"):
    try:
        version(_name)
    except PackageNotFoundError:
        raise MissingExtraError(
            f"yuanmoe serve needs {_name}, which is not installed: pip install 'yuanmoe[serve]'"
        ) from None
