"""What every video compressor offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hico.ops.dropping import keep_count
from hico.registry import VIDEO_COMPRESSORS


class FrameTokens(NamedTuple):
    """The tokens of some frames of one video, in order, and what is known of them."""

    tokens_FPD: Tensor
    """Floating point, of any dtype."""
    attention_FP: Tensor | None = None
    """Attention that each token received in the encoder; comparable within a frame."""
    keys_FPC: Tensor | None = None
    """Keys of the encoder's attention, averaged over heads."""

    def cut(self, start: int, end: int | None = None) -> FrameTokens:
        """Return the frames ``[start, end)``."""
        return FrameTokens(*(None if part is None else part[start:end] for part in self))


@dataclass(frozen=True)
class CompressedVideo:
    """What is left of a video.

    Args:
        tokens_KD: ``(K, D)`` the tokens, in the order of the LLM.
        indices_K: ``(K,)`` int64, strictly increasing: where each stood among all ``num_frames * tokens_per_frame``.
        num_frames: F.
        tokens_per_frame: P.
        sampled_per_frame: sampled frames that the encoder joined into each of the F.
    """

    tokens_KD: Tensor
    indices_K: Tensor
    num_frames: int
    tokens_per_frame: int
    sampled_per_frame: int = 1

    @classmethod
    def whole(cls, tokens_FPD: Tensor, *, sampled_per_frame: int = 1) -> CompressedVideo:
        """Describe a video of which all is left."""
        num_frames, per_frame, _ = tokens_FPD.shape
        indices_K = torch.arange(num_frames * per_frame, device=tokens_FPD.device)
        return cls(tokens_FPD.flatten(0, 1), indices_K, num_frames, per_frame, sampled_per_frame)

    @property
    def frames_K(self) -> Tensor:
        """``(K,)`` int64, the frame that each token is of, from 0."""
        return self.indices_K // self.tokens_per_frame

    def seconds_of(self, seconds: Tensor) -> Tensor:
        """Say when each token is.

        Args:
            seconds: ``(sampled,)`` when every sampled frame appears, in any unit. Where the encoder joins several into
                one frame, the mean of their times counts; frames that only fill the last clip are as late as the last.

        Returns:
            ``(K,)``.
        """
        missing = self.num_frames * self.sampled_per_frame - len(seconds)
        padded = torch.cat([seconds, seconds[-1:].expand(missing)])
        return padded.unflatten(0, (self.num_frames, -1)).mean(1)[self.frames_K.to(seconds.device)]


