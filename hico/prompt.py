"""The text around the visual tokens: timestamp sentence, placeholders, and which tokens a model learns from."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
DEFAULT_SYSTEM_MESSAGE = "You are a helpful assistant."
IGNORE_INDEX = -100
ANSWER_MARKS = ("\ufdd0", "\ufdd1")
"""Stand around answers in a text until it is tokenized; Unicode keeps these characters out of all other text."""

CHAT_TEMPLATE = (
    "{%- macro body(message) -%}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'text' -%}{{- part.text -}}"
    "{%- elif part.type in ('video', 'image') -%}"
    "{{- '" + VIDEO_TOKEN + "' if part.type == 'video' else '" + IMAGE_TOKEN + "' -}}"
    "{%- if not loop.last -%}{{- '\n' -}}{%- endif -%}"
    "{%- else -%}{{- raise_exception('unknown content type ' + part.type + '; use text, image or video') -}}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endmacro -%}"
    "{%- if messages[0].role != 'system' -%}"
    "{{- '<|im_start|>system\n" + DEFAULT_SYSTEM_MESSAGE + "<|im_end|>\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- if message.role == 'assistant' -%}{%- generation -%}{{- body(message) -}}{%- endgeneration -%}"
    "{%- else -%}{{- body(message) -}}{%- endif -%}"
    "{{- '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""ChatML as Qwen2 speaks it; a newline follows a video or image, as in the data that the published models saw. What
an assistant says, its end token included, is marked as generated."""


def content_as_text(content: str | Sequence[Mapping[str, Any]]) -> str:
    """Write the parts of a turn as `CHAT_TEMPLATE` does: a newline follows a video or image."""
    if isinstance(content, str):
        return content
    signs = {"video": VIDEO_TOKEN + "\n", "image": IMAGE_TOKEN + "\n"}
    texts = [part["text"] if part["type"] == "text" else signs[part["type"]] for part in content]
    return "".join(texts[:-1]) + texts[-1] if content[-1]["type"] == "text" else "".join(texts).removesuffix("\n")


def time_message(style: str | None, *, duration: float, seconds: Sequence[float]) -> str:
    """Say in words how long a video lasts and how it was sampled.

    Args:
        style: ``"short"`` names the number of frames, ``"long"`` lists their times, ``None`` says nothing. ``"chat"``
            is the short sentence as `chat()` of the releases writes it, after which the question goes on in the same
            line; in training it stands on the next one. See `join_lines`.
        duration: of the video in seconds.
        seconds: time of every sampled frame.

    Returns:
        The sentence with a leading newline and a trailing space, or ``""``.

    Raises:
        ValueError: if the style is unknown.

    Source: Li et al., "VideoChat-Flash", arXiv:2501.00574, timestamp-aware prompt.
    """
    if style is None:
        return ""
    start = f"\nThe video lasts for {duration:.2f} seconds, and {len(seconds)} frames are uniformly sampled "
    if style in ("short", "chat"):
        return start + "from it. "
    if style == "long":
        return start + f"at {', '.join(str(round(float(second), 1)) for second in seconds)} seconds. "
    raise ValueError(f"unknown time message {style!r}; use 'chat', 'short', 'long' or None")


def insert_time_message(message: str) -> str:
    """Return what stands between a placeholder and the rest of its turn."""
    return message.rstrip() + " " if message else ""


def join_lines(text: str, style: str | None) -> str:
    """Let a question follow the sentence about its video in the same line, if the style is ``"chat"``."""
    return text.replace(VIDEO_TOKEN + "\n", VIDEO_TOKEN) if style == "chat" else text


def llava_turn(value: str, *, message: str = "", placeholder: str = "<image>") -> str:
    """Arrange a LLaVA user turn as the published training does.

    A single placeholder moves to the front, on a line of its own; every placeholder is followed by the message.

    Args:
        value: the turn's text.
        message: from `time_message`, or ``""``.
        placeholder: what stands for the video or image.
    """
    if value.count(placeholder) == 1 and not value.startswith(placeholder):
        value = placeholder + "\n" + value.replace(placeholder, "").strip()
    return value.replace(placeholder, placeholder + insert_time_message(message))


