"""A small language model for tests: random weights, a BPE tokenizer, and both in a native checkpoint."""

from pathlib import Path

from small_models import random_model, small_config
from small_tokenizers import bpe
from yuanmoe.checkpoint.write.save import save_native
from yuanmoe.config import ModelConfig
from yuanmoe.lm import LanguageModel
from yuanmoe.text.tokenizer import Tokenizer


def lm_config(tokenizer: Tokenizer, **changes) -> ModelConfig:
    """A configuration for a tokenizer; the model has more rows than it, as the released ones do."""
    values = {
        "vocab_size": tokenizer.vocab_size + 8,
        "eod_token_id": tokenizer.eod_id,
        "sep_token_id": tokenizer.sep_id,
        "pad_token_id": tokenizer.pad_id,
    }
    return small_config(**values | changes)


def small_lm(**changes) -> LanguageModel:
    return LanguageModel(random_model(lm_config(bpe(), **changes)), bpe())


def write_lm(folder: Path, **changes) -> LanguageModel:
    """The same, saved in `folder`."""
    lm = small_lm(**changes)
    save_native(lm.model.state_dict(), lm.config, folder)
    lm.tokenizer.save(folder)
    return lm
