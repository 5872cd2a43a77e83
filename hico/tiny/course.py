"""The whole course: corpus, warm-ups, four stages, exams and pictures."""

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hico.modeling_hico import HicoForConditionalGeneration
from hico.processing_hico import HicoProcessor
from hico.tiny.corpus import LONG_SCENES, CorpusSize, long_story, write_corpus, write_video
from hico.tiny.exam import Answered, accuracy, chance, read_exam, sit_blank_exam, sit_exam
from hico.tiny.model import write_untrained
from hico.tiny.pictures import draw_answers, draw_losses
from hico.tiny.stories import Story
from hico.train.config import PARTS, Recipe
from hico.train.recipes import load_recipes
from hico.train.run import run_stage

RECIPE = Path(__file__).parents[2] / "train" / "tiny" / "all.yaml"
TARGETS = {"short": 0.9, "long": 0.8}
"""Held-out questions about short and long videos that the last model should answer right, as shares."""
MAX_LUCK = 0.1
"""How far above guessing the same model may be with blank frames."""


@dataclass(frozen=True)
class Report:
    """How a stage went."""

    recipe: Recipe
    seconds: float
    curve: list[tuple[int, float]]
    seen: dict[str, list[Answered]]
    blank: dict[str, list[Answered]]


def run_course(
    folder: str | Path,
    *,
    recipe: str | Path = RECIPE,
    scale: float = 1.0,
    overrides: dict[str, Any] | None = None,
    seed: int = 0,
) -> tuple[Path, bool]:
    """Write the corpus, train all stages, examine the model after each, and draw pictures; prints what it does.

    What a folder holds already is used again: a corpus is not written twice, a finished stage is not trained twice.

    Args:
        folder: for everything.
        recipe: a chain; ``${TINY}`` in it stands for the folder.
        scale: size of the corpus.
        overrides: recipe keys for all stages.
        seed: of corpus and weights; one that is not 0 is also of training, in place of the recipe's.

    Returns:
        The folder of the trained model, and whether it reached `TARGETS` by looking.

    Raises:
        FileNotFoundError: if there is no recipe.
    """
    folder, recipe = Path(folder), Path(recipe)
    if not recipe.is_file():
        raise FileNotFoundError(f"there is no recipe {recipe}; run from a clone of the repository, or name another")
    started = time.perf_counter()
    if not (folder / "model" / "config.json").is_file():
        write_corpus(folder, CorpusSize().scaled(scale), seed=seed)
        write_untrained(folder / "model", seed=seed)
    videos, images = (len(list((folder / name).iterdir())) for name in ("videos", "images"))
    print(f"corpus: {videos:,} videos and {images:,} pictures in {folder}, {time.perf_counter() - started:.0f} s")
    os.environ["TINY"] = str(folder)
    seeds = {"seed": seed + 1} if seed else {}
    recipes = load_recipes(recipe, {"disable_tqdm": not sys.stderr.isatty(), **seeds, **(overrides or {})})
    title = "held-out questions answered right, with the videos and with blank frames in their place"
    print("\n" + title.rjust(len(_line(*[""] * 11))))
    exams = [*TARGETS, *(f"blank {exam}" for exam in TARGETS)]
    print(_line("stage", "learns", "frames", "px", "steps", "s", "loss", *exams), flush=True)
    reports = [_train_and_examine(stage, folder) for stage in recipes]
    last = reports[-1]
    draw_losses(folder / "losses.png", {report.recipe.name: report.curve for report in reports})
    draw_answers(folder / "answers.png", _some_of_each(last.seen), folder=folder)
    guessed = {exam: chance(results) for exam, results in last.seen.items()}
    shares = [f"{share:.1%}" for share in guessed.values()]
    print(_line("guessing", *[""] * 6, *shares, *shares))
    print(f"\n{folder / 'losses.png'}, {folder / 'answers.png'}; {time.perf_counter() - started:.0f} s in all")
    has_learned = all(
        accuracy(last.seen[exam]) >= TARGETS[exam] and accuracy(last.blank[exam]) <= guessed[exam] + MAX_LUCK
        for exam in TARGETS
    )
    if not has_learned:
        print(
            f"the last model should reach {TARGETS} by looking, and be within {MAX_LUCK} of guessing with blank frames"
        )
    return Path(last.recipe.output_dir) / "final", has_learned


def _line(*cells: object) -> str:
    """Format a line of the table: what was trained and how, then shares of right answers."""
    widths = (-14, -30, 6, 3, 5, 4, 6, 7, 7, 12, 11)
    return " ".join(f"{cell:<{-w}}" if w < 0 else f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))


def _train_and_examine(recipe: Recipe, folder: Path) -> Report:
    start = time.perf_counter()
    # The trainer's own lines go to a file: they are for those who watch one run, not for an overview.
    Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(recipe.output_dir) / "log.txt", "a") as log, contextlib.ExitStack() as redirected:
        redirected.enter_context(contextlib.redirect_stdout(log))
        if recipe.arguments["disable_tqdm"]:
            redirected.enter_context(contextlib.redirect_stderr(log))
        final = run_stage(recipe)
    seconds = time.perf_counter() - start
    history = json.loads((final / "trainer_state.json").read_text())["log_history"]
    curve = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    model = HicoForConditionalGeneration.from_pretrained(final).eval()
    processor = HicoProcessor.from_pretrained(final)
    processor.video = HicoProcessor.from_pretrained(folder / "model").video  # the same exam after every stage
    seen, blank = {}, {}
    for exam in TARGETS:
        rows = read_exam(folder / f"held_out_{exam}.jsonl")
        seen[exam] = sit_exam(model, processor, rows, folder=folder)
        blank[exam] = sit_blank_exam(model, processor, rows)
    report = Report(recipe, seconds, curve, seen, blank)
    print(_table_row(report), flush=True)
    return report


def _table_row(report: Report) -> str:
    recipe = report.recipe
    frames = f"{recipe.min_frames}-{recipe.max_frames}" if recipe.min_frames < recipe.max_frames else recipe.max_frames
    steps, loss = report.curve[-1]
    return _line(
        recipe.name,
        "all" if len(recipe.trainable) == len(PARTS) else ", ".join(recipe.trainable),
        "-" if recipe.trainable == ["llm"] else frames,
        recipe.image_size,
        steps,
        f"{report.seconds:.0f}",
        f"{loss:.3f}",
        *(f"{accuracy(results[exam]):.1%}" for results in (report.seen, report.blank) for exam in TARGETS),
    )


def _some_of_each(seen: dict[str, list[Answered]], *, num_videos: int = 6) -> list[Answered]:
    """Return all answers about a few videos of both exams, evenly spread."""
    chosen = []
    for results in seen.values():
        videos = list(dict.fromkeys(result.video for result in results))
        some = {videos[n] for n in np.linspace(0, len(videos) - 1, num_videos).round().astype(int)}
        chosen += [result for result in results if result.video in some]
    return chosen


def new_video(path: str | Path, *, seed: int = 0) -> Story:
    """Write a long video of three events that is in no corpus, and return its story."""
    story = long_story(np.random.default_rng((seed, 2**31)), num_scenes=LONG_SCENES, num_events=3)
    write_video(path, story)
    return story
