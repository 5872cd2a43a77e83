"""``python -m hico.train --config RECIPE [--key value ...]``: train a stage, or a chain of stages."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

import torch

from hico.train.config import load_recipes, parse_overrides
from hico.train.decoding import SampleError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status. Bad input is one line on standard error, never a traceback."""
    parser = argparse.ArgumentParser(
        prog="python -m hico.train",
        description="Train a stage, or a chain of stages. Any key of a recipe is a flag too: --learning_rate 2e-5.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="a YAML file, see train/")
    parser.add_argument("--dry_run", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--world_size", type=int, help="devices that --dry_run plans for (those there are)")
    args, rest = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        recipes = load_recipes(args.config, parse_overrides(rest))
        if args.dry_run:
            _dry_run(recipes, args.world_size or int(os.environ.get("WORLD_SIZE", 1)))
        else:
            _train(recipes)
        return 0
    except (ValueError, OSError, ImportError, SampleError) as error:
        print(f"hico.train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _dry_run(recipes, world_size: int) -> None:
    from hico.train.report import dry_run
    from hico.train.run import prepare

    for recipe in recipes:
        if recipe is not recipes[0]:
            # The stage before has not run: plan with the checkpoint that the chain starts from.
            recipe.model = recipes[0].model
            print()
        print(dry_run(recipe, prepare(recipe), world_size=world_size))


def _train(recipes) -> None:
    from hico.train.run import run_chain

    try:
        run_chain(recipes)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
