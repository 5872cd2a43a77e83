"""What a call brings that dropping builds on, read and checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hico.compat import UnsupportedDecoder
from hico.llm_dropout.queries import IGNORED_LABEL
from hico.ops.dropping import span_ids

SHORTENED = ("attention_mask", "position_ids", "position_embeddings")
"""What a decoder hands to its layers for every token, and what a plan knows to shorten."""


def read_mask(attention_mask: Any, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return bool ``(B, seen + S)``, which is ``shape``, True at real tokens.

    Raises:
        ValueError: if the mask is of another form.
    """
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != shape:
        seen = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"attention_mask is {seen}; where visual tokens are dropped it must be None or {shape}, "
            "1 for real tokens and 0 for padding"
        )
    return attention_mask.to(device, torch.bool)


def read_positions(
    position_ids: Tensor | None, length: int, device: torch.device, *, num_seen: int, may_be_packed: bool
) -> Tensor:
    """Return positions ``(B or 1, S)``, counted on from what was seen if none are given.

    Raises:
        ValueError: if a token has several, or they have gaps where transformers would take those for borders of rows.
    """
    if position_ids is None:
        return torch.arange(length, device=device)[None] + num_seen
    if position_ids.ndim != 2:
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}, with more than one position for each token; "
            "where visual tokens are dropped it must be None or (batch, sequence)"
        )
    if may_be_packed and (position_ids.diff(dim=-1) != 1).any():
        raise ValueError(
            "position_ids has gaps or restarts, which transformers reads as packed sequences; visual tokens can "
            "be dropped from one sample per row only, so unpack the rows"
        )
    return position_ids


def read_spans(visual_mask: Tensor, labels: Tensor | None, valid_BS: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the spans of a call, as `span_ids` numbers them, and which tokens are answers; None if nothing tells.

    Raises:
        ValueError: if one of them is not laid out as the call.
    """
    shape = tuple(valid_BS.shape)
    for name, given in (("visual_mask", visual_mask), ("labels", labels)):
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(given.shape)} for a call of {shape[0]} rows of {shape[1]} tokens; pass "
                "the prompt in one piece (no prefill_chunk_size), with one entry per token"
            )
    spans_BS = span_ids(visual_mask).to(valid_BS.device)
    answer_BS = spans_BS < 0
    if labels is not None:
        answer_BS |= labels.to(valid_BS.device) != IGNORED_LABEL
    elif not answer_BS.any():
        return spans_BS, None
    return spans_BS, answer_BS & valid_BS


def check_given(layer: nn.Module, given: dict[str, Any]) -> None:
    """Check that a decoder hands its layers what a plan replaces, and no other tensor.

    Raises:
        UnsupportedDecoder: naming what is missing, or what there is beside.
    """
    missing = [name for name in ("attention_mask", "position_embeddings") if name not in given]
    if missing:
        raise UnsupportedDecoder(layer, f"is not given {' or '.join(missing)} by name, so it cannot be shortened")
    others = [name for name, part in given.items() if name not in SHORTENED and isinstance(part, Tensor) and part.ndim]
    if others:
        raise UnsupportedDecoder(layer, f"is given {', '.join(others)}, which dropping does not know to shorten")
