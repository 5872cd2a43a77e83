"""Running stages: from a recipe to its result, and from one stage to the next."""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig, set_seed

from hico.data.dataset import TrainingRows
from hico.parallel import make_mesh
from hico.train import checkpoint, provenance
from hico.train.arguments import StageArguments, training_arguments
from hico.train.config import PARTS, Recipe
from hico.train.lora import add_lora, load_model
from hico.train.memory import OffloadActivations, save_memory
from hico.train.parts import fit_vocabulary, freeze, modules_of
from hico.train.plan import Prepared, load_config, prepare
from hico.train.preference import PreferenceTrainer
from hico.train.safeguards import BadRows
from hico.train.stage_trainer import StageTrainer
from hico.train.throughput import FlopCounter, peak_tflops
from hico.train.trainer import HicoTrainer, unwrapped

logger = logging.getLogger(__name__)

STOPPED = 143
"""Exit status after SIGTERM, as shells count it."""


def run_chain(recipes: Sequence[Recipe], *, overwrite: bool = False) -> Path:
    """Run stages one after the other; finished ones are skipped.

    What later stages need is checked before the chain's first step.

    Args:
        recipes: of the stages.
        overwrite: see `run_stage`.

    Returns:
        The folder of the last stage's model.
    """
    if recipes[1:] and not any(Path(recipe.output_dir).is_dir() for recipe in recipes):
        config, _ = load_config(recipes[0])
        for recipe in recipes[1:]:
            config = prepare(replace(recipe, model=recipes[0].model), start=config, is_first=_is_first()).config
    for recipe in recipes:
        result = run_stage(recipe, overwrite=overwrite)
    return result


def run_stage(recipe: Recipe, *, overwrite: bool = False) -> Path:
    """Train a stage, from where it was left if it was begun, or was finished with fewer steps than it asks for now.

    Ends the process with status 143 after SIGTERM; its checkpoint, or after the last step its result, is written then.

    Args:
        recipe: of the stage.
        overwrite: train it anew where recipe or data are not those that it was begun or finished with.

    Returns:
        The folder of the trained model.

    Raises:
        ValueError, FileNotFoundError: for what is wrong with recipe, data or checkpoint, before the first step.
        RuntimeError: from what the training steps raise.
    """
    output_dir = Path(recipe.output_dir)
    final = output_dir / checkpoint.FINAL
    last = next(reversed(checkpoint.checkpoints(output_dir)), None)
    anew, changes = False, ""
    if checkpoint.is_complete(final):
        changes = ", ".join(provenance.changes_since_end(final, recipe).values())
        anew = bool(changes) and not (last and provenance.is_longer(final, recipe))
        if not changes:
            _announce("stage %s is finished: %s is there; remove it to train again", recipe.name, final)
            return final
        if anew and not overwrite:
            raise ValueError(
                f"stage {recipe.name} is finished, but {changes}; remove {output_dir} or give --overwrite to train it "
                "again, more epochs to go on from its last checkpoint, or name another output_dir"
            )
    # Before anything is loaded: under ZeRO-3 the arguments decide how weights are placed.
    args = training_arguments(recipe)
    trainer = make_trainer(recipe, args, prepare(recipe, is_first=args.process_index == 0))
    if last and not anew:
        try:
            changes = provenance.changes_since(last, trainer.manifest)
        except ValueError:
            if not overwrite:
                raise
            anew = True
    if anew:
        _announce("stage %s is trained anew in %s", recipe.name, output_dir)
        PartialState().wait_for_everyone()
        if args.process_index == 0:
            checkpoint.discard_run(output_dir)
        PartialState().wait_for_everyone()
        last = None
    elif last:
        _announce("stage %s goes on from %s%s", recipe.name, last, f", though {changes}" if changes else "")
    with trainer.stop_on_signal.listening():
        trainer.train_from(last)
        if trainer.is_done:
            trainer.save_final()
    if trainer.stop_on_signal.agree(args):
        sys.exit(STOPPED)
    return final


