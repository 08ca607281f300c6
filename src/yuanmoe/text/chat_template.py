"""The chat format as a Jinja template, for `tokenizer_config.json`: what transformers and vLLM render.

Source: the template published with the Janus models, `q1<n>a1<n>q2<sep>`. There `<n>` is typed out as three ordinary
tokens, while the training data had it replaced by a newline; `newline` chooses, a newline being what models saw.
Not here: our own rendering (`chat`), to which the template is equal.
"""

from typing import Literal

from yuanmoe.errors import UsageError

EOD, SEP, PAD = "<eod>", "<sep>", "<pad>"

Newline = Literal["newline", "literal"]

TURN_ENDS: dict[Newline, str] = {"newline": "\n", "literal": "<n>"}


def turn_end(newline: Newline) -> str:
    """The text between two turns. Raises UsageError for an unknown variant."""
    if newline not in TURN_ENDS:
        raise UsageError(f"newline is {newline!r}; it must be one of {', '.join(TURN_ENDS)}")
    return TURN_ENDS[newline]


def chat_template(newline: Newline = "newline") -> str:
    """Jinja source that renders `messages`; contents are not escaped, so `<eod>` in them is a special token."""
    escaped = turn_end(newline).replace("\n", r"\n")
    return (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}{{ message['content'] + '\\n' }}"
        "{%- elif message['role'] in ['user', 'assistant'] -%}"
        f"{{{{ message['content'].strip() + ('{SEP}' if loop.last else '{escaped}') }}}}"
        "{%- else -%}{{ raise_exception('unknown role ' + message['role']) }}"
        "{%- endif -%}"
        "{%- endfor -%}"
    )
