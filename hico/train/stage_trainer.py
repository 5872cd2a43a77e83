"""`StageTrainer`: `transformers.Trainer` that obeys signals and whose checkpoints are complete or absent."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments

from hico.compat import require
from hico.train import checkpoint
from hico.train.safeguards import BadRows, StopOnSignal, workers_end_with_training

_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"


class _Follow(TrainerCallback):
    """Let the trainer take part where its parent class has no method to extend."""

    def __init__(self, trainer: "StageTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.go_on_as_asked()

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.has_begun = True

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.note_rates()


require(Trainer, "_get_output_dir", "_load_best_model", "_determine_best_metric", "_save_checkpoint", "_save")


class StageTrainer(Trainer):
    """Train a stage so that it can be killed at any moment, and goes on where it was left.

    Args:
        model: what is trained.
        args: training arguments.
        manifest: written beside every checkpoint.
        dtype: of the result.
        bad_rows: counts rows that cannot be read; its state is part of a checkpoint.
        options: of `transformers.Trainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        manifest: Mapping[str, Any],
        dtype: torch.dtype,
        bad_rows: BadRows,
        **options: Any,
    ):
        self.dtype = dtype
        self.manifest, self.bad_rows = dict(manifest), bad_rows
        self.stop_on_signal, self.has_begun = StopOnSignal(), False
        # The parent class removes checkpoints of its own accord when training ends: also the one after a signal.
        self.save_total_limit, args.save_total_limit = args.save_total_limit, None
        self._asked_rates: list[float] = []
        self._rates: list[float] = []
        # TensorBoard would begin another run at every restart.
        asked = os.environ.get(_TENSORBOARD)
        os.environ[_TENSORBOARD] = asked or os.path.join(args.output_dir, checkpoint.LOGS)
        super().__init__(model, args, callbacks=[self.stop_on_signal, _Follow(self)], **options)
        if asked is None:
            del os.environ[_TENSORBOARD]

    def train(self, *args, **kwargs):
        """Train; see `transformers.Trainer.train`.

        Raises:
            RuntimeError: from what a step raises, be it only bad input before the first one; rows that cannot be read
                are a `SampleError` at any time.
        """
        with self.stop_on_signal.listening(), workers_end_with_training():
            try:
                return super().train(*args, **kwargs)
            except (ValueError, OSError, ImportError) as error:
                if not self.has_begun:
                    raise
                raise RuntimeError(f"training failed after step {self.state.global_step}") from error

    @property
    def is_done(self) -> bool:
        """Whether the last step was made."""
        return self.state.global_step >= self.state.max_steps

    def train_from(self, last: Path | None) -> None:
        """Train from the beginning, or go on from a checkpoint."""
        self.restore(last)
        self.train(resume_from_checkpoint=str(last) if last else None)

    def restore(self, last: Path | None) -> None:
        """Go back to what a checkpoint says of bad rows, beside all that transformers restores."""
        self.bad_rows.load(last)

    def create_scheduler(self, *args, **kwargs):
        """Make the schedule, and note the rates that it begins with: a checkpoint would put its own in their place."""
        schedule = super().create_scheduler(*args, **kwargs)
        self._asked_rates = list(getattr(schedule, "base_lrs", []))
        return schedule

    def go_on_as_asked(self) -> None:
        """Give what a checkpoint restored the learning rates and intervals of this run."""
        self.state.compute_steps(self.args, self.state.max_steps)
        schedule = self.lr_scheduler
        if not isinstance(schedule, LambdaLR) or schedule.base_lrs == self._asked_rates:
            return
        schedule.base_lrs = self._asked_rates
        for group, rate, factor in zip(
            schedule.optimizer.param_groups, self._asked_rates, schedule.lr_lambdas, strict=True
        ):
            group["initial_lr"], group["lr"] = rate, rate * factor(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]

    def note_rates(self) -> None:
        """Note the learning rates of the step that is made, one per group of parameters."""
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]

    def sum_over_devices(self, values: Tensor) -> Tensor:
        """Return the sum over devices, on the CPU."""
        if self.args.world_size == 1:
            return values.cpu()
        return self.accelerator.reduce(values.to(self.args.device), reduction="sum").cpu()

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Take the batches of one step from the loader; none if a run of ``max_steps`` is resumed after its last."""
        if self.is_done:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def save_final(self) -> Path:
        """Publish the trained model as the stage's result."""
        with self.staged(checkpoint.FINAL) as staged:
            self.save_result(staged)
            if self.args.should_save:
                self.state.save_to_json(str(staged / "trainer_state.json"))
        return Path(self.args.output_dir) / checkpoint.FINAL

    def save_result(self, folder: Path) -> None:
        """Write the trained model and its processor; all devices take part."""
        self.save_model(str(folder))

    @contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """Yield a folder to write into; it gets its name when all devices have left the block."""
        output_dir = Path(self.args.output_dir)
        staged = output_dir / checkpoint.STAGING / name
        if self.args.should_save:
            checkpoint.clean(output_dir)
            staged.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        yield staged
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoint.publish(staged, output_dir / name, {**self.manifest, "step": self.state.global_step})
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial) -> str:
        return str(getattr(self, "_staging", None) or super()._get_output_dir(trial))

    def _load_best_model(self) -> None:
        if self.is_done:  # and not stopped by a signal, after which the time is short
            super()._load_best_model()

    def _determine_best_metric(self, metrics, trial) -> bool:
        # With save_strategy `best` the answer alone decides whether to save, and a run that stops must.
        return super()._determine_best_metric(metrics, trial) or self.stop_on_signal.is_stopping

    def _save_checkpoint(self, model, trial) -> None:
        step, output_dir = self.state.global_step, Path(self.args.output_dir)
        with self.staged(f"checkpoint-{step}") as staged:
            self._staging = staged.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.bad_rows.save(staged)
            if self.state.best_global_step:
                # It was written into the folder that has no name yet.
                self.state.best_model_checkpoint = str(output_dir / f"checkpoint-{self.state.best_global_step}")
            if self.args.should_save:
                self.state.save_to_json(str(staged / "trainer_state.json"))
        if self.args.should_save:
            checkpoint.rotate(output_dir, self.save_total_limit, keep=self.state.best_model_checkpoint)
