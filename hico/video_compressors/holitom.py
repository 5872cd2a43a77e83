"""Average what stands still over the best segments, and spend the budget on what is left: HoliTom."""

import math

import numpy as np
import torch
from torch import Tensor

from hico.ops.clustering import dpc_knn, merge_into
from hico.ops.dropping import keep_count
from hico.ops.similarity import cosine_to_previous, rank_in_frame
from hico.video_compressors.base import FrameTokens, VideoCompressor, check_ratio

NEIGHBOURS = 7
MIN_WEIGHT = 0.6


class HoliTomVideoCompressor(VideoCompressor):
    """Cut a video where most can be averaged over time, then keep a share of what stands still and of what moves.

    A place is static in a segment if each of its tokens has a cosine above ``threshold`` to the one before; its mean
    stands in the segment's first frame. The segments are those that save most tokens by that. The ratio grows by what
    was saved, up to 1. Then every frame keeps its share of the others by attention, and every segment its share of the
    static ones around density peaks (`hico.ops.clustering.dpc_knn`, 7 neighbours), where a centre that n tokens joined
    weighs ``max(1 / (n + 1), 0.6)`` and their mean the rest. Shares are rounded down, so the content decides how far
    below R the count is; a video never loses its last token.

    Args:
        keep_ratio: share R of the tokens to keep at most, in (0, 1]; 1 leaves a video as it is.
        threshold: cosine above which a token counts as the one before; if omitted, as published: 0.8, and 0.65 where
            ``keep_ratio`` is at most 0.1.

    Raises:
        ValueError: if a setting is out of range.

    Source: Shao et al., "HoliTom", arXiv:2505.21334, the part before the LLM. Of equally good segmentations the one
    whose last segment is shorter is taken, and so on for those before.
    """

    by_content = True
    needs_attention = True

    def __init__(self, *, keep_ratio: float = 0.25, threshold: float | None = None):
        super().__init__()
        self.keep_ratio = check_ratio(keep_ratio)
        if threshold is not None and not -1 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}; it is a cosine, from -1 to 1")
        self.threshold = (0.65 if keep_ratio <= 0.1 else 0.8) if threshold is None else threshold

    def num_kept(self, num_frames: int, tokens_per_frame: int) -> int:
        """See ``VideoCompressor.num_kept``."""
        return max(1, math.ceil(num_frames * tokens_per_frame * self.keep_ratio))

    def choose(self, video: FrameTokens) -> tuple[Tensor, Tensor]:
        """See ``VideoCompressor.choose``."""
        tokens_FPD, attention_FP, _ = video
        num_frames, per_frame, _ = tokens_FPD.shape
        total = num_frames * per_frame
        if self.keep_ratio == 1:
            return torch.arange(total, device=tokens_FPD.device), tokens_FPD.flatten(0, 1)
        is_like_FP = (cosine_to_previous(tokens_FPD) > self.threshold).cpu()
        segments = best_segments(is_like_FP.numpy())
        is_static = [is_like_FP[start : end - 1].all(0) & (end - start > 1) for start, end in segments]
        num_saved = sum(int(s.sum()) * (end - start - 1) for s, (start, end) in zip(is_static, segments, strict=True))
        ratio = min(self.keep_ratio / (1 - num_saved / total), 1.0)
        found = []
        for is_static_P, (start, end) in zip(is_static, segments, strict=True):
            reduced = self._reduce(tokens_FPD[start:end], attention_FP[start:end], is_static_P, ratio)
            found += [(places + start * per_frame, tokens) for places, tokens in reduced]
        if not found:
            best = attention_FP.flatten().argmax(0, keepdim=True)
            return best, tokens_FPD.flatten(0, 1)[best]
        indices, tokens = map(torch.cat, zip(*found, strict=True))
        order = indices.argsort()
        return indices[order], tokens[order]

    @staticmethod
    def _reduce(
        tokens_LPD: Tensor, attention_LP: Tensor, is_static_P: Tensor, ratio: float
    ) -> list[tuple[Tensor, Tensor]]:
        """Return places in a segment and the tokens there, static ones and others."""
        is_static_P, per_frame = is_static_P.to(tokens_LPD.device), tokens_LPD.shape[1]
        static, moving = is_static_P.nonzero()[:, 0], (~is_static_P).nonzero()[:, 0]
        num_static, num_moving = (keep_count(len(places), ratio) for places in (static, moving))
        found = []
        if num_static:
            means_ND = tokens_LPD[:, static].mean(0, dtype=torch.promote_types(tokens_LPD.dtype, torch.float32))
            centres, group_N = (part[0] for part in dpc_knn(means_ND[None], num_static, k=NEIGHBOURS))
            joins_N = torch.ones_like(group_N, dtype=torch.bool)
            joins_N[centres] = False
            merged = merge_into(means_ND[centres], means_ND[joins_N], group_N[joins_N], min_weight=MIN_WEIGHT)
            found.append((static[centres], merged.to(tokens_LPD.dtype)))
        if num_moving:
            rank_LQ = rank_in_frame(attention_LP[:, moving])
            places_LQ = moving + torch.arange(len(tokens_LPD), device=moving.device)[:, None] * per_frame
            kept = places_LQ[rank_LQ < num_moving]
            found.append((kept, tokens_LPD.flatten(0, 1)[kept]))
        return found


def best_segments(is_like_FP: np.ndarray) -> list[tuple[int, int]]:
    """Cut frames so that most tokens are saved: per segment, places that stay alike all through, times length - 1.

    Args:
        is_like_FP: ``(F - 1, P)`` bool, whether a place of frame f + 1 is like that of frame f.

    Returns:
        The first and the past-the-last frame of every segment, in order.
    """
    num_frames, per_frame = len(is_like_FP) + 1, is_like_FP.shape[1]
    best, start_of = np.zeros(num_frames + 1, dtype=np.int64), np.zeros(num_frames + 1, dtype=np.int64)
    run_P = np.zeros(per_frame, dtype=np.int64)
    for end in range(1, num_frames + 1):
        if end > 1:
            run_P = np.where(is_like_FP[end - 2], run_P + 1, 0)
        num_alike = np.bincount(run_P)[::-1].cumsum()[::-1]  # places alike for the last n steps, n = 0 ..
        num_steps = np.arange(len(num_alike))
        saved = best[end - 1 - num_steps] + num_alike * num_steps
        longest = int(saved.argmax())
        best[end], start_of[end] = saved[longest], end - 1 - longest
    segments, end = [], num_frames
    while end:
        segments.append((int(start_of[end]), end))
        end = int(start_of[end])
    return segments[::-1]
