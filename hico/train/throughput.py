"""How fast and how well a run goes: losses per modality, tokens, frames, waiting for data, FLOPs utilisation."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hico.data.mixture import MODALITIES
from hico.llm_dropout.schedule import DropSchedule

PEAK_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
}
"""Dense bf16 peak by a word of the device's name, from the vendor's data sheets."""


class TokenLoss:
    """Cross-entropy that remembers the loss of every token; takes the place of a model's ``loss_function``."""

    def __init__(self):
        self._losses: list[Tensor] = []

    @contextmanager
    def remembered(self) -> Iterator[list[Tensor]]:
        """Yield a list that gets the losses of all tokens, in their order, of the calls inside the block."""
        self._losses = []
        yield self._losses
        # The backward pass may compute chunks again.
        self._losses = []

    def __call__(
        self, logits: Tensor, labels: Any, vocab_size: int, *, shift_labels: Tensor, num_items_in_batch=None, **kwargs
    ) -> Tensor:
        """Return the sum over tokens, divided by ``num_items_in_batch`` or else by their number.

        Args:
            logits: ``(n, vocabulary)`` of the positions that are learned.
            labels: not used; they are shifted already.
            vocab_size: not used.
            shift_labels: ``(n,)`` the tokens to predict.
            num_items_in_batch: learned tokens of the optimizer step over all devices.
            kwargs: not used.
        """
        losses = nn.functional.cross_entropy(logits.float(), shift_labels, reduction="none")
        self._losses.append(losses.detach())
        count = len(losses) if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / torch.as_tensor(count, device=losses.device).clamp(min=1)


class Meter:
    """Sums since the last report; `report` adds them up over devices.

    Args:
        peak_tflops: of one device; without it no utilisation is reported.
    """

    FIELDS = (
        *(f"loss_{kind}" for kind in MODALITIES),
        *(f"count_{kind}" for kind in MODALITIES),
        *("rows", "tokens", "frames", "flops", "wait", "seconds", "bad_rows"),
    )

    def __init__(self, peak_tflops: float | None = None):
        self.peak_tflops = peak_tflops
        self.sums = torch.zeros(len(self.FIELDS), dtype=torch.float64)
        self._pending: list[Tensor] = []

    def add(self, **values: float) -> None:
        """Add to sums by their names."""
        for name, value in values.items():
            self.sums[self.FIELDS.index(name)] += value

    def add_losses(self, losses: Tensor, modality: Tensor) -> None:
        """Add the losses ``(n,)`` of tokens whose rows have ``modality`` ``(n,)``; the device does not wait for it."""
        sums = torch.zeros(2, len(MODALITIES), device=losses.device)
        sums[0].index_add_(0, modality, losses.float())
        sums[1].index_add_(0, modality, torch.ones_like(losses, dtype=torch.float32))
        self._pending.append(sums)

    def totals(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return all sums over devices by their names."""
        if self._pending:
            self.sums[: 2 * len(MODALITIES)] += torch.stack(self._pending).cpu().double().sum(dim=0).flatten()
            self._pending = []
        return dict(zip(self.FIELDS, reduce(self.sums).tolist(), strict=True))

    def report(self, reduce: Callable[[Tensor], Tensor], world_size: int) -> dict[str, float]:
        """Return the figures since the last report, and begin anew.

        Args:
            reduce: sums a tensor over devices.
            world_size: number of devices.
        """
        sums = self.totals(reduce)
        self.sums = torch.zeros_like(self.sums)
        figures = losses_by_modality(sums)
        seconds = sums["seconds"] / world_size
        if seconds > 0:
            figures |= {f"{name}_per_second": sums[name] / seconds for name in ("rows", "tokens", "frames")}
            figures["data_wait"] = sums["wait"] / sums["seconds"]
            if self.peak_tflops:
                figures["mfu"] = sums["flops"] / sums["seconds"] / (self.peak_tflops * 1e12)
        if sums["bad_rows"]:
            figures["bad_rows"] = sums["bad_rows"]
        return figures


def losses_by_modality(sums: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """Return the mean loss of a token for every modality that there was."""
    return {
        f"{prefix}loss_{kind}": sums[f"loss_{kind}"] / sums[f"count_{kind}"]
        for kind in MODALITIES
        if sums[f"count_{kind}"]
    }


def peak_tflops() -> float | None:
    """Return the dense bf16 peak of the first GPU, if it is a known one."""
    if not torch.cuda.is_available():
        return None
    words = torch.cuda.get_device_name().upper().replace("-", " ").split()
    return next((float(peak) for name, peak in PEAK_TFLOPS.items() if name in words), None)


class FlopCounter:
    """Floating-point operations of a training step by arithmetic.

    Counted are matrix products with weights and the LLM's attention: forward, the gradient of activations, and the
    gradient of weights where a part learns. Attention inside the encoder (about a tenth of it) and the recomputation
    of gradient checkpointing are not counted, so the utilisation errs on the low side.

    Args:
        model: `HicoForConditionalGeneration`, frozen as it will be trained.
        schedule: what the LLM drops.
    """

    def __init__(self, model: nn.Module, schedule: DropSchedule):
        self.text, self.encoder = model.config.text_config, model.model.encoder
        self.clip_len, self.image_size = model.config.clip_len, self.encoder.image_size
        self.stages = schedule.stages
        self.size, self.passes = {}, {}
        parts = {
            "encoder": model.model.encoder,
            "projector": model.model.projector,
            "layers": model.model.language_model.layers,
            "head": model.lm_head,
        }
        gradient_flows = False
        for name, module in parts.items():
            learns = any(parameter.requires_grad for parameter in module.parameters())
            gradient_flows = gradient_flows or learns or (name == "layers")
            self.size[name] = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
            self.passes[name] = 1 + gradient_flows + learns

    def __call__(
        self, rows: Sequence[tuple[int, int]], *, num_clips: int = 0, num_tiles: int = 0, num_learned: int = 0
    ) -> float:
        """Return the operations of a batch.

        Args:
            rows: tokens, and visual tokens among them, of every row.
            num_clips: clips encoded.
            num_tiles: image tiles encoded.
            num_learned: tokens with a label.
        """
        side = self.image_size
        patches = num_clips * math.prod(self.encoder.grid(self.clip_len, side, side)) if num_clips else 0
        patches += num_tiles * math.prod(self.encoder.grid(1, side, side)) if num_tiles else 0
        num_visual = sum(visual for _, visual in rows)
        uses = {"encoder": patches, "projector": num_visual, "head": num_learned}
        total = sum(2 * self.passes[name] * self.size[name] * count for name, count in uses.items())
        return total + sum(self._layers(*row) for row in rows)

    def _layers(self, length: int, num_visual: int) -> float:
        num_layers = self.text.num_hidden_layers
        head_dim = getattr(self.text, "head_dim", None) or self.text.hidden_size // self.text.num_attention_heads
        width, total, first, now = head_dim * self.text.num_attention_heads, 0.0, 0, length
        for layer, keep in [*((stage.layer, stage.keep) for stage in self.stages), (num_layers, 1.0)]:
            # Two products of a causal half of length x length per head.
            per_layer = 2 * self.size["layers"] / num_layers * now + 2 * width * now * now
            total += (layer - first) * per_layer
            kept = int(num_visual * keep) if isinstance(keep, float) else min(keep, num_visual)
            first, now = layer, length - num_visual + kept
        return self.passes["layers"] * total
