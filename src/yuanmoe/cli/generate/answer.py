"""An answer on a terminal: streamed as it is made, kept whole when Ctrl-C cuts it short, measured afterwards.

Not here: what is asked (`generate.py`, `conversation.py`), colours (`experts.py`).
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from yuanmoe.cli.terminal.interrupt import Interrupt
from yuanmoe.cli.terminal.output import people
from yuanmoe.plan import cost
from yuanmoe.plan.device.machine import measure_bandwidth
from yuanmoe.units import MIB, format_count

if TYPE_CHECKING:
    from yuanmoe.lm import Completion, LanguageModel, Stream

CACHED_BYTES = 256 * MIB
"""A model that reads less for a token may sit in the processor's caches, and memory then bounds nothing."""

# What a model says is a stranger's text: an escape sequence in it could retitle the terminal or write its clipboard.
_CONTROLS = {code: f"^{chr(code ^ 64)}" for code in (*range(32), 127) if chr(code) not in "\n\t"}
_CONTROLS |= {code: f"\\x{code:02x}" for code in range(128, 160)}


def speak(stream: "Stream", write: Callable[[str], None]) -> bool:
    """Writes an answer as it comes, and what was held back at its end; whether it was all, and not cut by Ctrl-C."""
    try:
        with people().status("reading the prompt") as status, Interrupt() as interrupt:
            for piece in stream:
                status.stop()
                interrupt.graceful = True
                write(piece)
                if interrupt.requested:
                    break
            else:
                return True
    except KeyboardInterrupt:
        pass
    write(stream.finish())
    return False


def write(text: str) -> None:
    """What a model said, to stdout at once."""
    emit(visible(text))


def visible(text: str) -> str:
    """The text with control characters spelled out, where stdout is a terminal that would obey them."""
    return spelled_out(text) if sys.stdout.isatty() else text


def spelled_out(text: str) -> str:
    """The text with control characters, but newlines and tabs, as `^[` and the like."""
    return text.translate(_CONTROLS)


def emit(text: str) -> None:
    """To stdout at once, as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()


def statistics(completion: "Completion") -> str:
    """Tokens and rates in a line."""
    timing = completion.timing
    reading = f"prompt: {_tokens(completion.prompt_tokens)} in {timing.prefill_s:.2f} s"
    writing = f"answer: {_tokens(len(completion.ids))} in {timing.decode_s:.2f} s"
    return f"{reading}; {writing}, {timing.decode_tokens_per_s:,.1f} a second"


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"


def bandwidth_bound(lm: "LanguageModel", completion: "Completion") -> tuple[float, float] | None:
    """This machine's memory bandwidth in bytes a second, and the tokens a second that it allows, measured in a moment.

    None where another bound may be tighter: on a GPU, and for a model that the caches hold.
    """
    norm = lm.model.model.norm.weight
    context = completion.prompt_tokens + len(completion.ids) // 2
    kv_dtype = lm.model.kv_dtype
    kv_bits = 8 if kv_dtype is not None and kv_dtype.itemsize == 1 else 16
    precision = lm.precision or cost.precision(16)
    bytes_read = cost.decode_bytes(lm.config, precision, context=context, kv_bits=kv_bits)
    if lm.precision is None:
        bytes_read *= norm.dtype.itemsize / cost.STATE_BYTES
    if norm.device.type != "cpu" or bytes_read < CACHED_BYTES:
        return None
    bandwidth = measure_bandwidth(rounds=3).median
    return bandwidth, bandwidth / bytes_read


def bound_note(bandwidth: float, bound: float, rate: float) -> str:
    """A rate beside its bound."""
    return f"{rate / bound:.0%} of the {bound:,.1f} that {format_count(bandwidth, 'B/s')} of memory bandwidth allow"
