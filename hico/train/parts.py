"""Parts of the model: what is frozen, and which learning rate each has."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from hico.prompt import IMAGE_TOKEN, VIDEO_TOKEN
from hico.train.config import PARTS

logger = logging.getLogger(__name__)

_PART = re.compile(r"(?:^|\.)model\.(encoder|compressor|projector)\.")


def part_of(name: str) -> str:
    """Return the part that a parameter of `HicoForConditionalGeneration` belongs to, wrapped or not.

    The LM head and the embeddings belong to ``llm``.
    """
    match = _PART.search(name)
    return match[1] if match else "llm"


def modules_of(model: nn.Module, parts: Sequence[str]) -> list[nn.Module]:
    """Return the modules of some parts of `HicoForConditionalGeneration`."""
    found = [getattr(model.model, part) for part in parts if part != "llm"]
    return [*found, *([model.model.language_model, model.lm_head] if "llm" in parts else [])]


def rest(modules: Sequence[nn.Module]) -> None:
    """Put frozen modules in eval mode, so that nothing in them drops out; what recomputes activations goes on to."""
    for below in (below for module in modules for below in module.modules()):
        below.training = getattr(below, "gradient_checkpointing", False)


def freeze(model: nn.Module, trainable: Sequence[str]) -> None:
    """Let only some parts learn; adapters always do.

    A frozen parameter gets no gradient and, through `parameter_groups`, no optimizer state.

    Raises:
        ValueError: if nothing is left to train.
    """
    for name, parameter in model.named_parameters():
        adapter = "lora_" in name
        shadowed = ".original_module." in name
        parameter.requires_grad_(adapter or (part_of(name) in trainable and not shadowed))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"trainable parts {list(trainable)} have no parameters in this model; name others")


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return per part how many parameters learn, and how many there are."""
    counts = dict.fromkeys(PARTS, (0, 0))
    for name, parameter in model.named_parameters():
        # DeepSpeed's ZeRO-3 leaves an empty tensor in place of a sharded one, and its size beside it.
        size = getattr(parameter, "ds_numel", parameter.numel())
        learned, total = counts[part_of(name)]
        counts[part_of(name)] = (learned + size * parameter.requires_grad, total + size)
    return counts


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    part_learning_rates: Mapping[str, float],
    weight_decay: float,
    decayed: Sequence[str],
) -> list[dict[str, Any]]:
    """Group the parameters that learn, by part and by weight decay.

    Args:
        model: after `freeze`.
        learning_rate: of the parts that ``part_learning_rates`` leaves out.
        part_learning_rates: part -> learning rate.
        weight_decay: of the parameters that ``decayed`` names; the others have none.
        decayed: names of parameters.

    Returns:
        Groups for a torch optimizer, each with its ``name``.
    """
    decayed, groups = set(decayed), {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decays = part_of(name), bool(weight_decay) and name in decayed
        group = groups.setdefault(
            (part, decays),
            {
                "name": part + (" with decay" if decays else ""),
                "params": [],
                "lr": float(part_learning_rates.get(part, learning_rate)),
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def fit_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Give the LLM an embedding for every token that was added to its tokenizer; new ones are drawn around the mean.

    Placeholders of videos and images need none, since what is seen takes their places.

    Args:
        model: `HicoForConditionalGeneration`; it is changed.
        tokenizer: of its processor.

    Returns:
        How many embeddings are new.
    """
    known = model.get_input_embeddings().num_embeddings
    ids = [number for token, number in tokenizer.get_vocab().items() if token not in (VIDEO_TOKEN, IMAGE_TOKEN)]
    missing = max(0, max(ids) + 1 - known)
    if missing:
        model.resize_token_embeddings(known + missing)
        logger.warning("the tokenizer has %d token(s) more than the LLM; their embeddings are new", missing)
    return missing
