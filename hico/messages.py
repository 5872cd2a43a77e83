"""Chat messages as people write them: brought into one form, and asked what they show."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Message = dict[str, Any]
SOURCES = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}
"""Kind of a part -> the keys that may hold what it shows, as transformers has them."""


def normalize(conversation: Sequence[Any]) -> tuple[list[list[Message]], bool]:
    """Bring conversations into the form that chat templates take, as transformers does.

    Keys whose value is None are left out, and parts in the words of OpenAI's interface, ``image_url`` and
    ``video_url``, become parts with a ``url``.

    Args:
        conversation: messages, or a list of such lists.

    Returns:
        Conversations, and whether several were given.

    Raises:
        ValueError: if there is no message, or one is not a mapping with text or a list of parts as its content.
    """
    if not len(conversation):
        raise ValueError("the conversation has no messages; give at least one")
    is_batch = not isinstance(conversation[0], Mapping)
    return [[_message(m) for m in messages] for messages in (conversation if is_batch else [conversation])], is_batch


def media_parts(messages: Iterable[Message]) -> list[Message]:
    """Return the videos and images of a conversation, in order."""
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    return [part for content in contents for part in content if part["type"] in SOURCES]


def source_of(part: Message) -> tuple[Any, dict[str, Any]]:
    """Return what a video or image part shows, and its other settings.

    Raises:
        ValueError: if it names no source, or several.
    """
    kind = part["type"]
    found = [key for key in SOURCES[kind] if key in part]
    if not found:
        raise ValueError(f"the {kind} part {part} names no file; give it a 'path'")
    if len(found) > 1:
        raise ValueError(f"the {kind} part names {' and '.join(found)}; give it one of them")
    return part[found[0]], {key: value for key, value in part.items() if key not in ("type", found[0])}


def mentions(template: str, name: str) -> bool:
    """Say whether a chat template has a variable or key of this name."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"a message is {message!r}; it must be a mapping with 'role' and 'content'")
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content", "")
    if isinstance(content, (list, tuple)):
        message["content"] = [_part(part) for part in content]
    elif not isinstance(content, str):
        raise ValueError(f"the content of a message is {content!r}; it must be text or a list of parts")
    return message


def _part(part: Any) -> Message:
    if not isinstance(part, Mapping) or "type" not in part:
        raise ValueError(f"a part of a message is {part!r}; it must be a mapping with a 'type', such as 'text'")
    kind = part["type"]
    if kind in ("image_url", "video_url") and kind in part:
        address = part[kind]
        return {"type": kind.removesuffix("_url"), "url": address["url"] if isinstance(address, Mapping) else address}
    return dict(part)
