"""A few layers of a preset at full width against transformers' Mixtral of the same sizes: prefill and decode.

Both run on the very same expert weights. Mixtral has no Localized Filtering and a linear router, so it has a little
less to do. The output head is left out of both (a vocabulary of 1,024), as it is the same product in both.
Legend: L layers.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from yuanmoe.bench.timing import Timing, take_turns
from yuanmoe.config import ModelConfig
from yuanmoe.errors import UsageError
from yuanmoe.model.decoder import CausalLM
from yuanmoe.plan import cost

PREFILL_PEERS = ("eager", "grouped_mm")
"""batched_mm copies two experts a token: 34 GB for 256 tokens of M32's sizes."""
DECODE_RUNS = 5
"""Decode steps for each run of a prefill: they are short, and other programs disturb them more."""
DECODE_PEERS = ("eager", "grouped_mm", "batched_mm")


def cut(config: ModelConfig, num_hidden_layers: int) -> ModelConfig:
    """`config` with few layers and a small vocabulary, every width kept."""
    return config.replace(
        num_hidden_layers=num_hidden_layers, vocab_size=1024, eod_token_id=0, sep_token_id=1, pad_token_id=2
    )


def build(config: ModelConfig, dtype: torch.dtype, device: str) -> CausalLM:
    """A model with random weights, made directly in `dtype` on `device`."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return CausalLM(config).initialize().eval()
    finally:
        torch.set_default_dtype(previous)


def build_mixtral(model: CausalLM) -> Any:
    """transformers' Mixtral with the sizes, and the very expert tensors, of `model`.

    Raises UsageError where transformers is not installed.
    """
    try:
        from transformers import MixtralConfig, MixtralForCausalLM
    except ImportError as error:
        raise UsageError("the comparison needs transformers: pip install 'yuanmoe[hf]', or pass --no-peer") from error
    config, weight = model.config, model.model.embed_tokens.weight
    with torch.device("meta"):
        peer = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.moe_intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_attention_heads,
                head_dim=config.head_dim,
                num_local_experts=config.experts_per_layer[0],
                num_experts_per_tok=config.num_experts_per_tok,
                max_position_embeddings=config.max_position_embeddings,
            )
        )
    layers: Any = zip(peer.model.layers, model.model.layers, strict=True)
    for theirs, ours in layers:
        theirs.mlp.experts.gate_up_proj = ours.mlp.experts.gate_up_proj
        theirs.mlp.experts.down_proj = ours.mlp.experts.down_proj
    for module in peer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                random = torch.empty(parameter.shape, dtype=weight.dtype, device=weight.device).normal_(0, 0.02)
                setattr(module, name, torch.nn.Parameter(random, requires_grad=False))
    peer.model.rotary_emb = type(peer.model.rotary_emb)(config=peer.config).to(weight.device)
    return peer.eval()


def our_steps(model: CausalLM, prompt: torch.Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """Prefill of `prompt` [S] into an empty cache, and one decode step behind it."""
    S = len(prompt)
    cache = model.new_cache(1, S + 1)

    def forward(tokens: torch.Tensor, past: int) -> None:
        cache.lengths = [past]
        hidden, _ = model.model(tokens, cache.extend([len(tokens)]))
        model.logits(hidden[-1:])

    return lambda: forward(prompt, 0), lambda: forward(prompt[:1], S)


def mixtral_steps(peer: Any, prompt: torch.Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """The same two steps of transformers' model."""
    from transformers import DynamicCache

    past = peer(prompt[None], logits_to_keep=1).past_key_values

    def prefill() -> None:
        peer(prompt[None], past_key_values=DynamicCache(), logits_to_keep=1)

    def decode() -> None:
        peer(prompt[None, :1], past_key_values=past, logits_to_keep=1)
        past.crop(-1)

    return prefill, decode


def synchronised(call: Callable[[], None], device: str) -> Callable[[], None]:
    """`call`, waiting for the device at its end."""
    if not device.startswith("cuda"):
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


@torch.inference_mode()
def compare_layers(
    config: ModelConfig,
    *,
    num_hidden_layers: int = 2,
    prompt_tokens: int = 256,
    runs: int = 7,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    peer: bool = True,
    on_run: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Prefill and single-token decode of ours and of Mixtral's experts implementations, side by side.

    Returns tokens/s with spread, our share of the bytes a second, and the ratios against the best peer.
    """
    small = cut(config, num_hidden_layers)
    model = build(small, dtype, device)
    prompt = torch.randint(3, small.vocab_size, (prompt_tokens,), device=device)
    prefill, decode = our_steps(model, prompt)
    prefills, decodes = {"yuanmoe": synchronised(prefill, device)}, {"yuanmoe": synchronised(decode, device)}
    if peer:
        mixtral = build_mixtral(model)
        their_prefill, their_decode = mixtral_steps(mixtral, prompt)
        for contenders, step, kinds in (
            (prefills, their_prefill, PREFILL_PEERS),
            (decodes, their_decode, DECODE_PEERS),
        ):
            for kind in kinds:
                contenders[f"mixtral {kind}"] = synchronised(_with_experts(mixtral, kind, step), device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prefill_timings = take_turns(prefills, runs, on_run)
        decode_timings = take_turns(decodes, DECODE_RUNS * runs, on_run)
    return {
        "layers": num_hidden_layers,
        "prompt_tokens": prompt_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "prefill": _report(prefill_timings, prompt_tokens),
        "decode": _report(decode_timings, 1),
        "decode_bytes": cost.decode_bytes(small, cost.precision(16), context=prompt_tokens),
    }


def _with_experts(mixtral: Any, kind: str, step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        mixtral.config._experts_implementation = kind
        step()

    return run


def _report(timings: dict[str, Timing], tokens: int) -> dict[str, Any]:
    ours = timings["yuanmoe"].median_s
    peers = {name: timing.median_s for name, timing in timings.items() if name != "yuanmoe"}
    report: dict[str, Any] = {
        name: timing.to_dict() | {"tokens_per_s": timing.rate(tokens)} for name, timing in timings.items()
    }
    if peers:
        best = min(peers, key=lambda name: peers[name])
        report["best_peer"], report["speed_against_best_peer"] = best, peers[best] / ours
    return report
