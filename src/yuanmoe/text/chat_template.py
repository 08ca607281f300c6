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
    """Jinja source that renders `messages`; contents are not escaped, so `<eod>` in them is a special token.

    Contents are text, nothing, or parts of type `text`. The models know three roles: `developer` is the system, the
    result of a `tool` is said by the user, and calls of tools are text of the assistant, as `yuanmoe serve` writes
    them.
    """
    lines = _TEMPLATE.replace("TURN_END", turn_end(newline).replace("\n", r"\n")).splitlines()
    return "".join(line.strip() for line in lines)


_TEMPLATE = r"""
{%- for message in messages -%}
  {%- set content = message.get('content') -%}
  {%- if content is none -%}{%- set text = '' -%}
  {%- elif content is string -%}{%- set text = content -%}
  {%- elif content | rejectattr('type', 'equalto', 'text') | list -%}
    {{ raise_exception('only parts of type text can be read') }}
  {%- else -%}{%- set text = content | map(attribute='text') | join -%}
  {%- endif -%}
  {%- if message['role'] in ['system', 'developer'] -%}{{ text + '\n' }}
  {%- elif message['role'] in ['user', 'assistant', 'tool'] -%}
    {%- if message['role'] == 'tool' -%}{%- set text = '<tool_result>' + text + '</tool_result>' -%}{%- endif -%}
    {%- set said = namespace(parts=[text] if text else []) -%}
    {%- for call in message.get('tool_calls') or [] -%}
      {%- set function = call.get('function') or call -%}
      {%- set arguments = function.get('arguments') or {} -%}
      {%- if arguments is not string -%}{%- set arguments = arguments | tojson -%}{%- endif -%}
      {%- set name = function['name'] | tojson -%}
      {%- set arguments = arguments.strip() or '{}' -%}
      {%- set body = '{"name": ' + name + ', "arguments": ' + arguments + '}' -%}
      {%- set said.parts = said.parts + ['<tool_call>' + body + '</tool_call>'] -%}
    {%- endfor -%}
    {{ (said.parts | join('\n')).strip() + ('<sep>' if loop.last else 'TURN_END') }}
  {%- else -%}{{ raise_exception('unknown role ' + message['role']) }}
  {%- endif -%}
{%- endfor -%}
"""
"""Joined without what stands at the ends of its lines."""
