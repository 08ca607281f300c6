"""What the server is: facts of the model and its cost, for the page and whoever asks."""

from typing import Any

from yuanmoe import __version__
from yuanmoe.plan import cost
from yuanmoe.serve.core.routing import routed_layers
from yuanmoe.serve.core.service import Service

SAMPLING_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""What the server samples with where a request says nothing."""


def model_card(service: Service, name: str) -> dict[str, Any]:
    """The model, or an adapter of it, in the OpenAI API's shape; `parent` is what an adapter corrects."""
    card = {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "yuanmoe",
        "max_model_len": service.config.max_position_embeddings,
    }
    return card | {"parent": service.model_id} if name in service.adapters else card


def model_info(service: Service) -> dict[str, Any]:
    """Sizes, cost of a token, and limits of this server.

    `gflop_per_token` is a forward pass without attention scores; `dense` is a model of as many parameters that are all
    at work, `llama3_70b` the number that the article of M32 compares with. An adapter costs its own beside the model's.
    `kind` to `suggestions` are the checkpoint's card; `sampling` has this server's defaults where nothing is `advised`.
    """
    config = service.config
    card = service.card
    return {
        "version": __version__,
        "model": service.model_id,
        "kind": card.kind,
        "languages": list(card.languages),
        "sampling": SAMPLING_DEFAULTS | dict(card.sampling),
        "advised": list(card.sampling),
        "limits": dict(card.limits),
        "suggestions": {language: list(texts) for language, texts in card.suggestions.items()},
        "parameters": sum(cost.parameters(config).values()),
        "active_parameters": sum(cost.active_parameters(config).values()),
        "layers": config.num_hidden_layers,
        "routed_layers": routed_layers(config),
        "experts_per_layer": list(config.experts_per_layer),
        "experts_per_token": config.num_experts_per_tok if config.is_moe else 0,
        "router": config.router,
        "localized_filtering": config.localized_filtering,
        "hidden_size": config.hidden_size,
        "vocab_size": service.tokenizer.vocab_size,
        "context": config.max_position_embeddings,
        "max_prompt_tokens": service.max_prompt_tokens,
        "cache_tokens": service.cache_tokens,
        "gflop_per_token": {
            "this": cost.forward_flops(config) / 1e9,
            "attention_per_context_token": cost.attention_flops(config, 1) / 1e9,
            "dense": cost.dense_flops(config) / 1e9,
            "llama3_70b": cost.LLAMA3_70B.forward_flops / 1e9,
        },
        "adapters": [
            {
                "name": name,
                "parameters": adapter.parameters,
                "active_parameters": adapter.active_parameters,
                "gflop_per_token": 2 * adapter.active_parameters / 1e9,
            }
            for name, adapter in service.adapters.items()
        ],
    }
