"""Examples to batches: right padding or packing, and a batch for a device that has no row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hico.data.dataset import BadRow
from hico.data.mixture import MODALITIES
from hico.processing_hico import HicoProcessor
from hico.prompt import IGNORE_INDEX, IMAGE_TOKEN, VIDEO_TOKEN

KINDS = ("modality", "dataset")
PIXELS = ("pixel_values_videos", "video_num_clips", "pixel_values", "image_grids")


@dataclass
class Collator:
    """Put examples into a batch.

    A batch holds ``input_ids`` and ``labels`` ``(B, S)``, ``attention_mask`` or, if packed, ``position_ids``; the
    rows' pixels; ``modality`` and ``dataset`` ``(B, S)``, those of the row at every token; ``num_rows``, how many
    were asked for; and ``bad_rows``, those of them left out. A batch that lacks rows gets a black image or video in a
    row of its own, without labels: it adds nothing to the loss.

    Args:
        processor: of the model.
        packing: one sequence instead of padded rows; positions begin anew with every row, so that attention stays
            within it.
        needed: what every batch must have: ``"rows"``; ``"pixels"``, so that every part of the model runs and gets a
            gradient, as data-parallel devices must agree on; or ``"both"`` images and videos, so that the encoder
            runs equally often on every device, as sharded weights need.
        preferences: rows have two answers each: ``B`` rows with the chosen ones, then the same with the others, and
            ``visual_copies`` says that the pixels are given once for both.
    """

    processor: HicoProcessor
    packing: bool = False
    needed: str = "rows"
    preferences: bool = False

    def __call__(self, examples: Sequence[dict[str, Any] | BadRow]) -> dict[str, Any]:
        bad_rows = [example for example in examples if isinstance(example, BadRow)]
        rows = [example for example in examples if not isinstance(example, BadRow)]
        present = {name for row in rows for name in PIXELS if name in row}
        if not rows or (self.needed != "rows" and not present) or (self.needed == "both" and PIXELS[0] not in present):
            rows.append(self._blank("video" if self.needed == "both" else "image"))
        if self.needed == "both" and "pixel_values" not in present:
            rows.append(self._blank("image"))
        texts = rows
        if self.preferences:
            texts = rows + [{**row, **row.get("rejected", {})} for row in rows]  # a blank row is its own rival
        batch = self._pack(texts) if self.packing else self._pad(texts)
        for name in PIXELS:
            if values := [row[name] for row in rows if name in row]:
                batch[name] = torch.cat(values)
        if self.preferences:
            batch["visual_copies"] = 2
        # With a cache, transformers takes packed rows for one: it looks for their borders only without.
        return {**batch, "use_cache": False, "num_rows": len(examples), "bad_rows": bad_rows}

    def _pad(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        pad_id = self.processor.tokenizer.pad_token_id
        columns = {
            "input_ids": ([row["input_ids"] for row in rows], pad_id),
            "attention_mask": ([torch.ones_like(row["input_ids"]) for row in rows], 0),
            "labels": ([row["labels"] for row in rows], IGNORE_INDEX),
            **{name: ([torch.full_like(row["input_ids"], row[name]) for row in rows], 0) for name in KINDS},
        }
        pad = torch.nn.utils.rnn.pad_sequence
        return {name: pad(values, batch_first=True, padding_value=fill) for name, (values, fill) in columns.items()}

    def _pack(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        columns = {
            "input_ids": [row["input_ids"] for row in rows],
            "labels": [row["labels"] for row in rows],
            "position_ids": [torch.arange(len(row["input_ids"])) for row in rows],
            **{name: [torch.full_like(row["input_ids"], row[name]) for row in rows] for name in KINDS},
        }
        return {name: torch.cat(values)[None] for name, values in columns.items()}

    def _blank(self, kind: str) -> dict[str, Any]:
        vision = self.processor.vision
        frame = torch.zeros(3, vision.image_size, vision.image_size, dtype=torch.uint8)
        if kind == "image":
            token, count = IMAGE_TOKEN, vision.num_image_tokens()
            pixels = {"pixel_values": frame[None], "image_grids": torch.zeros(1, 2, dtype=torch.long)}
        else:
            token, count = VIDEO_TOKEN, vision.num_video_tokens(vision.clip_len)
            pixels = {
                "pixel_values_videos": frame.repeat(1, vision.clip_len, 1, 1, 1),
                "video_num_clips": torch.ones(1, dtype=torch.long),
            }
        input_ids = torch.full((count,), self.processor.tokenizer.convert_tokens_to_ids(token))
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        return {"input_ids": input_ids, "labels": labels, "modality": MODALITIES.index("text"), "dataset": 0, **pixels}
