"""What one setting of a model costs, and how many questions it answers: the figures of a row of an ablation."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from hico.bench import MemoryWatch
from hico.configuration_hico import build_compressor
from hico.costs import Decoder, Vision, lengths_per_layer
from hico.eval.answers import Question, answer_batch, is_right, wilson_interval, without_pixels
from hico.eval.cells import Cell
from hico.llm_dropout import DropSchedule
from hico.modeling_hico import HicoForConditionalGeneration
from hico.processing_hico import HicoProcessor, split_clips
from hico.video_compressors.base import CompressedVideo
from hico.video_io import Video, read_video


class Tried:
    """A loaded model that takes on one setting after another, without learning anything.

    Args:
        model: in evaluation mode.
        processor: of the same model.
    """

    def __init__(self, model: HicoForConditionalGeneration, processor: HicoProcessor):
        self.model, self.processor = model, processor
        self._own = model.config.compressor, model.model.compressor

    def set(self, cell: Cell) -> None:
        """Make the model and its processor those of a cell.

        Raises:
            ValueError: if its parts do not fit, or would need weights that the checkpoint does not hold.
        """
        if cell.encoder:
            raise ValueError(
                f"encoder {cell.encoder['name']!r} is not the checkpoint's; compare encoders in trained mode"
            )
        inner, config = self.model.model, self.model.config
        self.model.set_video_compressor(None)
        self.model.set_drop_schedule(None)
        config.compressor, inner.compressor = self._own
        if cell.compressor:
            width = config.text_config.hidden_size if config.projector_first else inner.encoder.hidden_size
            built = build_compressor(cell.compressor, inner.encoder, hidden_size=width)
            if any(True for _ in built.parameters()):
                raise ValueError(
                    f"compressor {cell.compressor['name']!r} has weights of its own, which the checkpoint does not "
                    "hold; compare it in trained mode"
                )
            config.compressor, inner.compressor = dict(cell.compressor), built.to(self.model.device).eval()
        self.model.set_video_compressor(cell.video_compressor)
        self.model.set_drop_schedule(cell.drop_schedule)
        self.processor.vision = config.vision


@dataclass
class Seconds:
    """Time to the first token in its four parts, and of every further token."""

    decode: float
    encode: float
    compress: float
    prefill: float = 0.0
    token: float = 0.0


@torch.no_grad()
def measure(
    model: HicoForConditionalGeneration,
    processor: HicoProcessor,
    questions: Sequence[Question],
    *,
    frames: int | None = None,
    batch_size: int = 32,
    num_timed: int = 8,
    new_tokens: int = 16,
) -> dict[str, Any]:
    """Ask questions, and say what that costs.

    Args:
        model: in evaluation mode.
        processor: of the same model.
        questions: those about one video stand together.
        frames: frames of every video; as the processor chooses them if omitted.
        batch_size: questions that are answered at once. Times and memory are of one question alone.
        num_timed: questions that are timed, after one that warms up and whose memory is taken.
        new_tokens: length of the timed answers.

    Returns:
        The figures, as JSON has them: counts and operations are means over all questions, times the medians of those
        timed. Operations are by arithmetic (`hico.costs`), with the tokens that the video compressor left.
    """
    decoder, vision = Decoder.of(model.config.text_config), Vision.of(model.config)
    schedule = DropSchedule.parse(model.config.drop_schedule)
    totals: dict[str, float] = dict.fromkeys(("frames", "before", "visual", "deep", "encode", "compress", "llm"), 0.0)
    num_right, waiting = 0, []
    for _, group in groupby(questions, key=lambda question: str(question.video)):
        asked = list(group)
        video, compressed, _ = _see(model, processor, asked[0], frames)
        num_clips = -(-len(video.frames) // processor.vision.clip_len)
        for question in asked:
            waiting.append((question, video, compressed.tokens_KD))
            num_text = _num_text(model, processor, question, video)
            num_visual = len(compressed.tokens_KD)
            lengths = lengths_per_layer(
                schedule, num_layers=len(decoder.layer_weights), num_visual=num_visual, num_text=num_text
            )
            totals["frames"] += len(video.frames)
            totals["before"] += compressed.num_frames * compressed.tokens_per_frame
            totals["visual"] += num_visual
            totals["deep"] += sum(lengths) / len(lengths) - num_text
            totals["encode"] += num_clips * vision.encoder_flops / 1e12
            totals["compress"] += num_clips * vision.compressor_flops / 1e12
            totals["llm"] += decoder.prefill_flops(lengths) / 1e12
        while len(waiting) >= batch_size:
            num_right += _num_right(model, processor, waiting[:batch_size])
            waiting = waiting[batch_size:]
    num_right += _num_right(model, processor, waiting)
    count = len(questions)
    means = {name: total / count for name, total in totals.items()}
    low, high = wilson_interval(num_right, count)
    return {
        "frames": means["frames"],
        "tokens_per_frame": totals["visual"] / totals["frames"],
        "deep_tokens_per_frame": totals["deep"] / totals["frames"],
        "retained": totals["visual"] / totals["before"],
        "encode_tflop": means["encode"],
        "compress_tflop": means["compress"],
        "llm_tflop": means["llm"],
        **_costs(model, processor, questions, frames, num_timed=num_timed, new_tokens=new_tokens),
        "right": num_right,
        "n": count,
        "accuracy": num_right / count,
        "low": low,
        "high": high,
    }


def _costs(model, processor, questions, frames, *, num_timed: int, new_tokens: int) -> dict[str, float | None]:
    """Time some questions, evenly spread, one by one."""
    num_timed = min(num_timed, len(questions))
    chosen = [questions[number * len(questions) // num_timed] for number in range(num_timed)]
    with MemoryWatch(model.device) as memory:
        _run_alone(model, processor, chosen[0], frames, new_tokens)
    runs = [_run_alone(model, processor, question, frames, new_tokens) for question in chosen]
    parts = {f"{part}_s": median(getattr(run, part) for run in runs) for part in ("decode", "encode", "compress")}
    prefill, token = (median(getattr(run, part) for run in runs) for part in ("prefill", "token"))
    first = median(run.decode + run.encode + run.compress + run.prefill for run in runs)
    rest = {"prefill_s": prefill, "first_token_s": first, "tokens_per_s": 1 / token if token else None}
    return {**parts, **rest, "peak_bytes": memory.rise}


def _run_alone(model, processor, question: Question, frames: int | None, new_tokens: int) -> Seconds:
    video, compressed, seconds = _see(model, processor, question, frames)
    inputs = processor.apply_chat_template([question.about(video)], tokenize=True, add_generation_prompt=True)
    inputs = {name: value.to(model.device) for name, value in without_pixels(inputs).items()}
    clock, length = _TokenClock(), max(2, new_tokens)
    started = _now(model)
    model.generate(
        **inputs,
        visual_embeds=[compressed.tokens_KD],
        do_sample=False,
        max_new_tokens=length,
        min_new_tokens=length,
        streamer=clock,
    )
    seconds.prefill = clock.times[1] - started
    seconds.token = (clock.times[-1] - clock.times[1]) / (len(clock.times) - 2)
    return seconds


class _TokenClock(BaseStreamer):
    """Note when the prompt and every new token came; the tokens are on the CPU by then."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        """See `BaseStreamer`."""


def _see(model, processor, question: Question, frames: int | None) -> tuple[Video, CompressedVideo, Seconds]:
    """Decode, encode and compress the video of a question."""
    vision = processor.vision
    settings = processor.video_settings({"num_frames": frames})
    started = time.perf_counter()
    video = read_video(question.video, size=vision.image_size, clip_len=vision.clip_len, **settings)
    decoded = _now(model)
    clips = split_clips(video.frames, vision.clip_len)
    with _encoder_time(model) as encoding:
        compressed = model.model.encode_video(clips, num_clips=len(clips))
    seen = _now(model) - decoded
    return video, compressed, Seconds(decoded - started, encoding[0], seen - encoding[0])


@contextmanager
def _encoder_time(model) -> Iterator[list[float]]:
    """Add up the seconds that the encoder takes inside a ``with`` block."""
    encoder, total, is_inside = model.model.encoder, [0.0], False

    def timed(run):
        def wrapped(*args, **kwargs):
            nonlocal is_inside
            if is_inside:  # one of the two calls the other
                return run(*args, **kwargs)
            started, is_inside = _now(model), True
            result = run(*args, **kwargs)
            total[0], is_inside = total[0] + _now(model) - started, False
            return result

        return wrapped

    names = ("forward", "attend")
    for name in names:
        setattr(encoder, name, timed(getattr(encoder, name)))
    try:
        yield total
    finally:
        for name in names:
            delattr(encoder, name)


def _num_right(model, processor, waiting: Sequence[tuple[Question, Video, torch.Tensor]]) -> int:
    if not waiting:
        return 0
    conversations = [question.about(video) for question, video, _ in waiting]
    answers = answer_batch(model, processor, conversations, visual_embeds=[tokens for *_, tokens in waiting])
    return sum(is_right(answer, one[0].truth) for answer, one in zip(answers, waiting, strict=True))


def _num_text(model, processor, question: Question, video: Video) -> int:
    """Count the tokens of a prompt that are not visual."""
    inputs = processor.apply_chat_template([question.about(video)], tokenize=True, add_generation_prompt=True)
    return int((inputs["input_ids"] != model.config.video_token_id).sum())


def _now(model) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
