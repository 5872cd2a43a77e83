"""How fast and how well a run goes: losses by kind, tokens, frames, waiting for data, memory, FLOPs utilisation."""

import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hico.data.survey import MODALITIES
from hico.encoders.base import FrameEncoder
from hico.llm_dropout.schedule import DropSchedule

PEAK_TFLOPS = {"B200": 2250, **dict.fromkeys(("GH200", "H200", "H100", "H800"), 989)}
PEAK_TFLOPS |= {"A100": 312, "A800": 312, "L40S": 362}
"""Dense bf16 peak by a word of the device's name, from the vendor's data sheets."""


class TokenLoss:
    """Cross-entropy that remembers the loss of every token; takes the place of a model's ``loss_function``."""

    def __init__(self):
        self._losses: list[Tensor] = []
        self.numbers: Tensor | None = None

    @contextmanager
    def remembered(self) -> Iterator[list[Tensor]]:
        """Yield a list that gets the losses of all tokens, in their order, of the calls inside the block."""
        self._losses, self.numbers = [], None
        yield self._losses
        # The backward pass may compute chunks again.
        self._losses = []

    def __call__(
        self, logits: Tensor, labels: Any, vocab_size: int, *, shift_labels: Tensor, num_items_in_batch=None, **kwargs
    ) -> Tensor:
        """Return the sum over the tokens ``shift_labels`` ``(n,)``, divided by ``num_items_in_batch`` or their number.

        ``logits`` are ``(n, vocabulary)``. ``token_numbers``, if given, say which of the batch's learned tokens this
        process has, of several that share rows; they become ``numbers``. The other arguments are those of transformers
        and not used.
        """
        losses = nn.functional.cross_entropy(logits.float(), shift_labels, reduction="none")
        self._losses.append(losses.detach())
        self.numbers = kwargs.get("token_numbers")
        count = len(losses) if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / torch.as_tensor(count, device=losses.device).clamp(min=1)


