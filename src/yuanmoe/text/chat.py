"""Conversations in the format that Yuan's instruction models were tuned on: `question<sep>`, turns joined by newlines.

Sources: the template published with the Janus models, and the formats of IEIT-Yuan/Yuan2.0-M32 (docs/data_process.md).
The format has one special token, the last `<sep>`; turns are told apart by newlines alone, which contents may hold too.
Not here: the Jinja form of the same format (`chat_template`), the loss mask of fine-tuning (`finetuning`).
"""

from collections.abc import Mapping, Sequence

from yuanmoe.errors import UsageError
from yuanmoe.text.chat_template import SEP, Newline, turn_end
from yuanmoe.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")

Message = Mapping[str, object]
"""`{"role": "user", "content": "..."}`, as in the OpenAI API; contents may be lists of text parts."""

AS_ROLES = {"developer": "system", "tool": "user"}
"""Roles of the OpenAI API that the models do not know, and what they are to them."""


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, newline: Newline = "newline") -> list[int]:
    """Ids of a conversation that waits for its answer. Special strings in contents are plain text.

    Raises UsageError when there is no such conversation in `messages`.
    """
    return [*tokenizer.encode(_render(messages, newline), allow_special=False), tokenizer.sep_id]


def render_chat(messages: Sequence[Message], *, newline: Newline = "newline") -> str:
    """The conversation as text, for display and logs. Do not tokenize it: contents could contain special tokens."""
    return _render(messages, newline) + SEP


def _render(messages: Sequence[Message], newline: Newline) -> str:
    return "".join(render_turns(plain_messages(messages), newline=newline))


def plain_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages as clients write them, in the roles that the models know and with one text each.

    Contents may be nothing or a list of text parts; a developer is the system, and the result of a tool is a user's
    text between `<tool_result>` marks. Raises UsageError for what is no list of messages and for parts that are no
    text.
    """
    if isinstance(messages, str | Mapping):
        raise UsageError("a conversation is a list of messages: [{'role': 'user', 'content': '...'}]")
    return [_plain(place, message) for place, message in enumerate(messages, start=1)]


def _plain(place: int, message: Message) -> Message:
    if not isinstance(message, Mapping):
        raise UsageError(f"message {place} is a {type(message).__name__}; it must be a dict with role and content")
    role, content = message.get("role"), message.get("content")
    if content is None and "content" in message:
        content = ""
    if isinstance(content, list | tuple):
        content = "".join(_text_of(place, part) for part in content)
    if role == "tool":
        content = f"<tool_result>{content}</tool_result>"
    return {"role": AS_ROLES.get(role, role) if isinstance(role, str) else role, "content": content}


def _text_of(place: int, part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise UsageError(f"message {place} has a part that is no text; parts are {{'type': 'text', 'text': '...'}}")
    return text


def render_turns(messages: Sequence[Message], *, newline: Newline = "newline") -> list[str]:
    """The text of each message: system contents with a newline, the others stripped, with `newline` but the last.

    Raises UsageError when there is no conversation that waits for its answer in `messages`.
    """
    end = turn_end(newline)
    if not messages:
        raise UsageError("the conversation has 0 messages; it needs at least 1, from the user")
    if isinstance(messages, str):
        raise UsageError('the conversation is a text; give messages: [{"role": "user", "content": "..."}]')
    roles = [_role(place, message) for place, message in enumerate(messages, start=1)]
    contents = [_content(place, message) for place, message in enumerate(messages, start=1)]
    if roles[-1] != "user" or not contents[-1].strip():
        raise UsageError(
            f"message {len(messages)}, the last one, is from {roles[-1]!r} and has "
            f"{len(contents[-1].strip())} characters; the last message must be from 'user' and hold text"
        )
    turns = [
        content + "\n" if role == "system" else content.strip() + end
        for role, content in zip(roles[:-1], contents[:-1], strict=True)
    ]
    return [*turns, contents[-1].strip()]


def _role(place: int, message: Message) -> str:
    if not isinstance(message, Mapping):
        raise UsageError(f'message {place} is of type {type(message).__name__}; write {{"role": ..., "content": ...}}')
    role = message.get("role")
    if role == "developer":
        return "system"
    if not isinstance(role, str) or role not in ROLES:
        raise UsageError(f"message {place} has the role {role!r}; it must be one of {', '.join(ROLES)}")
    return role


def _content(place: int, message: Message) -> str:
    """The text of a message, the parts of one that has several joined."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(_part(place, part) for part in content)
    if not isinstance(content, str):
        raise UsageError(f"message {place} has content of type {type(content).__name__}; it must be text")
    return content


def _part(place: int, part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise UsageError(f'message {place} has a part that is no text; write {{"type": "text", "text": "..."}}')
    return text
