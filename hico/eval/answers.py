"""Questions with one right answer, from rows as they are trained on: read, asked, and scored."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from hico.data.records import parse_row
from hico.data.tables import open_rows
from hico.modeling_hico import HicoForConditionalGeneration
from hico.processing_hico import HicoProcessor

ANSWER_TOKENS = 4
"""Length of an answer at most: a letter or a word."""
CHOICES = ("choices",)
"""Keys of a row that matter to whoever examines, and to no model."""


@dataclass(frozen=True)
class Question:
    """What is asked about one video, and what is right."""

    video: Any
    """Whatever `hico.video_io.read_video` opens."""
    messages: list[dict[str, Any]]
    """The conversation up to the answer, in which a part ``{"type": "video"}`` stands for the video."""
    truth: str

    def about(self, video: Any) -> list[dict[str, Any]]:
        """Return the conversation with a video, decoded or not, in its place."""

        def shown(part: dict[str, Any]) -> dict[str, Any]:
            return {"type": "video", "path": video} if part["type"] == "video" else part

        return [{**turn, "content": [shown(part) for part in turn["content"]]} for turn in self.messages]


def read_questions(path: str | Path, *, limit: int | None = None) -> list[Question]:
    """Read rows of any known form, each with one video, which lie relative to their file.

    Args:
        path: of a file of rows.
        limit: how many to take at most, evenly spread over the file; all if omitted.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a row is malformed, has more or less than one video, or does not end in an answer; or there is
            none.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file of rows {path}; give one whose rows have a video and an answer")
    rows = open_rows(str(path))
    num_taken = len(rows) if limit is None else min(limit, len(rows))
    if num_taken < 1:
        raise ValueError(f"{path} has {len(rows)} rows, of which {num_taken} are to be taken; there must be one")
    chosen = [number * len(rows) // num_taken for number in range(num_taken)]
    return [_question(rows, index, str(path.parent)) for index in chosen]


def _question(rows, index: int, root: str) -> Question:
    record = parse_row(rows[index], rows, index, root=root, other_keys=CHOICES)
    if [media.kind for media in record.media] != ["video"]:
        kinds = ", ".join(media.kind for media in record.media) or "none"
        raise ValueError(f"{record.where}: a question is about one video, and this row's media are: {kinds}")
    *asked, last = record.messages
    if last["role"] != "assistant" or not asked:
        raise ValueError(f"{record.where}: the row does not end in an answer, so none can be right")
    truth = "".join(part["text"] for part in last["content"] if part["type"] == "text")
    return Question(record.media[0].source, asked, truth.strip())


def is_right(answer: str, truth: str) -> bool:
    """Say whether a letter or a word is the right one: the same, but for blanks around it."""
    return answer.strip() == truth.strip()


@torch.no_grad()
def answer_batch(
    model: HicoForConditionalGeneration,
    processor: HicoProcessor,
    conversations: Sequence[list[dict[str, Any]]],
    *,
    visual_embeds: Sequence[Tensor] | None = None,
    max_new_tokens: int = ANSWER_TOKENS,
) -> list[str]:
    """Let a model answer greedily.

    Args:
        model: in evaluation mode.
        processor: of the same model.
        conversations: messages up to the answer.
        visual_embeds: tokens of their videos, encoded before; they are encoded here if omitted.
        max_new_tokens: length of an answer at most.
    """
    inputs = processor.apply_chat_template(conversations, tokenize=True, add_generation_prompt=True)
    if visual_embeds is not None:
        inputs = without_pixels(inputs) | {"visual_embeds": list(visual_embeds)}
    inputs = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def without_pixels(inputs: Any) -> dict[str, Tensor]:
    """Return a prompt's inputs without the pixels of its videos, for which ``visual_embeds`` stand."""
    return {name: value for name, value in inputs.items() if name not in ("pixel_values_videos", "video_num_clips")}


def wilson_interval(num_right: int, num_asked: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval that holds the true share of right answers, as Wilson reckons it.

    Args:
        num_right: answers that are right.
        num_asked: of so many, at least 1.
        confidence: in how many of all cases it does.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = num_right / num_asked, 1 + z * z / num_asked
    middle = (share + z * z / (2 * num_asked)) / scale
    half = z * math.sqrt(share * (1 - share) / num_asked + z * z / (4 * num_asked**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)