class VideoCompressor(nn.Module, ABC):
    """Turn all tokens of one video, between projector and LLM, into fewer.

    A *frame* is what the clip compressor leaves apart in time: one step of the encoder's grid if it pools each frame,
    and a whole clip if it merges tokens across frames; see `hico.compressors.base.Compressor.num_steps`.

    All settings are keyword arguments of the constructor; a config stores them as they are. Choices are deterministic,
    of equal tokens the earlier one wins, and gradients flow through the tokens, not through the choice.
    """

    by_content: ClassVar[bool] = False
    """Whether the content decides how many tokens are kept; then ``num_kept`` is the most that can be."""
    needs_attention: ClassVar[bool] = False
    """Whether ``select`` must be given what the encoder attended to."""
    streams: ClassVar[bool] = False
    """Whether it decides on frames as they come, without knowing how many will, so that a stream need not end."""

    @abstractmethod
    def num_kept(self, num_frames: int, tokens_per_frame: int) -> int:
        """Say how many of ``num_frames * tokens_per_frame`` tokens are kept, exactly; the most if ``by_content``.

        This is the one owner of the number: processor and model ask here. Needs no weights.

        Raises:
            ValueError: if so many frames or tokens cannot be reduced as the settings ask.
        """

    @abstractmethod
    def choose(self, video: FrameTokens) -> tuple[Tensor, Tensor]:
        """Choose tokens, of which some are dropped; called by `select`, with the same results."""

    def select(
        self, tokens_FPD: Tensor, attention_FP: Tensor | None = None, keys_FPC: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Reduce the tokens of one video.

        Args:
            tokens_FPD: ``(F, P, D)``.
            attention_FP: ``(F, P)`` attention that each token received in the encoder.
            keys_FPC: ``(F, P, C)`` keys of the encoder's attention, averaged over heads. Methods that compare keys
                compare the tokens themselves if it is omitted.

        Returns:
            ``(K,)`` int64 strictly increasing places among the ``F * P`` tokens, and the tokens ``(K, D)``.

        Raises:
            ValueError: if attention is needed and not given, or the tokens cannot be reduced as asked.
        """
        num_frames, per_frame = tokens_FPD.shape[:2]
        if self.needs_attention and attention_FP is None:
            raise ValueError(
                f"{type(self).__name__} ranks tokens by the encoder's attention, and none was given; "
                "pass attention_FP, or use a method that needs none"
            )
        if not self.by_content and self.num_kept(num_frames, per_frame) == num_frames * per_frame:
            return torch.arange(num_frames * per_frame, device=tokens_FPD.device), tokens_FPD.flatten(0, 1)
        return self.choose(FrameTokens(tokens_FPD, attention_FP, keys_FPC))

    def select_stream(self, chunks: Iterable[FrameTokens], *, num_frames: int) -> tuple[Tensor, Tensor]:
        """Reduce the tokens of a video that comes in chunks of frames, as `select` would reduce all at once.

        Methods that ``streams`` hold what they keep and a few frames more; others hold what they need, which may be
        the whole video.

        Args:
            chunks: frames in order.
            num_frames: F, in all chunks together.
        """
        parts = [torch.cat(part) if part[0] is not None else None for part in zip(*chunks, strict=True)]
        return self.select(*parts)

    def forward(self, tokens_FPD: Tensor, attention_FP: Tensor | None = None, keys_FPC: Tensor | None = None):
        """See `select`."""
        return self.select(tokens_FPD, attention_FP, keys_FPC)


class PlacewiseCompressor(VideoCompressor):
    """A video compressor that looks at how many tokens there are, and at none of them.

    Args:
        keep_ratio: share of the tokens to keep.
    """

    def __init__(self, *, keep_ratio: float = 0.25):
        super().__init__()
        self.keep_ratio = check_ratio(keep_ratio)

    def num_kept(self, num_frames: int, tokens_per_frame: int) -> int:
        """See `VideoCompressor.num_kept`; at least one."""
        return max(1, keep_count(num_frames * tokens_per_frame, self.keep_ratio))

    @abstractmethod
    def places(self, num_tokens: int, num_keep: int) -> Tensor:
        """Return ``num_keep`` strictly increasing places on the CPU."""

    def choose(self, video: FrameTokens) -> tuple[Tensor, Tensor]:
        """See `VideoCompressor.choose`."""
        num_frames, per_frame = video.tokens_FPD.shape[:2]
        places = self.places(num_frames * per_frame, self.num_kept(num_frames, per_frame)).to(video.tokens_FPD.device)
        return places, video.tokens_FPD.flatten(0, 1)[places]

    def select_stream(self, chunks: Iterable[FrameTokens], *, num_frames: int) -> tuple[Tensor, Tensor]:
        """See `VideoCompressor.select_stream`; holds what it keeps."""
        places, kept, start = None, [], 0
        for tokens_FPD, *_ in chunks:
            if places is None:
                per_frame = tokens_FPD.shape[1]
                places = self.places(num_frames * per_frame, self.num_kept(num_frames, per_frame))
                places = places.to(tokens_FPD.device)
            tokens = tokens_FPD.flatten(0, 1)
            here = places[(places >= start) & (places < start + len(tokens))] - start
            kept.append(tokens[here])
            start += len(tokens)
        return places, torch.cat(kept)


class WindowedCompressor(VideoCompressor):
    """A video compressor that decides on a few frames at a time, so that it works on a stream."""

    streams = True
    window: ClassVar[int] = 1
    """Frames that are decided on together."""
    lookback: ClassVar[int] = 0
    """Frames before them that the decision reads, whose own tokens `choose` keeps."""

    def select_stream(self, chunks: Iterable[FrameTokens], *, num_frames: int) -> tuple[Tensor, Tensor]:
        """See `VideoCompressor.select_stream`; works chunk by chunk, and reads no further than it must."""
        found: list[tuple[Tensor, Tensor]] = []
        for indices, tokens, _ in self.select_chunks(chunks):
            found.append((indices, tokens))
        indices, tokens = zip(*found, strict=True)
        return torch.cat(indices), torch.cat(tokens)

    def select_chunks(self, chunks: Iterable[FrameTokens]):
        """Yield for every few frames the places of their kept tokens, the tokens, and the frames decided on so far."""
        waiting, num_done, num_read = None, 0, 0
        for chunk in chunks:
            waiting = chunk if waiting is None else _join(waiting, chunk)
            num_whole = (len(waiting.tokens_FPD) - num_read) // self.window * self.window
            if num_whole:
                yield self._decide(waiting.cut(0, num_read + num_whole), num_read, num_done)
                num_done += num_whole
                left = num_read + num_whole - min(self.lookback, num_done)
                waiting, num_read = waiting.cut(left), min(self.lookback, num_done)
        if waiting is not None and len(waiting.tokens_FPD) > num_read:
            yield self._decide(waiting, num_read, num_done)

    def _decide(self, frames: FrameTokens, num_read: int, num_done: int):
        indices, tokens = self.select(*frames)
        per_frame = frames.tokens_FPD.shape[1]
        new = indices >= num_read * per_frame
        places = indices[new] + (num_done - num_read) * per_frame
        return places, tokens[new], num_done + len(frames.tokens_FPD) - num_read


def check_ratio(keep_ratio: float) -> float:
    """Return the share of tokens to keep.

    Raises:
        ValueError: if it is not in (0, 1].
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio is {keep_ratio}; it must be above 0 and at most 1")
    return float(keep_ratio)


def refuse_by_content(compressor: VideoCompressor | None, where: str) -> None:
    """Refuse a method whose counts only the content tells.

    Raises:
        ValueError: if the compressor is such a method; ``where`` says what needs exact counts.
    """
    if compressor is not None and compressor.by_content:
        exact = [name for name in VIDEO_COMPRESSORS.names() if not VIDEO_COMPRESSORS.get(name).by_content]
        raise ValueError(
            f"{where} must know how many tokens a video takes before it is encoded, and with "
            f"{type(compressor).__name__} the content decides; use one of {', '.join(exact)}"
        )


def _join(one: FrameTokens, other: FrameTokens) -> FrameTokens:
    return FrameTokens(*(a if a is None else torch.cat([a, b]) for a, b in zip(one, other, strict=True)))
