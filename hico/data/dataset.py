"""Rows of a mixture as token ids, labels and pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hico.data.batching import Key
from hico.data.decoding import SampleError, TimedReader
from hico.data.mixture import MODALITIES, Mixture
from hico.data.records import Media, Record
from hico.data.rowfiles import open_source
from hico.data.settings import RowSettings
from hico.processing_hico import HicoProcessor
from hico.prompt import IGNORE_INDEX, IMAGE_TOKEN, VIDEO_TOKEN, label_mask
from hico.video_io import Video, read_video


@dataclass(frozen=True)
class BadRow:
    """A row that was left out."""

    index: int
    where: str
    reason: str


class TrainingRows(Dataset):
    """Turn rows into examples, lazily; see `__getitem__`.

    Args:
        mixture: the rows.
        processor: writes prompts and prepares pixels.
        settings: frames, labels, lengths, and what to do with bad rows.
        seed: of random frame sampling; a row's draw depends on it, the epoch and the row's number alone.
    """

    def __init__(self, mixture: Mixture, processor: HicoProcessor, settings: RowSettings, *, seed: int):
        self.mixture, self.processor, self.settings, self.seed = mixture, processor, settings, seed
        self.marks = label_marks(processor.tokenizer)
        self.visual_ids = torch.tensor(processor.tokenizer.convert_tokens_to_ids([VIDEO_TOKEN, IMAGE_TOKEN]))
        vision = processor.vision
        video = {**frame_settings(settings), **settings.video, "size": vision.image_size, "clip_len": vision.clip_len}
        self._read = TimedReader(partial(read_media, settings=video), settings.decode_timeout)

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, key: Key) -> dict[str, Any] | BadRow:
        """Read a row.

        Args:
            key: epoch and row number.

        Returns:
            ``input_ids`` and ``labels`` ``(S,)``, the row's pixels as `HicoProcessor` names them, and its ``modality``
            as a number. With ``on_bad_sample: skip``, a `BadRow` instead of an error.

        Raises:
            SampleError: if the row cannot be read; the message names it.
        """
        epoch, index = key
        record = self.mixture.record(index)
        try:
            return self._example(record, row_seed(self.seed, epoch, index), self.mixture.spec(index).video_settings)
        except SampleError as error:
            if self.settings.on_bad_sample == "skip":
                return BadRow(index, record.where, str(error))
            raise SampleError(
                f"the row at {record.where} cannot be read: {error}. "
                "Mend or remove it, or set on_bad_sample: skip to count such rows and go on"
            ) from error

    def _example(self, record: Record, seed: int, video_settings: dict[str, Any]) -> dict[str, Any]:
        media = self._read(record.media, seed, video_settings) if record.media else []
        text = self.processor.apply_chat_template(record.messages)
        try:
            batch = self.processor(
                [text],
                images=[item for item in media if not isinstance(item, Video)] or None,
                videos=[_with_tensor(item) for item in media if isinstance(item, Video)] or None,
                padding=False,
            )
        except ValueError as error:
            raise SampleError(str(error)) from error
        example = {name: value for name, value in batch.items() if name != "attention_mask"}
        example["input_ids"] = batch["input_ids"][0]
        example["labels"] = self._labels(example["input_ids"])
        example["modality"] = MODALITIES.index(record.modality)
        return self._fit(example)

    def _labels(self, input_ids: Tensor) -> Tensor:
        learned = torch.tensor(label_mask(input_ids.tolist(), scheme=self.settings.label_scheme, **self.marks))
        learned &= ~torch.isin(input_ids, self.visual_ids)
        # Nothing stands before the first token to predict it from, and in a packed sequence it would be another row.
        learned[0] = False
        return input_ids.masked_fill(~learned, IGNORE_INDEX)

    def _fit(self, example: dict[str, Any]) -> dict[str, Any]:
        limit, length = self.settings.max_length, len(example["input_ids"])
        if length > limit:
            visual = int(torch.isin(example["input_ids"], self.visual_ids).sum())
            kept = example["input_ids"][:limit]
            if int(torch.isin(kept, self.visual_ids).sum()) < visual:
                raise SampleError(
                    f"it has {length} tokens ({visual} of them visual), max_length is {limit}, and cutting there "
                    "would cut a video or image; lower max_frames or raise max_length"
                )
            example.update(input_ids=kept, labels=example["labels"][:limit])
        if not bool((example["labels"] != IGNORE_INDEX).any()):
            raise SampleError(f"nothing in its {length} tokens is learned; is its answer empty, or cut by max_length?")
        return example


def frame_settings(settings: RowSettings) -> dict[str, Any]:
    """Return what is said about frames in the words of `hico.sampling.sample_frames`.

    ``middle`` and ``rand`` take ``max_frames``, however long the video.
    """
    if settings.frame_sampling in ("middle", "rand"):
        return {"mode": settings.frame_sampling, "num_frames": settings.max_frames}
    return {"mode": settings.frame_sampling, "min_frames": settings.min_frames, "max_frames": settings.max_frames}


def read_media(
    media: Sequence[Media], seed: int, own: dict[str, Any], *, settings: dict[str, Any]
) -> list[Video | Image.Image]:
    """Decode the videos and images of a row; runs in the child process of `TimedReader`.

    Args:
        media: of the row, in order.
        seed: of random sampling.
        own: settings of `hico.video_io.read_video` for the row's dataset.
        settings: those for all.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        _read_video(item, {**settings, **own, "generator": generator}) if item.kind == "video" else _read_image(item)
        for item in media
    ]


def row_seed(seed: int, epoch: int, index: int) -> int:
    """Return the seed of a row's random choices."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1)[0])


def label_marks(tokenizer) -> dict[str, Any]:
    """Return the token ids by which `hico.prompt.label_mask` reads a conversation.

    Raises:
        ValueError: if the tokenizer does not know ChatML.
    """
    marks = {}
    for name, text in (("start_id", "<|im_start|>"), ("end_id", "<|im_end|>"), ("newline_id", "\n")):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"the tokenizer writes {text!r} as {len(ids)} tokens; training needs a ChatML tokenizer")
        marks[name] = ids[0]
    return {**marks, "assistant_ids": tokenizer.encode("assistant", add_special_tokens=False)}


def _read_video(item: Media, settings: dict[str, Any]) -> Video:
    video = read_video(open_source(item.source), start=item.start, end=item.end, **settings)
    # As an array, the frames go through the pipe in one piece.
    return replace(video, frames=video.frames.numpy())


def _with_tensor(video: Video) -> Video:
    return replace(video, frames=torch.from_numpy(video.frames))


def _read_image(item: Media) -> Image.Image:
    source = open_source(item.source)
    with Image.open(source) as image:
        return image.convert("RGB")
