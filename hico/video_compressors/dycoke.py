"""Keep of every other frame what is new in it: DyCoke's temporal merging."""

import torch
from torch import Tensor

from hico.ops.similarity import frame_blocks, paired_cosine, rank_in_frame
from hico.video_compressors.base import FrameTokens, WindowedCompressor


class DyCokeVideoCompressor(WindowedCompressor):
    """Compare frames in windows of four, and keep of the later one of each pair the tokens that are least similar.

    Frame 1 is compared with frame 0, 3 with 2, and 2 with 0, place by place; frame 0 is kept whole. A last window of
    fewer frames is treated in the same way as far as it goes.

    Args:
        merge_ratio: share K of the tokens of a later frame that are dropped, in [0, 1]; ``int((1 - K) P)`` are kept.

    Raises:
        ValueError: if ``merge_ratio`` is out of range.

    Source: Tao et al., "DyCoke", arXiv:2411.15024, temporal token merging. Its second stage, which prunes the KV cache
    while an answer is written, belongs inside the LLM and is left out.
    """

    window = 4

    def __init__(self, *, merge_ratio: float = 0.7):
        super().__init__()
        if not 0 <= merge_ratio <= 1:
            raise ValueError(f"merge_ratio is {merge_ratio}; it must be from 0 to 1")
        self.merge_ratio = merge_ratio

    def num_kept(self, num_frames: int, tokens_per_frame: int) -> int:
        """See ``VideoCompressor.num_kept``; (1 + 3 (1 - K)) / 4 of whole windows."""
        num_whole = -(-num_frames // self.window)
        return num_whole * tokens_per_frame + (num_frames - num_whole) * self._num_later(tokens_per_frame)

    def _num_later(self, tokens_per_frame: int) -> int:
        return int((1 - self.merge_ratio) * tokens_per_frame)

    @torch.no_grad()
    def _kept(self, tokens_FPD: Tensor) -> Tensor:
        frames = torch.arange(len(tokens_FPD), device=tokens_FPD.device)
        place = frames % self.window
        before = frames - torch.where(place == 2, 2, 1)
        kept_FP = torch.ones(tokens_FPD.shape[:2], dtype=torch.bool, device=tokens_FPD.device)
        later = frames[place > 0]
        for block in frame_blocks(tokens_FPD):
            some = later[(later >= block.start) & (later < block.stop)]
            similar_FP = paired_cosine(tokens_FPD[some], tokens_FPD[before[some]])
            kept_FP[some] = rank_in_frame(-similar_FP) < self._num_later(tokens_FPD.shape[1])
        return kept_FP

    def choose(self, video: FrameTokens) -> tuple[Tensor, Tensor]:
        """See ``VideoCompressor.choose``."""
        kept = self._kept(video.tokens_FPD).flatten().nonzero()[:, 0]
        return kept, video.tokens_FPD.flatten(0, 1)[kept]