def make_trainer(recipe: Recipe, args: StageArguments, prepared: Prepared) -> StageTrainer:
    """Load the model, freeze what does not learn, and put the trainer together."""
    set_seed(args.seed)
    dtype = prepared.dtype  # loading makes the configuration say what it is loaded as
    if recipe.objective == "text":
        return _text_trainer(recipe, args, prepared, dtype)
    options = {"attn_implementation": recipe.attn_implementation}
    if recipe.quantization is not None:
        options["quantization_config"] = BitsAndBytesConfig(**recipe.quantization)
    model = load_model(recipe.model, config=prepared.config, **options)
    if fit_vocabulary(model, prepared.processor.tokenizer) and "llm" not in recipe.trainable:
        raise ValueError(
            "the tokenizer has tokens that the LLM does not, and `trainable` leaves it out, so they would not be "
            "learned; add 'llm', or resize the model first: model.resize_token_embeddings(len(tokenizer))"
        )
    set_seed(args.seed)  # merging adapters draws numbers, and what follows must not depend on it
    frozen = [part for part in PARTS if part not in recipe.trainable and not (part == "llm" and recipe.quantization)]
    if recipe.frozen_dtype is not None:
        for module in modules_of(model, frozen):
            module.to(getattr(torch, recipe.frozen_dtype))
    common = _common(recipe, args, prepared, dtype)
    dataset = TrainingRows(prepared.mixture, prepared.processor, recipe, seed=args.seed)
    save_memory(model, recipe)
    if recipe.objective == "tracks":
        from hico.tiny.tracks import TrackTrainer

        return TrackTrainer(model, args, rows=dataset, **common)
    if recipe.lora is not None:
        model = add_lora(model, recipe.lora, trainable=recipe.trainable)
    freeze(model, recipe.trainable)
    eval_dataset = prepared.eval_mixture and TrainingRows(
        prepared.eval_mixture, prepared.processor, recipe, seed=args.seed
    )
    mesh = make_mesh(
        recipe.sequence_parallel,
        num_key_value_heads=prepared.config.text_config.num_key_value_heads,
        ulysses=recipe.ulysses_size,
        device_type=args.device.type,
    )
    unwrapped(model).set_sequence_parallel(mesh)
    place = {"rank": mesh.data_rank, "world_size": mesh.data_size}
    trainer = (PreferenceTrainer if recipe.objective == "preference" else HicoTrainer)(
        model,
        args,
        recipe=recipe,
        mesh=mesh,
        dataset=dataset,
        sampler=prepared.sampler(**place),
        needed=prepared.needed(args.world_size),
        eval_dataset=eval_dataset,
        eval_sampler=eval_dataset and prepared.eval_sampler(args.per_device_eval_batch_size, **place),
        flops=FlopCounter(unwrapped(model), prepared.schedule),
        peak_tflops=recipe.peak_tflops or peak_tflops(),
        **common,
    )
    if recipe.offload_activations:
        trainer.add_callback(OffloadActivations())
    return trainer


def _common(recipe: Recipe, args: StageArguments, prepared: Prepared, dtype: torch.dtype) -> dict[str, Any]:
    """Return what every `StageTrainer` takes."""
    per_step = args.gradient_accumulation_steps * recipe.num_groups(args.world_size)
    return {
        "manifest": provenance.manifest(recipe, prepared.mixture, prepared.sampler(), per_step),
        "dtype": dtype,
        "bad_rows": BadRows(Path(args.output_dir), args.process_index, recipe.max_bad_fraction),
    }


def _text_trainer(recipe: Recipe, args: StageArguments, prepared: Any, dtype: torch.dtype) -> StageTrainer:
    from hico.train.text import make_text_trainer

    trainer = make_text_trainer(recipe, args, prepared, **_common(recipe, args, prepared, dtype))
    set_seed(args.seed)
    return trainer


def _is_first() -> bool:
    """Say whether this is the first of several processes, which need not know of each other yet."""
    return os.environ.get("RANK", "0") == "0"


def _announce(message: str, *values: Any) -> None:
    """Say something once, whatever the number of devices."""
    if _is_first():
        logger.warning(message, *values)
