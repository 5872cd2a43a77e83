"""Training speed: samples/s, tokens/s, and the share of time that a step waits for its data.

    python benchmarks/train.py [--case tiny] [--stage stage3] [--workers 2] [--steps 40] [--quick]
    python benchmarks/train.py --case stage3 [--preset videochat-flash-7b-224] [--seconds 128]

``tiny`` trains a stage of train/tiny on a small corpus of its own. ``stage3`` trains the preset's shapes with random
weights as train/videochat_flash/stage3.yaml says, on synthetic videos of 640 x 360 pixels; it is meant for a GPU.
On one device Adafactor stands in for AdamW, whose state would not fit beside 7B weights; forward and backward are
the same.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import av
import numpy as np
import torch

from hico import HicoConfig, HicoForConditionalGeneration, HicoProcessor
from hico.tokenizer import byte_tokenizer
from hico.train.config import Recipe
from hico.train.plan import prepare
from hico.train.recipes import load_recipes
from hico.train.run import make_trainer, training_arguments

ROOT = Path(__file__).parents[1]


def measure(recipe: Recipe, *, steps: int) -> dict[str, float]:
    """Train twice as many steps as asked for; report the second half, when all is warm."""
    prepared = prepare(recipe)
    recipe.arguments |= {"max_steps": 2 * steps, "logging_steps": steps, "save_strategy": "no", "disable_tqdm": True}
    trainer = make_trainer(recipe, training_arguments(recipe), prepared)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "rows_per_second" in entry]
    return entries[-1]


def tiny_recipe(folder: Path, *, stage: str, workers: int, scale: float) -> Recipe:
    """Return a stage of the tiny recipe on a corpus of its own, from the untrained model."""
    from hico.tiny.corpus import CorpusSize, write_corpus
    from hico.tiny.model import write_untrained

    write_corpus(folder, CorpusSize().scaled(scale))
    write_untrained(folder / "model")
    os.environ["TINY"] = str(folder)
    recipes = {recipe.name: recipe for recipe in load_recipes(ROOT / "train/tiny/all.yaml")}
    recipe = recipes[stage]
    recipe.model, recipe.output_dir = str(folder / "model"), str(folder / "run")
    recipe.arguments |= {"dataloader_num_workers": workers, "num_train_epochs": 1}
    return recipe


def stage3_recipe(folder: Path, *, preset: str, workers: int, seconds: int, num_videos: int) -> Recipe:
    """Return stage 3 on synthetic videos, for a model of the preset's shapes."""
    changes = {} if preset == "tiny" else {"video_token_id": 260, "image_token_id": 259}
    config = HicoConfig.preset(preset, **changes)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = HicoForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    del model
    HicoProcessor.from_config(config, byte_tokenizer()).save_pretrained(folder / "model")
    rows = []
    for number in range(num_videos):
        write_video(folder / f"{number}.mp4", num_frames=30 * seconds, seed=number)
        asked = {"from": "human", "value": "<video>\nDescribe the video in detail."}
        rows.append({"video": f"{number}.mp4", "conversations": [asked, {"from": "gpt", "value": "word " * 60}]})
    (folder / "rows.json").write_text(json.dumps(rows))
    return load_recipes(
        ROOT / "train/videochat_flash/stage3.yaml",
        {
            "model": str(folder / "model"),
            "output_dir": str(folder / "run"),
            "data": [{"json_path": str(folder / "rows.json"), "data_root": str(folder)}],
            "image_size": None,
            "global_batch_size": None,
            "num_train_epochs": 1000,
            "dataloader_num_workers": workers,
            "optim": "adafactor",
            "deepspeed": None,
            "report_to": "none",
            "bf16": torch.cuda.is_available(),
        },
    )[0]


def write_video(path: Path, *, num_frames: int, seed: int) -> None:
    """Write blocks that drift under noise: h264, a keyframe every 250 frames."""
    rng = np.random.default_rng(seed)
    picture = np.kron(rng.integers(0, 255, (36, 80, 3), dtype=np.uint8), np.ones((10, 16, 1), np.uint8))
    noise = rng.integers(0, 12, (8, 360, 640, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast", "g": "250"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for number in range(num_frames):
            frame = picture[:, number % 640 : number % 640 + 640] // 2 + noise[number % 8]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=("tiny", "stage3"), default="tiny")
    parser.add_argument("--stage", default="stage3", help="stage of the tiny recipe (%(default)s)")
    parser.add_argument("--preset", default="videochat-flash-7b-224", help="shapes for --case stage3 (%(default)s)")
    parser.add_argument("--seconds", type=int, default=128, help="length of the synthetic videos (%(default)s)")
    parser.add_argument("--videos", type=int, default=8, help="synthetic videos (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="data workers (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="steps to measure, after as many (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="few steps on little data")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.videos, args.seconds = 8, 2, 16
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        if args.case == "tiny":
            scale = 0.05 if args.quick else 0.25
            recipe = tiny_recipe(Path(name), stage=args.stage, workers=args.workers, scale=scale)
        else:
            recipe = stage3_recipe(
                Path(name), preset=args.preset, workers=args.workers, seconds=args.seconds, num_videos=args.videos
            )
        figures = measure(recipe, steps=args.steps)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    print(f"\n{args.case} {args.stage if args.case == 'tiny' else args.preset}, {device}, {args.workers} workers")
    print(f"samples/s          {figures['rows_per_second']:10.2f}")
    print(f"tokens/s           {figures['tokens_per_second']:10.0f}")
    print(f"frames/s           {figures['frames_per_second']:10.1f}")
    print(f"waiting for data   {figures['data_wait']:10.1%}")
    if "mfu" in figures:
        print(f"FLOPs utilisation  {figures['mfu']:10.1%}")


if __name__ == "__main__":
    main()
