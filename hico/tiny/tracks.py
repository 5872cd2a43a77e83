"""Pre-train a video encoder alone, on clips in which one thing moves: what every patch shows, and where it goes.

This stands in for the large-scale pre-training that published encoders come with, where there is no such encoder.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hico.data.dataset import BadRow, TrainingRows
from hico.data.decoding import SampleError
from hico.data.mixture import Mixture
from hico.encoders.base import VisionEncoder
from hico.modeling_hico import HicoForConditionalGeneration
from hico.preprocessing import normalize_pixels
from hico.train.safeguards import BadRows
from hico.train.stage_trainer import StageTrainer

BACKGROUND_WEIGHT = 0.15
"""Weight of a patch that shows no part of a figure; most patches do not."""
PLACE_WEIGHT = 8.0
"""Weight of the error in place. Without it, directions are learned late or not at all."""


class TrackModel(nn.Module):
    """An encoder with two linear heads: classes of a patch, and places of the figure.

    Args:
        encoder: learns.
        classes: label -> its values, such as ``{"shape": ["circle", "square"]}``.
    """

    def __init__(self, encoder: VisionEncoder, classes: Mapping[str, Sequence[str]]):
        super().__init__()
        self.encoder = encoder
        self.num_classes = [1 + len(values) for values in classes.values()]
        self.what = nn.Linear(encoder.hidden_size, sum(self.num_classes))
        self.where = nn.Linear(encoder.hidden_size, 4)

    def forward(self, clips: Tensor, classes: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """Return the loss.

        Args:
            clips: ``(N, T, 3, H, W)`` uint8.
            classes: ``(N, labels)`` numbers of the figure's classes, from 1; 0 is the floor.
            boxes: ``(N, T, 4)`` of the figure in every frame: left, top, right, bottom, as shares of the sides.
        """
        encoder = self.encoder
        pixels = normalize_pixels(clips, mean=encoder.image_mean, std=encoder.image_std)
        tokens_NLD = encoder(pixels)
        shown_NL = shown_patches(boxes, encoder.grid(pixels.shape[1], *pixels.shape[-2:]))
        weights = torch.where(shown_NL, 1.0, BACKGROUND_WEIGHT).flatten()
        loss = torch.zeros((), device=clips.device)
        for label, scores in enumerate(self.what(tokens_NLD).split(self.num_classes, dim=-1)):
            targets_NL = shown_NL * classes[:, label, None]
            losses = F.cross_entropy(scores.flatten(0, 1), targets_NL.flatten(), reduction="none")
            loss = loss + (losses * weights).sum() / weights.sum()
        centers = (boxes[..., :2] + boxes[..., 2:]) - 1
        ends = torch.cat([centers[:, 0], centers[:, -1]], dim=-1)
        place = F.smooth_l1_loss(self.where(tokens_NLD.mean(dim=1)), ends, beta=0.1)
        return {"loss": loss + PLACE_WEIGHT * place}


def shown_patches(boxes_NT4: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Say which patches show a part of a figure: those whose middle half its box overlaps.

    Args:
        boxes_NT4: left, top, right, bottom in every frame, as shares of the sides.
        grid: steps, rows and columns of patches; a step of several frames takes the first one's box.

    Returns:
        ``(N, L)`` bool, time-major, then rows.
    """
    steps, rows, columns = grid
    boxes = boxes_NT4[:, :: boxes_NT4.shape[1] // steps]
    across, down = ((torch.arange(n, device=boxes.device) + 0.5) / n for n in (columns, rows))
    left, top, right, bottom = boxes[..., None].unbind(dim=2)
    in_columns = (across > left - 0.25 / columns) & (across < right + 0.25 / columns)
    in_rows = (down > top - 0.25 / rows) & (down < bottom + 0.25 / rows)
    return (in_rows[..., :, None] & in_columns[..., None, :]).flatten(1)


class Tracks(Dataset):
    """Clips with the classes and boxes of what moves in them, decoded once and kept in memory.

    Args:
        rows: training rows with a video of one clip each. Two keys of theirs are particular to tracks: ``labels``,
            such as ``{"shape": "circle"}``, and ``boxes``, one ``[left, top, right, bottom]`` per frame.
        num_workers: processes that decode.
        bad_rows: counts rows that cannot be read, which are left out.

    Raises:
        ValueError: if a row lacks them, or its video is not one clip.
        SampleError: if rows cannot be read, as `hico.data.dataset.TrainingRows` and `BadRows` say.
    """

    def __init__(self, rows: TrainingRows, *, bad_rows: BadRows, num_workers: int = 0):
        facts = [_facts(rows.mixture, number) for number in range(len(rows))]
        batches = [
            [(0, number) for number in range(len(rows))[start : start + 100]] for start in range(0, len(rows), 100)
        ]
        loader = DataLoader(rows, batch_sampler=batches, collate_fn=list, num_workers=num_workers)
        clips, left_out = [], []
        for example in itertools.chain.from_iterable(loader):
            (left_out if isinstance(example, BadRow) else clips).append(example)
        bad_rows.load(None)
        bad_rows.count(len(rows), left_out)
        if not clips:
            raise SampleError(f"none of the {len(rows)} rows can be read; {bad_rows.path} says why")
        without = {row.index for row in left_out}
        facts = [row for number, row in enumerate(facts) if number not in without]
        self._clips = torch.cat([example["pixel_values_videos"] for example in clips])
        if len(self._clips) != len(facts):
            raise ValueError(
                f"{len(facts)} videos make {len(self._clips)} clips; tracks take one clip of each, so set "
                "max_frames to the length of a clip"
            )
        names = list(facts[0]["labels"])
        self.classes = {name: sorted({row["labels"][name] for row in facts}) for name in names}
        self._classes = torch.tensor(
            [[1 + self.classes[name].index(row["labels"][name]) for name in names] for row in facts]
        )
        self._boxes = torch.tensor([row["boxes"] for row in facts])

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"clips": self._clips[index], "classes": self._classes[index], "boxes": self._boxes[index]}


