"""Whether a model knows an answer, and how well it predicts text: one forward each, and few logits."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.inference_mode()
def answer_logits(model: PreTrainedModel, prompt_ids: Tensor, answer_ids: Tensor, **visuals: Any) -> Tensor:
    """Predict every token of an answer from the prompt and the right tokens before it.

    One forward over prompt and answer, without a cache; logits exist for the answer's positions only.

    Args:
        model: a causal LM.
        prompt_ids: ``(S,)``.
        answer_ids: ``(K,)``.
        visuals: what else its ``forward`` takes, such as ``visual_embeds``.

    Returns:
        ``(K, vocabulary)`` float32.

    Raises:
        ValueError: if the answer has no tokens, or the model makes logits of all positions or of none.
    """
    if len(answer_ids) == 0:
        raise ValueError("the answer has no tokens; give one that the tokenizer does not turn into nothing")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} takes no logits_to_keep, and the logits of a whole context would not fit into "
            "memory; use an LLM of transformers that does"
        )
    input_ids = torch.cat([prompt_ids, answer_ids[:-1]])[None].to(model.device)
    outputs = model(input_ids=input_ids, use_cache=False, logits_to_keep=len(answer_ids), **visuals)
    if outputs.logits.shape[1] != len(answer_ids):
        raise ValueError(
            f"{type(model).__name__} returned logits of {outputs.logits.shape[1]} positions where "
            f"{len(answer_ids)} were asked for; use another model, or another version of transformers"
        )
    return outputs.logits[0].float()


def knows_answer(model: PreTrainedModel, prompt_ids: Tensor, answer_ids: Tensor, **visuals: Any) -> bool:
    """Say whether every token of the answer is the likeliest one, given those before it.

    For the arguments see `answer_logits`. Of equally likely tokens the first counts, as in ``argmax``.

    Source: Zhang et al., "LongVA", arXiv:2406.16852, V-NIAH.
    """
    likeliest = answer_logits(model, prompt_ids, answer_ids, **visuals).argmax(-1)
    return bool((likeliest == answer_ids.to(likeliest.device)).all())


def mean_loss(model: PreTrainedModel, prompt_ids: Tensor, answer_ids: Tensor, **visuals: Any) -> float:
    """Return the mean negative log-likelihood of an answer's tokens in nats; see `answer_logits`."""
    logits = answer_logits(model, prompt_ids, answer_ids, **visuals)
    return torch.nn.functional.cross_entropy(logits, answer_ids.to(logits.device)).item()
