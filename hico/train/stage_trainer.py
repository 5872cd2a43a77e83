"""`StageTrainer`: `transformers.Trainer` that obeys signals and whose checkpoints are complete or absent."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hico.train import checkpoint
from hico.train.safeguards import BadRows, FollowBest, StopOnSignal, locate_best, workers_end_with_training

PROGRESS = "progress.json"


class StageTrainer(Trainer):
    """Train a stage so that it can be killed at any moment, and goes on where it was left.

    Args:
        model: what is trained.
        args: training arguments.
        manifest: written beside every checkpoint.
        bad_rows: counts rows that cannot be read; its state is part of a checkpoint.
        options: of `transformers.Trainer`.
    """

    def __init__(
        self, model: nn.Module, args: TrainingArguments, *, manifest: Mapping[str, Any], bad_rows: BadRows, **options
    ):
        self.manifest, self.bad_rows = dict(manifest), bad_rows
        self.stop_on_signal = StopOnSignal()
        # The parent class removes checkpoints of its own accord when training ends: also the one after a signal.
        self.save_total_limit, args.save_total_limit = args.save_total_limit, None
        self._loss_sum, self._last_logged = torch.zeros(()), 0
        super().__init__(model, args, callbacks=[self.stop_on_signal, FollowBest()], **options)

    def train(self, *args, **kwargs):
        """Train; see `transformers.Trainer.train`."""
        with self.stop_on_signal.listening(), workers_end_with_training():
            return super().train(*args, **kwargs)

    @property
    def is_done(self) -> bool:
        """Whether the last step was made."""
        return self.state.global_step >= self.state.max_steps

    def train_from(self, last: Path | None) -> None:
        """Train from the beginning, or go on from a checkpoint."""
        self.restore(last)
        self.train(resume_from_checkpoint=str(last) if last else None)

    def restore(self, last: Path | None) -> None:
        """Go back to what a checkpoint says of bad rows and progress, beside all that transformers restores."""
        self.bad_rows.load(last)
        if last is not None:
            self.load_progress(json.loads((last / PROGRESS).read_text()))

    def training_step(self, *args, **kwargs) -> Tensor:
        """Return the loss of a micro-batch, and add it to what is logged next."""
        loss = super().training_step(*args, **kwargs)
        self._loss_sum = self._loss_sum + loss.detach()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean loss of all steps since the last log, whether or not the run was stopped between them."""
        if "loss" in logs:
            logs["loss"] = self._mean_loss_sum() / (self.state.global_step - self._last_logged)
            self._loss_sum, self._last_logged = torch.zeros(()), self.state.global_step
        super().log(logs, start_time)

    def progress(self) -> dict[str, Any]:
        """Return what was added up since the last log; all devices ask together."""
        return {"loss_sum": self._mean_loss_sum(), "last_logged": self._last_logged}

    def load_progress(self, progress: Mapping[str, Any]) -> None:
        """Go on adding up where a checkpoint was written."""
        self._loss_sum, self._last_logged = torch.tensor(progress["loss_sum"]), progress["last_logged"]

    def sum_over_devices(self, values: Tensor) -> Tensor:
        """Return the sum over devices, on the CPU."""
        if self.args.world_size == 1:
            return values.cpu()
        return self.accelerator.reduce(values.to(self.args.device), reduction="sum").cpu()

    def _mean_loss_sum(self) -> float:
        return self.sum_over_devices(self._loss_sum).item() / self.args.world_size

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
        locate_best(self.args, self.state)
        with self.staged(f"checkpoint-{step}") as staged:
            self._staging = staged.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.bad_rows.save(staged)
            locate_best(self.args, self.state)
            progress = self.progress()
            if self.args.should_save:
                (staged / PROGRESS).write_text(json.dumps(progress))
                self.state.save_to_json(str(staged / "trainer_state.json"))
        if self.args.should_save:
            checkpoint.rotate(output_dir, self.save_total_limit, keep=self.state.best_model_checkpoint)
