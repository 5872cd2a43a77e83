"""Merge tokens of a clip over time only: what stands still is said once."""

import math

from torch import Tensor

from hico.compressors.base import Compressor
from hico.ops.merging import apply_merge, plan_merge_over_time, similarity_metric


class TemporalMergeCompressor(Compressor):
    """Merge each place's most similar successive tokens into their means, until a fixed number is left.

    Has no weights. Places are never merged with each other, so a frame can go down to 1/T of its tokens, and an image,
    which has no time, keeps all of its own. Tokens come out by the time and place of their first member.

    Args:
        hidden_size: width D.
        num_heads: the encoder's attention heads; tokens are compared by the mean over heads.
        tokens_per_frame: output tokens of a clip, per step of its time axis.

    Raises:
        ValueError: if the settings do not fit.

    Source: the similarity of Bolya et al., "Token Merging", arXiv:2210.09461, along time alone: the contrast to
    merging over space and time in Li et al., "VideoChat-Flash", arXiv:2501.00574.
    """

    def __init__(self, *, hidden_size: int, num_heads: int, tokens_per_frame: int = 49):
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} does not split into {num_heads} heads")
        self.num_heads = num_heads
        self.tokens_per_frame = tokens_per_frame

    def num_output_tokens(self, grid: tuple[int, int, int]) -> int:
        """See ``Compressor.num_output_tokens``."""
        steps, places, num_tokens = grid[0], grid[1] * grid[2], math.prod(grid)
        if steps == 1:
            return num_tokens
        num_keep = self.tokens_per_frame * steps
        if not places <= num_keep <= num_tokens:
            raise ValueError(
                f"merging {steps} frames of {places} tokens over time leaves {math.ceil(places / steps)} to {places} "
                f"tokens a frame, and not {self.tokens_per_frame}; set tokens_per_frame within that, or frames of "
                "another size"
            )
        return num_keep

    def carry(self, values_NLC: Tensor, tokens_NLD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """See ``Compressor.carry``."""
        num_keep = self.num_output_tokens(grid)
        if num_keep == tokens_NLD.shape[1]:
            return values_NLC
        metric_NLC = similarity_metric(tokens_NLD.detach(), num_heads=self.num_heads)
        return apply_merge(values_NLC, plan_merge_over_time(metric_NLC, num_keep, num_steps=grid[0]))

    def forward(self, tokens_NLD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """See ``Compressor.forward``."""
        self.check_grid(tokens_NLD, grid)
        return self.carry(tokens_NLD, tokens_NLD, grid)
