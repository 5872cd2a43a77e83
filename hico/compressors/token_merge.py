"""Merge similar tokens of a clip, as VideoChat-Flash does."""

import math

from torch import Tensor

from hico.compressors.base import Compressor
from hico.ops.merging import ORDERS, apply_merge, merge_tokens, plan_merge, similarity_metric


class TokenMergeCompressor(Compressor):
    """Merge the tokens of a clip, over space and time, into a fixed number of size-weighted means.

    Has no weights. Deterministic: a clip gives the same bits alone and in any batch.

    Args:
        hidden_size: width D.
        num_heads: the encoder's attention heads; tokens are compared by the mean over heads.
        tokens_per_frame: output tokens of a clip, per step of its time axis.
        tokens_per_image: output tokens of a clip with one step.
        order: ``"similarity"`` (as published) or ``"position"``; see ``hico.ops.merging.plan_merge``.

    Raises:
        ValueError: if the settings do not fit.

    Source: Li et al., "VideoChat-Flash", arXiv:2501.00574, clip-level compression.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        tokens_per_frame: int = 16,
        tokens_per_image: int = 64,
        order: str = "similarity",
    ):
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} does not split into {num_heads} heads")
        if min(tokens_per_frame, tokens_per_image) < 1:
            raise ValueError(
                f"tokens_per_frame {tokens_per_frame} and tokens_per_image {tokens_per_image} must be at least 1"
            )
        if order not in ORDERS:
            raise ValueError(f"unknown order {order!r} of merged tokens; known: {', '.join(ORDERS)}")
        self.num_heads = num_heads
        self.tokens_per_frame = tokens_per_frame
        self.tokens_per_image = tokens_per_image
        self.order = order

    def num_output_tokens(self, grid: tuple[int, int, int]) -> int:
        """See ``Compressor.num_output_tokens``."""
        num_tokens, num_steps = math.prod(grid), grid[0]
        num_keep = self.tokens_per_image if num_steps == 1 else self.tokens_per_frame * num_steps
        if num_keep > num_tokens:
            setting = "tokens_per_image" if num_steps == 1 else "tokens_per_frame"
            raise ValueError(
                f"cannot merge the {num_tokens} tokens of grid {tuple(grid)} into {num_keep}; "
                f"use larger frames or {setting} <= {num_tokens // num_steps}"
            )
        return num_keep

    def carry(self, values_NLC: Tensor, tokens_NLD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """See ``Compressor.carry``."""
        num_keep = self.num_output_tokens(grid)
        if num_keep == tokens_NLD.shape[1]:
            return values_NLC
        metric_NLC = similarity_metric(tokens_NLD.detach(), num_heads=self.num_heads)
        return apply_merge(values_NLC, plan_merge(metric_NLC, num_keep, order=self.order))

    def forward(self, tokens_NLD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """See ``Compressor.forward``."""
        self.check_grid(tokens_NLD, grid)
        num_keep = self.num_output_tokens(grid)
        return merge_tokens(tokens_NLD, num_keep=num_keep, num_heads=self.num_heads, order=self.order)
