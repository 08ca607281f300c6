"""The Yuan 2.0 decoder: embedding, pre-norm layers of attention and experts, final norm, output head.

Sources: arXiv 2311.15786, arXiv 2405.17976, spec 1.1 and 1.2. This file and the loaders are the only ones that read
the configuration. Not here: sampling, devices, sharding, quantization; they are applied from outside.
Legend: N tokens, D hidden, V vocabulary, B sequences, S tokens of a sequence.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from yuanmoe.config import ModelConfig
from yuanmoe.model.attention import Attention, LocalizedFilter
from yuanmoe.model.experts import DenseFeedForward, Experts, MixtureOfExperts
from yuanmoe.model.fast.whole_pass import WholePass
from yuanmoe.model.lora.low_rank import LowRank, factors_of
from yuanmoe.model.norm import RMSNorm
from yuanmoe.model.router import AttentionRouter, LinearRouter, Routing
from yuanmoe.model.state.cache import Cache
from yuanmoe.model.state.sequences import Sequences, WholeSequences, documents_of
from yuanmoe.ops.products.linear import linear
from yuanmoe.ops.products.low_rank import corrected
from yuanmoe.ops.rotary import rotary_tables


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); returns the routing too, None in a dense layer."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        lfa = LocalizedFilter(layer_idx, D, eps) if config.localized_filtering else None
        self.input_layernorm = RMSNorm(D, eps)
        self.self_attn = Attention(
            layer_idx, D, config.num_attention_heads, config.head_dim, lfa, config.attention_dropout
        )
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.mlp = _feed_forward(config, layer_idx)

    def forward(self, x: Tensor, sequences: Sequences, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Routing | None]:
        return self.feed_forward(self.attend(x, sequences, rotary))

    def attend(self, x: Tensor, sequences: Sequences, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """The first half, in which tokens meet."""
        return x + self.self_attn(self.input_layernorm(x), sequences, rotary)

    def feed_forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        """The second half, each token by itself."""
        y = self.mlp(self.post_attention_layernorm(x))
        y, routing = y if isinstance(y, tuple) else (y, None)
        return x + y, routing


def _feed_forward(config: ModelConfig, layer_idx: int) -> DenseFeedForward | MixtureOfExperts:
    D, F, E = config.hidden_size, config.moe_intermediate_size, config.experts_per_layer[layer_idx]
    if E == 0:
        return DenseFeedForward(D, config.intermediate_size)
    kind = AttentionRouter if config.router == "attention" else LinearRouter
    router = kind(D, E, config.num_experts_per_tok, config.router_bias)
    shared = DenseFeedForward(D, config.num_shared_experts * F) if config.num_shared_experts else None
    return MixtureOfExperts(router, Experts(E, D, F), shared)


class Decoder(nn.Module):
    """Tokens in, final hidden states and every layer's routing out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._whole_pass = WholePass()

    def forward(
        self, input_ids: Int[Tensor, " N"], sequences: Sequences
    ) -> tuple[Float[Tensor, "N D"], tuple[Routing, ...]]:
        """The tokens of `sequences` in its order; returns final hidden states and routings."""
        hidden, routings = self.through_layers(self.embed_tokens(input_ids), sequences)
        return self.norm(hidden), routings

    def through_layers(
        self, x: Float[Tensor, "N D"], sequences: Sequences
    ) -> tuple[Float[Tensor, "N D"], tuple[Routing, ...]]:
        """The same between embedding and final norm."""
        rotary = self.rotary(sequences.positions)
        if (whole := self._whole_pass.run(self.layers, x, sequences, rotary)) is not None:
            return whole
        routings = []
        for layer in self.layers:
            x, routing = layer(x, sequences, rotary)
            routings.append(routing)
        return x, tuple(routing for routing in routings if routing is not None)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The cosines and sines of these positions under this model's RoPE base and precision."""
        return rotary_of(self.config, positions)


