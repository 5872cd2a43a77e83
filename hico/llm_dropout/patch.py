"""Hooks that drop visual tokens between the layers of a stock Hugging Face decoder."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.utils import ModelOutput

from hico.compat import UnsupportedDecoder, arguments, check_decoder, find_cache, replace_loss_function, unwrapped
from hico.llm_dropout.cache import holds_less
from hico.llm_dropout.plan import POSITIONS, DropPlan, DropRules
from hico.llm_dropout.queries import QUERY_ROWS
from hico.llm_dropout.schedule import DropSchedule
from hico.llm_dropout.survivors import SCOPES
from hico.ops.dropping import span_ids
from hico.registry import DROP_POLICIES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the number of tokens, which differs between layers."""


def patch(
    model: nn.Module,
    schedule: str | list | DropSchedule | None,
    *,
    positions: str = "renumber",
    queries: str = "before_answers",
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
        queries: whose attention the attention policy reads: "before_answers" (the token before every answer, or the
            last token where there is none), "last_prompt" (the token before the last answer), "all_text" (all text
            that is no answer), or "published" (as before_answers, with the quirks of the released code: a labelled
            first token looks back to the last one, and rows without labels keep everything).
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
    check_decoder(decoder)
    schedule.check_depth(len(decoder.layers))
    policies = tuple(DROP_POLICIES.get(stage.policy)() for stage in schedule.stages)
    rope_type = getattr(decoder.rotary_emb, "rope_type", "default")
    rope_types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    if positions == "renumber" and any(kind in LENGTH_DEPENDENT_ROPE for kind in rope_types):
        raise ValueError(
            f"rotary embeddings of type {rope_type!r} depend on the number of tokens, and with positions='renumber' "
            "every segment has its own; use positions='keep'"
        )
    return DropHandle(decoder, causal_lm, DropRules(schedule, policies, positions, queries, scope, seed))


def find_decoder(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """Find the module with the decoder layers: the model itself or one that it holds.

    Returns:
        The decoder, and the stock causal LM right around it, or None.

    Raises:
        ValueError: if there is none.
    """
    holder, module = None, unwrapped(model)
    while module is not None and not isinstance(getattr(module, "layers", None), nn.ModuleList):
        inner = getattr(module, "language_model", None) or getattr(module, "model", None)
        inner = inner or getattr(module, getattr(module, "base_model_prefix", "") or "model", None)
        holder, module = module, inner and unwrapped(inner)
    if module is None or not hasattr(module, "rotary_emb"):
        raise UnsupportedDecoder(
            model,
            "holds no decoder with `layers` and one `rotary_emb` for them; "
            "pass a model built like Qwen2, Qwen3, Llama or Mistral",
        )
    is_causal_lm = hasattr(holder, "get_output_embeddings") and holder.get_output_embeddings() is not None
    return module, holder if is_causal_lm else None


def find_handle(decoder: nn.Module) -> DropHandle | None:
    """Return the handle by which a decoder is patched, or None."""
    owners = (getattr(hook, "__self__", None) for hook in decoder._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, DropHandle)), None)


@dataclass
class _Request:
    """What a causal LM asks of its decoder, and the plan that comes back."""

    visual_mask: Tensor | None
    labels: Tensor | None
    attention_mask: Any
    logits_to_keep: Any = 0
    plan: DropPlan | None = None