class TrackTrainer(StageTrainer):
    """Train the encoder of a model on tracks; the other parts stay as they are.

    A checkpoint holds encoder and heads, the result the whole model.

    Args:
        model: learns in place.
        args: training arguments.
        rows: see `Tracks`.
        bad_rows: counts those that cannot be read.
        options: of `StageTrainer`.

    Raises:
        ValueError: if weights are sharded over devices.
    """

    def __init__(
        self,
        model: HicoForConditionalGeneration,
        args: TrainingArguments,
        *,
        rows: TrainingRows,
        bad_rows: BadRows,
        **options: Any,
    ):
        if is_deepspeed_zero3_enabled() or args.fsdp:
            raise ValueError("objective 'tracks' trains an encoder whole on every device; use DDP, ZeRO-1 or ZeRO-2")
        tracks = Tracks(rows, bad_rows=bad_rows, num_workers=args.dataloader_num_workers)
        self._result = model, rows.processor
        learner = TrackModel(model.model.encoder, tracks.classes)
        super().__init__(learner, args, bad_rows=bad_rows, train_dataset=tracks, **options)

    def restore(self, last: Path | None) -> None:
        """Go back to a checkpoint; without one, rows are read and counted already."""
        if last is not None:
            super().restore(last)

    def save_result(self, folder: Path) -> None:
        """Write the whole model with the trained encoder, and its processor."""
        if self.args.should_save:
            model, processor = self._result
            model.to(self.dtype).save_pretrained(folder)
            processor.save_pretrained(folder)


def _facts(mixture: Mixture, number: int) -> Mapping[str, Any]:
    row = mixture.raw_row(number)
    missing = [key for key in ("labels", "boxes") if key not in row]
    if missing:
        raise ValueError(
            f"the row at {mixture.record(number).where} has no {' and no '.join(missing)}, which tracks need"
        )
    return row
