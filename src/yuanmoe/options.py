"""The keywords that `load`, `generate`, `chat`, `fill` and `stream` take, as types that an editor can complete.

Not here: what the values mean and which are allowed (`engine/sampling.py`, `config.py`).
"""

from collections.abc import Mapping, Sequence
from typing import TypedDict

from yuanmoe.config import Packing, RopeAngles


class SamplingOptions(TypedDict, total=False):
    """How an answer is chosen: the fields of `SamplingParams`, each with the default that it has there."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    max_new_tokens: int | None
    stop_ids: tuple[int, ...]
    """By default `<eod>`."""


class AnswerOptions(SamplingOptions, total=False):
    """Everything that can be asked of an answer."""

    stop: Sequence[str]
    """Strings that end the answer and are not part of it."""
    routing: bool
    """Whether to report which experts each token visited."""


class ComputeOptions(TypedDict, total=False):
    """Fields of `ModelConfig` that change what is computed with the same weights."""

    rope_theta: float
    rope_angles: RopeAngles
    packing: Packing
    max_position_embeddings: int
