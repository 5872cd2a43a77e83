"""Prompts whose placeholders are filled with visual tokens, and shortened where there are fewer than promised."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hico.ops.trimming import Trim, trim_rows
from hico.placeholders import number_items
from hico.video_compressors.base import CompressedVideo


@dataclass(frozen=True)
class VisualItems:
    """Videos, or images, that fill placeholders of their own, in order, row by row.

    Args:
        name: what to call one of them.
        mask_BS: bool, their placeholders.
        tokens: ``(tokens, E)`` of each.
        promised: how many placeholders each was given: as many as it has tokens, or more, of which it fills the first.
    """

    name: str
    mask_BS: Tensor
    tokens: Sequence[Tensor]
    promised: Sequence[int]

    def unfilled(self) -> Tensor:
        """Return the placeholders ``(B, S)`` that stay empty."""
        pairs = zip(self.tokens, self.promised, strict=True)
        is_empty = [place >= len(tokens) for tokens, promised in pairs for place in range(promised)]
        empty_n = torch.tensor(is_empty, dtype=torch.bool, device=self.mask_BS.device)
        return torch.zeros_like(self.mask_BS).masked_scatter(self.mask_BS, empty_n)


@dataclass
class VisualPrompt:
    """A prompt as the LLM gets it, of S' tokens.

    Args:
        input_ids: ``(B, S')``.
        inputs_embeds: ``(B, S', E)``.
        visual_mask: ``(B, S')``: 0 for text, k for the k-th video or image of its row.
        attention_mask: ``(B, S')``, or None.
        position_ids: ``(B or 1, S')`` without gaps, or None.
        trim: which tokens of the S that were given are left; None if all are, and S' is S.
        videos: the videos of the batch, if they were given as pixels.
    """

    input_ids: Tensor
    inputs_embeds: Tensor
    visual_mask: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    trim: Trim | None = None
    videos: list[CompressedVideo] | None = None


def fill_prompt(
    input_ids: Tensor,
    kind_BS: Tensor,
    groups: Sequence[VisualItems],
    *,
    embedding: Callable[[Tensor], Tensor],
    pad_id: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> VisualPrompt:
    """Put visual tokens in the place of their placeholders; leave out placeholders that stay empty.

    Args:
        input_ids: ``(B, S)``.
        kind_BS: 0 at text, elsewhere the kind of the placeholder.
        groups: what fills them.
        embedding: of tokens.
        pad_id: what stands where rows are padded anew.
        attention_mask: ``(B, S)``, or None.
        position_ids: ``(B or 1, S)``, or None.

    Raises:
        ValueError: if the items do not fill the placeholders of their rows, item by item.
    """
    visual_mask = number_items(kind_BS, [(group.name, group.mask_BS, group.promised) for group in groups])
    trim = None
    if any(len(tokens) != size for group in groups for tokens, size in zip(group.tokens, group.promised, strict=True)):
        empty_BS = torch.stack([group.unfilled() for group in groups]).any(0)
        trim, attention_mask = trim_rows(~empty_BS, attention_mask)
        input_ids, kind_BS = trim.gather(input_ids, fill=pad_id), trim.gather(kind_BS)
        visual_mask = trim.gather(visual_mask)
        position_ids = None if position_ids is None else trim.renumber(position_ids)
    # A placeholder may lie beyond the vocabulary.
    embeds = embedding(input_ids.masked_fill(kind_BS != 0, 0))
    for group in groups:
        if group.tokens:
            mask_BS = group.mask_BS if trim is None else trim.gather(group.mask_BS)
            embeds = embeds.masked_scatter(mask_BS[..., None], torch.cat(list(group.tokens)).to(embeds))
    return VisualPrompt(input_ids, embeds, visual_mask, attention_mask, position_ids, trim)
