"""Loading and converting a published checkpoint: time, and peak memory against the size of its files.

    python benchmarks/convert.py [--gigabytes 2] [--shards 2] [--folder DIR]

A checkpoint in the layout of VideoChat-Flash is made up on disk. Every job runs in a process of its own; its memory is
what the process holds at most, beyond what it held when all was imported. A loaded model is read once from end to end,
since mapped files take memory only then.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import peak_resident_megabytes, resident_megabytes
from safetensors.torch import save_file

from hico import HicoConfig, HicoForConditionalGeneration
from hico.configuration_hico import PRESETS
from hico.convert import convert, inspect_checkpoint
from hico.convert.export import export_config
from hico.convert.plan import Expected
from hico.published import to_published


def config_of(num_layers: int) -> HicoConfig:
    """Return UMT-L and a Qwen2 of the width of the 2B model, with a small vocabulary."""
    text = PRESETS["videochat-flash-2b-448"]["text_config"]
    text = {**text, "vocab_size": 32000, "num_hidden_layers": num_layers, "tie_word_embeddings": False}
    text |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return HicoConfig(text_config=text, dtype="bfloat16")


def weight_bytes(config: HicoConfig) -> int:
    return 2 * sum(math.prod(shape) for shape in Expected.of(config).shapes.values())


def make_checkpoint(folder: Path, *, gigabytes: float, shards: int, suffix: str) -> None:
    """Write a checkpoint of about that size, in bfloat16."""
    one, two = (weight_bytes(config_of(num_layers)) for num_layers in (1, 2))
    config = config_of(1 + max(0, round((gigabytes * 1e9 - one) / (two - one))))
    system, published = export_config(config)
    shapes = {
        to_published(name, system, config.encoder["name"]): shape for name, shape in Expected.of(config).shapes.items()
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(published))
    names, weight_map = list(shapes), {}
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    per_shard = -(-len(names) // shards)
    for number in range(shards):
        part = names[number * per_shard : (number + 1) * per_shard]
        tensors = {name: torch.randn(shapes[name]).to(torch.bfloat16) for name in part}
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        save_file(tensors, folder / file, {"format": "pt"}) if suffix == "safetensors" else torch.save(
            tensors, folder / file
        )
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(folder: Path) -> None:
    model = HicoForConditionalGeneration.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data.view(torch.int16).max()


def convert_aside(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        convert(folder, Path(aside) / "hico")


JOBS = {"load": load, "convert": convert_aside, "inspect": inspect_checkpoint}


def run_job(name: str, folder: Path) -> None:
    """Run one job and print its seconds and megabytes; the body of a process of its own."""
    torch.set_num_threads(1)
    before = resident_megabytes()
    start = time.perf_counter()
    JOBS[name](folder)
    print(json.dumps([time.perf_counter() - start, peak_resident_megabytes() - before]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--folder", help="where to make the checkpoints; a temporary folder if omitted")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        run_job(args.job[0], Path(args.job[1]))
        return
    print(f"{'':24} {'seconds':>8} {'GB/s':>6} {'peak MB':>8} {'of all files':>13} {'of the largest':>15}")
    for suffix in ("safetensors", "bin"):
        with tempfile.TemporaryDirectory(dir=args.folder) as aside:
            folder = Path(aside) / suffix
            make_checkpoint(folder, gigabytes=args.gigabytes, shards=args.shards, suffix=suffix)
            sizes = [path.stat().st_size / 1e6 for path in folder.glob(f"*.{suffix}")]
            for name in JOBS:
                command = [sys.executable, __file__, "--job", name, str(folder)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                seconds, peak = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{name + ', ' + suffix:24} {seconds:8.2f} {sum(sizes) / 1e3 / seconds:6.2f} {peak:8.0f} "
                    f"{peak / sum(sizes):12.2f}x {peak / max(sizes):14.2f}x",
                    flush=True,
                )
    print(f"files of {sum(sizes):.0f} MB, the largest {max(sizes):.0f} MB")


if __name__ == "__main__":
    main()
