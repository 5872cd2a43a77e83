"""Hooks that drop visual tokens between the layers of a stock Hugging Face decoder."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput

from hico.llm_dropout.cache import holds_less
from hico.llm_dropout.plan import POSITIONS, DropPlan, DropRules
from hico.llm_dropout.queries import QUERY_ROWS
from hico.llm_dropout.schedule import DropSchedule
from hico.llm_dropout.scoring import check_scorable
from hico.llm_dropout.survivors import SCOPES
from hico.registry import DROP_POLICIES

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the number of tokens, which differs between layers."""


def patch(
    model: nn.Module,
    schedule: str | list | DropSchedule | None,
    *,
    positions: str = "renumber",
    queries: str = "auto",
    scope: str = "span",
    seed: int = 0,
) -> DropHandle:
    """Make a decoder drop visual tokens between its layers.

    No weight, state-dict key, class or configuration changes. Calls without ``visual_mask`` are untouched. See the
    package docstring for what a patched model takes and returns.

    Args:
        model: a decoder with ``layers`` and ``rotary_emb``, or a model that holds one.
        schedule: see `DropSchedule.parse`.
        positions: "renumber" closes the gaps that dropped tokens leave, as published; "keep" leaves every token its
            true position in the rotary embedding.
        queries: whose attention the attention policy reads: "last_prompt", "before_answers" (the token before every
            labelled run), "all_text" (all text that is not labelled), "auto" (before_answers where there are labels,
            otherwise last_prompt), or "published" (as auto, with the quirks of the released code: a labelled first
            token looks back to the last one, and rows without labels keep everything).
        scope: "span" keeps a share of each video or image; in "row" all visual tokens of a row compete.
        seed: of the policies that use chance.

    Returns:
        A handle; ``remove()`` it, or use it as a context manager.

    Raises:
        ValueError: if a setting is unknown, the schedule does not fit the decoder, or the decoder cannot be patched.
        RuntimeError: if the decoder is patched already.
    """
    for name, value, known in (
        ("positions", positions, POSITIONS),
        ("queries", queries, QUERY_ROWS),
        ("scope", scope, SCOPES),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
    schedule = DropSchedule.parse(schedule)
    decoder, causal_lm = find_decoder(model)
    schedule.check_depth(len(decoder.layers))
    policies = tuple(DROP_POLICIES.get(stage.policy)() for stage in schedule.stages)
    for stage, policy in zip(schedule.stages, policies, strict=True):
        if policy.needs_scores:
            check_scorable(decoder.layers[stage.layer])
    rope_type = getattr(decoder.rotary_emb, "rope_type", "default")
    if positions == "renumber" and rope_type in LENGTH_DEPENDENT_ROPE:
        raise ValueError(
            f"rotary embeddings of type {rope_type!r} depend on the number of tokens, and with positions='renumber' "
            "every segment has its own; use positions='keep'"
        )
    return DropHandle(decoder, causal_lm, DropRules(schedule, policies, positions, queries, scope, seed))


def find_decoder(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """Find the module with the decoder layers: the model itself or one that it holds.

    Returns:
        The decoder, and the stock causal LM that holds it (as its ``model``), or None.

    Raises:
        ValueError: if there is none, or it does not compute one rotary embedding for all its layers.
    """
    holder, module = None, model
    while module is not None and not isinstance(getattr(module, "layers", None), nn.ModuleList):
        holder, module = module, getattr(module, "language_model", None) or getattr(module, "model", None)
    if module is None or not hasattr(module, "rotary_emb"):
        raise ValueError(
            f"{type(model).__name__} holds no decoder with `layers` and `rotary_emb`; "
            "pass a model built like Qwen2, Qwen3, Llama or Mistral"
        )
    if "layer_type" in inspect.signature(module.rotary_emb.forward).parameters:
        raise ValueError(
            f"{type(module).__name__} cannot be patched: {type(module.rotary_emb).__name__} also needs layer_type, "
            "so its layers do not share one rotary embedding"
        )
    is_causal_lm = getattr(holder, "model", None) is module and hasattr(holder, "lm_head")
    return module, holder if is_causal_lm else None


def find_handle(decoder: nn.Module) -> DropHandle | None:
    """Return the handle by which a decoder is patched, or None."""
    owners = (getattr(hook, "__self__", None) for hook in decoder._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, DropHandle)), None)


class _Request:
    """What a causal LM asks of its decoder, and the plan that comes back."""

    def __init__(self, visual_mask: Tensor, labels: Tensor | None):
        self.visual_mask = visual_mask
        self.labels = labels
        self.plan: DropPlan | None = None


