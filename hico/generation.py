"""Generation by a model that sees: videos and images are encoded once, before the first token."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from hico.llm_dropout import add_visual_mask

VISUAL_INPUTS = ("pixel_values", "image_grids", "pixel_values_videos", "video_num_clips", "visual_embeds")
"""Arguments of `HicoModel.embed` beside the prompt."""


class VisualGenerationMixin(GenerationMixin):
    """What `HicoForConditionalGeneration` adds to `transformers.GenerationMixin`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        **kwargs,
    ):
        """Generate as `transformers.GenerationMixin.generate` does; videos and images are encoded once, before.

        Where the content of a video decides how many tokens it takes, the model reads a prompt of fewer placeholders;
        what is returned begins with the prompt as it was given all the same.

        A repetition penalty counts generated tokens only, as where a model is given embeddings, which is how the
        published code generates; a `RepetitionPenaltyLogitsProcessor` of the caller's counts what it was made to.

        Args:
            inputs: ``(B, S)`` prompt, or ``input_ids`` by name; padded on the left.
            generation_config: settings; placeholders are suppressed besides.
            logits_processor: applied after those that follow from the settings.
            kwargs: what `HicoModel.embed` and ``GenerationMixin.generate`` take.

        Raises:
            ValueError: if a prompt is padded on the right, or so that only an ``attention_mask`` could tell, or has
                videos or images and a way of generating is asked for that does not see them.
        """
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)

        def asked(name: str) -> Any:
            if name in kwargs:
                return kwargs[name]
            value = getattr(generation_config, name, None)
            return getattr(self.generation_config, name, None) if value is None else value

        _check_padding(input_ids, kwargs.get("attention_mask"), pad=asked("pad_token_id"), eos=asked("eos_token_id"))
        # A placeholder stands for pixels that were given; an answer holds none.
        placeholders = {self.config.video_token_id, self.config.image_token_id}
        suppressed = {*(asked("suppress_tokens") or ()), *placeholders}
        changes = {"suppress_tokens": sorted(token for token in suppressed if token < self.lm_head.out_features)}
        visuals = {name: kwargs.pop(name, None) for name in VISUAL_INPUTS}
        given_ids = input_ids
        if input_ids is None:
            refuse_without_prompt(visuals)
        if any(value is not None for value in visuals.values()):
            _refuse_blind(asked)
            masks = {name: kwargs.pop(name, None) for name in ("attention_mask", "position_ids")}
            if masks["attention_mask"] is None:
                masks["attention_mask"] = _mask_of_padding(
                    input_ids, pad=asked("pad_token_id"), eos=asked("eos_token_id")
                )
            prompt = self.model.prepare(input_ids.to(self.device), **masks, **visuals)
            kwargs.update(inputs_embeds=prompt.inputs_embeds, visual_mask=prompt.visual_mask)
            kwargs.update({name: getattr(prompt, name) for name in masks if getattr(prompt, name) is not None})
            input_ids = prompt.input_ids if prompt.trim is not None else input_ids
        processors = LogitsProcessorList(logits_processor or [])
        penalty = asked("repetition_penalty") or 1.0
        if penalty != 1.0 and not any(isinstance(own, RepetitionPenaltyLogitsProcessor) for own in processors):
            length = 0 if input_ids is None else input_ids.shape[1]
            processors.insert(0, RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=length))
            changes["repetition_penalty"] = 1.0
        kwargs.update(changes)
        if generation_config is not None:  # transformers wants one or the other
            generation_config = copy(generation_config)
            kwargs = generation_config.update(**kwargs)
        output = super().generate(input_ids, generation_config, logits_processor=processors, **kwargs)
        return output if input_ids is given_ids else _with_prompt(output, given_ids, input_ids.shape[1])

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, visual_mask=None, is_first_iteration=False, **kwargs
    ):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if self.model.drops_tokens:
            model_inputs = add_visual_mask(model_inputs, visual_mask, is_prefill=is_first_iteration)
        return model_inputs


def _with_prompt(output: Any, input_ids: Tensor, num_read: int) -> Any:
    """Begin generated sequences with the prompt as it was given, instead of the ``num_read`` tokens that were read."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    prompts = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0).to(sequences.device)
    sequences = torch.cat([prompts, sequences[:, num_read:]], dim=1)
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output


def _mask_of_padding(input_ids: Tensor, *, pad: int | None, eos: int | Sequence[int] | None) -> Tensor | None:
    """Return the attention mask that transformers makes of token ids alone; None if they hold no padding."""
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if pad is None or pad in ends or not (input_ids == pad).any():
        return None
    return (input_ids != pad).long()


def refuse_without_prompt(visuals: Mapping[str, object]) -> None:
    """Raise a ValueError if there are visual inputs; to be asked where there is no prompt that they could fill."""
    given = [name for name, value in visuals.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)} given without input_ids, whose placeholders say where they belong; "
            "give input_ids, or the inputs_embeds that HicoModel.embed makes of both"
        )


_BLIND = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "prefill_chunk_size")
"""Settings by which transformers guesses at tokens, or reads the prompt, without embeddings of visual tokens."""


def _refuse_blind(asked: Callable[[str], Any]) -> None:
    given = [name for name in _BLIND if asked(name) is not None and asked(name) is not False]
    if asked("cache_implementation") == "paged":
        given.append("cache_implementation='paged'")
    if given:
        raise ValueError(
            f"{', '.join(given)} cannot be used with videos or images: transformers would guess at tokens, or read "
            "chunks of the prompt, from token ids alone; leave it unset (videos are encoded in chunks all the same)"
        )


def _check_padding(
    input_ids: Tensor | None, attention_mask: Tensor | None, *, pad: int | None, eos: int | Sequence[int] | None
) -> None:
    """Refuse padding on the right, and padding without a mask that transformers cannot tell from text.

    Without a mask, transformers takes tokens that equal ``pad``, or the first ``eos`` if there is none, as padding,
    unless it is an ``eos`` too.
    """
    if attention_mask is not None:
        num_rows = int((attention_mask[:, -1] == 0).sum()) if attention_mask.ndim == 2 else 0
        if num_rows:
            raise ValueError(
                f"{num_rows} of {len(attention_mask)} rows end in padding, which generation would continue; "
                "tokenize with padding_side='left'"
            )
        return
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    pad = ends[0] if pad is None and ends else pad
    if input_ids is None or pad is None:
        return
    is_pad_BS = input_ids == pad
    num_leading_B = is_pad_BS.cumprod(1).sum(1)
    num_rows = int((is_pad_BS[:, -1:].any(1) & (num_leading_B < input_ids.shape[1])).sum())
    if num_rows:
        raise ValueError(
            f"{num_rows} of {len(input_ids)} rows end in token {pad}, with which rows are padded, and there is no "
            "attention_mask; tokenize with padding_side='left', or pass a mask of ones if the token is meant"
        )
    if pad in ends and len(set(num_leading_B.tolist())) > 1:
        raise ValueError(
            f"rows begin with {num_leading_B.tolist()} times token {pad}, which is padding and the end of a text, and "
            "there is no attention_mask to tell which; pass the tokenizer's"
        )