class Meter:
    """Sums since the last report; `report` adds them up over devices.

    Args:
        datasets: names of the datasets; where there are several, each has a loss of its own.
        peak_tflops: of one device; without it no utilisation is reported.
    """

    def __init__(self, datasets: Sequence[str] = (), peak_tflops: float | None = None):
        names = list(dict.fromkeys(datasets))
        self.numbers = torch.tensor([names.index(name) for name in datasets])
        self.losses = [*MODALITIES, *(f"of_{name}" for name in (names if len(names) > 1 else ()))]
        counts = ("steps", "rows", "bad_rows", "tokens", "visual_tokens", "learned_tokens", "padding", "frames")
        self.fields = [f"{what}_{kind}" for what in ("loss", "count") for kind in self.losses]
        self.fields += [*counts, "flops", "wait", "seconds"]
        self.peak_tflops = peak_tflops
        self.sums = torch.zeros(len(self.fields), dtype=torch.float64)
        self._pending: list[Tensor] = []

    def add(self, **values: float) -> None:
        """Add to sums by their names."""
        for name, value in values.items():
            self.sums[self.fields.index(name)] += value

    def add_losses(self, losses: Tensor, modality: Tensor, dataset: Tensor) -> None:
        """Add the losses ``(n,)`` of tokens of rows of a ``modality`` and ``dataset`` ``(n,)``; no device waits."""
        sums = torch.zeros(2, len(self.losses), device=losses.device)
        groups = [modality]
        if len(self.losses) > len(MODALITIES):
            groups.append(len(MODALITIES) + self.numbers.to(losses.device)[dataset])
        for group in groups:
            sums[0].index_add_(0, group, losses.float())
            sums[1].index_add_(0, group, torch.ones_like(losses, dtype=torch.float32))
        self._pending.append(sums)

    def totals(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return all sums over devices by their names."""
        if self._pending:
            self.sums[: 2 * len(self.losses)] += torch.stack(self._pending).cpu().double().sum(dim=0).flatten()
            self._pending = []
        return dict(zip(self.fields, reduce(self.sums).tolist(), strict=True))

    def mean_losses(self, sums: Mapping[str, float], prefix: str = "") -> dict[str, float]:
        """Return the mean loss of a token for every modality and dataset that there was."""
        return {
            f"{prefix}loss_{kind}": sums[f"loss_{kind}"] / sums[f"count_{kind}"]
            for kind in self.losses
            if sums[f"count_{kind}"]
        }

    def report(self, reduce: Callable[[Tensor], Tensor], world_size: int) -> dict[str, float]:
        """Return the figures since the last report, and begin anew.

        Args:
            reduce: sums a tensor over devices.
            world_size: number of devices.
        """
        sums = self.totals(reduce)
        self.sums = torch.zeros_like(self.sums)
        figures = self.mean_losses(sums)
        seconds, steps = sums["seconds"] / world_size, sums["steps"] / world_size
        if seconds > 0:
            figures |= {f"{name}_per_second": sums[name] / seconds for name in ("rows", "tokens", "frames")}
            figures["data_wait"] = sums["wait"] / sums["seconds"]
            if self.peak_tflops:
                figures["mfu"] = sums["flops"] / sums["seconds"] / (self.peak_tflops * 1e12)
        if steps:
            figures |= {f"{name}_per_step": sums[name] / steps for name in ("visual_tokens", "learned_tokens")}
            figures["padding"] = sums["padding"] / max(1, sums["tokens"] + sums["padding"])
        if sums["bad_rows"]:
            figures["bad_rows"] = sums["bad_rows"]
        return figures


def peak_memory() -> float:
    """Return the most memory in GiB that this device had in use at once, or this process where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_tflops() -> float | None:
    """Return the dense bf16 peak of the first GPU, if it is a known one."""
    if not torch.cuda.is_available():
        return None
    words = torch.cuda.get_device_name().upper().replace("-", " ").split()
    return next((float(peak) for name, peak in PEAK_TFLOPS.items() if name in words), None)


class FlopCounter:
    """Floating-point operations of a training step by arithmetic, as torch's own counter counts them.

    Counted are products with weights and attention over all pairs of tokens of a row: forward, the gradient of
    activations, and the gradient of weights that learn. The recomputation of gradient checkpointing is not, so the
    utilisation errs on the low side; what merging compares is not either.

    Args:
        model: `HicoForConditionalGeneration`, frozen as it will be trained.
        schedule: what the LLM drops.
    """

    def __init__(self, model: nn.Module, schedule: DropSchedule):
        self.text, self.encoder, self.stages = model.config.text_config, model.model.encoder, schedule.stages
        self.clip_len, self.projects_first = model.config.clip_len, model.config.projector_first
        self.depth = sum(isinstance(module, GradientCheckpointingLayer) for module in self.encoder.modules())
        self.per_token: dict[str, int] = {}
        self.passes: dict[str, int] = {}
        gradient_flows = False
        for name, module in (
            ("encoder", self.encoder),
            ("projector", model.model.projector),
            ("layers", model.model.language_model.layers),
            ("head", model.lm_head),
        ):
            sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]
            learned = sum(size for size, learns in sizes if learns)
            # Something before or inside the LLM learns, or there would be nothing to train.
            gradient_flows = gradient_flows or learned > 0 or name == "layers"
            self.per_token[name] = 2 * (sum(size for size, _ in sizes) * (1 + gradient_flows) + learned)
            # Attention is a product of two activations, and each wants its gradient.
            self.passes[name] = 1 + 2 * gradient_flows

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
        num_visual = 0 if self.projects_first else sum(visual for _, visual in rows)
        total = self.per_token["projector"] * num_visual + self.per_token["head"] * num_learned
        total += num_clips * self._encoder(self.clip_len) if num_clips else 0
        total += num_tiles * self._encoder(1) if num_tiles else 0
        return total + sum(self._layers(*row) for row in rows)

    def _encoder(self, num_frames: int) -> float:
        side = self.encoder.image_size
        steps, rows, columns = self.encoder.grid(num_frames, side, side)
        tokens = steps * rows * columns
        seen = rows * columns if isinstance(self.encoder, FrameEncoder) else tokens
        pairs = 4 * self.passes["encoder"] * self.depth * self.encoder.hidden_size * tokens * seen
        projected = self.per_token["projector"] * tokens if self.projects_first else 0
        return self.per_token["encoder"] * tokens + pairs + projected

    def _layers(self, length: int, num_visual: int) -> float:
        num_layers = self.text.num_hidden_layers
        head_dim = getattr(self.text, "head_dim", None) or self.text.hidden_size // self.text.num_attention_heads
        pairs = 4 * self.passes["layers"] * head_dim * self.text.num_attention_heads
        total, first, now = 0.0, 0, length
        for layer, keep in [*((stage.layer, stage.keep) for stage in self.stages), (num_layers, 1.0)]:
            total += (layer - first) * (self.per_token["layers"] / num_layers * now + pairs * now * now)
            kept = int(num_visual * keep) if isinstance(keep, float) else min(keep, num_visual)
            first, now = layer, length - num_visual + kept
        return total
