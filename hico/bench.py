"""``hico bench``: what a setting costs, by arithmetic and measured."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TABLE_7 = (
    "none",
    "uniform@4:0.5",
    "attention@4:0.5",
    "uniform@18:0.5",
    "attention@18:0.5",
    "uniform@4:0.75,attention@18:0.25",
)
"""Schedules that the paper compares in its Table 7, beginning with no dropping."""
M_MMAP_THRESHOLD = -3
"""Of ``mallopt`` in glibc."""
FORGET_PEAK = "5"
"""To ``clear_refs`` of Linux: begin the peak of resident memory anew."""
NARROW = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 28,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
"""A Qwen2 of the depth of the 7B one, narrow enough for a CPU."""


@dataclass
class Cost:
    """Costs of one schedule; ratios to the first schedule are computed where they are shown."""

    schedule: str
    prefill_flops: float
    prefill_seconds: float
    decode_seconds: float
    kv_bytes: float
    peak_bytes: float | None


COLUMNS: dict[str, tuple[str, float, str]] = {
    "prefill_flops": ("prefill TFLOP", 1e12, ".3f"),
    "prefill_seconds": ("prefill s", 1, ".3f"),
    "decode_seconds": ("ms per token", 1e-3, ".2f"),
    "kv_bytes": ("KV MiB", 2**20, ".1f"),
    "peak_bytes": ("peak MiB", 2**20, ".0f"),
}
"""Field of `Cost` -> heading, unit, format."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks as subcommands of ``hico bench``."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="benchmark")
    drop = benchmarks.add_parser(
        "drop",
        help="progressive visual dropout: FLOPs, prefill, decoding, KV cache, memory",
        description="Compare drop schedules on one prompt with one video, and random weights.",
    )
    drop.add_argument(
        "--schedules",
        nargs="+",
        default=list(TABLE_7),
        metavar="SCHEDULE",
        help="ratios are to the first one (the rows of the paper's Table 7)",
    )
    drop.add_argument("--preset", help="size of the LLM, as HicoConfig.preset names it; a narrow one if omitted")
    drop.add_argument("--visual-tokens", type=int, default=4096, help="(%(default)s)")
    drop.add_argument("--text-tokens", type=int, default=64, help="half of them before the video (%(default)s)")
    drop.add_argument("--new-tokens", type=int, default=16, help="tokens to decode (%(default)s)")
    drop.add_argument("--repeats", type=int, default=3, help="rounds; the best of them counts (%(default)s)")
    drop.add_argument("--positions", default="renumber", help="renumber or keep (%(default)s)")
    drop.add_argument("--attention", default="sdpa", help="attention implementation (%(default)s)")
    drop.add_argument("--device", help="cuda if there is one, else cpu")
    drop.add_argument("--dtype", help="as torch names it; float32 on a CPU, else bfloat16")
    drop.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    drop.add_argument("--json", type=Path, help="write the figures here; after the table if omitted")
    drop.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that was asked for, print its table, and write or print its JSON; return the exit status."""
    settings, costs = bench_drop(args)
    print(format_table(costs))
    report = json.dumps({"settings": settings, "costs": [_with_ratios(cost, costs[0]) for cost in costs]}, indent=1)
    if args.json is None:
        print(report)
    else:
        args.json.write_text(report + "\n")
    return 0


def bench_drop(args: argparse.Namespace) -> tuple[dict[str, Any], list[Cost]]:
    """Measure the schedules in turn, round after round, so that a slow spell of the machine meets them all.

    Raises:
        ValueError: if a schedule, preset or size cannot be.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from hico.configuration_hico import HicoConfig
    from hico.costs import Decoder, lengths_per_layer
    from hico.llm_dropout import DropSchedule, patch
    from hico.rotary import keep_rotary_in_float32

    if min(args.visual_tokens, args.text_tokens, args.new_tokens, args.repeats) < 1:
        raise ValueError("--visual-tokens, --text-tokens, --new-tokens and --repeats must be at least 1")
    schedules = [DropSchedule.parse(text) for text in args.schedules]
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    config = HicoConfig.preset(args.preset).text_config if args.preset else Qwen2Config(**NARROW)
    for schedule in schedules:
        schedule.check_depth(config.num_hidden_layers)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=args.attention).eval()
        length = args.visual_tokens + args.text_tokens
        embeds = torch.randn(1, length, config.hidden_size, dtype=dtype)
        visual_mask = torch.zeros(1, length, dtype=torch.long)
    keep_rotary_in_float32(model)
    start = args.text_tokens // 2
    visual_mask[:, start : start + args.visual_tokens] = 1

    memory, rounds = {}, {schedule: [] for schedule in schedules}
    for number in range(args.repeats + 1):
        for schedule in schedules:
            _show_progress(f"{number}/{args.repeats} {schedule}")
            with torch.inference_mode(), patch(model, schedule, positions=args.positions):
                if number:
                    rounds[schedule].append(_time(model, embeds, visual_mask, args.new_tokens))
                else:  # warms up, too
                    memory[schedule] = _weigh(model, embeds, visual_mask)
    _show_progress("")
    costs, decoder = [], Decoder.of(config)
    for schedule in schedules:
        lengths = lengths_per_layer(
            schedule,
            num_layers=config.num_hidden_layers,
            num_visual=args.visual_tokens,
            num_text=args.text_tokens,
        )
        prefill, decode = zip(*rounds[schedule], strict=True)
        # Other work on the machine only adds, so the least of the rounds is nearest to the truth.
        costs.append(Cost(str(schedule), decoder.prefill_flops(lengths), min(prefill), min(decode), *memory[schedule]))
    settings = {name: value for name, value in vars(args).items() if name not in ("run", "json", "schedules")}
    return {**settings, "device": str(device), "dtype": str(dtype), "torch": torch.__version__}, costs


