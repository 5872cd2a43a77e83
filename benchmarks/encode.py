"""Encoding clips with UMT-L against the plain formulation: time, and memory of activations.

    python benchmarks/encode.py [--clips 1] [--frames 4] [--size 224] [--depth 24] [--device cpu]

The plain formulation is the same network with the attention written out: all L x L weights of every head are stored.
"""

import argparse
import math

import torch
from measure import peak_megabytes, saved_megabytes, seconds_of

from hico.encoders.umt import UMTEncoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--frames", type=int, default=4, help="per clip")
    parser.add_argument("--size", type=int, default=224, help="pixels per side")
    parser.add_argument("--depth", type=int, default=24, help="blocks of the network; one less runs")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attention", default="sdpa", help="what to compare: sdpa or flash_attention_2")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    dtype = getattr(torch, args.dtype)
    settings = {"image_size": args.size, "depth": args.depth}
    hico = UMTEncoder(**settings, attn_implementation=args.attention).to(args.device, dtype)
    plain = UMTEncoder(**settings, attn_implementation="eager").to(args.device, dtype)
    plain.load_state_dict(hico.state_dict())
    ways = {"plain": plain, "hico": hico}
    clips = torch.randn(args.clips, args.frames, 3, args.size, args.size, device=args.device, dtype=dtype)

    num_tokens = math.prod(hico.grid(args.frames, args.size, args.size))
    print(
        f"{args.clips} clips of {args.frames} x {args.size} x {args.size} pixels, {num_tokens} tokens each, "
        f"{len(hico.blocks)} blocks, {args.dtype} on {args.device}"
    )
    with torch.no_grad():
        difference = (hico(clips) - plain(clips)).abs().max().item()
        print(f"  largest difference of the tokens {difference:.1e}")
        functions = {name: lambda way=way: way(clips) for name, way in ways.items()}
        seconds = seconds_of(functions, device=args.device, repeats=args.repeats)
        peaks = {name: peak_megabytes(function, device=args.device) for name, function in functions.items()}
    saved = {name: saved_megabytes(way, clips) for name, way in ways.items()}

    print(f"  {'':24} {'plain':>10} {'hico':>10} {'ratio':>7}")
    for job, values, unit in (
        ("forward", {name: value * 1e3 for name, value in seconds.items()}, "ms"),
        ("peak memory, inference", peaks, "MB"),
        ("activations, training", saved, "MB"),
    ):
        texts = {name: f"{value:.0f} {unit}" for name, value in values.items()}
        print(f"  {job:24} {texts['plain']:>10} {texts['hico']:>10} {values['plain'] / values['hico']:6.2f}x")


if __name__ == "__main__":
    main()
