"""Which rotary settings a model's weights want: a text's likelihood under each, compared token by token.

M32 was pre-trained with base 10000 and fine-tuned and evaluated with 40890 (arXiv 2405.17976 section 4.2), while every
released runtime uses 10000, and the released HF code rounds angles to bfloat16. Weights work best under the angles they
were trained with, so a text can tell. Only the settings change between runs, never the weights.

The same tokens are scored under every setting, so the differences are paired. Neighbouring tokens are not independent:
standard errors are those of means over blocks of tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yuanmoe.config import RopeAngles
from yuanmoe.evals.reading import configured, losses, text_windows
from yuanmoe.model.decoder import CausalLM

BASES = (10000.0, 40890.0)
BLOCK_TOKENS = 32
MIN_BLOCKS = 8
"""From fewer blocks no spread can be told."""
CERTAIN = 3.0
"""Standard errors between two settings from which on one of them is called better."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Setting:
    """One way to rotate."""

    rope_theta: float
    rope_angles: RopeAngles

    def __str__(self) -> str:
        return f"base {base_name(self.rope_theta)}, {self.rope_angles} angles"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How many nats a token one setting loses against another."""

    mean: float
    standard_error: float
    tokens: int

    @property
    def certainty(self) -> float:
        """In standard errors."""
        if self.standard_error == 0:
            return math.inf if self.mean > 0 else 0.0
        return self.mean / self.standard_error

    @property
    def clear(self) -> bool:
        return self.certainty > CERTAIN

    @property
    def more_tokens(self) -> int | None:
        """About how many more tokens would make it clear if it stays; None if there is no difference to make clear."""
        if self.mean <= 0:
            return None
        wanted = self.tokens * (CERTAIN * self.standard_error / self.mean) ** 2
        return max(0, _round_up(wanted - self.tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a text says about the weights; None for a setting that it leaves open."""

    rope_theta: float | None
    rope_angles: RopeAngles | None
    more_tokens: int | None
    """About how many more would settle what is open; None if nothing is, or if it cannot be said."""
    text: str


def settings_of(model: CausalLM) -> list[Setting]:
    """The settings worth trying: the released bases and the model's own, each with both precisions."""
    bases = sorted({*BASES, float(model.config.rope_theta)})
    angles: tuple[RopeAngles, ...] = ("float32", "bfloat16")
    return [Setting(rope_theta=base, rope_angles=precision) for base in bases for precision in angles]


def losses_by_setting(
    model: CausalLM, ids: Sequence[int], context: int, settings: Sequence[Setting]
) -> dict[Setting, Tensor]:
    """Nats of every token but the first under each setting."""
    parts: dict[Setting, list[Tensor]] = {setting: [] for setting in settings}
    for window in text_windows(ids, context):
        for setting in settings:
            with configured(model, rope_theta=setting.rope_theta, rope_angles=setting.rope_angles):
                parts[setting].append(losses(model, window, context))
    return {setting: torch.cat(pieces) for setting, pieces in parts.items()}


def difference(worse: Tensor, better: Tensor) -> Difference:
    """The paired difference of two settings' losses."""
    paired = (worse - better).double()
    blocks = paired[: len(paired) // BLOCK_TOKENS * BLOCK_TOKENS].view(-1, BLOCK_TOKENS).mean(dim=1)
    error = (blocks.std() / math.sqrt(len(blocks))).item() if len(blocks) >= MIN_BLOCKS else math.inf
    return Difference(mean=paired.mean().item(), standard_error=error, tokens=len(paired))


def best_of(losses: dict[Setting, Tensor]) -> Setting:
    """The setting under which the text is likeliest; in doubt the first."""
    return min(losses, key=lambda setting: losses[setting].mean().item())


def judge(losses: dict[Setting, Tensor]) -> Verdict:
    """First which base, each with the precision that suits it best; then, for that base, which precision."""
    best = best_of(losses)
    tokens, enough = len(losses[best]), MIN_BLOCKS * BLOCK_TOKENS
    if tokens < enough:
        text = f"The text is too short to tell: {tokens:,} tokens were scored, at least {enough:,} are needed."
        return Verdict(rope_theta=None, rope_angles=None, more_tokens=enough - tokens, text=text)
    rival, apart = _closest(best, _rivals(losses, best), losses)
    bases = base_name(best.rope_theta), base_name(rival.rope_theta)
    if not apart.clear:
        text = f"The text is too short to tell RoPE base {bases[0]} from {bases[1]}: {_needs(apart)}"
        return Verdict(rope_theta=None, rope_angles=None, more_tokens=apart.more_tokens, text=text)
    text = f"These weights want RoPE base {bases[0]}: with {bases[1]} a token costs {_nats(apart)} more."
    same_base = [setting for setting in losses if setting.rope_theta == best.rope_theta and setting != best]
    rounding, apart = _closest(best, same_base, losses)
    if not apart.clear:
        text += f" The text is too short to tell the precisions of the angles apart: {_needs(apart)}"
        return Verdict(rope_theta=best.rope_theta, rope_angles=None, more_tokens=apart.more_tokens, text=text)
    text += f" They want {best.rope_angles} angles: with {rounding.rope_angles} ones it costs {_nats(apart)} more."
    return Verdict(rope_theta=best.rope_theta, rope_angles=best.rope_angles, more_tokens=None, text=text)


def _rivals(losses: dict[Setting, Tensor], best: Setting) -> list[Setting]:
    """The best setting of every other base."""
    bases = {setting.rope_theta for setting in losses} - {best.rope_theta}
    return [best_of({s: loss for s, loss in losses.items() if s.rope_theta == base}) for base in sorted(bases)]


def _closest(best: Setting, others: Sequence[Setting], losses: dict[Setting, Tensor]) -> tuple[Setting, Difference]:
    """The one of `others` that `best` is least certainly better than."""
    differences = {other: difference(losses[other], losses[best]) for other in others}
    return min(differences.items(), key=lambda item: item[1].certainty)


def base_name(theta: float) -> str:
    """`10000` for 10000.0."""
    return f"{theta:.10g}"


def _nats(apart: Difference) -> str:
    return f"{apart.mean:.4f} +- {apart.standard_error:.4f} nats"


def _needs(apart: Difference) -> str:
    if apart.more_tokens is None:
        return "they make no difference at all."
    return f"they differ by {_nats(apart)} a token. About {apart.more_tokens:,} more tokens would, if it stays so."


def _round_up(number: float) -> int:
    """To two digits."""
    if number <= 0:
        return 0
    unit = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit
