"""``python -m hico.train --config RECIPE [--key value ...]``: train a stage, or a chain of stages."""

import argparse
import atexit
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from hico.data.decoding import SampleError
from hico.registry import import_plugins
from hico.train.config import Recipe
from hico.train.recipes import load_recipes, parse_overrides

BAD_INPUT = (ValueError, OSError, ImportError, SampleError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    Bad input is one line on standard error. What goes wrong in a training step has a traceback: it may be your code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m hico.train",
        description="Train a stage, or a chain of stages. Any key of a recipe is a flag too: --learning_rate 2e-5.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="a YAML file, see train/")
    parser.add_argument("--dry_run", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--world_size", type=int, help="devices that --dry_run plans for (those here)")
    parser.add_argument("--overwrite", action="store_true", help="train anew what was made otherwise")
    parser.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="import yours first")
    args, rest = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        import_plugins(args.plugin)
        recipes = load_recipes(args.config, parse_overrides(rest))
        if args.dry_run:
            return _dry_run(recipes, args.world_size)
        from hico.train.run import run_chain

        run_chain(recipes, overwrite=args.overwrite)
        return 0
    except BAD_INPUT as error:
        _complain(error)
        return 1
    except KeyboardInterrupt:
        return 130


def _dry_run(recipes: Sequence[Recipe], world_size: int | None) -> int:
    """Report every stage, or what is wrong with it; of several processes, the first one does."""
    from hico.train.arguments import planned_arguments
    from hico.train.plan import prepare
    from hico.train.report import dry_run

    num_bad, config = 0, None
    num_devices = world_size or int(os.environ.get("WORLD_SIZE", 1))
    for recipe in recipes if os.environ.get("RANK", "0") == "0" else ():
        # Stages before have not run: plan with the checkpoint that the chain starts from, and what becomes of it.
        recipe.model = recipes[0].model
        try:
            planned_arguments(recipe, here=world_size is None)
            prepared = prepare(recipe, start=config, world_size=num_devices)
            config = prepared.config
            print(dry_run(recipe, prepared, world_size=num_devices) + "\n", flush=True)
        except BAD_INPUT as error:
            _complain(error, f"stage {recipe.name}: " if len(recipes) > 1 else "")
            num_bad += 1
    return int(num_bad > 0)


def _complain(error: Exception, where: str = "") -> None:
    print(f"hico.train: {where}{' '.join(str(error).split())}", file=sys.stderr)


def leave(run: Callable[[], int]) -> NoReturn:
    """End the process with the status that ``run`` returns or exits with.

    A process that a launcher started skips the teardown of Python, during which threads of torch.distributed that
    still let go of a tensor abort it, after all work is done.
    """
    if "RANK" not in os.environ:
        sys.exit(run())
    try:
        status = run()
    except SystemExit as stopped:
        status = stopped.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    # Gloo would wait for such a thread while that waits for Python's lock.
    if torch.distributed.is_initialized() and torch.distributed.get_backend() != "gloo":
        torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main)