def expand_placeholders(texts: Sequence[str], placeholder: str, replacements: Sequence[str]) -> list[str]:
    """Replace the placeholders of prompts, in order, from one list.

    Raises:
        ValueError: if there are not as many placeholders as replacements.
    """
    num_placeholders = sum(text.count(placeholder) for text in texts)
    if num_placeholders != len(replacements):
        raise ValueError(
            f"{len(replacements)} were given for the {num_placeholders} {placeholder} of the text; put one where each "
            "video or image belongs, and none into a question"
        )
    rest = iter(replacements)
    return [re.sub(re.escape(placeholder), lambda _: next(rest), text) for text in texts]


def take_answers(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Take the marks around answers out of a text.

    Returns:
        The text without them, and where every answer begins and ends in it.
    """
    before, *answers = text.split(ANSWER_MARKS[0])
    plain, spans = before, []
    for answer in answers:
        inside, _, after = answer.partition(ANSWER_MARKS[1])
        spans.append((len(plain), len(plain) + len(inside)))
        plain += inside + after
    return plain, spans


def mark_answers(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """Put marks around answers; `take_answers` takes them out again."""
    for start, end in reversed(spans):
        text = text[:start] + ANSWER_MARKS[0] + text[start:end] + ANSWER_MARKS[1] + text[end:]
    return text


def runs(flags: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and past-the-last place of every run of true flags."""
    found, place = [], 0
    for flag, group in groupby(flags, key=bool):
        end = place + len(list(group))
        found += [(place, end)] if flag else []
        place = end
    return found


def tokens_inside(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Say of tokens at offsets of characters whether they hold any character of the spans."""
    return [int(any(start < b and max(end, start + 1) > a for a, b in spans)) for start, end in offsets]


def label_mask(
    input_ids: Sequence[int],
    *,
    start_id: int,
    end_id: int,
    newline_id: int,
    assistant_ids: Sequence[int],
    scheme: str = "assistant",
) -> list[bool]:
    """Say which tokens of a ChatML conversation carry labels.

    Args:
        input_ids: one conversation.
        start_id: of ``<|im_start|>``.
        end_id: of ``<|im_end|>``.
        newline_id: of a single newline.
        assistant_ids: how the tokenizer writes ``assistant``.
        scheme: ``"assistant"`` labels content and end token of assistant turns. ``"published"`` is VideoChat-Flash:
            assistant turns with their header, and every newline, start and end token of all turns.
            ``"longva"``: start token, end token and closing newline of all turns, and assistant content.

    Returns:
        One flag per token.

    Raises:
        ValueError: if the scheme is unknown.

    Source: behaviour of the published trainers (arXiv:2501.00574, arXiv:2406.16852).
    """
    if scheme not in ("assistant", "published", "longva"):
        raise ValueError(f"unknown label scheme {scheme!r}; use 'assistant', 'published' or 'longva'")
    ids, assistant = list(input_ids), list(assistant_ids)
    labelled = [False] * len(ids)
    answering = in_header = False
    for i, token in enumerate(ids):
        if token == start_id:
            in_header = True
            answering = ids[i + 1 : i + len(assistant) + 2] == [*assistant, newline_id]
        is_mark = token in (start_id, end_id)
        content = answering and not in_header
        if scheme == "assistant":
            labelled[i] = content
        elif scheme == "published":
            labelled[i] = is_mark or token == newline_id or answering
        else:
            closing_newline = token == newline_id and i > 0 and ids[i - 1] == end_id
            labelled[i] = is_mark or closing_newline or content
        if in_header and token == newline_id:
            in_header = False
        if token == end_id:
            answering = False
    return labelled
