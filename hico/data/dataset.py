"""Rows of a mixture as token ids, labels and pixels."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hico.data.batching import Key
from hico.data.decoding import SampleError, TimedReader
from hico.data.labels import Labels
from hico.data.media import read_media
from hico.data.mixture import MODALITIES, Mixture
from hico.data.records import Record
from hico.data.settings import RowSettings, own_fit, read_settings
from hico.processing_hico import HicoProcessor
from hico.prompt import IGNORE_INDEX
from hico.video_io import Video


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
        video = {**own_fit(processor), **read_settings(settings, vision.clip_len), "size": vision.image_size}
        self._read = TimedReader(partial(read_media, settings=video), settings.decode_timeout)

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, key: Key) -> dict[str, Any] | BadRow:
        """Read a row.

        Args:
            key: epoch and row number.

        Returns:
            ``input_ids`` and ``labels`` ``(S,)``, the row's pixels as `HicoProcessor` names them, and its ``modality``
            and ``dataset`` as numbers; of a preference row, these are of the chosen answer, and ``rejected`` holds
            ``input_ids`` and ``labels`` of the other. With ``on_bad_sample: skip``, a `BadRow` instead of an error.

        Raises:
            SampleError: if the row cannot be read; the message names it.
        """
        epoch, index = key
        record = self.mixture.record(index)
        try:
            example = self._example(record, row_seed(self.seed, epoch, index), self.mixture.spec(index).video_settings)
            return {**example, "dataset": int(self.mixture.rows[index, 0])}
        except SampleError as error:
            if self.settings.on_bad_sample == "skip":
                return BadRow(index, record.where, str(error))
            raise SampleError(
                f"the row at {record.where} cannot be read: {error}. "
                "Mend or remove it, or set on_bad_sample: skip to count such rows and go on"
            ) from error

    def _example(self, record: Record, seed: int, video_settings: dict[str, Any]) -> dict[str, Any]:
        media = self._read(record.media, seed, video_settings) if record.media else []
        example = {**self._written(record.messages, media), "modality": MODALITIES.index(record.modality)}
        if record.rejected is not None:
            other = self._written(record.rejected, media)
            if torch.equal(other["input_ids"], example["input_ids"]):
                raise SampleError(f"its two answers differ only behind max_length {self.settings.max_length}")
            example["rejected"] = {name: other[name] for name in ("input_ids", "labels")}
        return example

    def _written(self, messages: list[dict[str, Any]], media: list) -> dict[str, Any]:
        try:
            batch = self.processor(
                [self.labels.mark(messages)],
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
        return self._fit(example)

    def _fit(self, example: dict[str, Any]) -> dict[str, Any]:
        limit, length = self.settings.max_length, len(example["input_ids"])
        if length > limit:
            if self.settings.on_long_sample == "bad":
                raise SampleError(f"it has {length} tokens, and max_length is {limit}; raise it or shorten the row")
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


def row_seed(seed: int, epoch: int, index: int) -> int:
    """Return the seed of a row's random choices."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1)[0])


def _with_tensor(video: Video) -> Video:
    return replace(video, frames=torch.from_numpy(video.frames))
