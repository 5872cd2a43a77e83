"""Positions as vectors."""

import torch
from torch import Tensor


def sinusoid_table(num_positions: int, width: int) -> Tensor:
    """Compute the sine and cosine table of positions ``0 .. num_positions - 1``.

    Column ``j`` of row ``p`` is the sine (even ``j``) or cosine (odd ``j``) of
    ``p / 10000^(2 * floor(j / 2) / width)``.

    Returns:
        ``(num_positions, width)`` float32 on the CPU, computed in float64.

    Source: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, section 3.5.
    """
    positions = torch.arange(num_positions, dtype=torch.float64, device="cpu")
    columns = torch.arange(width, dtype=torch.float64, device="cpu")
    angles = positions[:, None] / 10000 ** (2 * (columns // 2) / width)
    angles[:, 0::2] = angles[:, 0::2].sin()
    angles[:, 1::2] = angles[:, 1::2].cos()
    return angles.float()
