"""Ask about a video: encode it once, in bounded memory, and ask as often as you like."""

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hico.modeling_hico import CLIPS_PER_CHUNK, HicoForConditionalGeneration
from hico.processing_hico import HicoProcessor, split_clips
from hico.video_io import stream_video


class Session:
    """A conversation about one video, for one thread.

    The video is decoded, encoded and compressed in chunks, the next one decoding while this one is encoded; only its
    visual tokens stay in memory.

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
            self.visual_tokens = self._encode(progress)

    @torch.no_grad()
    def _encode(self, progress: bool) -> Tensor:
        with tqdm(total=self.video.num_frames, unit="frame", desc="encoding", disable=not progress) as bar:

            def clips():
                for frames in self.video:
                    yield split_clips(frames, self.processor.vision.clip_len)
                    bar.update(len(frames))

            return self.model.model.encode(clips()).flatten(0, 1)

    @torch.no_grad()
    def ask(self, question: str, *, max_new_tokens: int = 256, **generate_kwargs: Any) -> str:
        """Ask a question; earlier questions and answers are part of the prompt.

        Args:
            question: plain text.
            max_new_tokens: length of the answer at most.
            generate_kwargs: for ``generate``, such as ``streamer`` or ``do_sample``.

        Returns:
            The answer, without special tokens.
        """
        content: Any = question
        if not self.messages:
            content = [{"type": "video", "path": self.video}, {"type": "text", "text": question}]
        messages = [*self.messages, {"role": "user", "content": content}]
        inputs = self.processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
        inputs = inputs.to(self.model.device)
        ids = self.model.generate(
            **inputs, visual_embeds=[self.visual_tokens], max_new_tokens=max_new_tokens, **generate_kwargs
        )
        answer = self.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer


def answer(
    model: HicoForConditionalGeneration,
    processor: HicoProcessor,
    video: Any,
    question: str,
    *,
    max_new_tokens: int = 256,
    progress: bool = False,
    generate_kwargs: dict[str, Any] | None = None,
    **video_settings: Any,
) -> str:
    """Answer one question about one video, of any length, in bounded memory.

    Args:
        model: see `Session`.
        processor: see `Session`.
        video: a path, bytes, a file object or a folder of images.
        question: plain text.
        max_new_tokens: length of the answer at most.
        progress: show a bar while the video is encoded.
        generate_kwargs: further arguments of ``generate``.
        video_settings: ``num_frames``, ``fps``, ``start``, ``end`` and all else that `stream_video` takes.

    Returns:
        The answer.
    """
    session = Session(model, processor, video, progress=progress, **video_settings)
    return session.ask(question, max_new_tokens=max_new_tokens, **(generate_kwargs or {}))
