"""Ask a model the held-out questions, with the pixels and with blank frames in their place."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hico.eval.answers import answer_batch, is_right
from hico.modeling_hico import HicoForConditionalGeneration
from hico.processing_hico import HicoProcessor
from hico.video_io import Video, read_video

BLANK = 50
"""Grey level of a blank frame: that of the floor."""


@dataclass(frozen=True)
class Answered:
    """A held-out question and what the model answered."""

    video: str
    question: str
    truth: str
    answer: str
    choices: int

    @property
    def is_right(self) -> bool:
        return is_right(self.answer, self.truth)


def read_exam(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a held-out file, see `hico.tiny.corpus.exam_rows`."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def sit_exam(
    model: HicoForConditionalGeneration,
    processor: HicoProcessor,
    rows: Sequence[dict[str, Any]],
    *,
    folder: str | Path,
    batch_size: int = 32,
) -> list[Answered]:
    """Let a model answer questions.

    Args:
        model: in evaluation mode.
        processor: of the same model; its video settings choose the frames.
        rows: from `read_exam`.
        folder: that the rows' videos are relative to.
        batch_size: questions answered at once.
    """
    vision, answers, opened = processor.vision, [], ("", None)
    for start in range(0, len(rows), batch_size):
        batch, videos = rows[start : start + batch_size], []
        for row in batch:
            # Questions about one video follow each other.
            if opened[0] != row["video"]:
                path = Path(folder) / row["video"]
                video = read_video(path, size=vision.image_size, clip_len=vision.clip_len, **processor.video)
                opened = (row["video"], video)
            videos.append(opened[1])
        answers += _answers(model, processor, videos, [_question(row) for row in batch])
    return [_answered(row, answer) for row, answer in zip(rows, answers, strict=True)]


def sit_blank_exam(
    model: HicoForConditionalGeneration, processor: HicoProcessor, rows: Sequence[dict[str, Any]]
) -> list[Answered]:
    """Let a model answer the same questions about grey frames, which shows how much can be guessed.

    One video of grey frames is like another of the same length, so each question is asked once per length.
    """
    size = processor.vision.image_size
    asked = list(dict.fromkeys((_question(row), row["duration"]) for row in rows))
    videos = [torch.full((seconds, 3, size, size), BLANK, dtype=torch.uint8) for _, seconds in asked]
    answers = dict(zip(asked, _answers(model, processor, videos, [question for question, _ in asked]), strict=True))
    return [_answered(row, answers[_question(row), row["duration"]]) for row in rows]


def accuracy(results: Sequence[Answered]) -> float:
    """Return the share of right answers."""
    return sum(result.is_right for result in results) / len(results)


def chance(results: Sequence[Answered]) -> float:
    """Return the share of right answers that guessing among the possible ones gives on average."""
    return sum(1 / result.choices for result in results) / len(results)


def accuracy_by_question(results: Sequence[Answered]) -> dict[str, float]:
    """Return the share of right answers to every question."""
    groups: dict[str, list[Answered]] = {}
    for result in results:
        groups.setdefault(result.question, []).append(result)
    return {question: accuracy(group) for question, group in groups.items()}


def _answers(
    model: HicoForConditionalGeneration,
    processor: HicoProcessor,
    videos: Sequence[Video | Tensor],
    questions: Sequence[str],
) -> list[str]:
    conversations = [
        [{"role": "user", "content": [{"type": "video", "path": video}, {"type": "text", "text": question}]}]
        for video, question in zip(videos, questions, strict=True)
    ]
    return answer_batch(model, processor, conversations)


def _question(row: dict[str, Any]) -> str:
    return row["conversations"][0]["value"].partition("\n")[2]


def _answered(row: dict[str, Any], answer: str) -> Answered:
    return Answered(row["video"], _question(row), row["conversations"][1]["value"], answer, row["choices"])
