"""Records of the common shapes of conversations, checked, as turns: who wrote what, and whether it is to be learned.

`chat` is OpenAI's shape (`messages`) or a `prompt` and its `completion`; `alpaca` has `instruction`, `input` and
`output` (Stanford Alpaca); `sharegpt` has `conversations` of `from` and `value` (FastChat). All become the same turns.
Not here: tokens and the loss mask (`finetuning.py`), files (`records.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from yuanmoe.errors import UsageError
from yuanmoe.text.chat import ROLES, Message

ConversationShape = Literal["chat", "alpaca", "sharegpt"]

COLUMNS: dict[ConversationShape, tuple[str, ...]] = {
    "chat": ("messages", "prompt", "completion"),
    "alpaca": ("instruction", "input", "output"),
    "sharegpt": ("conversations",),
}
"""What a record of each shape is read from; a table has at least one of them."""
FURTHER_COLUMNS: dict[ConversationShape, tuple[str, ...]] = {
    "chat": ("weight", "train"),
    "alpaca": ("system", "history", "weight", "train"),
    "sharegpt": ("system", "weight", "train"),
}

LEARN_KEYS = ("weight", "train", "training", "trainable", "loss")
"""Of a message: 0 or false leaves it out of what is learned. OpenAI, axolotl and ms-swift write these."""
RECORD_LEARN_KEYS = ("weight", "train")
REFUSED_KEYS = (
    *("mask", "masked", "loss_mask", "loss_weight", "loss_scale", "train_detail", "training_detail"),
    *("tool_calls", "function_call"),
)
"""Of a message: to ignore these would teach something else than the author meant."""

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bing", "bard"), "assistant"),
    "system": "system",
}

SHOWN = 80
"""Characters of a value, at most, in a message."""


class Turn(NamedTuple):
    """One message, checked."""

    role: str
    text: str
    learned: bool
    """Whether it is an answer that the model shall learn to write."""


def conversation_of(record: Mapping[str, Any], shape: ConversationShape = "chat") -> list[Turn]:
    """The checked turns of a record. Raises UsageError where it is no conversation to learn from."""
    turns = turns_of(messages_of(record, shape))
    if _learn_choice("the record", record, RECORD_LEARN_KEYS) is False:
        return [turn._replace(learned=False) for turn in turns]
    return turns


def messages_of(record: Mapping[str, Any], shape: ConversationShape = "chat") -> list[Message]:
    """The conversation of a record as messages, whose contents are not yet checked.

    Raises UsageError for a record that has none.
    """
    if shape == "alpaca":
        return [*_system(record), *_alpaca(record)]
    if shape == "sharegpt":
        return [*_system(record), *map(_of_sharegpt, _objects(record, "conversations", shape))]
    if record.get("messages"):
        return _objects(record, "messages", shape)
    if "prompt" in record and "completion" in record:
        return [
            {"role": "user", "content": content_text(record["prompt"], "prompt")},
            {"role": "assistant", "content": content_text(record["completion"], "completion")},
        ]
    raise _other_shape(record, shape, "messages (a list of objects), or prompt and completion")


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """Messages as turns that end with a question and its answer.

    Raises UsageError with the number of the message that is not text, not from a known role, or out of place.
    """
    turns = [_turn(place, message) for place, message in enumerate(messages, 1)]
    if not turns or turns[-1].role != "assistant" or not turns[-1].text.strip():
        last = repr(turns[-1].role) + ("" if turns[-1].text.strip() else " and is empty") if turns else "nobody"
        raise UsageError(
            f"message {len(turns)}, the last one, is from {last}; a conversation to learn from must end with text "
            "from 'assistant'"
        )
    asked = turns[-2] if len(turns) > 1 else None
    if asked is None or asked.role != "user" or not asked.text.strip():
        found = f"message {len(turns) - 1} is from {asked.role!r}" if asked else "the answer is the first message"
        found += " and is empty" if asked and not asked.text.strip() else ""
        raise UsageError(f"{found}; the last answer must follow text from 'user'")
    return turns


def content_text(content: object, what: str) -> str:
    """The text of a content: a string, or text parts, joined as the server does.

    Raises UsageError for everything else: null, numbers, booleans, pictures.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        kind = "null" if content is None else type(content).__name__
        kind += f" ({str(content)[:SHOWN]})" if isinstance(content, dict) else ""
        raise UsageError(f"{what} has content of type {kind}; it must be text")
    texts: list[str] = []
    for number, part in enumerate(content, 1):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            kind = repr(part.get("type")) if isinstance(part, dict) else type(part).__name__
            raise UsageError(
                f'{what} has a part {number} of type {kind}; parts must be {{"type": "text", "text": "..."}}'
            )
        texts.append(text)
    return "".join(texts)


