"""`HicoTrainer`: trains a model in parts, on rows whose order can be resumed."""

import copy
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hico.data.batching import BatchSampler, EpochLoader
from hico.data.collator import Collator
from hico.data.dataset import TrainingRows
from hico.data.survey import MODALITIES
from hico.parallel import SequenceMesh
from hico.prompt import IGNORE_INDEX
from hico.train.config import PARTS, Recipe
from hico.train.parts import modules_of, parameter_groups, rest
from hico.train.safeguards import outlive_sigterm
from hico.train.stage_trainer import StageTrainer
from hico.train.throughput import FlopCounter, Meter, TokenLoss, peak_memory


class HicoTrainer(StageTrainer):
    """Train one stage.

    What differs from `transformers.Trainer`: the order of batches and every random choice in the data follow from
    the seed, so that a resumed run goes on with the very next row; parts have learning rates of their own; rows that
    cannot be read are counted; evaluation weighs every learned token alike.

    Args:
        model: `HicoForConditionalGeneration`, frozen by `hico.train.parts.freeze`, or its peft wrapper.
        args: training arguments.
        recipe: of the stage.
        mesh: the processes that share this one's rows, as ``model`` knows them too.
        dataset, sampler: training rows, and this device's batches of them.
        needed: what every batch must have, see `hico.data.collator.Collator`.
        eval_dataset, eval_sampler: the same to evaluate on, if any.
        flops, peak_tflops: operations of a batch, and the most a device can do in a second, for the utilisation.
        options: of `StageTrainer`.
    """

    meter_type = Meter

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        recipe: Recipe,
        mesh: SequenceMesh,
        dataset: TrainingRows,
        sampler: BatchSampler,
        needed: str = "rows",
        eval_dataset: TrainingRows | None = None,
        eval_sampler: BatchSampler | None = None,
        flops: FlopCounter | None = None,
        peak_tflops: float | None = None,
        **options: Any,
    ):
        self.recipe, self.mesh, self.sampler, self.eval_sampler = recipe, mesh, sampler, eval_sampler
        self.flops, self.meter = flops, self.meter_type(dataset.mixture.names, peak_tflops if flops else None)
        self.token_loss = TokenLoss()
        unwrapped(model).loss_function = self.token_loss
        frozen = [part for part in PARTS if part not in recipe.trainable and (part != "llm" or recipe.lora is None)]
        pairs = dataset.mixture.preferences
        self._resting, self._visual_ids = modules_of(unwrapped(model), frozen), dataset.visual_ids
        self._parts: list[str] = []
        self._cast: torch.dtype | None = None
        super().__init__(
            model,
            args,
            data_collator=Collator(dataset.processor, packing=recipe.packing, needed=needed, preferences=pairs),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=dataset.processor,
            **options,
        )
        if needed == "both":
            # Weights are sharded: the encoder runs once per batch for images and once for videos, not once per chunk
            # of clips; the LM head once, not once per chunk of tokens.
            core = unwrapped(model).model
            core.encode = partial(core.encode, clips_per_chunk=sys.maxsize)
            unwrapped(model).tokens_per_loss_chunk = sys.maxsize
        self._since = time.perf_counter()

    def train(self, *args, **kwargs):
        """Train; see `transformers.Trainer.train`."""
        self._since = time.perf_counter()
        return super().train(*args, **kwargs)

    # Data ---------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> EpochLoader:
        """Return the loader of this device; accelerate neither shards nor shuffles it again."""
        return self._loader(self.train_dataset, self.sampler)

    def get_eval_dataloader(self, eval_dataset=None) -> EpochLoader:
        """Return the loader of this device's share of the held-out rows, in their order."""
        return self._loader(self.eval_dataset, self.eval_sampler)

    def _loader(self, dataset: TrainingRows, sampler: BatchSampler) -> EpochLoader:
        args = self.args
        return EpochLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=outlive_sigterm,
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Take the batches of one step from the loader, and note how long that took."""
        batches, num_items = super().get_batch_samples(self._timed(epoch_iterator), num_batches, device)
        self.meter.add(steps=1)
        for batch in batches:
            self._count(batch)
        return batches, num_items

    def _timed(self, batches: Iterator) -> Iterator:
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.meter.add(wait=time.perf_counter() - start)
            yield batch

    def _count(self, batch: dict[str, Any]) -> None:
        num_rows, left_out = batch.pop("num_rows"), batch.pop("bad_rows")
        self.bad_rows.count(num_rows, left_out)
        rows = row_sizes(batch, self._visual_ids)
        num_tiles = len(batch["pixel_values"]) if "pixel_values" in batch else 0
        clips = batch["pixel_values_videos"].shape[:2] if "pixel_values_videos" in batch else (0, 0)
        num_tokens, num_learned = sum(length for length, _ in rows), int((batch["labels"] != IGNORE_INDEX).sum())
        if self.flops:
            flops = self.flops(rows, num_clips=clips[0], num_tiles=num_tiles, num_learned=num_learned)
            self.meter.add(flops=flops / self.mesh.size)
        if self.mesh.rank > 0:
            return  # what follows is said once by those that share rows
        self.meter.add(
            rows=num_rows - len(left_out),
            bad_rows=len(left_out),
            tokens=num_tokens,
            visual_tokens=sum(visual for _, visual in rows),
            learned_tokens=num_learned,
            padding=batch["input_ids"].numel() - num_tokens,
            frames=clips[0] * clips[1] + num_tiles,
        )

    # Loss ---------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss, and add the tokens' losses to those of their modality and dataset."""
        rest(self._resting)
        modality, dataset = inputs.pop("modality"), inputs.pop("dataset")
        with self.token_loss.remembered() as losses:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            self._note_losses(self.meter, losses, inputs["labels"], modality, dataset)
        return result

    def _note_losses(
        self, meter: Meter, losses: list[Tensor], labels: Tensor, modality: Tensor, dataset: Tensor
    ) -> None:
        """Add the losses of the tokens that this process learned of, which may be a part of those in the batch."""
        learned = labels[:, 1:] != IGNORE_INDEX
        kinds = modality[:, 1:][learned], dataset[:, 1:][learned]
        if self.token_loss.numbers is not None:
            kinds = (kind[self.token_loss.numbers] for kind in kinds)
        meter.add_losses(torch.cat(losses), *kinds)

    def floating_point_ops(self, inputs) -> float:
        """Say nothing: operations are counted batch by batch in the meter."""
        return 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report the meter and every part's learning rate beside the loss."""
        if "loss" in logs:
            now = time.perf_counter()
            self.meter.add(seconds=now - self._since)
            self._since = now
            rates = dict(zip(self._parts, self._rates, strict=False))
            logs |= {f"learning_rate_{part}": rate for part, rate in rates.items()}
            common = [rate for part, rate in rates.items() if part not in self.recipe.part_learning_rates]
            logs["learning_rate"] = (common or [logs["learning_rate"]])[0]
            logs |= self.meter.report(self.sum_over_devices, self.args.world_size)
            memory = torch.tensor([peak_memory()], device=self.args.device)
            logs["peak_memory_gib"] = self.accelerator.gather(memory).max().item()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return the mean loss of a learned token of the held-out rows: of all, and per modality."""
        start, meter = time.perf_counter(), self.meter_type(self.eval_dataset.mixture.names)
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        for batch in self.get_eval_dataloader():
            batch = self._prepare_inputs(batch)
            self.bad_rows.count(batch.pop("num_rows"), batch.pop("bad_rows"))
            with self.compute_loss_context_manager():
                self.evaluate_batch(model, batch, meter)
        model.train(was_training)
        sums = meter.totals(self.sum_over_devices)
        losses, counts = (sum(sums[f"{what}_{kind}"] for kind in MODALITIES) for what in ("loss", "count"))
        metrics = {f"{metric_key_prefix}_loss": losses / max(counts, 1)}
        metrics |= meter.mean_losses(sums, f"{metric_key_prefix}_")
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self._since += metrics[f"{metric_key_prefix}_runtime"]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluate_batch(self, model: nn.Module, batch: dict[str, Any], meter: Meter) -> None:
        """Add the losses of a batch to a meter."""
        modality, dataset = batch.pop("modality"), batch.pop("dataset")
        with self.token_loss.remembered() as losses:
            model(**batch, logits_to_keep=1)
            self._note_losses(meter, losses, batch["labels"], modality, dataset)

    # Parts --------------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer, with one group per part."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(
                model,
                learning_rate=self.args.learning_rate,
                part_learning_rates=self.recipe.part_learning_rates,
                weight_decay=self.args.weight_decay,
                decayed=self.get_decay_parameter_names(model),
            )
            self._parts = [group["name"].split()[0] for group in groups]
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    # Checkpoints --------------------------------------------------------------------------------------------------

    def save_result(self, folder: Path) -> None:
        """Write the trained model in the dtype that is asked for, adapters in their own, and the processor."""
        self._cast = self.dtype if unwrapped(self.model) is self.model else None
        if self._cast and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self.model.to(self.dtype)
        self.save_model(str(folder))
        if self.args.should_save:
            self._save_config(folder, dtype=self.dtype)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict and self._cast:
            state_dict = {name: tensor.to(self._cast) for name, tensor in state_dict.items()}
        super()._save(output_dir, state_dict)
        if self.args.should_save and unwrapped(self.model) is not self.model:
            self._save_config(output_dir)

    def _save_config(self, folder: str | Path, **changes: Any) -> None:
        """Write the configuration of weights that were not cast with the model, or that lie under adapters."""
        config = copy.deepcopy(unwrapped(self.model).config)
        for key, value in changes.items():
            setattr(config, key, value)
            setattr(config.text_config, key, value)
        if hasattr(config, "quantization_config"):  # how the model below was loaded, and not how it lies there
            del config.quantization_config
        config.save_pretrained(folder)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return `HicoForConditionalGeneration` from inside a peft wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def row_sizes(batch: Mapping[str, Tensor], visual_ids: Tensor) -> list[tuple[int, int]]:
    """Return tokens and visual tokens of every row of a batch, padded or packed."""
    visual = torch.isin(batch["input_ids"], visual_ids)
    if "position_ids" not in batch:
        lengths = batch["attention_mask"].sum(dim=1)
        return list(zip(lengths.tolist(), visual.sum(dim=1).tolist(), strict=True))
    row_of_token = (batch["position_ids"][0] == 0).cumsum(dim=0) - 1
    lengths, seen = row_of_token.bincount(), row_of_token[visual[0]]
    return list(zip(lengths.tolist(), seen.bincount(minlength=len(lengths)).tolist(), strict=True))
