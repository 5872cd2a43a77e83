"""`PreferenceTrainer`: learns which of two answers is the better one, by direct preference optimization (DPO).

Source: Rafailov et al., "Direct Preference Optimization", arXiv:2305.18290.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hico.ops.preference import compare_answers
from hico.prompt import IGNORE_INDEX
from hico.train.config import PARTS, PreferenceSettings, Recipe
from hico.train.parts import modules_of, rest
from hico.train.throughput import Meter
from hico.train.trainer import HicoTrainer, unwrapped


class RewardMeter(Meter):
    """A meter of pairs: their losses by modality and dataset, rewards, and how often the chosen answer has more."""

    REWARDS = ("chosen", "rejected", "margins", "accuracies")

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.fields += ["pairs", *self.REWARDS]
        self.sums = torch.zeros(len(self.fields), dtype=torch.float64)
        self._rewards: list[Tensor] = []

    def add_rewards(self, chosen: Tensor, rejected: Tensor) -> None:
        """Add the rewards ``(n,)`` of pairs; no device waits."""
        wins, counts = (chosen > rejected).float(), torch.ones_like(chosen)
        self._rewards.append(torch.stack([counts, chosen, rejected, chosen - rejected, wins]).sum(dim=1))

    def totals(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """See `Meter.totals`."""
        if self._rewards:
            self.sums[-len(self.REWARDS) - 1 :] += torch.stack(self._rewards).cpu().double().sum(dim=0)
            self._rewards = []
        return super().totals(reduce)

    def mean_losses(self, sums: Mapping[str, float], prefix: str = "") -> dict[str, float]:
        """Return the mean loss of a pair for every modality and dataset that there was, and the mean rewards."""
        means = super().mean_losses(sums, prefix)
        if sums["pairs"]:
            means |= {f"{prefix}rewards/{name}": sums[name] / sums["pairs"] for name in self.REWARDS}
        return means


class PreferenceTrainer(HicoTrainer):
    """Train on pairs of answers, against the model that the stage started from.

    This reference is a frozen copy of what learns, made before the first step; parts that do not learn are shared.
    Under adapters it is the model without them, and there is no copy. A frozen encoder runs once for both answers and
    both models, one that learns once per model.

    The loss of a step is the mean over its pairs, on however many devices and in however many micro-batches.

    Args:
        model, args, recipe, needed: see `HicoTrainer`.
        options: of `HicoTrainer`.

    Raises:
        ValueError: if weights are sharded over devices.
    """

    meter_type = RewardMeter

    def __init__(
        self, model: nn.Module, args: TrainingArguments, *, recipe: Recipe, needed: str = "rows", **options: Any
    ):
        if needed == "both":
            raise ValueError("objective preference runs two models whole on every device; use DDP, ZeRO-1 or ZeRO-2")
        self.settings = PreferenceSettings.of(recipe.preference)
        frozen = [part for part in PARTS if part not in recipe.trainable]
        self.reference = None if hasattr(model, "disable_adapter") else _frozen_copy(model, frozen)
        if self.reference is not None:
            if recipe.frozen_dtype is not None:
                self.reference.to(getattr(torch, recipe.frozen_dtype))
            elif args.deepspeed and (args.bf16 or args.fp16):  # it casts what learns, and computes in that dtype
                self.reference.to(torch.bfloat16 if args.bf16 else torch.float16)
            self.reference.to(args.device)
        self._frozen_encoder = unwrapped(model).model.encoder if "encoder" in frozen else None
        super().__init__(model, args, recipe=recipe, needed=needed, **options)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Take the batches of one step from the loader, and count the pairs of it on all devices."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(float(sum(int(_is_pair(batch).sum()) for batch in batches)), device=device)
        return batches, self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the share of a micro-batch in the mean loss of the pairs of its step."""
        rest(self._resting)
        # Devices' gradients are averaged, and pairs counted over all devices.
        return self.compare(model, inputs, self.meter).sum() * self.args.world_size / num_items_in_batch.clamp(min=1)

    def evaluate_batch(self, model: nn.Module, batch: dict[str, Any], meter: RewardMeter) -> None:
        """See `HicoTrainer.evaluate_batch`."""
        self.compare(model, batch, meter)

    def compare(self, model: nn.Module, inputs: dict[str, Any], meter: RewardMeter) -> Tensor:
        """Return the losses ``(B,)`` of pairs, those without an answer at 0, and note losses and rewards."""
        num_pairs, is_pair = len(inputs["labels"]) // 2, _is_pair(inputs)
        modality, dataset = (inputs.pop(name)[:num_pairs, 0] for name in ("modality", "dataset"))
        # The last positions' logits are not read, but asked for one they are not those of whole rows.
        inputs = {**inputs, "loss_per_row": True, "logits_to_keep": 1}
        with encoded_once(self._frozen_encoder) as again:
            # First, since a wrapper of several devices may write to buffers, which the policy's graph still needs.
            with torch.no_grad():
                reference_2B = -self._reference_losses(model, inputs)
            again()
            policy_2B = -model(**inputs).loss
        losses, chosen, rejected = compare_answers(
            policy_2B, reference_2B, beta=self.settings.beta, label_smoothing=self.settings.label_smoothing
        )
        meter.add_losses(losses.detach()[is_pair], modality[is_pair], dataset[is_pair])
        meter.add_rewards(chosen[is_pair], rejected[is_pair])
        return losses * is_pair

    def _reference_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.reference is None:
            with self.model.disable_adapter():
                return model(**inputs).loss
        with self.accelerator.autocast():
            return self.reference(**inputs).loss


@contextmanager
def encoded_once(encoder: nn.Module | None) -> Iterator[Callable[[], None]]:
    """Let an encoder run once for two models that share it and are given the same clips.

    Yields what to call between the two: from then on the encoder answers with what it gave before, in that order.
    """
    if encoder is None:
        yield lambda: None
        return
    forward, given, before = encoder.forward, deque(), vars(encoder).get("forward")

    def keep(*args: Any, **kwargs: Any) -> Tensor:
        given.append(forward(*args, **kwargs))
        return given[-1]

    def again() -> None:
        encoder.forward = lambda *args, **kwargs: given.popleft()

    encoder.forward = keep
    try:
        yield again
    finally:
        del encoder.forward
        if before is not None:
            encoder.forward = before


def _frozen_copy(model: nn.Module, shared: list[str]) -> nn.Module:
    """Copy a model but for the parts that do not learn, which it shares."""
    kept = {id(module): module for module in modules_of(model, shared)}
    return copy.deepcopy(model, kept).requires_grad_(False).eval()


def _is_pair(batch: Mapping[str, Any]) -> Tensor:
    """Say which pairs ``(B,)`` of a batch have answers; what stands in for a missing row has none."""
    chosen, _ = (batch["labels"][:, 1:] != IGNORE_INDEX).any(dim=1).chunk(2)
    return chosen
