"""Drop what stayed as it was in the frame before: differential token drop."""

import torch
from torch import Tensor

from hico.ops.similarity import cosine_to_previous
from hico.video_compressors.base import FrameTokens, WindowedCompressor


class DTDVideoCompressor(WindowedCompressor):
    """Drop a token if it is too similar to the one at its place in the frame before. The first frame is kept whole.

    Args:
        threshold: cosine above which a token is dropped; 1 drops nothing. Published are 0.25 to 0.5.

    Raises:
        ValueError: if the threshold is no cosine.

    Source: "TimeChat-Online", arXiv:2504.17343, differential token drop by features. Its other form, by pixels, is
    left out: a video compressor sees no pixels.
    """

    by_content = True
    lookback = 1

    def __init__(self, *, threshold: float = 0.5):
        super().__init__()
        if not -1 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}; it is a cosine, from -1 to 1")
        self.threshold = threshold

    def num_kept(self, num_frames: int, tokens_per_frame: int) -> int:
        """See ``VideoCompressor.num_kept``."""
        return num_frames * tokens_per_frame

    def choose(self, video: FrameTokens) -> tuple[Tensor, Tensor]:
        """See ``VideoCompressor.choose``."""
        tokens_FPD = video.tokens_FPD
        changed_FP = cosine_to_previous(tokens_FPD) <= self.threshold
        kept_FP = torch.cat([changed_FP.new_ones(1, tokens_FPD.shape[1]), changed_FP])
        kept = kept_FP.flatten().nonzero()[:, 0]
        return kept, tokens_FPD.flatten(0, 1)[kept]
