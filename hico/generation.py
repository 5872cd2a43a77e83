"""Generation by a model that sees: videos and images are encoded once, before the first token."""

from collections.abc import Mapping
from copy import copy

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from hico.llm_dropout import add_visual_mask

VISUAL_INPUTS = ("pixel_values", "image_grids", "pixel_values_videos", "video_num_clips", "visual_embeds")
"""Arguments of `HicoModel.embed` beside the prompt."""


class VisualGenerationMixin(GenerationMixin):
    """What `HicoForConditionalGeneration` adds to `transformers.GenerationMixin`."""

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs):
        """Generate as `transformers.GenerationMixin.generate` does; videos and images are encoded once, before.

        Args:
            inputs: ``(B, S)`` prompt, or ``input_ids`` by name; padded on the left.
            generation_config: settings; placeholders are suppressed besides.
            kwargs: what `HicoModel.embed` and ``GenerationMixin.generate`` take.

        Raises:
            ValueError: if a prompt is padded on the right, or has videos or images and is to be read in chunks, which
                transformers cannot.
        """
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        _refuse_right_padding(kwargs.get("attention_mask"))
        settings = generation_config or self.generation_config
        # A placeholder stands for pixels that were given; an answer holds none.
        placeholders = {self.config.video_token_id, self.config.image_token_id}
        suppressed = {*(kwargs.get("suppress_tokens", settings.suppress_tokens) or ()), *placeholders}
        kwargs["suppress_tokens"] = sorted(token for token in suppressed if token < self.lm_head.out_features)
        if generation_config is not None:  # transformers wants one or the other
            generation_config = copy(generation_config)
            generation_config.suppress_tokens = kwargs.pop("suppress_tokens")
        visuals = {name: kwargs.pop(name, None) for name in VISUAL_INPUTS}
        if input_ids is None:
            refuse_without_prompt(visuals)
        if any(value is not None for value in visuals.values()):
            if kwargs.get("prefill_chunk_size", settings.prefill_chunk_size):
                raise ValueError(
                    "transformers cannot read prompts with videos or images in chunks; leave prefill_chunk_size unset "
                    "(videos are encoded in chunks all the same)"
                )
            embeds, visual_mask = self.model.embed(input_ids.to(self.device), **visuals)
            kwargs.update(inputs_embeds=embeds, visual_mask=visual_mask)
        return super().generate(input_ids, generation_config, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, visual_mask=None, is_first_iteration=False, **kwargs
    ):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if self.model.drops_tokens:
            model_inputs = add_visual_mask(model_inputs, visual_mask, is_prefill=is_first_iteration)
        return model_inputs


def refuse_without_prompt(visuals: Mapping[str, object]) -> None:
    """Raise a ValueError if there are visual inputs; to be asked where there is no prompt that they could fill."""
    given = [name for name, value in visuals.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)} given without input_ids, whose placeholders say where they belong; "
            "give input_ids, or the inputs_embeds that HicoModel.embed makes of both"
        )


def _refuse_right_padding(attention_mask: Tensor | None) -> None:
    if attention_mask is not None and attention_mask.ndim == 2 and not attention_mask[:, -1].all():
        num_rows = int((attention_mask[:, -1] == 0).sum())
        raise ValueError(
            f"{num_rows} of {len(attention_mask)} rows end in padding, which generation would continue; "
            "tokenize with padding_side='left'"
        )