def _time(model, embeds, visual_mask, num_tokens: int) -> tuple[float, float]:
    """Measure the seconds of a prefill, and of a decoded token on average."""
    from hico.compat import CACHE_NAME

    started = _now(embeds.device)
    out = model(inputs_embeds=embeds, visual_mask=visual_mask, use_cache=True, logits_to_keep=1)
    prefilled = _now(embeds.device)
    for _ in range(num_tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, **{CACHE_NAME: out[CACHE_NAME]}, use_cache=True)
    return prefilled - started, (_now(embeds.device) - prefilled) / num_tokens


def _weigh(model, embeds, visual_mask) -> tuple[float, float | None]:
    """Measure the bytes of the cache that a prefill leaves, and by how many bytes memory rose at most."""
    from hico.compat import CACHE_NAME

    with MemoryWatch(embeds.device) as peak:
        out = model(inputs_embeds=embeds, visual_mask=visual_mask, use_cache=True, logits_to_keep=1)
    parts = [part for layer in out[CACHE_NAME].layers for part in (layer.keys, layer.values)]
    return float(sum(part.numel() * part.element_size() for part in parts)), peak.rise


def _now(device) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class MemoryWatch:
    """Watch memory for the time of a ``with`` block.

    Args:
        device: a CUDA device; or the CPU, where the system remembers the most that this process held, on Linux only.
    """

    rise: float | None = None
    """Bytes by which memory rose at most; None where that cannot be told."""

    def __init__(self, device):
        self.device = device

    def __enter__(self) -> MemoryWatch:
        gc.collect()
        self._before = None
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif sys.platform.startswith("linux"):
            # Let every tensor come from the system and go back to it, or the rise would hide in what was freed before.
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, 2**16)
            libc.malloc_trim(0)
            with suppress(OSError):  # some containers do not let a process forget its peak
                Path("/proc/self/clear_refs").write_text(FORGET_PEAK)
                self._before = _resident_bytes("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            import torch

            self.rise = float(torch.cuda.max_memory_allocated(self.device) - self._before)
        elif self._before is not None:
            self.rise = _resident_bytes("VmHWM") - self._before
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**25)


def _resident_bytes(which: str) -> float:
    """Return the resident memory of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith(which)).split()[1])


def _show_progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:70}", end="" if text else "\r", file=sys.stderr, flush=True)


def _with_ratios(cost: Cost, base: Cost) -> dict[str, Any]:
    ratios = {}
    for name in COLUMNS:
        value, whole = getattr(cost, name), getattr(base, name)
        ratios[name] = None if value is None or not whole else value / whole
    return {**asdict(cost), "ratios": ratios}


def format_table(costs: list[Cost]) -> str:
    """Lay out costs as text: a row per schedule, and behind each figure its ratio to the first row's."""
    headings = ["schedule", *(heading for heading, _, _ in COLUMNS.values())]
    rows = [headings]
    for cost in costs:
        ratios, cells = _with_ratios(cost, costs[0])["ratios"], [cost.schedule]
        for name, (_, unit, style) in COLUMNS.items():
            value, ratio = getattr(cost, name), ratios[name]
            cells.append("?" if value is None else f"{value / unit:{style}} ({ratio:.3f})" if ratio else "0")
        rows.append(cells)
    return lay_out(rows)


def lay_out(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of text as a table; the first column stands on the left, the others on the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not place else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m hico.bench``; return the exit status."""
    parser = argparse.ArgumentParser(prog="hico bench", description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
