"""Cells of an ablation that are trained: one recipe, from one start, seed and budget, for every setting."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from hico.configuration_hico import HicoConfig
from hico.eval.cells import Cell
from hico.modeling_hico import HicoForConditionalGeneration
from hico.processing_hico import HicoProcessor
from hico.train.recipes import load_recipes
from hico.train.run import run_chain


def recipe_facts(recipe: str | Path, overrides: Mapping[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """Return the checkpoint that a recipe starts from, and all that it says but where it writes."""
    stages = load_recipes(recipe, {"output_dir": ".", **overrides})
    facts = [{key: value for key, value in asdict(stage).items() if key != "output_dir"} for stage in stages]
    return stages[0].model, facts


def train_cell(cell: Cell, recipe: str | Path, overrides: Mapping[str, Any], *, folder: str | Path) -> Path:
    """Train a recipe with the configuration of a cell.

    Weights of the recipe's start are taken where name and size are the same, all others drawn from the recipe's seed.
    A training that was stopped goes on, and a finished one is not repeated.

    Args:
        cell: what to change.
        recipe: YAML file of a stage or a chain.
        overrides: recipe keys that win over the file.
        folder: for the start and the stages of this cell.

    Returns:
        The folder of the trained model.

    Raises:
        ValueError: if the parts do not fit each other, or the recipe or its data are wrong.
    """
    folder = Path(folder)
    start = folder / "start"
    stages = load_recipes(recipe, {"output_dir": str(folder), **overrides})
    if not (start / "processor_config.json").is_file():
        write_start(cell, stages[0].model, start, seed=stages[0].seed)
    return run_chain(load_recipes(recipe, {**overrides, "model": str(start), "output_dir": str(folder)}))


def write_start(cell: Cell, source: str | Path, target: str | Path, *, seed: int) -> None:
    """Write the model that a cell is trained from; see `train_cell`."""
    old = HicoForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    config = cell.changed(HicoConfig.from_pretrained(source))
    with torch.random.fork_rng(devices=[]):
        set_seed(seed)
        model = HicoForConditionalGeneration(config)
    known, own = old.state_dict(), model.state_dict()
    fitting = {name: known[name] for name, value in own.items() if name in known and known[name].shape == value.shape}
    model.load_state_dict(fitting, strict=False)
    processor = HicoProcessor.from_pretrained(source)
    processor.vision = config.vision
    model.save_pretrained(target)
    processor.save_pretrained(target)
