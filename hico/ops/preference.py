"""Learning from preferences between two answers."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Preferences(NamedTuple):
    """What comes of comparing B pairs of answers, each ``(B,)``."""

    losses: Tensor
    chosen: Tensor
    """Rewards of the chosen answers: how much likelier they have become, times ``beta``."""
    rejected: Tensor
    """Rewards of the rejected answers."""


def compare_answers(
    policy_2B: Tensor, reference_2B: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Preferences:
    """Compare answers by direct preference optimization (DPO).

    Args:
        policy_2B: logarithms of the probabilities of B chosen answers and then of B rejected ones, by the model that
            learns.
        reference_2B: the same by the frozen model that it started from.
        beta: how dearly the distance from the reference is paid for, above 0.
        label_smoothing: share of the pairs that are taken to be the wrong way round, in [0, 0.5).

    Returns:
        Losses, which are log 2 where both models agree, and rewards without a gradient.

    Source: Rafailov et al., "Direct Preference Optimization", arXiv:2305.18290, equation 7; label smoothing as in its
        conservative variant: Mitchell, "A note on DPO with noisy preferences", 2023.
    """
    chosen_B, rejected_B = (beta * (policy_2B - reference_2B)).chunk(2)
    margins_B = chosen_B - rejected_B
    losses_B = -F.logsigmoid(margins_B)
    if label_smoothing:
        losses_B = (1 - label_smoothing) * losses_B - label_smoothing * F.logsigmoid(-margins_B)
    return Preferences(losses_B, chosen_B.detach(), rejected_B.detach())
