"""Ask a model the held-out questions, with the pixels and with blank frames in their place."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
        return self.answer == self.truth


def read_exam(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a held-out file, see `hico.tiny.corpus.exam_rows`."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@torch.no_grad()
def sit_exam(
    model: HicoForConditionalGeneration,
    processor: HicoProcessor,
    rows: Sequence[dict[str, Any]],
    *,
    folder: str | Path,
    blank: bool = False,
    batch_size: int = 32,
) -> list[Answered]:
    """Let a model answer questions.

    Args:
        model: in evaluation mode.
        processor: of the same model; its video settings choose the frames.
        rows: from `read_exam`.
        folder: that the rows' videos are relative to.
        blank: replace all pixels by one grey, which shows how much can be guessed.
        batch_size: questions answered at once.
    """
    tokenizer = processor.tokenizer
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    results: list[Answered] = []
    for batch, videos in _with_videos(rows, processor, Path(folder), batch_size):
        questions = [row["conversations"][0]["value"].partition("\n")[2] for row in batch]
        conversations = [
            [{"role": "user", "content": [{"type": "video", "path": video}, {"type": "text", "text": question}]}]
            for video, question in zip(videos, questions, strict=True)
        ]
        inputs = processor.apply_chat_template(conversations, tokenize=True, add_generation_prompt=True)
        if blank:
            inputs["pixel_values_videos"].fill_(BLANK)
        ids = model.generate(**inputs.to(model.device), max_new_tokens=4, do_sample=False)
        answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, question, answer in zip(batch, questions, answers, strict=True):
            truth = row["conversations"][1]["value"]
            results.append(Answered(row["video"], question, truth, answer.strip(), row["choices"]))
    tokenizer.padding_side = side
    return results


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


def _with_videos(
    rows: Sequence[dict[str, Any]], processor: HicoProcessor, folder: Path, batch_size: int
) -> Iterator[tuple[Sequence[dict[str, Any]], list[Video]]]:
    """Yield batches of rows with their videos; rows that follow each other share the decoding."""
    vision, opened = processor.vision, ("", None)
    for start in range(0, len(rows), batch_size):
        batch, videos = rows[start : start + batch_size], []
        for row in batch:
            if opened[0] != row["video"]:
                video = read_video(
                    folder / row["video"], size=vision.image_size, clip_len=vision.clip_len, **processor.video
                )
                opened = (row["video"], video)
            videos.append(opened[1])
        yield batch, videos
