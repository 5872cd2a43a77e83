"""Long context transfer in miniature: context learned from text alone, and met again in video.

A world of few words, in which a frame says as much as a sentence: ``a white circle.`` is four tokens, and so is a
frame with one. The *needle* is the one figure that has a color, and the question is which. The LLM learns to find
it in text, short or long; the projector learns on pictures of two to nine tiles what a tile says. Videos, of up to a
thousand frames, are seen by nobody before the exam.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hico.configuration_hico import HicoConfig
from hico.eval.heatmap import draw_heatmap
from hico.eval.models import model_digest
from hico.eval.niah import HEATMAP, KEY, RESULTS, format_table, scores_of
from hico.eval.results import ResultsFile
from hico.eval.scoring import knows_answer
from hico.modeling_hico import HicoForConditionalGeneration
from hico.processing_hico import HicoProcessor
from hico.prompt import IMAGE_TOKEN, VIDEO_TOKEN
from hico.tiny.scenes import COLORS, SHAPES, draw_frame, still_scene
from hico.tokenizer import word_tokenizer
from hico.train.recipes import load_recipes
from hico.train.run import run_chain

QUESTION = "which color is there?"
NEEDLE_COLORS = tuple(color for color in COLORS if color != "white")
SIDE = 48
"""Pixels per side of a frame or tile."""
TOKENS = 4
"""Of a sentence, and of a frame."""
SHORT, LONG = 128, 1024
"""Tokens of the texts before and in the extension."""
SHORTEST = 16
"""Tokens of a tale at least."""
FRAMES = (8, 16, 32, 64, 128, 256, 512)
WHITES = 400
"""White frames that the videos of the exam are put together of."""
RECIPES = Path(__file__).parents[2] / "train" / "tiny"
CHAINS = {"unextended": ("longva_unextended.yaml", SHORT), "extended": ("longva.yaml", LONG)}
"""What is compared: a chain, and the longest text that its LLM learned from."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_TILES = 3
"""Tiles along a side of a picture."""
_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}"
    "{% else %}{{ '\n' + message['content'] + '\n<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
)


def write_world(
    folder: str | Path, *, num_texts: int = 6400, num_long: int = 1800, num_pictures: int = 3000, seed: int = 0
):
    """Write texts, pictures with questions, and an untrained model.

    Args:
        folder: to be made. ``short.jsonl`` and ``long.jsonl`` hold the texts, ``pictures.jsonl`` the rows of pictures.
        num_texts: short texts, of `SHORT` tokens.
        num_long: long texts, of `LONG` tokens.
        num_pictures: of two to nine tiles.
        seed: of all chance.
    """
    folder = Path(folder)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for name, longest, count, turn in (("short", SHORT, num_texts, 2), ("long", LONG, num_long, 3)):
        texts = (text(rng, longest, whole=n % turn < turn - 1) for n in range(count))
        _write_rows(folder / f"{name}.jsonl", ({"text": one} for one in texts))
    _write_rows(folder / "pictures.jsonl", (_picture(rng, folder, number) for number in range(num_pictures)))
    _write_model(folder / "model", seed=seed)


