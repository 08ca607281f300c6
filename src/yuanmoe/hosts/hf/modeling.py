"""YuanModel and YuanForCausalLM for transformers, over the modules of `yuanmoe.model`.

This is a host: it turns padded batches into flat tokens, keeps transformers' books (hidden states, router logits, loss,
gradient checkpointing, tying) and calls the same layers as training and the engine. What `model/decoder.py` does
besides is the loop over the layers, which a host that checkpoints and records has to run itself.
Not here: names and shapes of the official files (`weights.py`), how tokens see their past (`sequences.py`).
Legend: B rows, S slots, N real tokens, D hidden, V vocabulary, E experts.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils.generic import can_return_tuple

from yuanmoe.errors import CheckpointError, UsageError
from yuanmoe.hosts.hf.configuration import YuanConfig
from yuanmoe.hosts.hf.sequences import CachedRows, Padding, check_cache, whole_sequences
from yuanmoe.model import decoder
from yuanmoe.model.linear import Linear
from yuanmoe.model.state.sequences import Sequences, documents_of
from yuanmoe.ops.rotary import rotary_tables

_HEAD = "lm_head.weight"


class YuanPreTrainedModel(PreTrainedModel):
    """What both models share: loading, initialization, and what transformers may ask of them."""

    config: YuanConfig
    config_class = YuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # noqa: RUF012
    # Attention is always torch's SDPA, which takes a flash kernel by itself where there is one.
    _supports_sdpa = True

    def __init__(self, config: YuanConfig) -> None:
        super().__init__(config)
        self.native_config = config.to_native()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Random weights as published for a new model; what was loaded stays."""
        parameters = list(self.parameters())
        if not any(getattr(parameter, "_is_hf_initialized", False) for parameter in parameters):
            decoder.CausalLM.initialize(self)  # pyright: ignore[reportArgumentType]
            for parameter in parameters:
                parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        super().initialize_weights()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but raises CheckpointError where that would invent tensors which the files lack."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        missing = set(info["missing_keys"])
        head = model.get_output_embeddings()
        if head is not None:
            if missing == {_HEAD}:  # a head that is absent is the embedding, whatever config.json says (spec 1.1)
                missing.clear()
                model.config.tie_word_embeddings = True
                model.tie_weights()
            model.config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight
        if missing:
            raise CheckpointError(
                f"{model.config.name_or_path} lacks {len(missing)} tensors of the model, such as {min(missing)}; "
                "the files are incomplete, or config.json belongs to another model"
            )
        return (model, info) if output_loading_info else model


class YuanModel(YuanPreTrainedModel):
    """The decoder without a head: padded token ids in, hidden states [B, S, D] out."""

    def __init__(self, config: YuanConfig) -> None:
        super().__init__(config)
        native = decoder.Decoder(self.native_config)
        self.embed_tokens, self.layers, self.norm = native.embed_tokens, native.layers, native.norm
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,  # noqa: ARG002 - transformers passes what some model wants
    ) -> MoeModelOutputWithPast:
        """`attention_mask` is [B, past + S], 0 at padding, which may stand anywhere; results at padding are zero.

        `position_ids` that restart, without mask and cache, are documents that do not see each other. `<eod>` restarts
        what `packing` says where there is no cache; with one, a row is one document.
        """
        config = self.config
        if output_attentions or config.output_attentions:
            raise UsageError("attention weights are never formed, so output_attentions cannot be true")
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("give either input_ids or inputs_embeds")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache)
        padding, sequences = self._placed(embeds, cache, input_ids, attention_mask, position_ids)
        positions = sequences.positions
        if position_ids is not None:
            positions = padding.pack(position_ids.expand(padding.batch))
        rotary = self._rotary(positions)
        wants_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_routes = config.output_router_logits if output_router_logits is None else output_router_logits
        states, routes = [], []
        x = padding.pack(embeds)
        for layer in self.layers:
            if wants_states:
                states.append(padding.unpack(x))
            x, logits = self._run(layer, x, sequences, rotary)
            if wants_routes and logits is not None:
                routes.append(padding.unpack(logits).flatten(0, 1))
        hidden = padding.unpack(self.norm(x))
        return MoeModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*states, hidden) if wants_states else None,
            router_logits=tuple(routes) if wants_routes else None,
        )

    def _placed(
        self,
        embeds: Tensor,
        cache: Cache | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> tuple[Padding, Sequences]:
        """Where the tokens are in the batch, and how they see their past."""
        B, S, _ = embeds.shape
        config, packing = self.native_config, self.native_config.packing
        padding = Padding(attention_mask, (B, S), 0 if cache is None else cache.get_seq_length(), embeds.device)
        if cache is not None:
            return padding, CachedRows(cache, padding)
        documents = None
        if packing != "continuous":
            if input_ids is None:
                raise UsageError(f"packing {packing!r} finds documents by their <eod>; give input_ids")
            documents = documents_of(input_ids, config.eod_token_id)
        elif position_ids is not None and attention_mask is None:
            restarts = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
            documents, packing = restarts.cumsum(1).expand(B, S), "isolated"
        return padding, whole_sequences(padding, documents, packing)

    def _run(
        self, layer: nn.Module, x: Tensor, sequences: Sequences, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(_layer_output, layer, x, sequences, rotary)
        return _layer_output(layer, x, sequences, rotary)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        config = self.native_config
        return rotary_tables(positions, config.rotary_dim, config.rope_theta, config.rope_angles)

    def _cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        """The memory of this pass. Nobody asked for one in training, nor where documents restart."""
        if given is not None:
            if self.gradient_checkpointing and self.training:
                raise UsageError("gradient checkpointing runs layers twice, so it takes no past_key_values")
            check_cache(given, len(self.layers), self.native_config.localized_filtering)
            return given
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and self.native_config.packing == "continuous"
        if not use_cache or (self.gradient_checkpointing and self.training):
            return None
        return DynamicCache(config=self.config)


def _layer_output(
    layer: nn.Module, x: Tensor, sequences: Sequences, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor | None]:
    # Reentrant checkpointing passes gradients through a tuple of tensors, not through a Routing within it.
    x, routing = layer(x, sequences, rotary)
    return x, None if routing is None else routing.logits


class YuanForCausalLM(YuanPreTrainedModel, GenerationMixin):
    """The model with its output head: logits [B, S, V], loss, and `generate`."""

    _tied_weights_keys = {_HEAD: "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: YuanConfig) -> None:
        super().__init__(config)
        self.model = YuanModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As `YuanModel.forward`; `labels` [B, S] are shifted here, -100 is ignored.

        `logits_to_keep`: the last so many slots (0: all), indices of slots, or [B, S] booleans, which give [kept, V].
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(_kept(outputs.last_hidden_state, logits_to_keep))
        loss = balance = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            if outputs.router_logits:
                balance = self._imbalance(outputs.router_logits, attention_mask)
                # The released models were trained without; whoever wants it sets config.router_aux_loss_coef.
                loss = loss + getattr(self.config, "router_aux_loss_coef", 0.0) * balance.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=balance,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits,
        )

    def _imbalance(self, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
        """The load-balancing loss of arXiv 2101.03961, mean of the layers, which may have different experts."""
        chosen = self.model.native_config.num_experts_per_tok
        layers = [load_balancing_loss_func((p,), p.shape[1], chosen, attention_mask) for p in router_logits]
        return torch.stack([torch.as_tensor(loss, device=router_logits[0].device) for loss in layers]).mean()


def _kept(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:]
    if logits_to_keep.ndim == 1:
        return hidden[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden[logits_to_keep]
    return hidden.take_along_dim(logits_to_keep[..., None], dim=1)
