"""Keep what the encoder attended to, and merge the rest of each frame: VisionZip."""

import torch
from torch import Tensor

from hico.ops.clustering import group_means
from hico.ops.dropping import keep_count
from hico.ops.similarity import exact_units, frame_blocks, rank_in_frame, wide
from hico.video_compressors.base import FrameTokens, WindowedCompressor, check_ratio


class VisionZipVideoCompressor(WindowedCompressor):
    """Keep the dominant tokens of every frame, and merge the others into a few contextual ones.

    Dominant are those that received most attention. Of the rest, every step-th is a target, and every other joins the
    target with the most similar key; a target plus the mean of those that joined it is kept, at the target's place.

    Args:
        keep_ratio: share R of a frame's tokens to keep, in (0, 1]; of ``int(P R)``, at least one, ``int(10 / 64)`` of
            them are contextual, as published. 0.25 if no counts are given.
        dominant: dominant tokens per frame, instead of a ratio.
        contextual: contextual tokens per frame; with ``dominant`` only.

    Raises:
        ValueError: if the settings contradict each other or are out of range.

    Source: Yang et al., "VisionZip", arXiv:2412.04467. It merges what leaves the encoder; we merge what leaves the
    projector.
    """

    needs_attention = True

    def __init__(self, *, keep_ratio: float | None = None, dominant: int | None = None, contextual: int | None = None):
        super().__init__()
        if (dominant is None) != (contextual is None) or (dominant is not None and keep_ratio is not None):
            raise ValueError(
                f"keep_ratio {keep_ratio}, dominant {dominant}, contextual {contextual}: give the one or both others"
            )
        if dominant is not None and (min(dominant, contextual) < 0 or dominant + contextual < 1):
            raise ValueError(f"dominant {dominant} and contextual {contextual} must not be negative, nor both 0")
        self.keep_ratio = check_ratio(0.25 if keep_ratio is None else keep_ratio)
        self.counts = None if dominant is None else (dominant, contextual)

    def counts_of(self, tokens_per_frame: int) -> tuple[int, int]:
        """Return how many dominant and contextual tokens a frame keeps.

        Raises:
            ValueError: if it has fewer.
        """
        if self.counts is None:
            num_kept = max(1, keep_count(tokens_per_frame, self.keep_ratio))
            return num_kept - num_kept * 10 // 64, num_kept * 10 // 64
        if sum(self.counts) > tokens_per_frame:
            raise ValueError(
                f"cannot keep {self.counts[0]} dominant and {self.counts[1]} contextual tokens of the "
                f"{tokens_per_frame} of a frame; ask for fewer, or give keep_ratio"
            )
        return self.counts

    def num_kept(self, num_frames: int, tokens_per_frame: int) -> int:
        """See ``VideoCompressor.num_kept``."""
        return num_frames * sum(self.counts_of(tokens_per_frame))

    def choose(self, video: FrameTokens) -> tuple[Tensor, Tensor]:
        """See ``VideoCompressor.choose``."""
        per_frame, parts = video.tokens_FPD.shape[1], []
        for block in frame_blocks(video.tokens_FPD):
            places_FK, tokens_FKD = self._zip(video.cut(block.start, block.stop))
            frames = torch.arange(block.start, block.stop, device=places_FK.device)[:, None]
            parts.append(((places_FK + frames * per_frame).flatten(), tokens_FKD.flatten(0, 1)))
        indices, tokens = zip(*parts, strict=True)
        return torch.cat(indices), torch.cat(tokens)

    def _zip(self, video: FrameTokens) -> tuple[Tensor, Tensor]:
        tokens_FPD, keys_FPC = video.tokens_FPD, video.keys_FPC
        keys_FPC = tokens_FPD if keys_FPC is None else keys_FPC
        num_frames, per_frame, width = tokens_FPD.shape
        num_dominant, num_contextual = self.counts_of(per_frame)
        is_rest_FP = rank_in_frame(video.attention_FP) >= num_dominant
        order_FP = is_rest_FP.int().argsort(dim=1, stable=True)
        dominant_FK, rest_FQ = order_FP[:, :num_dominant], order_FP[:, num_dominant:]
        tokens_FKD = _take(tokens_FPD, dominant_FK)
        if not num_contextual:
            return dominant_FK, tokens_FKD
        step = max(1, rest_FQ.shape[1] // num_contextual)
        is_target_Q = torch.zeros(rest_FQ.shape[1], dtype=torch.bool, device=rest_FQ.device)
        is_target_Q[torch.arange(num_contextual, device=rest_FQ.device) * step] = True
        target_FC, other_FQ = rest_FQ[:, is_target_Q], rest_FQ[:, ~is_target_Q]
        with torch.no_grad():
            similar_FQC = exact_units(_take(keys_FPC, other_FQ)) @ exact_units(_take(keys_FPC, target_FC)).mT
        first_F1 = torch.arange(num_frames, device=rest_FQ.device)[:, None] * num_contextual
        group_FQ = similar_FQC.argmax(-1) + first_F1
        others = _take(tokens_FPD, other_FQ).flatten(0, 1)
        means, _ = group_means(others, group_FQ.flatten(), num_frames * num_contextual)
        context_FCD = wide(_take(tokens_FPD, target_FC)) + means.view(num_frames, num_contextual, width)
        places_FK, order_FK = torch.cat([dominant_FK, target_FC], dim=1).sort(dim=1)
        return places_FK, _take(torch.cat([tokens_FKD, context_FCD.to(tokens_FPD.dtype)], dim=1), order_FK)


def _take(values_FPD: Tensor, places_FK: Tensor) -> Tensor:
    return values_FPD.gather(1, places_FK[..., None].expand(-1, -1, values_FPD.shape[-1]))
