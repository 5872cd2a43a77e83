"""Rows of a mixture as token ids, labels and pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from hico.data.batching import Key
from hico.data.decoding import SampleError, TimedReader
from hico.data.labels import Labels
from hico.data.mixture import MODALITIES, Mixture
from hico.data.records import Media, Record
from hico.data.rowfiles import open_source
from hico.data.settings import RowSettings
from hico.processing_hico import HicoProcessor
from hico.prompt import IGNORE_INDEX
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
        self.labels = Labels(processor, settings.label_scheme)
        self.visual_ids = self.labels.visual_ids
        vision = processor.vision
        video = {**own_fit(processor), **frame_settings(settings), **settings.video}
        video |= {"size": vision.image_size, "clip_len": vision.clip_len}
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
        try:
            batch = self.processor(
                [self.labels.mark(record.messages)],
                images=[item for item in media if not isinstance(item, Video)] or None,
                videos=[_with_tensor(item) for item in media if isinstance(item, Video)] or None,
                padding=False,
            )
        except ValueError as error:
            raise SampleError(str(error)) from error
        example = {name: value for name, value in batch.items() if name not in ("attention_mask", "assistant_masks")}
        example["input_ids"] = ids = batch["input_ids"][0]
        answers = batch["assistant_masks"][0] if "assistant_masks" in batch else torch.zeros_like(ids)
        example["labels"] = ids.masked_fill(~self.labels.learned(ids, answers), IGNORE_INDEX)
        example["modality"] = MODALITIES.index(record.modality)
        return self._fit(example)

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


def own_fit(processor: HicoProcessor) -> dict[str, str]:
    """Return how a processor makes squares of frames, which training does not change unless it says so."""
    return {name: value for name, value in processor.video.items() if name == "fit"}


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
