"""Keep the tokens that are least like each other: DivPrune."""

import torch
from torch import Tensor

from hico.ops.dropping import keep_count
from hico.ops.similarity import exact_units
from hico.video_compressors.base import FrameTokens, VideoCompressor, check_ratio


class DivPruneVideoCompressor(VideoCompressor):
    """Take greedily the token whose largest cosine to those taken is smallest, window by window.

    The first is the one whose largest cosine to any other is smallest.

    Args:
        keep_ratio: share R of the tokens to keep, in (0, 1]; ``int(F P R)`` are, at least one. Windows share them in
            proportion to their frames; what rounding leaves over goes to later ones.
        window: frames among which tokens are compared. Videos of no more frames are treated as published; comparing
            all tokens of longer ones takes time with the square of their length.

    Raises:
        ValueError: if a setting is out of range.

    Source: Alvar et al., "DivPrune", arXiv:2503.02175.
    """

    def __init__(self, *, keep_ratio: float = 0.25, window: int = 32):
        super().__init__()
        self.keep_ratio = check_ratio(keep_ratio)
        if window < 1:
            raise ValueError(f"window is {window}; it must be at least 1 frame")
        self.window = window

    def num_kept(self, num_frames: int, tokens_per_frame: int) -> int:
        """See ``VideoCompressor.num_kept``; at least one."""
        return max(1, keep_count(num_frames * tokens_per_frame, self.keep_ratio))

    def choose(self, video: FrameTokens) -> tuple[Tensor, Tensor]:
        """See ``VideoCompressor.choose``."""
        tokens_FPD = video.tokens_FPD
        num_frames, per_frame, _ = tokens_FPD.shape
        total, kept, num_done = self.num_kept(num_frames, per_frame), [], 0
        for start in range(0, num_frames, self.window):
            end = min(start + self.window, num_frames)
            until = total * end // num_frames
            places = most_apart(tokens_FPD[start:end].flatten(0, 1), until - num_done)
            kept.append(places + start * per_frame)
            num_done = until
        indices = torch.cat(kept)
        return indices, tokens_FPD.flatten(0, 1)[indices]


@torch.no_grad()
def most_apart(tokens_ND: Tensor, num_keep: int) -> Tensor:
    """Choose tokens greedily, each as unlike those before as can be: ``(num_keep,)`` increasing places."""
    if num_keep == 0:
        return torch.zeros(0, dtype=torch.int64, device=tokens_ND.device)
    units_ND = exact_units(tokens_ND)
    similar_NN = units_ND @ units_ND.mT
    similar_NN.fill_diagonal_(-torch.inf)
    closest_N = similar_NN.amax(1)
    taken = []
    for _ in range(num_keep):
        taken.append(closest_N.argmin(0, keepdim=True))
        row_N = similar_NN.index_select(0, taken[-1])[0]
        closest_N = torch.maximum(closest_N, row_N) if taken[1:] else row_N
        closest_N[taken[-1]] = torch.inf  # and stays, so that none is taken twice
    return torch.cat(taken).sort().values
