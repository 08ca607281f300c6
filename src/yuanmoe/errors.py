"""The errors a user can cause, under one root; each message says what, the numbers and the way out.

Not here: bugs of ours, which are plain assertions.
"""


class YuanError(Exception):
    """Root of every error that this package raises on purpose."""


class ConfigError(YuanError, ValueError):
    """A configuration that describes no model: an unknown key, a number out of range, sizes that do not fit."""


class CheckpointError(YuanError):
    """A checkpoint that cannot be read or written as asked: missing, truncated, misshapen, or of another format."""


class UnsafePickleError(CheckpointError):
    """A pickle that asks for more than tensors; nothing of it was executed."""


class TokenizerError(YuanError):
    """A tokenizer that is missing, damaged, or does not belong to the model."""


class DataError(YuanError):
    """Training data that is missing, damaged, or too little for what was asked."""


class ContextLengthError(YuanError, ValueError):
    """More tokens than the model's context holds."""


class ResourceError(YuanError):
    """Not enough memory or disk for what was asked; raised before it is spent."""


class UsageError(YuanError, ValueError):
    """An argument or a combination of arguments that makes no sense."""


class MissingExtraError(YuanError, ImportError):
    """A part of this package was asked for whose optional dependency is not installed, or too old."""


class TrainingError(YuanError):
    """A training run that must not go on: a loss that is no number, or far above those before it."""
