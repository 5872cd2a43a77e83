"""The loss of many learned tokens: logits in chunks against all logits at once.

    python benchmarks/loss.py [--tokens 8192] [--vocabulary 152064] [--width 256] [--device cpu]

Forward and backward through the LM head, with gradients of its weights.
"""

import argparse
import sys
from functools import partial

import torch
from measure import peak_megabytes, seconds_of

from hico import HicoConfig, HicoForConditionalGeneration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="learned tokens")
    parser.add_argument("--vocabulary", type=int, default=152064)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    text = HicoConfig.preset("tiny").text_config.to_dict()
    text |= {"vocab_size": args.vocabulary, "hidden_size": args.width}
    model = HicoForConditionalGeneration(HicoConfig.preset("tiny", text_config=text)).to(args.device).train()
    hidden = torch.randn(1, args.tokens, args.width, device=args.device, requires_grad=True)
    labels = torch.randint(args.vocabulary, (1, args.tokens), device=args.device)
    losses = {}

    def step(tokens_per_chunk: int) -> None:
        model.tokens_per_loss_chunk = tokens_per_chunk
        loss = model._loss(hidden, labels)
        loss.backward()
        losses[tokens_per_chunk] = loss.item()

    names = {sys.maxsize: "at once", model.tokens_per_loss_chunk: f"in chunks of {model.tokens_per_loss_chunk:,}"}
    ways = {chunk: partial(step, chunk) for chunk in names}
    seconds = seconds_of(ways, device=args.device, repeats=args.repeats)
    memory = {chunk: peak_megabytes(way, device=args.device) for chunk, way in ways.items()}
    print(f"{args.tokens:,} learned tokens, vocabulary {args.vocabulary:,}, width {args.width:,} on {args.device}")
    for chunk, name in names.items():
        print(f"  {name:<20} {seconds[chunk]:8.2f} s {memory[chunk]:10,.0f} MB   loss {losses[chunk]:.6f}")
    whole, chunked = names
    print(f"  ratio {seconds[whole] / seconds[chunked]:.2f}x, {memory[whole] / memory[chunked]:.1f}x less memory")


if __name__ == "__main__":
    main()
