"""What a prompt with a video costs, by arithmetic: operations, cache and memory. Nothing is run.

Operations are counted as torch's counter counts them, two per multiply-add: products with weights and of activations.
Norms, rotary embedding and softmax are left out; they are below a hundredth of an LLM's work, and are bound by memory.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hico.configuration_hico import HicoConfig, build_compressor
from hico.llm_dropout import DropSchedule
from hico.ops.dropping import keep_count
from hico.projector import MLPProjector
from hico.registry import ENCODERS


def lengths_per_layer(schedule: DropSchedule, *, num_layers: int, num_visual: int, num_text: int) -> list[int]:
    """Count the tokens that enter each layer for a prompt with one video.

    Args:
        schedule: its stages are taken to keep what they ask for, as every policy but "none" does.
        num_layers: of the decoder.
        num_visual: visual tokens of the prompt.
        num_text: its other tokens.
    """
    kept, lengths = num_visual, []
    drops = {stage.layer: stage for stage in schedule.stages if stage.policy != "none"}
    for layer in range(num_layers):
        if layer in drops:
            keep = drops[layer].keep
            kept = min(kept, keep if isinstance(keep, int) else max(1, keep_count(num_visual, keep)))
        lengths.append(kept + num_text)
    return lengths


@dataclass(frozen=True)
class Decoder:
    """The sizes of a dense LLM that its costs follow from; `of` reads them off a configuration."""

    layer_weights: tuple[int, ...]
    """Weights that every token meets, of each layer."""
    head_weights: int
    """Weights of the LM head."""
    num_parameters: int
    """Of the whole LLM, tied ones once."""
    width: int
    """Of a hidden state, E."""
    head_width: int
    """Of an attention head."""
    query_width: int
    """Query heads times width of a head."""
    cache_width: int
    """Values that the cache keeps of a token and layer: keys and values."""
    inner_width: int
    """The widest that one linear layer makes of a token, inside a layer."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Decoder":
        """Read the sizes off a text configuration, whose model is built without weights.

        Raises:
            ValueError: if layers do not attend to all earlier tokens, or hold weights that not every token meets.
        """
        return _decoder(json.dumps(config.to_dict(), sort_keys=True, default=str), type(config))

    def prefill_flops(self, lengths: Sequence[int]) -> float:
        """Count the operations of a prefill, with the causal half of attention and the logits of the last position.

        Args:
            lengths: tokens that enter each layer, see `lengths_per_layer`.
        """
        layers = zip(self.layer_weights, lengths, strict=True)
        products = sum(
            2 * length * weights + 2 * length * (length + 1) * self.query_width for weights, length in layers
        )
        return products + 2 * self.head_weights

    def decode_flops(self, lengths: Sequence[int]) -> float:
        """Count the operations of the first token after a prompt of ``lengths``."""
        pairs = sum(4 * (length + 1) * self.query_width for length in lengths)
        return 2 * (sum(self.layer_weights) + self.head_weights) + pairs

    def cache_bytes(self, lengths: Sequence[int], *, bytes_per_value: int) -> int:
        """Count the bytes of the KV cache after a prompt."""
        return sum(lengths) * self.cache_width * bytes_per_value

    def working_bytes(self, length: int, *, bytes_per_value: int) -> int:
        """Count the bytes that are in use at once, beside weights and cache, where a layer takes ``length`` tokens.

        That is inside the MLP: what came into the layer, the residual and its normed copy; the gate, the other branch
        and their product; and the cosines and sines of all positions.
        """
        return length * (3 * self.width + 3 * self.inner_width + 2 * self.head_width) * bytes_per_value


@lru_cache(maxsize=16)
def _decoder(settings: str, kind: type[PreTrainedConfig]) -> Decoder:
    config = kind(**json.loads(settings))
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if types != {"full_attention"}:
        raise ValueError(f"costs are known of layers of full attention; this {config.model_type} has {sorted(types)}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers, sums = getattr(model.get_decoder(), "layers", ()), []
    for layer in layers:
        linear = [module.weight for module in layer.modules() if isinstance(module, nn.Linear)]
        known = {id(weight) for weight in linear}
        other = [name for name, weight in layer.named_parameters() if weight.dim() > 1 and id(weight) not in known]
        if other:
            raise ValueError(f"costs are known of linear layers; those of this {config.model_type} hold {other}")
        sums.append(sum(weight.numel() for weight in linear))
    if not sums:
        raise ValueError(f"costs are known of decoders with `layers`; this {config.model_type} has none of that name")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Decoder(
        layer_weights=tuple(sums),
        head_weights=model.get_output_embeddings().weight.numel(),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        width=config.hidden_size,
        head_width=head_dim,
        query_width=config.num_attention_heads * head_dim,
        cache_width=2 * config.num_key_value_heads * head_dim,
        inner_width=max(m.out_features for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)),
    )


@dataclass(frozen=True)
class Vision:
    """What turning one clip into visual tokens costs."""

    encoder_flops: float
    """Operations of the encoder, a clip."""
    compressor_flops: float
    """Operations of compressor and projector, a clip."""
    num_parameters: int
    """Of encoder, compressor and projector."""

    @classmethod
    def of(cls, config: HicoConfig) -> "Vision":
        """Count by running one clip through parts that have no weights and no values."""
        with torch.device("meta"):
            encoder = ENCODERS.build(config.encoder)
            width, llm_width = encoder.hidden_size, config.text_config.hidden_size
            first = llm_width if config.projector_first else width
            compressor = build_compressor(config.compressor, encoder, hidden_size=first)
            projector = MLPProjector(width, llm_width)
            for part in (encoder, compressor, projector):  # the counter follows gradients that nobody takes here
                part.requires_grad_(False)
            side, counters = encoder.image_size, (FlopCounterMode(display=False), FlopCounterMode(display=False))
            grid = encoder.grid(config.clip_len, side, side)
            with torch.no_grad(), counters[0]:
                tokens_NLD = encoder(torch.empty(1, config.clip_len, 3, side, side))
            with torch.no_grad(), counters[1]:
                if config.projector_first:
                    compressor(projector(tokens_NLD), grid)
                else:
                    projector(compressor(tokens_NLD, grid))
        return cls(
            *(float(counter.get_total_flops()) for counter in counters),
            sum(parameter.numel() for part in (encoder, compressor, projector) for parameter in part.parameters()),
        )
