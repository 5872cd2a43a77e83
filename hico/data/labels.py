"""Which tokens of a conversation are learned, whatever chat template writes it.

The template writes the conversation twice, once with marks in place of the answers. What the real one has between the
same pieces are the answers as the template writes them; their tokens follow from the offsets of characters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from hico.processing_hico import HicoProcessor
from hico.prompt import ANSWER_MARKS, IMAGE_TOKEN, VIDEO_TOKEN, label_mask


@dataclass
class Labels:
    """Mark the answers of conversations, and say which tokens are learned.

    Args:
        processor: its template writes conversations, its tokenizer knows where tokens lie.
        scheme: ``assistant`` learns what the model must write after a generation prompt: an answer, and what ends it.
            ``published`` and ``longva`` learn also what `hico.prompt.label_mask` says.

    Raises:
        ValueError: if the template cannot be used, loses text or ends an answer with nothing; the tokenizer cannot
            pad or has no offsets; or a published scheme meets a tokenizer that does not know ChatML.
    """

    processor: HicoProcessor
    scheme: str = "assistant"

    def __post_init__(self):
        tokenizer = self.processor.tokenizer
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token; set pad_token in its tokenizer_config.json")
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} does not say where its tokens lie; use a fast tokenizer")
        self._chatml = None if self.scheme == "assistant" else label_marks(tokenizer)
        self.visual_ids = torch.tensor(tokenizer.convert_tokens_to_ids([VIDEO_TOKEN, IMAGE_TOKEN]))
        self.borders, self._opening = ANSWER_MARKS, ""
        asked = [_turn("user", {"type": "video"}, {"type": "image"}, _text("What?"))]
        talk = [*asked, _turn("assistant", _text("Yes.")), _turn("user", _text("Why?"))]
        talk += [_turn("assistant", _text("Thus."))]
        try:
            closed, opened = (self._write(asked, add_generation_prompt=flag) for flag in (False, True))
            written = self._write(talk)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template cannot be used: {error}") from error
        lost = [text for text in ("What?", "Yes.", "Why?", "Thus.", VIDEO_TOKEN, IMAGE_TOKEN) if text not in written]
        if lost:
            raise ValueError(f"the chat template loses {', '.join(lost)} of a conversation: it writes {written!r}")
        self._opening = opened.removeprefix(closed)
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.borders = (*ANSWER_MARKS, *sorted(token for token in special if token in written + opened))
        self.mark(talk)

    def mark(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Write a conversation with marks around what is learned; `HicoProcessor` turns them into a mask.

        Raises:
            ValueError: if a text holds what the template writes itself, or the template does not take the messages.
        """
        texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        if border := next((border for border in self.borders if any(border in text for text in texts)), None):
            raise ValueError(f"a text holds {border!r}, which would be read as the border of a turn")
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        stands_for = {number: f"{ANSWER_MARKS[0]}{number}{ANSWER_MARKS[1]}" for number in answers}
        framed = [
            {**message, "content": [_text(stands_for[number])]} if number in stands_for else message
            for number, message in enumerate(messages)
        ]
        try:
            text, frame = self._write(messages), self._write(framed)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        pieces = []
        for number in answers:
            before, mark, frame = frame.partition(stands_for[number])
            if not mark:
                raise ValueError(f"the chat template loses the answer in turn {number + 1}")
            head, opening, _ = before.rpartition(self._opening) if self._opening else ("", "", "")
            pieces.append(head + opening if opening else before.rstrip())
        closing = frame.rstrip()
        if not closing:
            raise ValueError("the chat template writes nothing to end an answer, so a model would learn no end")
        # Before, between and after the answers, the text reads as the frame does.
        places, here = [], 0
        for piece in pieces:
            found = text.find(piece, here)
            if found < 0 or (not places and found):
                raise ValueError(f"the chat template writes {piece!r} differently around this answer")
            here = found + len(piece)
            places.append((found, here))
        ends = [*(found for found, _ in places[1:]), len(text) - len(frame)]
        result, done = "", 0
        for number, (_, start), end, after in zip(answers, places, ends, [*pieces[1:], frame], strict=True):
            if messages[number].get("loss", True):
                end += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(closing, after)))  # noqa: B905
                result += text[done:start] + ANSWER_MARKS[0] + text[start:end] + ANSWER_MARKS[1]
                done = end
        return result + text[done:]

    def learned(self, input_ids: Tensor, answers: Tensor) -> Tensor:
        """Say which tokens ``(S,)`` of a row are learned.

        Args:
            input_ids: ``(S,)``.
            answers: ``(S,)`` those of marked answers, as the processor returns them.
        """
        learned = answers.bool()
        if self._chatml is not None:
            learned |= torch.tensor(label_mask(input_ids.tolist(), scheme=self.scheme, **self._chatml))
        learned &= ~torch.isin(input_ids, self.visual_ids)
        # Nothing stands before the first token to predict it from, and in a packed sequence it would be another row.
        learned[0] = False
        return learned

    def _write(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        return self.processor.apply_chat_template(messages, **options)


def label_marks(tokenizer) -> dict[str, Any]:
    """Return the token ids by which `hico.prompt.label_mask` reads a conversation.

    Raises:
        ValueError: if the tokenizer does not know ChatML.
    """
    marks = {}
    for name, text in (("start_id", "<|im_start|>"), ("end_id", "<|im_end|>"), ("newline_id", "\n")):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"the tokenizer writes {text!r} as {len(ids)} tokens; the published label schemes need ChatML, "
                "label_scheme: assistant does not"
            )
        marks[name] = ids[0]
    return {**marks, "assistant_ids": tokenizer.encode("assistant", add_special_tokens=False)}


def _turn(role: str, *parts: dict[str, str]) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
