"""Encoders and clip compressors at published sizes, random weights: tokens, operations, time of a clip of 4 frames.

    python benchmarks/vision.py [--encoders umt clip] [--device cpu] [--dtype float32] [--repeats 1]

Ratios are to UMT-L with token merging, in the same run. Time on a CPU is CPU time.
"""

import argparse
import math
import time

import torch
from measure import synchronize

from hico import HicoConfig
from hico.configuration_hico import build_compressor
from hico.costs import Vision
from hico.registry import ENCODERS

CLIP_LEN = 4
PUBLISHED = {"umt": 224, "clip": 336, "siglip": 384, "internvideo2": 224}
"""Encoder -> pixels per side; the other sizes are its defaults."""
COMPRESSORS = {
    "token_merge": {"tokens_per_frame": 16},
    "temporal_merge": {"tokens_per_frame": 49},
    "pooling": {"tokens_per_frame": 16},
    "uneven": {"tokens_per_frame": 49},
    "resampler": {"tokens_per_frame": 16},
    "identity": {},
}
"""With UMT-L; the other encoders are measured with the first of them."""


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoders", nargs="+", default=list(PUBLISHED), help="UMT-L always comes first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=1, help="the best counts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    place = {"device": args.device, "dtype": getattr(torch, args.dtype)}

    print(f"{'encoder':14}{'compressor':16}{'tokens':>14}{'GFLOP':>9}{'encode ms':>11}{'compress ms':>13}{'ratio':>8}")
    whole = None
    for name in dict.fromkeys(["umt", *args.encoders]):
        encoder = ENCODERS.build({"name": name, "image_size": PUBLISHED[name]}).to(**place).eval()
        side = encoder.image_size
        clip_1TCHW, grid = torch.randn(1, CLIP_LEN, 3, side, side, **place), encoder.grid(CLIP_LEN, side, side)
        tokens_1LD = encoder(clip_1TCHW)
        encoding = best_of(lambda encoder=encoder, clip=clip_1TCHW: encoder(clip), args)
        del encoder
        for method in COMPRESSORS if name == "umt" else list(COMPRESSORS)[:1]:
            spec = {"name": method, **COMPRESSORS[method]}
            config = HicoConfig(encoder={"name": name, "image_size": side}, compressor=spec, clip_len=CLIP_LEN)
            compressor = build_compressor(spec, config.vision._parts[0], hidden_size=tokens_1LD.shape[-1])
            compressor = compressor.to(**place).eval()
            compressing = best_of(lambda part=compressor, tokens=tokens_1LD, grid=grid: part(tokens, grid), args)
            whole = whole or encoding + compressing
            costs, out = Vision.of(config), compressor.num_output_tokens(grid)
            print(
                f"{name:14}{method:16}{f'{math.prod(grid):,} -> {out:,}':>14}"
                f"{(costs.encoder_flops + costs.compressor_flops) / 1e9:9,.0f}{1e3 * encoding:11,.0f}"
                f"{1e3 * compressing:13,.1f}{(encoding + compressing) / whole:8.2f}"
            )


def best_of(function, args) -> float:
    """Return the seconds of a call, the best of some."""
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    seconds = []
    for _ in range(args.repeats):
        synchronize(args.device)
        start = clock()
        function()
        synchronize(args.device)
        seconds.append(clock() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
