"""``hico plan``: what a model costs at so many frames, by arithmetic, before anything is downloaded or run."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hico.configuration_hico import HicoConfig
    from hico.llm_dropout import DropSchedule

FRAMES = (64, 256, 1000, 10000)
"""Lengths of the paper's Table 1."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Plan:
    """What one video of so many frames costs under one drop schedule."""

    frames: int
    schedule: str
    visual_tokens: int
    encode_tflop: float
    compress_tflop: float
    prefill_tflop: float
    decode_gflop: float
    weights_gib: float
    cache_gib: float
    peak_gib: float


COLUMNS = {
    "frames": ("frames", ",d"),
    "schedule": ("drop schedule", ""),
    "visual_tokens": ("visual tokens", ",d"),
    "encode_tflop": ("encode TFLOP", ",.2f"),
    "compress_tflop": ("compress", ",.3f"),
    "prefill_tflop": ("prefill TFLOP", ",.2f"),
    "decode_gflop": ("GFLOP a token", ",.1f"),
    "weights_gib": ("weights GiB", ",.2f"),
    "cache_gib": ("KV GiB", ",.3f"),
    "peak_gib": ("peak GiB", ",.2f"),
}
"""Field of `Plan` -> heading, format."""


def plan(
    config: HicoConfig,
    *,
    num_frames: int,
    schedule: str | DropSchedule | None = None,
    num_text: int = 64,
    dtype: str = "bfloat16",
) -> Plan:
    """Count what a prompt with one video costs.

    Args:
        config: of the model.
        num_frames: frames that the encoder sees; a multiple of the clip length.
        schedule: progressive visual dropout; none if omitted.
        num_text: tokens of the prompt that are not visual.
        dtype: of weights and activations.

    Returns:
        Operations in units of 1e12 (of a decoded token 1e9), memory in GiB. The peak is that of the prefill: weights,
        cache, embeddings of the prompt, and what the longest layer has in use; with fused attention there is no more.

    Raises:
        ValueError: if the frames do not split into clips, or the LLM is of a kind whose costs are not known.
    """
    from hico.costs import Decoder, Vision, lengths_per_layer
    from hico.llm_dropout import DropSchedule

    schedule = DropSchedule.parse(schedule)
    schedule.check_depth(config.text_config.num_hidden_layers)
    decoder, vision = Decoder.of(config.text_config), Vision.of(config)
    num_visual, num_clips = config.vision.num_video_tokens(num_frames), num_frames // config.clip_len
    lengths = lengths_per_layer(
        schedule, num_layers=len(decoder.layer_weights), num_visual=num_visual, num_text=num_text
    )
    size = BYTES[dtype]
    weights = (decoder.num_parameters + vision.num_parameters) * size
    cache = decoder.cache_bytes(lengths, bytes_per_value=size)
    in_use = (num_visual + num_text) * decoder.width * size + decoder.working_bytes(max(lengths), bytes_per_value=size)
    return Plan(
        frames=num_frames,
        schedule=str(schedule) or "none",
        visual_tokens=num_visual,
        encode_tflop=num_clips * vision.encoder_flops / 1e12,
        compress_tflop=num_clips * vision.compressor_flops / 1e12,
        prefill_tflop=decoder.prefill_flops(lengths) / 1e12,
        decode_gflop=decoder.decode_flops(lengths) / 1e9,
        weights_gib=weights / 2**30,
        cache_gib=cache / 2**30,
        peak_gib=(weights + cache + in_use) / 2**30,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``hico plan``."""
    parser.add_argument("--preset", help="as HicoConfig.preset names it (videochat-flash-7b-224)")
    parser.add_argument("--model", help="a checkpoint's folder instead; only its config.json is read")
    parser.add_argument("--frames", type=int, nargs="+", default=list(FRAMES), help="(64 256 1000 10000)")
    parser.add_argument("--schedules", nargs="+", metavar="SCHEDULE", help="none, and the model's own if it has one")
    parser.add_argument("--text-tokens", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--dtype", choices=list(BYTES), default="bfloat16", help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plans that were asked for; return the exit status.

    Raises:
        ValueError: if preset, frames or schedules cannot be.
    """
    from hico.bench import lay_out
    from hico.configuration_hico import HicoConfig

    if args.preset and args.model:
        raise ValueError("--preset and --model exclude each other; give one of them")
    preset = args.preset or "videochat-flash-7b-224"
    config = HicoConfig.from_pretrained(args.model) if args.model else HicoConfig.preset(preset)
    schedules = args.schedules or ["none", *([config.drop_schedule] if config.drop_schedule else [])]
    plans = [
        plan(config, num_frames=frames, schedule=schedule, num_text=args.text_tokens, dtype=args.dtype)
        for frames in args.frames
        for schedule in schedules
    ]
    if args.json:
        print(json.dumps([asdict(one) for one in plans], indent=1))
        return 0
    rows = [[heading for heading, _ in COLUMNS.values()]]
    rows += [[f"{getattr(one, name):{style}}" for name, (_, style) in COLUMNS.items()] for one in plans]
    print(lay_out(rows))
    return 0