def text(rng: np.random.Generator, num_tokens: int, *, whole: bool) -> str:
    """Tell one tale, or several of any length, of ``num_tokens`` in all with the separator that is put behind them.

    A tale tells of white figures and of one that has a color, and answers which.
    """
    tales, left = [], num_tokens - 1
    while left >= SHORTEST:
        size = left if whole else min(left, round(np.exp(rng.uniform(np.log(SHORTEST), np.log(num_tokens)))))
        # Beside its figures it has a newline, five words of the question with their mark, a newline, answer, newline.
        figures = _figures(rng, (size - 9) // TOKENS)
        told = " ".join(f"a {color} {shape}." for color, shape in figures)
        tales.append(f"{told}\n{QUESTION}\n{_color_of(figures)}\n")
        left -= len(figures) * TOKENS + 9
    return "".join(tales) + "\n" * left


def picture(figures: Sequence[tuple[str, str]], rows: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a figure per tile, row by row: ``(rows * SIDE, columns * SIDE, 3)``."""
    tiles = np.stack([_frame(rng, *figure) for figure in figures])
    tiles = tiles.reshape(rows, -1, SIDE, SIDE, 3)
    return np.concatenate(list(np.concatenate(list(tiles.transpose(1, 0, 2, 3, 4)), axis=2)), axis=0)


def take_exam(
    model: HicoForConditionalGeneration,
    processor: HicoProcessor,
    results: ResultsFile,
    *,
    frames: Sequence[int] = FRAMES,
    depths: Sequence[float] = DEPTHS,
    samples: int = 20,
    seed: int = 1,
) -> None:
    """Ask for the color in videos of any length.

    Args:
        model: in evaluation mode.
        processor: of the same model.
        results: with the key ``("test", "length", "depth")``; what it holds is not measured again.
        frames: lengths of the videos.
        depths: of the frame with a color, in [0, 1].
        samples: videos of every length and depth.
        seed: of what is shown; the same for every model.
    """
    rng = np.random.default_rng(seed)
    white = _encode(model, [_frame(rng, "white", shape) for shape in rng.choice(SHAPES, WHITES)])
    for length in frames:
        ids = processor(f"{VIDEO_TOKEN}\n{QUESTION}\n", videos=[torch.zeros(length, 3, SIDE, SIDE, dtype=torch.uint8)])
        prompt = ids["input_ids"][0]
        for depth in depths:
            rng = np.random.default_rng((seed, length, round(depth * 100)))
            if ("needle", length, depth) in results:
                continue
            found = []
            for _ in range(samples):
                color, shape = rng.choice(NEEDLE_COLORS).item(), rng.choice(SHAPES).item()
                video = white[torch.from_numpy(rng.integers(WHITES, size=length))]
                video[int(depth * (length - 1))] = _encode(model, [_frame(rng, color, shape)])[0]
                answer = torch.tensor(processor.tokenizer.encode(color, add_special_tokens=False))
                found.append(knows_answer(model, prompt, answer, visual_embeds=[video.flatten(0, 1)]))
            score = sum(found) / samples
            results.add({"test": "needle", "length": length, "depth": depth, "score": score, "found": found})


def run(folder: str | Path, *, seed: int = 0) -> float:
    """Write the world, train both chains, examine what comes of them, and draw heatmaps; prints what it finds.

    What a folder holds already is used again.

    Args:
        folder: for everything.
        seed: of texts, pictures, weights, training and exam.

    Returns:
        By how much the extended model finds more needles than the other beyond `SHORT` tokens, as a share.

    Raises:
        FileNotFoundError: if the recipes are not there.
    """
    folder, started = Path(folder), time.perf_counter()
    if not (folder / "model" / "config.json").is_file():
        write_world(folder, seed=seed)
    os.environ["TINY"] = str(folder)
    beyond = {}
    for name, (recipe, trained) in CHAINS.items():
        if not (RECIPES / recipe).is_file():
            raise FileNotFoundError(f"there is no recipe {RECIPES / recipe}; run from a clone of the repository")
        final = run_chain(load_recipes(RECIPES / recipe, {"disable_tqdm": True, "seed": seed + 1}))
        model = HicoForConditionalGeneration.from_pretrained(final).eval()
        settings = {"test": "frames", "model": model_digest(final), "frames": FRAMES, "depths": DEPTHS, "seed": seed}
        results = ResultsFile(folder / name / RESULTS, settings, key=KEY)
        take_exam(model, HicoProcessor.from_pretrained(final), results, seed=seed + 1)
        scores, _ = scores_of(results)
        draw_heatmap(folder / name / HEATMAP, scores, across="frames", trained=trained // TOKENS, title=name)
        print(f"\n{name}\n{format_table(scores, trained=SHORT // TOKENS, across='frames')}")
        far = [score for (length, _), score in scores.items() if length > SHORT // TOKENS]
        beyond[name] = sum(far) / len(far)
    gain = beyond["extended"] - beyond["unextended"]
    print(f"\nbeyond {SHORT // TOKENS} frames the extended model finds {100 * gain:+.1f} points of all needles more")
    print(f"{folder}/*/{HEATMAP}; {time.perf_counter() - started:.0f} s in all")
    return gain


def _figures(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Draw white shapes, and put one figure of any color and shape among them."""
    figures = [("white", shape) for shape in rng.choice(SHAPES, count).tolist()]
    figures[rng.integers(count)] = rng.choice(NEEDLE_COLORS).item(), rng.choice(SHAPES).item()
    return figures


def _color_of(figures: Sequence[tuple[str, str]]) -> str:
    return next(color for color, _ in figures if color != "white")


def _frame(rng: np.random.Generator, color: str, shape: str) -> np.ndarray:
    return draw_frame(still_scene(rng, kinds=[(shape, color)]), 0.0, side=SIDE)


def _picture(rng: np.random.Generator, folder: Path, number: int) -> dict:
    rows, columns = rng.integers(1, MOST_TILES + 1, 2).tolist()
    columns += rows * columns == 1  # UniRes would cut a picture of one tile into two halves
    figures = _figures(rng, rows * columns)
    name = f"pictures/{number:05d}.png"
    Image.fromarray(picture(figures, rows, rng)).save(folder / name)
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": _color_of(figures)}]
    return {"image": name, "conversations": turns}


def _write_rows(path: Path, rows: Iterator[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@torch.inference_mode()
def _encode(model: HicoForConditionalGeneration, frames: Sequence[np.ndarray]) -> Tensor:
    """Return the tokens ``(F, TOKENS, E)`` of frames."""
    pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    return model.model.encode(pixels[:, None])


def _write_model(folder: Path, *, seed: int) -> None:
    tokenizer = word_tokenizer({"a", *COLORS, *SHAPES, *QUESTION.removesuffix("?").split(), *".?\n"})
    config = HicoConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": SHORT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "initializer_range": 0.07,  # see `hico.tiny.model`
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        encoder={
            "name": "umt",
            "image_size": SIDE,
            "patch_size": 12,
            "trained_side": 4,
            "hidden_size": 64,
            "depth": 3,
            "num_heads": 2,
        },
        compressor={"name": "pooling", "stride": 2},
        projector_first=True,
        clip_len=1,
        image_layout="tiles",
        video_token_id=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HicoForConditionalGeneration(config)
    model.save_pretrained(folder)
    HicoProcessor.from_config(config, tokenizer, chat_template=_TEMPLATE).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m hico.tiny.transfer", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where texts, pictures, models and heatmaps go")
    parser.add_argument("--seed", type=int, default=0, help="of all chance (%(default)s)")
    # Tensors this small gain nothing from more threads, and the data workers want the other core.
    torch.set_num_threads(1)
    args = parser.parse_args()
    run(args.folder, seed=args.seed)
