"""Processes that share a row against one that has all of it: ring, Ulysses and both, with and without dropping.

    OMP_NUM_THREADS=1 python benchmarks/parallel.py [--tokens 4096] [--processes 4]

A training step of one row, forward and backward. CPU seconds are those of a process, waiting for others left out, so
that they mean the same on a machine with fewer cores than processes; ratios are of all processes to the one.
"""

import argparse
import os
import socket
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import peak_megabytes

from hico import HicoConfig, HicoForConditionalGeneration
from hico.parallel import SequenceMesh, make_mesh

HEADS = (8, 4)


def build(args: argparse.Namespace) -> HicoForConditionalGeneration:
    """Build an LLM that is narrow, as attention weighs more then, as it does in a long row of a wide one."""
    text = HicoConfig.preset("tiny").text_config.to_dict() | {
        "hidden_size": args.width,
        "intermediate_size": 3 * args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": HEADS[0],
        "num_key_value_heads": HEADS[1],
        "layer_types": None,
        "head_dim": args.width // HEADS[0],
    }
    torch.manual_seed(0)
    return HicoForConditionalGeneration(HicoConfig.preset("tiny", text_config=text)).train()


def worker(rank: int, args: argparse.Namespace, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=args.processes)
    model = build(args)
    torch.manual_seed(1)
    embeds = torch.randn(1, args.tokens, args.width, requires_grad=True)
    visual = torch.zeros(1, args.tokens, dtype=torch.long)
    visual[:, 16:-48] = 1
    labels = torch.randint(1, 100, visual.shape).masked_fill(torch.arange(args.tokens) < args.tokens - 32, -100)

    def step() -> float:
        loss = model(inputs_embeds=embeds, visual_mask=visual, labels=labels, use_cache=False).loss
        loss.backward()
        model.zero_grad()
        return loss.item()

    splits = {"one process": None}
    splits |= {
        f"ring {args.processes // ulysses} x Ulysses {ulysses}": make_mesh(
            args.processes, num_key_value_heads=HEADS[1], ulysses=ulysses
        )
        for ulysses in (1, 2, 4)
        if args.processes % ulysses == 0
    }
    for schedule in (None, args.drop):
        model.set_drop_schedule(schedule)
        found = {name: [] for name in splits}
        for _ in range(args.repeats + 1):
            for name, mesh in splits.items():
                found[name].append(measure(model, mesh, step, rank))
        if rank == 0:
            report(schedule, {name: [torch.stack(part) for part in turns[1:]] for name, turns in found.items()})
    dist.destroy_process_group()


def measure(
    model: HicoForConditionalGeneration, mesh: SequenceMesh | None, step: Callable[[], float], rank: int
) -> list[torch.Tensor]:
    """Return CPU seconds, peak megabytes and loss of every process; zeros of those that had nothing to do."""
    model.set_sequence_parallel(mesh)
    seconds = memory = loss = 0.0
    dist.barrier()
    if mesh is not None or rank == 0:
        start = time.process_time()
        loss = step()
        seconds = time.process_time() - start
        memory = peak_megabytes(step, device="cpu")
    dist.barrier()
    own = torch.tensor([seconds, memory, loss])
    everywhere = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, own)
    return everywhere


def report(schedule: str | None, found: dict[str, list[torch.Tensor]]) -> None:
    """Print a line per way; the turns ``(processes, 3)`` of each are put together by their medians."""
    print(f"\ndropping: {schedule or 'none'}")
    medians = {name: torch.stack(turns).median(0).values for name, turns in found.items()}
    alone = medians["one process"]
    for name, of_processes in medians.items():
        seconds, memory, losses = of_processes.unbind(1)
        print(
            f"  {name:<20} {seconds.max():7.2f} CPU s of the busiest process, "
            f"{seconds.sum() / alone[0, 0]:5.2f}x in all, {memory.max():8.0f} MB, "
            f"{alone[0, 1] / memory.max():5.2f}x less   loss {losses[0]:.6f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="of the row, nearly all of them visual")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--drop", default="uniform@2:0.5,attention@4:0.25", help="schedule of the second part")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    print(f"{args.tokens:,} tokens, {args.layers} layers of width {args.width}, heads {HEADS[0]}:{HEADS[1]}, float32")
    mp.spawn(worker, (args, port), nprocs=args.processes)


if __name__ == "__main__":
    main()
