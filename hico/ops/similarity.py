"""Comparing tokens frame by frame, in blocks, so that nothing as large as a video is written out."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**22
"""Numbers of a video that are held in float32 at a time."""


def wide(tokens: Tensor) -> Tensor:
    """Return tokens in float32, or in float64 if they are."""
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def frame_blocks(tokens_FPD: Tensor) -> Iterator[slice]:
    """Cut the frames of a video into blocks of bounded size."""
    num_frames, *rest = tokens_FPD.shape
    step = max(1, BLOCK_ELEMENTS // max(1, torch.Size(rest).numel()))
    return (slice(start, min(start + step, num_frames)) for start in range(0, num_frames, step))


def unit_vectors(tokens: Tensor) -> Tensor:
    """Scale tokens ``(..., D)`` to length 1, in float32 or wider; zeros stay zeros."""
    tokens = wide(tokens)
    length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    return tokens / length.masked_fill(length == 0, 1)


def paired_cosine(one: Tensor, other: Tensor) -> Tensor:
    """Compute the cosine of tokens ``(..., D)`` one by one.

    Returns:
        ``(...)`` float64: exactly 1 for equal tokens, 0 where one of them is zero.
    """
    one, other = wide(one), wide(other)
    dot, first, second = ((a * b).sum(-1).double() for a, b in ((one, other), (one, one), (other, other)))
    norm = (first * second).sqrt()
    return (dot / norm.masked_fill(norm == 0, 1)).clamp(-1, 1)


@torch.no_grad()
def cosine_to_previous(tokens_FPD: Tensor) -> Tensor:
    """Compare every token with the one at its place in the frame before.

    Returns:
        ``(F - 1, P)`` float64, as `paired_cosine`; row f compares frames f and f + 1.
    """
    later_FPD = tokens_FPD[1:]
    found = [paired_cosine(later_FPD[block], tokens_FPD[block]) for block in frame_blocks(later_FPD)]
    return torch.cat(found) if found else tokens_FPD.new_zeros(0, tokens_FPD.shape[1], dtype=torch.float64)


def exact_units(tokens: Tensor) -> Tensor:
    """Scale tokens ``(..., D)`` to length 1 so that dot products are exact, and equal tokens tie exactly.

    Components are rounded to multiples of ``2**-26``, and float64 adds up their products without rounding, in whatever
    order a matrix product takes them. Zeros stay zeros.

    Returns:
        ``(..., D)`` float64.
    """
    units = unit_vectors(tokens.double())
    return (units * 2.0**26).round() * 2.0**-26


def frame_means(tokens_FPD: Tensor) -> Tensor:
    """Average the tokens of every frame: ``(F, D)`` in float32 or wider."""
    dtype = torch.promote_types(tokens_FPD.dtype, torch.float32)
    return tokens_FPD.mean(1, dtype=dtype)


def rank_in_frame(scores_FP: Tensor) -> Tensor:
    """Rank the tokens of every frame: ``(F, P)``, 0 for the highest score, of equal ones the earlier first."""
    return scores_FP.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
