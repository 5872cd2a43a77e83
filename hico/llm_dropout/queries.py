"""The query rows: tokens whose attention says which visual tokens matter."""

from collections.abc import Callable

import torch
from torch import Tensor

IGNORED_LABEL = -100


def _last(valid_BN: Tensor) -> Tensor:
    """Mark the last token of each row."""
    return valid_BN & (valid_BN.flip(1).cumsum(1).flip(1) == 1)


def _before_runs(valid_BN: Tensor, labels_BN: Tensor | None) -> Tensor:
    """Mark the token before each run of labelled tokens."""
    if labels_BN is None:
        return torch.zeros_like(valid_BN)
    labelled_BN = valid_BN & (labels_BN != IGNORED_LABEL)
    marked_BN = torch.zeros_like(valid_BN)
    marked_BN[:, :-1] = valid_BN[:, :-1] & ~labelled_BN[:, :-1] & labelled_BN[:, 1:]
    return marked_BN


def _or_last(marked_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Fall back on the last token in rows without a mark."""
    return torch.where(marked_BN.any(1, keepdim=True), marked_BN, _last(valid_BN))


def last_prompt(valid_BN: Tensor, text_BN: Tensor, labels_BN: Tensor | None) -> Tensor:
    """Mark the last token of the prompt: before the last labelled run, or the last token where nothing is labelled."""
    return _or_last(_last(_before_runs(valid_BN, labels_BN)), valid_BN)


def before_answers(valid_BN: Tensor, text_BN: Tensor, labels_BN: Tensor | None) -> Tensor:
    """Mark the token before every labelled run, or the last token where nothing is labelled."""
    return _or_last(_before_runs(valid_BN, labels_BN), valid_BN)


def all_text(valid_BN: Tensor, text_BN: Tensor, labels_BN: Tensor | None) -> Tensor:
    """Mark every text token that is not labelled: an answer must not choose what it is read from."""
    prompt_BN = valid_BN & text_BN
    if labels_BN is not None:
        prompt_BN = prompt_BN & (labels_BN == IGNORED_LABEL)
    return _or_last(prompt_BN, valid_BN)


def published(valid_BN: Tensor, text_BN: Tensor, labels_BN: Tensor | None) -> Tensor:
    """Mark what the released code takes.

    As `before_answers`, but a labelled first token looks back to the last token of the row, and a row without labels
    in a batch with labels has no query.
    """
    if labels_BN is None:
        return _last(valid_BN)
    labelled_BN = valid_BN & (labels_BN != IGNORED_LABEL)
    first_BN = valid_BN & (valid_BN.cumsum(1) == 1)
    last_BN = _last(valid_BN)
    looks_back_B1 = (first_BN & labelled_BN).any(1, keepdim=True) & (last_BN & ~labelled_BN).any(1, keepdim=True)
    return _before_runs(valid_BN, labels_BN) | (last_BN & looks_back_B1)


QUERY_ROWS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "auto": before_answers,  # which is the last prompt token where there are no labels
    "last_prompt": last_prompt,
    "before_answers": before_answers,
    "all_text": all_text,
    "published": published,
}
"""Setting -> function of ``valid_BN``, ``text_BN`` and ``labels_BN`` or None, that marks the query rows ``(B, N)``."""
