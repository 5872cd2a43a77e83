"""Video compressors at published sizes: time per 1,000 frames, how it grows, and what it is of the prefill it saves.

    python benchmarks/video_compressors.py [--frames 250 500 1000] [--tokens 64] [--width 3584] [--device cpu]

Every method runs with its defaults on one made-up video of scenes of 40 frames, in which some places stand still and
others do not. The prefill that a method saves is measured on a slice: one layer of a Qwen2 of that width (that of 7
billion weights at 3584) on a few hundred tokens, times 28 layers, times the tokens that are left out. Attention among
those would come on top and is not counted, so true ratios are lower. The goal: below 1, and the same time per frame at
every length.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from measure import synchronize
from torch import Tensor
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from hico.configuration_hico import HicoConfig
from hico.registry import VIDEO_COMPRESSORS
from hico.video_compressors.base import FrameTokens

NUM_LAYERS = 28
SCENE = 40


def make_video(num_frames: int, per_frame: int, width: int, *, device: str, dtype: torch.dtype) -> FrameTokens:
    """Make frames that change by scenes, and by an amount that grows from the first place to the last."""
    generator = torch.Generator().manual_seed(0)
    amount_P1 = torch.linspace(0.05, 1.2, per_frame)[:, None]
    tokens = torch.empty(num_frames, per_frame, width, dtype=dtype, device=device)
    for frame in range(num_frames):
        if frame % SCENE == 0:
            scene = torch.randn(per_frame, width, generator=generator)
        tokens[frame] = scene + amount_P1 * torch.randn(per_frame, width, generator=generator)
    attention = torch.rand(num_frames, per_frame, generator=generator)
    keys = torch.randn(num_frames, per_frame, 64, generator=generator)
    return FrameTokens(tokens, attention.to(device), keys.to(device))


def seconds(function: Callable, *, device: str, repeats: int) -> float:
    """Return the median time of a call: of the processor on a CPU, which other work does not slow down."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    found = []
    for _ in range(repeats):
        synchronize(device)
        start = clock()
        function()
        synchronize(device)
        found.append(clock() - start)
    return statistics.median(found)


def layer_seconds_per_token(width: int, *, device: str, dtype: torch.dtype, num_tokens: int = 256) -> float:
    """Measure one layer of Qwen2, of 7 billion weights if the width is 3584."""
    published = HicoConfig.preset("videochat-flash-7b-224").text_config
    scale = width / published.hidden_size
    config = Qwen2Config(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=int(published.intermediate_size * scale),
        num_hidden_layers=1,
        num_attention_heads=max(1, width // 128),
        num_key_value_heads=max(1, width // 128 // 7),
    )
    model = Qwen2Model(config).to(device=device, dtype=dtype).eval()
    embeds: Tensor = torch.randn(1, num_tokens, width, device=device, dtype=dtype)
    model(inputs_embeds=embeds)
    return seconds(lambda: model(inputs_embeds=embeds, use_cache=False), device=device, repeats=3) / num_tokens


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--tokens", type=int, default=64, help="per frame (%(default)s)")
    parser.add_argument("--width", type=int, default=3584, help="of the LLM (%(default)s)")
    parser.add_argument("--methods", nargs="+", default=VIDEO_COMPRESSORS.names())
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of the tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    dtype = getattr(torch, args.dtype)
    prefill_dtype = torch.float32 if args.device == "cpu" else dtype
    per_token = NUM_LAYERS * layer_seconds_per_token(args.width, device=args.device, dtype=prefill_dtype)
    longest = max(args.frames)
    video = make_video(longest, args.tokens, args.width, device=args.device, dtype=dtype)
    print(
        f"{args.tokens} tokens per frame, width {args.width}, {args.dtype} on {args.device}, {args.threads} thread(s)"
    )
    print(f"prefill of {NUM_LAYERS} layers, {prefill_dtype}: {per_token * 1e3:.2f} ms per token, attention left out")
    heads = [f"{frames:,} frames" for frames in args.frames]
    print(f"{'ms per 1,000 frames':20}" + "".join(f"{head:>14}" for head in heads) + f"{'kept':>9}{'of prefill':>13}")
    for name in args.methods:
        compressor = VIDEO_COMPRESSORS.build(name)
        compressor.select(*video.cut(0, 8))  # loads what is loaded late
        parts = {frames: video.cut(0, frames) for frames in args.frames}
        times = {
            frames: seconds(partial(compressor.select, *part), device=args.device, repeats=args.repeats)
            for frames, part in parts.items()
        }
        num_tokens = longest * args.tokens
        num_kept = len(compressor.select(*video)[0])
        saved = (num_tokens - num_kept) * per_token
        cells = "".join(f"{value / frames * 1e6:>14,.0f}" for frames, value in times.items())
        print(f"{name:20}{cells}{num_kept / num_tokens:>9.1%}{times[longest] / saved:>13.5f}", flush=True)


if __name__ == "__main__":
    main()
