"""Ask about a video: encode it once, in bounded memory, and ask as often as you like."""

from copy import copy
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from hico.modeling_hico import HicoForConditionalGeneration
from hico.processing_hico import HicoProcessor, split_clips
from hico.video_compressors.base import CompressedVideo
from hico.video_io import stream_video
from hico.visual_features import CLIPS_PER_CHUNK

ANSWER_TOKENS = 1024
"""Length of an answer at most where nobody names one: what the examples of the releases take."""


class Session:
    """A conversation about one video, for one thread.

    The video is decoded, encoded and compressed in chunks, the next one decoding while this one is encoded; only its
    visual tokens stay in memory. While they are made, a video compressor that ``streams`` holds what it keeps, and
    others what they need to choose.

    Args:
        model: in any dtype, on any device.
        processor: of the same model.
        video: whatever `hico.video_io.read_video` opens.
        progress: show a bar while the video is encoded.
        video_settings: sampling settings of `hico.video_io.stream_video`, such as ``num_frames``, ``start``, ``end``.

    Raises:
        VideoError: if the video cannot be read.
    """

    def __init__(
        self,
        model: HicoForConditionalGeneration,
        processor: HicoProcessor,
        video: Any,
        *,
        progress: bool = False,
        **video_settings: Any,
    ):
        self.model, self.processor = model, processor
        self.messages: list[dict[str, Any]] = []
        vision = processor.vision
        with stream_video(
            video,
            size=vision.image_size,
            clip_len=vision.clip_len,
            chunk_frames=CLIPS_PER_CHUNK * vision.clip_len,
            **processor.video_settings(video_settings),
        ) as self.video:
            self.compressed = self._encode(progress)

    @property
    def visual_tokens(self) -> Tensor:
        """``(K, E)`` the tokens that stand for the video."""
        return self.compressed.tokens_KD

    @property
    def token_seconds(self) -> Tensor:
        """``(K,)`` float64, when each of the visual tokens is, in seconds from the start of the video."""
        return self.compressed.seconds_of(self.video.seconds)

    @torch.no_grad()
    def _encode(self, progress: bool) -> CompressedVideo:
        with tqdm(total=self.video.num_frames, unit="frame", desc="encoding", disable=not progress) as bar:

            def clips():
                for frames in self.video:
                    yield split_clips(frames, self.processor.vision.clip_len)
                    bar.update(len(frames))

            num_clips = -(-self.video.num_frames // self.processor.vision.clip_len)
            return self.model.model.encode_video(clips(), num_clips=num_clips)

    @torch.no_grad()
    def ask(
        self, question: str, *, max_new_tokens: int | None = None, **generate_kwargs: Any
    ) -> str | GenerateDecoderOnlyOutput:
        """Ask a question; earlier questions and answers are part of the prompt.

        Args:
            question: plain text.
            max_new_tokens: length of the answer at most; if omitted, what ``generate_kwargs`` or the model's
                ``generation_config`` say, and `ANSWER_TOKENS` where they are silent.
            generate_kwargs: for ``generate``, such as ``streamer``, ``do_sample`` or ``generation_config``.

        Returns:
            The answer, without special tokens; with ``return_dict_in_generate`` the output of ``generate`` (token ids,
            scores, cache), whose ``answer`` it is.
        """
        content: Any = question
        if not self.messages:
            content = [{"type": "video", "path": self.video}, {"type": "text", "text": question}]
        messages = [*self.messages, {"role": "user", "content": content}]
        inputs = self.processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
        inputs = inputs.to(self.model.device)
        settings = _bounded({"max_new_tokens": max_new_tokens, **generate_kwargs}, self.model.generation_config)
        output = self.model.generate(**inputs, visual_embeds=[self.visual_tokens], **settings)
        ids = output if isinstance(output, Tensor) else output.sequences
        answer = self.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        if isinstance(output, Tensor):
            return answer
        output.answer = answer
        return output


def _bounded(settings: dict[str, Any], own: GenerationConfig) -> dict[str, Any]:
    """Give settings of ``generate`` a length if neither they nor the model's own name one."""
    settings = {name: value for name, value in settings.items() if (name, value) != ("max_new_tokens", None)}
    given = settings.get("generation_config")
    lengths = (settings.get("max_length"), *(getattr(given, name, None) for name in ("max_new_tokens", "max_length")))
    if "max_new_tokens" in settings or own.max_new_tokens or any(lengths):
        return settings
    if given is None:
        return {**settings, "max_new_tokens": ANSWER_TOKENS}
    given = copy(given)
    given.max_new_tokens = ANSWER_TOKENS
    return {**settings, "generation_config": given}


def answer(
    model: HicoForConditionalGeneration,
    processor: HicoProcessor,
    video: Any,
    question: str,
    *,
    max_new_tokens: int | None = None,
    progress: bool = False,
    generate_kwargs: dict[str, Any] | None = None,
    **video_settings: Any,
) -> str | GenerateDecoderOnlyOutput:
    """Answer one question about one video, of any length, in bounded memory.

    Args:
        model: see `Session`.
        processor: see `Session`.
        video: a path, bytes, a file object or a folder of images.
        question: plain text.
        max_new_tokens: see `Session.ask`.
        progress: show a bar while the video is encoded.
        generate_kwargs: further arguments of ``generate``.
        video_settings: ``num_frames``, ``fps``, ``start``, ``end`` and all else that `stream_video` takes.

    Returns:
        The answer, as `Session.ask` gives it.
    """
    session = Session(model, processor, video, progress=progress, **video_settings)
    return session.ask(question, max_new_tokens=max_new_tokens, **(generate_kwargs or {}))