class DropHandle:
    """The hooks of one patched model; holds settings, and nothing of any forward pass.

    Args:
        decoder: the decoder.
        causal_lm: the stock causal LM around it, if there is one.
        rules: settings.
    """

    def __init__(self, decoder: nn.Module, causal_lm: PreTrainedModel | None, rules: DropRules):
        present = find_handle(decoder)
        if present is not None:
            raise RuntimeError(
                f"{type(decoder).__name__} drops by {present.schedule} already; remove() that handle first"
            )
        self._rules = rules
        self._hooks = [
            decoder.register_forward_pre_hook(self._before_decoder, prepend=True, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, prepend=True, with_kwargs=True),
            *(
                layer.register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True)
                for index, layer in enumerate(decoder.layers)
            ),
        ]
        self._causal_lm = causal_lm
        if causal_lm is not None:
            self._hooks += [
                causal_lm.register_forward_pre_hook(self._before_causal_lm, prepend=True, with_kwargs=True),
                causal_lm.register_forward_hook(self._after_causal_lm, with_kwargs=True),
            ]
            self._loss_function = causal_lm.loss_function
            self._restore_loss_function = replace_loss_function(causal_lm, self._loss)
            causal_lm.prepare_inputs_for_generation = _PrepareInputs(causal_lm)

    @property
    def schedule(self) -> DropSchedule:
        """The schedule in force."""
        return self._rules.schedule

    @property
    def options(self) -> dict[str, Any]:
        """The other settings of `patch` in force."""
        return {name: getattr(self._rules, name) for name in ("positions", "queries", "scope", "seed")}

    def remove(self) -> None:
        """Take the hooks away; the model computes what it did before. Does nothing the second time."""
        for hook in self._hooks:
            hook.remove()
        if self._causal_lm is not None:
            self._restore_loss_function()
            del self._causal_lm.prepare_inputs_for_generation
        self._hooks, self._causal_lm = [], None

    def __enter__(self) -> DropHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _before_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        request = kwargs.pop("drop_request", None)
        if request is None:
            request = _Request(
                kwargs.pop("visual_mask", None), kwargs.pop("labels", None), kwargs.get("attention_mask")
            )
        else:
            kwargs["attention_mask"] = request.attention_mask
        given = arguments(decoder.forward, args, kwargs)
        _, cache = find_cache(given)
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
            index, layer, args, {name: value for name, value in kwargs.items() if name != "drop_plan"}
        )
        return (hidden_states,), kwargs

    def _after_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        plan = kwargs.get("drop_plan")
        if plan is None:
            return
        if plan.num_layers_reached < len(decoder.layers):
            raise UnsupportedDecoder(
                decoder, "does not hand its keyword arguments to every layer; it cannot be patched"
            )
        values = output if isinstance(output, ModelOutput) else dict(enumerate(output))
        if find_cache(values)[1] is not None and not plan.saw_cache:
            raise UnsupportedDecoder(decoder, "fills a cache that its layers are not given as an argument")
        plan.finish()
        if isinstance(output, ModelOutput):
            output.drop_plan = plan
            if plan.layout is not None:
                output.sequence_layout = plan.layout
            if output.get("router_logits") is not None:
                output.router_logits = self._of_real_tokens(decoder, plan, output.router_logits)

    @staticmethod
    def _of_real_tokens(decoder: nn.Module, plan: DropPlan, router_logits: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Take padding out of what routers said: the loss that balances experts gets no mask of their lengths."""
        valid = [plan.valid_at(layer).flatten() for layer in range(len(decoder.layers))]
        if all(part.all() for part in valid):
            return router_logits
        if len(valid) != len(router_logits):
            raise UnsupportedDecoder(decoder, "routes in some layers only, and rows are padded; give every row alone")
        return tuple(
            part.flatten(0, -2)[real.to(part.device)] for part, real in zip(router_logits, valid, strict=True)
        )

    def _before_causal_lm(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        visual_mask = kwargs.get("visual_mask")
        if visual_mask is None:
            return None
        given = arguments(model.forward, args, kwargs)
        del given["visual_mask"]
        if not self.schedule or not visual_mask.any():
            return (), given
        # The decoder gets the mask back: the model's own auxiliary losses must not see one of the full length.
        request = _Request(
            visual_mask,
            given.get("labels"),
            given.pop("attention_mask", None),
            given.get("logits_to_keep", 0),
        )
        return (), {**given, "drop_request": request}

    def _after_causal_lm(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        request = kwargs.get("drop_request")
        if request is None:
            return
        if request.plan is None:
            raise UnsupportedDecoder(model, "does not hand its keyword arguments to its decoder; it cannot be patched")
        if isinstance(output, ModelOutput):
            output.drop_plan = request.plan

    def _loss(
        self, logits: Tensor, labels: Tensor | None, *args: Any, drop_request: Any = None, **kwargs: Any
    ) -> Tensor:
        """Stand in for the model's loss function, over the shortened sequence where tokens were dropped."""
        if drop_request is not None and drop_request.plan is not None:
            kept = drop_request.logits_to_keep
            shifted = drop_request.plan.shift_labels(drop_request.labels)
            kwargs["shift_labels"] = shifted[:, slice(-kept, None) if isinstance(kept, int) else kept].contiguous()
        return self._loss_function(logits, labels, *args, **kwargs)


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
    _, cache = find_cache(model_inputs)
    if cache is None:  # every step sees the whole sequence; what was generated is an answer, and ranks nothing
        num_new = length - visual_mask.shape[1]
        spans = nn.functional.pad(span_ids(visual_mask), (0, num_new), value=-1)
        return {**model_inputs, "visual_mask": spans}
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
