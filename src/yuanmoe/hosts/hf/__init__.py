"""Importing this makes transformers know Yuan: `AutoModelForCausalLM.from_pretrained(directory)` opens an official
checkpoint without trust_remote_code, and `generate`, `save_pretrained` and PEFT work on it. `AutoTokenizer` gives its
tokenizer with the ids that it was trained on.

An extra: nothing else in this package needs transformers.
"""

from importlib.metadata import PackageNotFoundError, version

from yuanmoe.errors import MissingExtraError

OLDEST = (5, 17)
"""The first transformers whose caches hold two convolution states a layer and can be cropped by it."""

_HOW = 'pip install "yuanmoe[hf]"'

try:
    _INSTALLED = version("transformers")
except PackageNotFoundError:
    raise MissingExtraError(f"yuanmoe.hf needs transformers, which is not installed: {_HOW}") from None
if tuple(map(int, _INSTALLED.split(".")[:2])) < OLDEST:
    raise MissingExtraError(f"yuanmoe.hf needs transformers {OLDEST[0]}.{OLDEST[1]}, {_INSTALLED} is installed: {_HOW}")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.conversion_mapping import register_checkpoint_conversion_mapping  # noqa: E402
from transformers.models.auto import tokenization_auto  # noqa: E402

from yuanmoe.hosts.hf.configuration import YuanConfig  # noqa: E402
from yuanmoe.hosts.hf.modeling import YuanForCausalLM, YuanModel  # noqa: E402
from yuanmoe.hosts.hf.tokenizer import YuanTokenizer  # noqa: E402
from yuanmoe.hosts.hf.weights import conversions  # noqa: E402

__all__ = ["YuanConfig", "YuanForCausalLM", "YuanModel", "YuanTokenizer"]

AutoConfig.register(YuanConfig.model_type, YuanConfig)
AutoModel.register(YuanConfig, YuanModel)
AutoModelForCausalLM.register(YuanConfig, YuanForCausalLM)
AutoTokenizer.register(YuanConfig, tokenizer_class=YuanTokenizer)
# Directories of Yuan models that name LlamaTokenizer, as the authors' scripts do, would get other ids in silence.
tokenization_auto.TOKENIZER_MAPPING_NAMES[YuanConfig.model_type] = YuanTokenizer.__name__
tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(YuanConfig.model_type)
for _model in (YuanModel, YuanForCausalLM):
    register_checkpoint_conversion_mapping(_model.__name__, conversions())