def _turn(place: int, message: Message) -> Turn:
    what, role = f"message {place}", message.get("role")
    role = "system" if role == "developer" else role
    if not isinstance(role, str) or role not in ROLES:
        raise UsageError(f"{what} has the role {repr(role)[:SHOWN]}; it must be one of {', '.join(ROLES)}")
    for key in REFUSED_KEYS:
        if message.get(key):
            raise UsageError(f"{what} has {key}, which has no counterpart here; write what is said as content")
    text = content_text(message.get("content"), what)
    choice = _learn_choice(what, message, LEARN_KEYS)
    if choice and role != "assistant":
        raise UsageError(f"{what} is from {role!r} and asks to be learned; only answers of 'assistant' are")
    return Turn(role, text, role == "assistant" and choice is not False)


def _learn_choice(what: str, values: Mapping[str, Any], keys: Sequence[str]) -> bool | None:
    """What a message or record says about being learned; None where it says nothing."""
    given = {key: values[key] for key in keys if values.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UsageError(
                f"{what} has the {key} {repr(value)[:SHOWN]}; it must be 1 (true, learned) or 0 (false, not learned)"
            )
    if len(choices := {bool(value) for value in given.values()}) > 1:
        raise UsageError(f"{what} has {' and '.join(given)} that contradict each other")
    return choices.pop() if choices else None


def _objects(record: Mapping[str, Any], field: str, shape: ConversationShape) -> list[Message]:
    found = record.get(field)
    if not found:
        raise _other_shape(record, shape, field)
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise UsageError(f"{field} must be a list of objects, one for each message")
    return found


def _system(record: Mapping[str, Any]) -> list[Message]:
    content = record.get("system")
    text = "" if content is None else content_text(content, "system")
    return [{"role": "system", "content": text}] if text.strip() else []


def _alpaca(record: Mapping[str, Any]) -> list[Message]:
    if "instruction" not in record or "output" not in record:
        raise _other_shape(record, "alpaca", "instruction and output (input may be missing)")
    pairs = record.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UsageError("history must be a list of pairs, a question and its answer")
    given = record.get("input")
    question = content_text(record["instruction"], "instruction")
    if given is not None and (material := content_text(given, "input")).strip():
        question = f"{question.strip()}\n{material}"
    turns = [*pairs, [question, content_text(record["output"], "output")]]
    return [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _of_sharegpt(message: Message) -> Message:
    """The same message with OpenAI's names."""
    author = message.get("from", message.get("role"))
    role = SHAREGPT_ROLES.get(author, author) if isinstance(author, str) else author
    return {**message, "role": role, "content": message.get("value", message.get("content"))}


def _other_shape(record: Mapping[str, Any], shape: ConversationShape, needed: str) -> UsageError:
    others = [other for other in COLUMNS if other != shape and record.get(COLUMNS[other][0])]
    hint = f"; it looks like --format {others[0]}" if others else ""
    empty = ", messages is empty" if shape == "chat" and record.get("messages") == [] else ""
    return UsageError(f"a conversation needs {needed}; this one has {', '.join([*record][:20])}{empty}{hint}")
