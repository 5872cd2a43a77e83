"""Keep the tokens that stand out of their video and their frame: VidCom2."""

import torch
from torch import Tensor

from hico.ops.dropping import keep_count
from hico.ops.similarity import frame_blocks, rank_in_frame, unit_vectors
from hico.video_compressors.base import FrameTokens, VideoCompressor, check_ratio

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
"""Of the kernels that are added up."""
TEMPERATURE = 0.01


class VidCom2VideoCompressor(VideoCompressor):
    """Give frames that stand out of the video more tokens, and keep of each those that stand out of both.

    Likeness to a mean is a sum of Gaussian kernels, over the half of the channels that varies least. A frame's share
    grows with how little its tokens are like the video's mean, and its tokens are kept that are least like that mean
    and the frame's. Rounded shares are then made to add up: what is missing comes from the tokens that are least like
    among those left out, what is too much goes from the most like, but never a frame's last.

    Args:
        keep_ratio: share R of the tokens to keep, in (0, 1]; ``int(F P R)`` are, at least one of every frame.

    Raises:
        ValueError: if ``keep_ratio`` is out of range.

    Source: Liu et al., "VidCom2", arXiv:2505.14454. It does not say how shares are made to add up; we do as above.
    """

    def __init__(self, *, keep_ratio: float = 0.25):
        super().__init__()
        self.keep_ratio = check_ratio(keep_ratio)

    def num_kept(self, num_frames: int, tokens_per_frame: int) -> int:
        """See ``VideoCompressor.num_kept``; at least one of every frame."""
        return max(num_frames, keep_count(num_frames * tokens_per_frame, self.keep_ratio))

    def choose(self, video: FrameTokens) -> tuple[Tensor, Tensor]:
        """See ``VideoCompressor.choose``."""
        tokens_FPD = video.tokens_FPD
        kept = self._choose(tokens_FPD).flatten().nonzero()[:, 0]
        return kept, tokens_FPD.flatten(0, 1)[kept]

    @torch.no_grad()
    def _choose(self, tokens_FPD: Tensor) -> Tensor:
        num_frames, per_frame, _ = tokens_FPD.shape
        to_video_FP, to_frame_FP = likeness(tokens_FPD)
        frame_F = -to_video_FP.mean(1)
        share_F = ((frame_F - frame_F.max()) / TEMPERATURE).softmax(0)
        rate_F = (self.keep_ratio * (1 + share_F - share_F.mean())).clamp(max=1)
        count_F = (rate_F * per_frame).round().clamp(1, per_frame)
        like_FP = to_video_FP + to_frame_FP
        rank_FP = rank_in_frame(-like_FP)
        kept = (rank_FP < count_F[:, None]).flatten()
        missing = self.num_kept(num_frames, per_frame) - int(kept.sum())
        like = like_FP.flatten()
        if missing > 0:
            kept[like.masked_fill(kept, torch.inf).sort(stable=True).indices[:missing]] = True
        elif missing < 0:
            is_free = kept & (rank_FP > 0).flatten()
            # Of equally like tokens the later one goes.
            order = like.flip(0).masked_fill(~is_free.flip(0), -torch.inf).sort(descending=True, stable=True).indices
            kept[len(kept) - 1 - order[:-missing]] = False
        return kept


@torch.no_grad()
def likeness(tokens_FPD: Tensor) -> tuple[Tensor, Tensor]:
    """Say how like the mean of the video, and that of its frame, each token is: ``(F, P)`` float64 both."""
    narrow = _steady_channels(tokens_FPD)
    blocks = list(frame_blocks(tokens_FPD))
    mean_FD = torch.cat([unit_vectors(tokens_FPD[block][..., narrow]).double().mean(1) for block in blocks])
    mean_D = mean_FD.mean(0)
    both = []
    for block in blocks:
        units_FPD = unit_vectors(tokens_FPD[block][..., narrow]).double()
        both.append(torch.stack([_kernels(units_FPD - mean_D), _kernels(units_FPD - mean_FD[block, None])]))
    to_video_FP, to_frame_FP = torch.cat(both, dim=1)
    return to_video_FP, to_frame_FP


def _steady_channels(tokens_FPD: Tensor) -> Tensor:
    """Return the half of the channels with the lowest variance over all tokens, in order."""
    num_tokens, width = tokens_FPD.shape[:2].numel(), tokens_FPD.shape[2]
    blocks = [tokens_FPD[block] for block in frame_blocks(tokens_FPD)]
    mean_D = sum(block.double().sum((0, 1)) for block in blocks) / num_tokens
    spread_D = sum((block.double() - mean_D).square().sum((0, 1)) for block in blocks)
    return spread_D.sort(stable=True).indices[: max(1, width // 2)].sort().values


def _kernels(difference_FPD: Tensor) -> Tensor:
    squared_FP = difference_FPD.square().sum(-1)
    return sum((-squared_FP / (2 * width)).exp() for width in WIDTHS)