def rotary_of(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines and sines of `positions` as `config` wants them."""
    return rotary_tables(positions, config.rotary_dim, config.rope_theta, config.rope_angles)


class ModelOutput(NamedTuple):
    """`logits` [B, S, V], `hidden` [B, S, D] after the final norm, `routings` a layer with N = B * S."""

    logits: Tensor
    hidden: Tensor
    routings: tuple[Routing, ...]


class CausalLM(nn.Module):
    """The decoder with its output head, which is the embedding where the model is tied."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.kv_dtype: torch.dtype | None = None
        """Of cached keys and values: bfloat16, int8 or another; None is that of the activations."""
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.head_lora: LowRank | None = None
        """Factors of the output head alone, also where it is the embedding."""

    def logits(self, hidden: Float[Tensor, "*N D"]) -> Float[Tensor, "*N V"]:
        """The scores of all V tokens to come next."""
        out = self.head_product(hidden)
        return out if self.head_lora is None else out + self.head_lora(hidden)

    def head_product(self, hidden: Float[Tensor, "*N D"]) -> Float[Tensor, "*N V"]:
        """The same of the stored matrix alone."""
        return linear(hidden, self.head_weight)

    def whole_head(self, dtype: torch.dtype) -> Float[Tensor, "V D"]:
        """The matrix that makes the logits, factors included, for a loss that wants it in one piece."""
        return corrected(self.stored_head(dtype), factors_of(self.head_lora))

    def stored_head(self, dtype: torch.dtype) -> Float[Tensor, "V D"]:
        """The same without factors."""
        return self.head_weight.to(dtype)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.norm.weight.device

    @property
    def activation_dtype(self) -> torch.dtype:
        """The type of intermediate results, and of cached keys and values unless `kv_dtype` names another.

        That of the norms, whatever the precision of the matrices.
        """
        return self.model.norm.weight.dtype

    @property
    def head_weight(self) -> Any:
        """The matrix of the output head: a tensor [V, D], or `PackedMatrices` where it is in few bits."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return head.weight

    def forward(self, input_ids: Int[Tensor, "B S"]) -> ModelOutput:
        """B whole sequences at once, without state; documents restart as `config.packing` says."""
        hidden, routings = self.read(input_ids)
        return ModelOutput(self.logits(hidden), hidden, routings)

    def read(
        self, input_ids: Int[Tensor, "B S"], documents: Int[Tensor, "B S"] | None = None
    ) -> tuple[Float[Tensor, "B S D"], tuple[Routing, ...]]:
        """The same without the output head, for those who need few of its scores or none of them all at once.

        `documents` changes where a document begins; by default one does behind every `<eod>`.
        """
        hidden, routings = self.model(input_ids.flatten(), self.sequences(input_ids, documents))
        return hidden.view(*input_ids.shape, -1), routings

    def sequences(self, input_ids: Int[Tensor, "B S"], documents: Int[Tensor, "B S"] | None) -> WholeSequences:
        """How the tokens of `read` see their past."""
        config = self.config
        if documents is None and config.packing != "continuous":
            documents = documents_of(input_ids, config.eod_token_id)
        return WholeSequences(*input_ids.shape, device=input_ids.device, documents=documents, packing=config.packing)

    def new_cache(self, batch_size: int, capacity: int) -> Cache:
        """Room for as many sequences of up to `capacity` tokens, where and in what precision this model computes."""
        # Activations have the dtype of the norms, whatever the precision of the matrices.
        norm = self.model.norm.weight
        return Cache(self.config, batch_size, capacity, dtype=norm.dtype, kv_dtype=self.kv_dtype, device=norm.device)

    @torch.no_grad()
    def initialize(self) -> "CausalLM":
        """Random weights as published: N(0, 0.02), output projections scaled by 1 / sqrt(2 L), the filters as torch
        initializes convolutions: uniform within 1 / sqrt(inputs) (spec 1.3 and 6.2). Uses torch's global generator."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            elif "o_proj" in name or "down_proj" in name:
                parameter.normal_(0, std / math.sqrt(2 * self.config.num_hidden_layers))
            elif ".lfa." not in name:
                parameter.normal_(0, std)
        for module in self.modules():
            if isinstance(module, LocalizedFilter):
                module.conv1.reset_parameters()
                module.conv2.reset_parameters()
        return self
