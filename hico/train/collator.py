"""Examples to batches: right padding or packing, and a batch for a device that has no row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hico.processing_hico import HicoProcessor
from hico.prompt import IGNORE_INDEX, IMAGE_TOKEN
from hico.train.dataset import BadRow
from hico.train.mixture import MODALITIES

PIXELS = ("pixel_values_videos", "video_num_clips", "pixel_values", "image_grids")


@dataclass
class Collator:
    """Put examples into a batch.

    A batch holds ``input_ids`` and ``labels`` ``(B, S)``, ``attention_mask`` or, if packed, ``position_ids``; the
    rows' pixels; ``modality`` ``(B, S)``, that of the row at every token; and ``bad_rows``, those left out. A batch
    without pixels gets a black image in a row of its own, without labels, if ``blank_image`` is set: across
    devices, every part of the model must run on each. So does a batch without rows.

    Args:
        processor: of the model.
        packing: one sequence instead of padded rows; positions begin anew with every row, so that attention stays
            within it.
        blank_image: see above.
    """

    processor: HicoProcessor
    packing: bool = False
    blank_image: bool = False

    def __call__(self, examples: Sequence[dict[str, Any] | BadRow]) -> dict[str, Any]:
        bad_rows = [example for example in examples if isinstance(example, BadRow)]
        rows = [example for example in examples if not isinstance(example, BadRow)]
        if not rows or (self.blank_image and not any(name in row for row in rows for name in PIXELS)):
            rows.append(self._blank())
        batch = self._pack(rows) if self.packing else self._pad(rows)
        for name in PIXELS:
            if values := [row[name] for row in rows if name in row]:
                batch[name] = torch.cat(values)
        # With a cache, transformers takes packed rows for one: it looks for their borders only without.
        return {**batch, "use_cache": False, "bad_rows": bad_rows}

    def _pad(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        pad_id = self.processor.tokenizer.pad_token_id
        columns = {
            "input_ids": ([row["input_ids"] for row in rows], pad_id),
            "attention_mask": ([torch.ones_like(row["input_ids"]) for row in rows], 0),
            "labels": ([row["labels"] for row in rows], IGNORE_INDEX),
            "modality": ([torch.full_like(row["input_ids"], row["modality"]) for row in rows], 0),
        }
        pad = torch.nn.utils.rnn.pad_sequence
        return {name: pad(values, batch_first=True, padding_value=fill) for name, (values, fill) in columns.items()}

    def _pack(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        columns = {
            "input_ids": [row["input_ids"] for row in rows],
            "labels": [row["labels"] for row in rows],
            "position_ids": [torch.arange(len(row["input_ids"])) for row in rows],
            "modality": [torch.full_like(row["input_ids"], row["modality"]) for row in rows],
        }
        return {name: torch.cat(values)[None] for name, values in columns.items()}

    def _blank(self) -> dict[str, Any]:
        vision = self.processor.vision
        token = self.processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        input_ids = torch.full((vision.num_image_tokens(),), token)
        return {
            "input_ids": input_ids,
            "labels": torch.full_like(input_ids, IGNORE_INDEX),
            "pixel_values": torch.zeros(1, 3, vision.image_size, vision.image_size, dtype=torch.uint8),
            "image_grids": torch.zeros(1, 2, dtype=torch.long),
            "modality": MODALITIES.index("text"),
        }
