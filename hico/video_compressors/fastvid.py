"""Keep what the encoder attended to, and merge the rest of each scene into a few frames of it: FastVID."""

import torch
from torch import Tensor

from hico.ops.clustering import merge_into, peak_order, squared_distances
from hico.ops.dropping import keep_count
from hico.ops.segments import cut_segments, split_evenly
from hico.ops.similarity import exact_units, frame_means, paired_cosine, rank_in_frame
from hico.video_compressors.base import FrameTokens, VideoCompressor, check_ratio

NUM_FORCED_CUTS = 7
"""Cuts wherever consecutive frames are least alike, however alike they are."""
SAME_SCENE = 0.9
"""Cosine of consecutive frames below which a scene ends."""
CONTEXT_SHARE = 0.4
ANCHOR_STEP = 4
NEIGHBOURS = 4
MIN_WEIGHT = 0.6


class FastVIDVideoCompressor(VideoCompressor):
    """Cut a video into scenes, keep the most attended tokens of every frame, and merge the others into anchors.

    A scene ends where the means of consecutive frames are among the 7 least alike, or less than 0.9. Of the
    ``r = int(P R)`` tokens per frame, ``int(0.4 r)`` are context: they are carried by the tokens that stand best for
    others (`hico.ops.clustering.peak_order`, 4 neighbours) of every fourth frame, counted back from a scene's last.
    All tokens that are not kept join the most similar of them in their scene; an anchor that n tokens joined weighs
    ``max(1 / (n + 1), 0.6)``, and their mean the rest.

    Args:
        keep_ratio: share R of the tokens to keep, in (0, 1]; ``int(P R)`` are per frame, at least one.
        longest: frames after which a scene is cut in any case, so that time grows with the length of a video and not
            with its square. Videos of no more frames are treated as published.

    Raises:
        ValueError: if a setting is out of range.

    Source: Shen et al., "FastVID", arXiv:2503.11187. The context of a scene is shared out evenly among its anchors,
    earlier ones first; what they cannot hold (at ratios above 0.45) goes to attended tokens of its other frames. The
    release tells equal tokens apart by noise, we do by their places.
    """

    needs_attention = True

    def __init__(self, *, keep_ratio: float = 0.25, longest: int = 64):
        super().__init__()
        self.keep_ratio = check_ratio(keep_ratio)
        if longest < 1:
            raise ValueError(f"longest is {longest}; a scene has at least 1 frame")
        self.longest = longest

    def num_kept(self, num_frames: int, tokens_per_frame: int) -> int:
        """See ``VideoCompressor.num_kept``."""
        return num_frames * max(1, keep_count(tokens_per_frame, self.keep_ratio))

    def choose(self, video: FrameTokens) -> tuple[Tensor, Tensor]:
        """See ``VideoCompressor.choose``."""
        tokens_FPD, device = video.tokens_FPD, video.tokens_FPD.device
        with torch.no_grad():
            means_FD = frame_means(tokens_FPD)
            cosine_F = paired_cosine(means_FD[1:], means_FD[:-1])
        is_border = cosine_F < SAME_SCENE
        is_border[cosine_F.sort(stable=True).indices[:NUM_FORCED_CUTS]] = True
        segments = cut_segments(is_border.tolist(), longest=self.longest)
        num_salient, num_context = self._counts(segments, tokens_FPD.shape[1])
        is_salient_FP = rank_in_frame(video.attention_FP) < torch.tensor(num_salient, device=device)[:, None]
        is_anchor_FP = torch.zeros_like(is_salient_FP)
        merged = []
        for start, end in segments:
            if any(num_context[start:end]):
                of_segment = slice(start, end)
                tokens, salient = tokens_FPD[of_segment], is_salient_FP[of_segment]
                anchors = self._anchors(tokens, salient, num_context[of_segment])
                merged.append(self._merge(tokens, salient, anchors))
                is_anchor_FP[of_segment] = anchors
        kept = (is_salient_FP | is_anchor_FP).flatten().nonzero()[:, 0]
        tokens = tokens_FPD.flatten(0, 1)[kept]
        if merged:
            places = is_anchor_FP.flatten()[kept].nonzero()[:, 0]
            tokens = tokens.index_copy(0, places, torch.cat(merged))
        return kept, tokens

    def _counts(self, segments: list[tuple[int, int]], per_frame: int) -> tuple[list[int], list[int]]:
        """Return how many attended and how many context tokens every frame keeps."""
        num_kept = self.num_kept(1, per_frame)
        num_context = keep_count(num_kept, CONTEXT_SHARE)
        num_salient, most = num_kept - num_context, per_frame - num_kept + num_context
        salient, context = [], []
        for start, end in segments:
            is_anchor = [(end - 1 - frame) % ANCHOR_STEP == 0 for frame in range(start, end)]
            shares = split_evenly(num_context * (end - start), sum(is_anchor))
            over = sum(max(0, share - most) for share in shares)
            anchors, others = iter(shares), iter(split_evenly(over, len(is_anchor) - sum(is_anchor)))
            for anchor in is_anchor:
                context.append(min(next(anchors), most) if anchor else 0)
                salient.append(num_salient + (0 if anchor else next(others)))
        return salient, context

    @torch.no_grad()
    def _anchors(self, tokens_LPD: Tensor, is_salient_LP: Tensor, num_context: list[int]) -> Tensor:
        is_anchor_LP = torch.zeros_like(is_salient_LP)
        for frame, count in enumerate(num_context):
            if count:
                places = (~is_salient_LP[frame]).nonzero()[:, 0]
                order = peak_order(squared_distances(tokens_LPD[frame, places][None]), k=NEIGHBOURS)[0]
                is_anchor_LP[frame, places[order[:count]]] = True
        return is_anchor_LP

    @staticmethod
    def _merge(tokens_LPD: Tensor, is_salient_LP: Tensor, is_anchor_LP: Tensor) -> Tensor:
        anchors, others = tokens_LPD[is_anchor_LP], tokens_LPD[~(is_anchor_LP | is_salient_LP)]
        with torch.no_grad():
            nearest = (exact_units(others) @ exact_units(anchors).mT).argmax(1)
        return merge_into(anchors, others, nearest, min_weight=MIN_WEIGHT)
