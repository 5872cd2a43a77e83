"""The demo: every step from a video file to an answer, with what each step made and how long it took."""

import tempfile
import time
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from hico.modeling_hico import HicoForConditionalGeneration
from hico.preprocessing import normalize_pixels
from hico.processing_hico import HicoProcessor, split_clips
from hico.video_io import read_video


def run(
    model: HicoForConditionalGeneration,
    processor: HicoProcessor,
    video: str | None,
    question: str,
    *,
    max_new_tokens: int = 24,
    **video_settings: Any,
) -> str:
    """Answer a question about a video, printing what happens; returns the answer.

    Args:
        model: any model on the CPU.
        processor: of the same model.
        video: a path; a small mp4 is written if it is None.
        question: plain text.
        max_new_tokens: length of the answer.
        video_settings: for `read_video`.
    """
    with tempfile.TemporaryDirectory() as folder:
        if video is None:
            video = str(Path(folder) / "moving_square.mp4")
            with _step("write a video") as say:
                write_moving_square(video)
                say(f"{Path(video).name}, {Path(video).stat().st_size / 1000:.0f} kB")
        vision = processor.vision
        with _step("decode and sample") as say:
            settings = processor.video_settings(video_settings)
            frames = read_video(video, size=vision.image_size, clip_len=vision.clip_len, **settings)
            first, last = frames.seconds[0], frames.seconds[-1]
            say(f"{len(frames.frames)} of its frames, {first:.2f} s to {last:.2f} s, {vision.image_size} px")
    tokens = _encode(model, split_clips(frames.frames, vision.clip_len))
    with _step("write the prompt") as say:
        messages = [
            {"role": "user", "content": [{"type": "video", "path": frames}, {"type": "text", "text": question}]}
        ]
        inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
        num_tokens = inputs["input_ids"].shape[1]
        say(f"{num_tokens} tokens, {len(tokens)} of them visual")
    with _step("generate") as say, torch.no_grad():
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            visual_embeds=[tokens],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        say(f"{ids.shape[1] - num_tokens} tokens")
    answer = processor.decode(ids[0, num_tokens:], skip_special_tokens=True)
    print(f"\nquestion: {question}\nanswer:   {answer!r}")
    print("The weights of this model are random: until it is trained, its answers mean nothing.")
    return answer


@torch.no_grad()
def _encode(model: HicoForConditionalGeneration, clips_NTCHW: Tensor) -> Tensor:
    inner = model.model
    grid = inner.encoder.grid(clips_NTCHW.shape[1], *clips_NTCHW.shape[-2:])
    with _step("encode the clips") as say:
        pixels = normalize_pixels(clips_NTCHW, mean=inner.encoder.image_mean, std=inner.encoder.image_std)
        tokens = inner.encoder(pixels)
        say(f"{len(tokens)} clips of {grid[0]} frames, {tokens.shape[1]} tokens each")
    with _step("merge the tokens") as say:
        merged = inner.compressor(tokens, grid)
        say(f"{tokens.shape[0] * tokens.shape[1]} tokens in, {merged.shape[0] * merged.shape[1]} out")
    with _step("project to the LLM") as say:
        projected = inner.projector(merged).flatten(0, 1)
        say(f"{len(projected)} tokens of width {projected.shape[1]}")
    return projected


@contextmanager
def _step(name: str):
    """Print one line for a step: its name, its seconds and what it says."""
    facts: list[str] = []
    start = time.perf_counter()
    yield facts.append
    print(f"{name:20s} {time.perf_counter() - start:7.3f} s   {'; '.join(facts)}", flush=True)


def write_moving_square(path: str, *, num_frames: int = 90, fps: int = 15, size: tuple[int, int] = (240, 320)) -> None:
    """Write an mp4 of a red square that crosses a grey floor from left to right.

    Args:
        path: of the file to write.
        num_frames: length.
        fps: frames per second.
        size: height and width in pixels.
    """
    height, width = size
    side = height // 4
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for index in range(num_frames):
            frame = np.full((height, width, 3), 90, dtype=np.uint8)
            left = round((width - side) * index / max(1, num_frames - 1))
            frame[(height - side) // 2 : (height + side) // 2, left : left + side] = (220, 40, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
