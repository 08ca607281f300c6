"""The door to transformers: after `import yuanmoe.hf`, its Auto classes open Yuan checkpoints (code: `hosts/hf/`)."""

from yuanmoe.hosts.hf import YuanConfig, YuanForCausalLM, YuanModel, YuanTokenizer

__all__ = ["YuanConfig", "YuanForCausalLM", "YuanModel", "YuanTokenizer"]
