"""From a loaded model and settings to a server that is ready to run: the one place that knows all the parts."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from yuanmoe import __version__
from yuanmoe.checkpoint.adapters.adapter import Adapter
from yuanmoe.checkpoint.card import UsageCard
from yuanmoe.config import ModelConfig
from yuanmoe.engine.engine import Engine
from yuanmoe.errors import UsageError
from yuanmoe.lm import LanguageModel
from yuanmoe.model.lora.multi_lora import MultiLora
from yuanmoe.plan import cost
from yuanmoe.serve.core.adapters import check_room, offered
from yuanmoe.serve.core.metrics import Metrics
from yuanmoe.serve.core.server import Server
from yuanmoe.serve.core.service import Service
from yuanmoe.serve.core.worker import AnyEngine, EngineWorker
from yuanmoe.serve.openai.app import Access, create_app

PAGE_SIZE = 32
"""Tokens of a page; what the compiled kernels read at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a model is served."""

    model_id: str
    card: UsageCard = field(default_factory=UsageCard)
    """What the checkpoint's makers say of its use; `/v1/info` and the page show it."""
    access: Access = field(default_factory=Access)
    cache_tokens: int | None = None
    """Room for keys and values of all sequences; None is a full context for each of a batch, at most what half of
    `free_bytes` holds."""
    cache_bytes: int | None = None
    """The same room in bytes."""
    free_bytes: int | None = None
    """Memory that is left."""
    max_batch_size: int = 64
    step_tokens: int = 512
    max_queue: int = 256
    """Sequences that may wait beside those at work."""
    max_prompt_tokens: int | None = None
    strict_max_tokens: bool = False
    """Whether a request for more tokens than fit behind its prompt is refused."""
    timeout_s: float = 600.0
    drain_s: int = 30


class Launched(NamedTuple):
    """A server that is ready to run, and what it runs."""

    server: Server
    service: Service
    cache_bytes: int


NO_ADAPTERS: Mapping[str, Adapter] = {}


def launch(lm: LanguageModel, settings: Settings, adapters: Mapping[str, Adapter] = NO_ADAPTERS) -> Launched:
    """Takes the memory that serving needs.

    Raises UsageError for settings that do not fit one another, ResourceError for adapters that do not fit memory.
    """
    taken = check_room(adapters, lm.model.activation_dtype, settings.free_bytes)
    if settings.free_bytes is not None:
        settings = replace(settings, free_bytes=settings.free_bytes - taken)
    tokens = cache_tokens(lm.config, _kv_dtype(lm), settings)
    engine = Engine(
        lm.model,
        adapters=MultiLora(lm.model, adapters),
        vocab_size=lm.tokenizer.vocab_size,
        cache_tokens=tokens,
        page_size=PAGE_SIZE,
        max_batch_size=settings.max_batch_size,
        step_tokens=settings.step_tokens,
    )
    return launch_engine(lm, engine, tokens, settings, adapters)


def launch_engine(
    lm: LanguageModel,
    engine: AnyEngine,
    tokens: int,
    settings: Settings,
    adapters: Mapping[str, Adapter] = NO_ADAPTERS,
) -> Launched:
    """The same over an engine that is there, with room for `tokens`, and has these adapters."""
    metrics = Metrics(lm.config)
    worker = EngineWorker(engine, metrics, capacity=settings.max_batch_size + settings.max_queue)
    metrics.watch(worker)
    fingerprint = _fingerprint(lm)
    context = min(lm.config.max_position_embeddings, tokens)
    service = Service(
        config=lm.config,
        tokenizer=lm.tokenizer,
        worker=worker,
        model_id=settings.model_id,
        fingerprint=fingerprint,
        adapters={name: offered(adapter, lm.config, fingerprint) for name, adapter in adapters.items()},
        max_prompt_tokens=min(settings.max_prompt_tokens or context, context),
        cache_tokens=tokens,
        strict_max_tokens=settings.strict_max_tokens,
        timeout_s=settings.timeout_s,
        card=settings.card,
    )
    app = create_app(service, metrics, settings.access)
    return Launched(
        Server(app, worker, drain_s=settings.drain_s), service, tokens * token_bytes(lm.config, _kv_dtype(lm))
    )


def cache_tokens(config: ModelConfig, kv_dtype: torch.dtype, settings: Settings) -> int:
    """Tokens that the cache shall hold, in whole pages. Raises UsageError where that is none."""
    if settings.cache_tokens is not None and settings.cache_bytes is not None:
        raise UsageError("--cache-tokens and --cache-gib say the same; leave one out")
    each = token_bytes(config, kv_dtype)
    tokens = settings.cache_tokens
    if settings.cache_bytes is not None:
        tokens = settings.cache_bytes // each
    if tokens is None:
        tokens = settings.max_batch_size * config.max_position_embeddings
        if settings.free_bytes is not None:
            tokens = min(tokens, max(PAGE_SIZE, settings.free_bytes // 2 // each))
    if tokens < PAGE_SIZE:
        raise UsageError(
            f"a cache of {tokens} tokens is not one page of {PAGE_SIZE} ({PAGE_SIZE * each:,} bytes); "
            "give more with --cache-tokens or --cache-gib"
        )
    return tokens // PAGE_SIZE * PAGE_SIZE


def token_bytes(config: ModelConfig, kv_dtype: torch.dtype) -> int:
    """Bytes of one cached token: keys and values of all layers, and its share of the page's LFA tail."""
    kv_bits = 8 if kv_dtype == torch.int8 else 16
    widened = max(1, kv_dtype.itemsize // 2)  # float32 takes twice what 16 bits do
    return cost.kv_bytes(config, kv_bits) * widened + cost.lfa_bytes(config) // PAGE_SIZE


def _kv_dtype(lm: LanguageModel) -> torch.dtype:
    return lm.model.kv_dtype or lm.model.activation_dtype


def _fingerprint(lm: LanguageModel) -> str:
    """Of the model's configuration, its precision, and this software: what may change an answer to the same seed."""
    norm = lm.model.model.norm.weight
    facts = [__version__, torch.__version__, str(norm.dtype), str(_kv_dtype(lm)), norm.device.type]
    content = json.dumps([*facts, lm.config.to_dict()], sort_keys=True)
    return "fp_" + hashlib.sha256(content.encode()).hexdigest()[:10]
