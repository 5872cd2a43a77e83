"""``hico ablate``: many ways to spend fewer visual tokens, in one table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hico.eval.cells import Cell
    from hico.eval.results import ResultsFile

RESULTS, CSV, TABLE, PLOT = "results.jsonl", "table.csv", "table.md", "plot.png"
DEMO = "demo"
"""Folder of the tiny course, trained there if no model is named."""
GRID = ("encoders", "compressors", "video_compressors", "keep_ratios", "drop_schedules", "frames", "cross")
"""Keys of a grid's YAML file."""
DEFAULT_GRID: dict[str, Any] = {
    "video_compressors": [
        "evs",
        "vidcom2",
        "visionzip",
        "divprune",
        "fastvid",
        "holitom",
        "dycoke",
        "dtd",
        "prunevid",
    ],
    "compressors": ["token_merge tokens_per_frame=2", "token_merge tokens_per_frame=1"],
    "keep_ratios": [0.5, 0.25, 0.125],
    "drop_schedules": ["attention@1:0.5", "attention@1:0.25", "attention@1:0.125"],
}
"""What is compared where no grid is given."""


@dataclass(frozen=True)
class Work:
    """All that one cell needs beside itself; can be sent to another machine."""

    model: str
    data: str
    folder: str
    limit: int | None = None
    device: str | None = None
    dtype: str | None = None
    timed: int = 8
    new_tokens: int = 16
    batch_size: int = 32
    recipe: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return what decides the figures beside the cell, to digest."""
        from hico.data.rowfiles import file_sha256
        from hico.eval.models import model_digest

        facts = {"model": model_digest(self.model), "rows": file_sha256(Path(self.data)), "limit": self.limit}
        facts |= {"dtype": self.dtype, "timed": self.timed, "new_tokens": self.new_tokens}
        if self.recipe is not None:
            from hico.eval.trained import recipe_facts

            facts["recipe"] = recipe_facts(self.recipe, self.overrides)
        return facts

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """Measure a cell; in trained mode, train it first."""
        from hico.eval.answers import read_questions
        from hico.eval.measuring import Tried, measure
        from hico.registry import import_plugins

        import_plugins(self.plugins)
        questions = read_questions(self.data, limit=self.limit)
        if self.recipe is None:
            tried = _tried(self.model, self.device, self.dtype)
            tried.set(cell)
        else:
            from hico.eval.trained import train_cell

            final = train_cell(cell, self.recipe, self.overrides, folder=Path(self.folder) / cell.digest()[:16])
            tried = Tried(*_load(final, self.device, self.dtype))
        costs = {"num_timed": self.timed, "new_tokens": self.new_tokens, "batch_size": self.batch_size}
        return measure(tried.model, tried.processor, questions, frames=cell.frames, **costs)


def _load(folder: str | Path, device: str | None, dtype: str | None):
    from hico.eval.models import device_and_dtype, load_language_model
    from hico.processing_hico import HicoProcessor

    device, dtype = device_and_dtype(device, dtype)
    return load_language_model(folder, device=device, dtype=dtype), HicoProcessor.from_pretrained(folder)


@lru_cache(maxsize=1)
def _tried(folder: str, device: str | None, dtype: str | None):
    from hico.eval.measuring import Tried

    return Tried(*_load(folder, device, dtype))


def measure_grid(
    cells: Sequence[Cell],
    results: ResultsFile,
    facts: dict[str, Any],
    run: Callable[[Sequence[Cell]], Iterator[tuple[Cell, Any]]],
    *,
    with_baselines: bool = True,
) -> list[tuple[Cell, dict[str, Any]]]:
    """Measure what is not measured yet, and then the uniform and the random choice of every budget.

    Args:
        cells: the grid; see `hico.eval.cells.make_grid`.
        results: where figures are, by ``digest``, and are written as they come. A failure is not written, so that
            another run tries again.
        facts: what decides the figures beside the cells.
        run: yields the cells with their figures, or the exception that was raised.
        with_baselines: whether the choices that look at nothing are added.

    Returns:
        All cells with their figures, or their ``error``.
    """
    from hico.eval.cells import baselines, distinct

    def add(wanted: Sequence[Cell]) -> None:
        known = {line["digest"]: line["figures"] for line in results}
        digests = {id(cell): cell.digest(facts=facts) for cell in wanted}
        rows.extend((cell, known[digests[id(cell)]]) for cell in wanted if digests[id(cell)] in known)
        missing = [cell for cell in wanted if digests[id(cell)] not in known]
        for number, (cell, figures) in enumerate(run(missing), 1):
            what = f"{number}/{len(missing)} {cell.method} {cell.setting}".strip()
            if isinstance(figures, Exception):
                reason = " ".join(str(figures).split()) or type(figures).__name__
                rows.append((cell, {"error": reason}))
                print(f"{what}: failed: {reason}", file=sys.stderr, flush=True)
                continue
            line = {"digest": digests[id(cell)], "method": cell.method, "setting": cell.setting, "figures": figures}
            results.add(line)
            rows.append((cell, figures))
            share = f"{figures['accuracy']:.1%} of {figures['n']}"
            print(f"{what}: {share}, {figures['tokens_per_frame']:.2f} tokens per frame", flush=True)

    rows: list[tuple[Cell, dict[str, Any]]] = []
    add(cells)
    if not with_baselines:
        return rows
    tokens = {cell.digest(): figures["tokens_per_frame"] for cell, figures in rows if "error" not in figures}
    more: list[Cell] = []
    for cell, figures in list(rows):
        whole = tokens.get(cell.whole.digest())
        if not cell.is_whole and "error" not in figures and whole:
            ratio = figures["tokens_per_frame"] / whole
            more += baselines(cell, retained=figures["retained"], tokens_ratio=ratio)
    there = {cell.digest() for cell in cells}
    add([cell for cell in distinct(more) if cell.digest() not in there])
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``hico ablate``."""
    parser.add_argument("--model", metavar="DIR", help=f"checkpoint; that of the tiny course in {DEMO}/ if omitted")
    parser.add_argument("--data", metavar="FILE", help="rows with a video and an answer; the course's long exam")
    parser.add_argument("--grid", metavar="FILE", help=f"YAML with the keys {', '.join(GRID)}, which flags win over")
    part = "a name, or 'name key=value'"
    parser.add_argument("--encoders", nargs="+", metavar="PART", help=f"{part}; with --recipe only")
    parser.add_argument("--compressors", nargs="+", metavar="PART", help=f"of clips: {part}")
    parser.add_argument("--video-compressors", nargs="+", metavar="PART", help=part)
    parser.add_argument("--keep-ratios", nargs="+", type=float, metavar="R", help="for every video compressor")
    parser.add_argument("--drop-schedules", nargs="+", metavar="SCHEDULE", help="such as attention@18:0.25, fastv")
    parser.add_argument("--frames", nargs="+", type=int, metavar="N", help="frames of a video; the processor's choice")
    parser.add_argument("--cross", action="store_true", default=None, help="combine everything with everything")
    parser.add_argument("--recipe", metavar="FILE", help="trained mode: train this for every cell, from its --model")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="recipe keys, such as max_steps=50")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="questions, evenly spread over the file; all if omitted"
    )
    parser.add_argument("--timed", type=int, default=8, metavar="N", help="questions that are timed (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=16, metavar="N", help="of a timed answer (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="questions at once (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; the best there is if omitted")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="float32 on CPU, else bfloat16")
    parser.add_argument("--output", default="ablation", metavar="DIR", help=f"for {RESULTS}, {CSV}, ... (%(default)s)")
    parser.add_argument("--submit", choices=("local", "slurm", "debug"), help="run cells as jobs, through submitit")
    parser.add_argument("--job", nargs="+", default=[], metavar="KEY=VALUE", help="of jobs, such as timeout_min=60")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure a grid, and write table and plot; return the exit status, 1 if a cell failed.

    Raises:
        ValueError, OSError, ImportError: for what is wrong with model, rows, grid or recipe, before the first cell.
    """
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit is {args.limit}; ask at least 1 question")
    if args.timed < 1 or args.batch_size < 1 or args.new_tokens < 2:
        raise ValueError("--timed and --batch-size must be at least 1, --new-tokens at least 2")
    cells = read_grid(args)
    if args.recipe is None and any(cell.encoder for cell in cells):
        raise ValueError("--encoders need training; give the --recipe to train for every cell, or leave them out")
    if args.set and args.recipe is None:
        raise ValueError("--set changes a recipe, and there is none; give --recipe")
    overrides, job = _pairs(args.set, "--set"), _pairs(args.job, "--job")
    from hico.eval.ablation_table import draw_tradeoff, markdown, write_csv
    from hico.eval.answers import read_questions
    from hico.eval.results import ResultsFile
    from hico.eval.submitting import as_jobs, in_turn

    model, data = _model_and_data(args, overrides)
    read_questions(data, limit=args.limit)  # what is wrong with rows is said before anything is loaded
    output = Path(args.output)
    names = ("limit", "device", "dtype", "timed", "new_tokens", "batch_size", "recipe")
    work = Work(
        model=model,
        data=data,
        folder=str(output / "cells"),
        overrides=overrides,
        plugins=tuple(args.plugin),
        **{name: getattr(args, name) for name in names},
    )
    runner: Callable = partial(in_turn, work)
    if args.submit:
        runner = partial(as_jobs, work, cluster=args.submit, folder=output / "jobs", options=job)
    results = ResultsFile(output / RESULTS, {"test": "ablation"}, key=("digest",))
    rows = measure_grid(cells, results, work.facts(), runner)
    write_csv(output / CSV, rows)
    (output / TABLE).write_text(markdown(rows) + "\n")
    draw_tradeoff(output / PLOT, rows, title=f"{Path(data).name}, {Path(model).resolve().parent.name}")
    print(markdown(rows))
    print(", ".join(str(output / name) for name in (RESULTS, CSV, TABLE, PLOT)))
    return int(any("error" in figures for _, figures in rows))


def read_grid(args: argparse.Namespace) -> list[Cell]:
    """Return the cells that a YAML file and flags ask for, or those of `DEFAULT_GRID`."""
    from hico.data.fields import check_keys
    from hico.data.yaml_files import read_yaml
    from hico.eval.cells import make_grid

    settings = read_yaml(Path(args.grid)) if args.grid else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{args.grid} must hold keys of a grid ({', '.join(GRID)})")
    check_keys(settings, GRID, what="grid")
    settings |= {name: getattr(args, name) for name in GRID if getattr(args, name) is not None}
    if lone := [name for name in GRID if name != "cross" and not isinstance(settings.get(name, []), list)]:
        raise ValueError(f"{lone[0]} of {args.grid} is {settings[lone[0]]!r}; write a list")
    if not settings.keys() - {"frames", "keep_ratios", "cross"}:
        settings = DEFAULT_GRID | settings
    return make_grid(**settings)


def _model_and_data(args: argparse.Namespace, overrides: dict[str, Any]) -> tuple[str, str]:
    """Return the checkpoint and the rows that were asked for, or those of the tiny course, trained where missing."""
    model, data = args.model, args.data
    if args.recipe is not None and model is None:
        from hico.eval.trained import recipe_facts

        model, _ = recipe_facts(args.recipe, overrides)
    elif args.recipe is not None:
        overrides["model"] = model
    if model is None:
        import torch

        from hico.tiny.course import run_course

        torch.set_num_threads(1)
        final = Path(DEMO) / "runs" / "stage4" / "final"
        model = str(final if (final / "config.json").is_file() else run_course(DEMO)[0])
        data = data or str(Path(DEMO) / "held_out_long.jsonl")
    if data is None:
        raise ValueError("--data is missing: name the rows to ask the model about, each with a video and an answer")
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"there is no checkpoint {model!r}; give the folder of one, with its config.json")
    return model, data


def _pairs(words: Sequence[str], flag: str) -> dict[str, Any]:
    from hico.data.yaml_files import parse_yaml

    if wrong := [word for word in words if "=" not in word]:
        raise ValueError(f"{flag} has {wrong[0]!r}; write key=value")
    return {key: parse_yaml(value, f"{flag} {key}") for key, _, value in (word.partition("=") for word in words)}
