"""The official config.json as transformers sees it: every official key is an attribute and is written back as it was.

`checkpoint/formats/official_config.py` alone knows what the keys mean; `YuanConfig.to_native` asks it.
"""

from typing import Any

from transformers import PreTrainedConfig

from yuanmoe.checkpoint.formats.official_config import official_fields
from yuanmoe.config import ModelConfig
from yuanmoe.errors import ConfigError

_RELEASED = official_fields({})
"""What the released configuration class assumes where a key is absent."""

_COMMON_KEYS = frozenset(PreTrainedConfig().to_dict())
"""What transformers itself writes into every config.json."""

_OURS = ("ignore_unknown", "rope_theta", "yuanmoe")


class YuanConfig(PreTrainedConfig):
    """Keys of spec 3.2 and 3.3, and `yuanmoe`: fields of `ModelConfig` that no official key can say.

    `from_pretrained(path, rope_theta=40890.0)` and `from_pretrained(path, yuanmoe={"rope_angles": "bfloat16"})` change
    what is computed. Raises ConfigError for a GPTQ directory, and for unknown keys unless `ignore_unknown`.
    """

    model_type = "yuan"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = _RELEASED["vocab_size"]
    hidden_size: int = _RELEASED["hidden_size"]
    intermediate_size: int = _RELEASED["intermediate_size"]
    num_hidden_layers: int = _RELEASED["num_hidden_layers"]
    num_attention_heads: int = _RELEASED["num_attention_heads"]
    max_position_embeddings: int = _RELEASED["max_position_embeddings"]
    rms_norm_eps: float = _RELEASED["rms_norm_eps"]
    initializer_range: float = _RELEASED["initializer_range"]
    tie_word_embeddings: bool = _RELEASED["tie_word_embeddings"]
    rope_theta: float | None = None
    bos_token_id: int | None = _RELEASED["eod_token_id"]
    eos_token_id: int | list[int] | None = _RELEASED["eod_token_id"]
    pad_token_id: int | None = _RELEASED["pad_token_id"]
    use_cache: bool = True
    output_router_logits: bool = False
    yuanmoe: dict[str, Any] | None = None
    ignore_unknown: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # It names files that are not beside what we save, and code that nobody needs any more.
        kwargs.pop("auto_map", None)
        packing = kwargs.get("quantization_config")
        if isinstance(packing, dict) and packing.get("quant_method") == "gptq":
            raise ConfigError(
                f"these are GPTQ weights of {packing.get('bits')} bits, which transformers cannot read in Yuan's "
                "layout; write them as an official checkpoint first: yuanmoe convert"
            )
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """What a `DynamicCache(config=...)` keeps of each layer: "hybrid" is keys, values and the tails of LFA."""
        filtered = (self.yuanmoe or {}).get("localized_filtering", True)
        return ["hybrid" if filtered else "full_attention"] * self.num_hidden_layers

    @property
    def number_of_conv_states(self) -> int:
        """The filter's input and the output of its first convolution."""
        return 2

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json: official keys, and ours only where they say something."""
        values = super().to_diff_dict()
        said = {key: value for key, value in values.items() if value or key not in _OURS}
        # Before its version 5, transformers read `torch_dtype`; so do engines of that time.
        return said | ({"torch_dtype": values["dtype"]} if "dtype" in values else {})

    def to_native(self) -> ModelConfig:
        """The same in our terms. Raises ConfigError for an unknown key or numbers that describe no model."""
        own = {key: value for key, value in self.to_dict().items() if key not in _COMMON_KEYS}
        ignore_unknown = own.pop("ignore_unknown")
        return ModelConfig.from_dict(official_fields(own, ignore_unknown=ignore_unknown))