class DropHandle:
    """The hooks of one patched model; holds settings, and nothing of any forward pass.

    Args:
        decoder: the decoder.
        causal_lm: the stock causal LM around it, if there is one.
        rules: settings.
    """

    def __init__(self, decoder: nn.Module, causal_lm: nn.Module | None, rules: DropRules):
        present = find_handle(decoder)
        if present is not None:
            raise RuntimeError(
                f"{type(decoder).__name__} drops by {present.schedule} already; remove() that handle first"
            )
        self._rules = rules
        self._hooks = [
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, with_kwargs=True),
            *(
                layer.register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True)
                for index, layer in enumerate(decoder.layers)
            ),
        ]
        self._causal_lm = causal_lm
        if causal_lm is not None:
            self._hooks += [
                causal_lm.register_forward_pre_hook(self._before_causal_lm, with_kwargs=True),
                causal_lm.register_forward_hook(self._after_causal_lm, with_kwargs=True),
            ]
            causal_lm.prepare_inputs_for_generation = _PrepareInputs(causal_lm)

    @property
    def schedule(self) -> DropSchedule:
        """The schedule in force."""
        return self._rules.schedule

    def remove(self) -> None:
        """Take the hooks away; the model computes what it did before. Does nothing the second time."""
        for hook in self._hooks:
            hook.remove()
        if self._causal_lm is not None:
            del self._causal_lm.prepare_inputs_for_generation
        self._hooks, self._causal_lm = [], None

    def __enter__(self) -> DropHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _before_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        request = kwargs.pop("drop_request", None) or _Request(
            kwargs.pop("visual_mask", None), kwargs.pop("labels", None)
        )
        given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
        cache = given.get("past_key_values")
        visual_mask = request.visual_mask if self.schedule else None
        if visual_mask is not None and not visual_mask.any():
            visual_mask = None
        if visual_mask is None and not holds_less(cache):
            return args, kwargs
        inputs = given.get("inputs_embeds")
        request.plan = DropPlan(
            self._rules,
            decoder,
            inputs=given["input_ids"] if inputs is None else inputs,
            visual_mask=visual_mask,
            labels=request.labels,
            attention_mask=given.get("attention_mask"),
            position_ids=given.get("position_ids"),
            cache=cache,
        )
        return args, {**kwargs, "drop_plan": request.plan}

    def _before_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if "drop_plan" not in kwargs:
            return None
        plan = kwargs["drop_plan"]
        hidden_states, kwargs = plan.enter_layer(
            index, layer, args[0], {name: value for name, value in kwargs.items() if name != "drop_plan"}
        )
        return (hidden_states, *args[1:]), kwargs

    def _after_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        plan = kwargs.get("drop_plan")
        if plan is None:
            return
        if not plan.reached_layers:
            raise RuntimeError(
                f"{type(decoder).__name__} does not hand its keyword arguments to its layers, so nothing was dropped; "
                "it cannot be patched"
            )
        plan.finish()
        if isinstance(output, ModelOutput):
            output.drop_plan = plan

    def _before_causal_lm(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if kwargs.get("visual_mask") is None:
            return None
        kwargs = dict(kwargs)
        request = _Request(kwargs.pop("visual_mask"), kwargs.pop("labels", None))
        return args, {**kwargs, "drop_request": request}

    def _after_causal_lm(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        request = kwargs.get("drop_request")
        if request is None:
            return None
        if request.labels is not None:
            output = self._with_loss(model, kwargs, output, request)
        if isinstance(output, ModelOutput) and request.plan is not None:
            output.drop_plan = request.plan
        return output

    def _with_loss(self, model: nn.Module, kwargs: dict, output: Any, request: _Request) -> Any:
        """Compute the loss over the shortened sequence, with the model's own loss function."""
        logits = output.logits if isinstance(output, ModelOutput) else output[0]
        own = inspect.signature(model.forward).parameters
        loss_kwargs = {name: value for name, value in kwargs.items() if name not in own and name != "drop_request"}
        if request.plan is not None:
            kept = kwargs.get("logits_to_keep", 0)
            shift_labels = request.plan.shift_labels(request.labels)
            loss_kwargs["shift_labels"] = shift_labels[
                :, slice(-kept, None) if isinstance(kept, int) else kept
            ].contiguous()
        loss = model.loss_function(
            logits=logits, labels=request.labels, vocab_size=model.config.vocab_size, **loss_kwargs
        )
        if not isinstance(output, ModelOutput):
            return (loss, *output)
        return type(output)(**{**output, "loss": loss})


class _PrepareInputs:
    """``prepare_inputs_for_generation`` of a causal LM, which hands ``visual_mask`` to the prefill.

    Args:
        model: the causal LM.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        original = inspect.signature(model.prepare_inputs_for_generation)
        mask = inspect.Parameter("visual_mask", inspect.Parameter.KEYWORD_ONLY, default=None)
        *named, rest = original.parameters.values()
        self.__signature__ = original.replace(parameters=[*named, mask, rest])  # `generate` checks its arguments by it

    def __call__(self, *args: Any, visual_mask: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
        model_inputs = type(self._model).prepare_inputs_for_generation(self._model, *args, **kwargs)
        return add_visual_mask(model_inputs, visual_mask, is_prefill=kwargs.get("is_first_iteration", False))


def add_visual_mask(model_inputs: dict[str, Any], visual_mask: Tensor | None, *, is_prefill: bool) -> dict[str, Any]:
    """Add ``visual_mask`` to what ``prepare_inputs_for_generation`` made, in the steps that need it.

    Args:
        model_inputs: of one step.
        visual_mask: ``(B, S)`` of the prompt, or of the part of it that no cache has seen yet; or None.
        is_prefill: whether this is the first step.

    Raises:
        ValueError: if the prefill is cut into chunks, or holds guesses at the answer: either would drop other tokens.
    """
    if visual_mask is None:
        return model_inputs
    inputs = model_inputs.get("inputs_embeds")
    length = (model_inputs["input_ids"] if inputs is None else inputs).shape[1]
    cache = model_inputs.get("past_key_values")
    if cache is None:  # every step sees the whole sequence, generated tokens included
        return {
            **model_inputs,
            "visual_mask": nn.functional.pad(visual_mask, (0, length - visual_mask.shape[1])),
        }
    num_seen = cache.get_seq_length()
    if is_prefill and visual_mask.shape[1] in (length, num_seen + length):
        return {**model_inputs, "visual_mask": visual_mask[:, -length:]}
    if num_seen < visual_mask.shape[1]:
        raise ValueError(
            f"visual_mask has {visual_mask.shape[1]} tokens, and a call of generation has {length} after {num_seen}; "
            "chunks of the prompt, or guesses after it, would drop other tokens, so leave prefill_chunk_size, "
            "prompt_lookup_num_tokens and assistant_model unset"
        )
    return model_inputs
