"""What happened to the tokens of a video on the way to an answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hico.compressors.base import Compressor
from hico.llm_dropout import DropPlan, find_handle
from hico.modeling_hico import HicoForConditionalGeneration
from hico.processing_hico import HicoProcessor, split_clips
from hico.video_compressors.base import CompressedVideo
from hico.video_io import Video, read_video


@dataclass(frozen=True)
class Step:
    """A place where tokens may go.

    Args:
        name: of what decides.
        kept_K: int64, ascending: which of all N * K tokens of the clips are left after it.
        scores: ``(N * K,)`` float32 by which it chose, 0 at tokens that had gone before; None if it asked for none.
    """

    name: str
    kept_K: Tensor
    scores: Tensor | None = None


@dataclass(frozen=True)
class Facts:
    """All that a page shows.

    Args:
        question: that was asked.
        answer: that the model gave.
        frames_FCHW: uint8, the frames that were looked at, without those that fill the last clip.
        seconds: ``(F,)`` when each appears.
        clip_len: frames of a clip, T.
        grid: patches of a clip along time, rows and columns.
        groups_NL: int64, which of the K tokens of its clip each patch weighs most in; -1 where it is in none. None if
            the compressor cannot say.
        tokens_per_clip: K.
        tokens_per_unit: tokens that stand for one moment: those of a frame, or of a clip that is merged over time.
        steps: the clip compressor, then the video compressor if there is one, then the stages of the drop schedule.
    """

    question: str
    answer: str
    frames_FCHW: Tensor
    seconds: Tensor
    clip_len: int
    grid: tuple[int, int, int]
    groups_NL: Tensor | None
    tokens_per_clip: int
    tokens_per_unit: int
    steps: tuple[Step, ...]


@torch.no_grad()
def collect(
    model: HicoForConditionalGeneration,
    processor: HicoProcessor,
    video: Any,
    question: str,
    *,
    video_settings: Mapping[str, Any] | None = None,
    **generate_kwargs: Any,
) -> Facts:
    """Answer a question about a video, and note what became of its tokens meanwhile.

    The video is encoded once and the prompt read once, as for any answer: hooks listen, and are gone afterwards.

    Args:
        model: in any dtype, on any device.
        processor: of the same model.
        video: whatever `hico.video_io.read_video` opens.
        question: plain text.
        video_settings: sampling settings of `read_video`.
        generate_kwargs: for ``generate``.

    Raises:
        VideoError: if the video cannot be read.
    """
    vision, network = processor.vision, model.model
    settings = processor.video_settings(dict(video_settings or {}))
    frames = read_video(video, size=vision.image_size, clip_len=vision.clip_len, **settings)
    clips_NTCHW = split_clips(frames.frames, vision.clip_len)
    groups: list[Tensor | None] = []
    listener = network.compressor.register_forward_pre_hook(
        lambda compressor, args: groups.append(find_groups(compressor, *args))
    )
    try:
        compressed = network.encode_video(clips_NTCHW, num_clips=len(clips_NTCHW))
    finally:
        listener.remove()
    answer, plan, columns_K = _answer(model, processor, frames, compressed, question, generate_kwargs)
    return Facts(
        question=question,
        answer=answer,
        frames_FCHW=frames.frames,
        seconds=frames.seconds,
        clip_len=vision.clip_len,
        grid=network.encoder.grid(vision.clip_len, *clips_NTCHW.shape[-2:]),
        groups_NL=None if groups[0] is None else torch.cat(groups),
        tokens_per_clip=compressed.num_frames * compressed.tokens_per_frame // len(clips_NTCHW),
        tokens_per_unit=compressed.tokens_per_frame,
        steps=_steps(model, compressed, plan, columns_K),
    )


def find_groups(compressor: Compressor, tokens_NLD: Tensor, grid: tuple[int, int, int]) -> Tensor | None:
    """Say which output token each patch weighs most in.

    Args:
        compressor: any.
        tokens_NLD: what it is given.
        grid: of one clip.

    Returns:
        ``(N, L)`` int64 on the CPU, -1 where a patch is in no token; None if the compressor cannot say.
    """
    if not compressor.carries:
        return None
    num_patches, groups = tokens_NLD.shape[1], []
    marks_1LL = torch.eye(num_patches, device=tokens_NLD.device)[None]
    for clip_1LD in tokens_NLD.split(1):  # L x L numbers at a time
        weights_KL = compressor.carry(marks_1LL, clip_1LD, grid)[0]
        most_L, group_L = weights_KL.max(dim=0)
        groups.append(group_L.masked_fill(most_L <= 0, -1).cpu())
    return torch.stack(groups)


def _answer(
    model: HicoForConditionalGeneration,
    processor: HicoProcessor,
    frames: Video,
    compressed: CompressedVideo,
    question: str,
    settings: Mapping[str, Any],
) -> tuple[str, DropPlan | None, Tensor]:
    """Return the answer, what the prefill dropped, and the columns of the video's tokens in the prefill."""
    messages = [{"role": "user", "content": [{"type": "video", "path": frames}, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True).to(model.device)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")} | {
        "visual_embeds": [compressed.tokens_KD]
    }
    columns_K = model.model.prepare(**given).visual_mask[0].nonzero()[:, 0]
    plans: list[DropPlan | None] = []
    listener = model.model.language_model.register_forward_hook(
        lambda decoder, args, output: plans.append(getattr(output, "drop_plan", None)) if not plans else None
    )
    try:
        ids = model.generate(**given, **settings)
    finally:
        listener.remove()
    answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer, plans[0], columns_K


def _steps(
    model: HicoForConditionalGeneration, compressed: CompressedVideo, plan: DropPlan | None, columns_K: Tensor
) -> tuple[Step, ...]:
    num_tokens = compressed.num_frames * compressed.tokens_per_frame
    config, indices_K = model.config, compressed.indices_K.cpu()
    steps = [Step(config.compressor["name"], torch.arange(num_tokens))]
    if config.video_compressor is not None:
        steps.append(Step(config.video_compressor["name"], indices_K))
    if plan is None:
        return tuple(steps)
    for stage in find_handle(model.model.language_model).schedule.stages:
        kept_K = torch.isin(columns_K, plan.kept_at(stage.layer)[0].to(columns_K.device)).cpu()
        scores_S, scores = plan.scores_at(stage.layer), None
        if scores_S is not None:
            scores = torch.zeros(num_tokens).scatter_(0, indices_K, scores_S[0].cpu()[columns_K.cpu()])
        steps.append(Step(str(stage), indices_K[kept_K], scores))
    return tuple(steps)
