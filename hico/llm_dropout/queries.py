"""The query rows: tokens whose attention says which visual tokens matter."""

from collections.abc import Callable

import torch
from torch import Tensor

IGNORED_LABEL = -100


def _last(valid_BN: Tensor) -> Tensor:
    """Mark the last token of each row."""
    return valid_BN & (valid_BN.flip(1).cumsum(1).flip(1) == 1)


def _before_runs(valid_BN: Tensor, answer_BN: Tensor | None) -> Tensor:
    """Mark the token before each run of answer tokens."""
    marked_BN = torch.zeros_like(valid_BN)
    if answer_BN is not None:
        marked_BN[:, :-1] = valid_BN[:, :-1] & ~answer_BN[:, :-1] & answer_BN[:, 1:]
    return marked_BN


def _or_last(marked_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Fall back on the last token in rows without a mark."""
    return torch.where(marked_BN.any(1, keepdim=True), marked_BN, _last(valid_BN))


def last_prompt(valid_BN: Tensor, text_BN: Tensor, answer_BN: Tensor | None) -> Tensor:
    """Mark the last token of the prompt: before the last answer, or the last token where there is none."""
    return _or_last(_last(_before_runs(valid_BN, answer_BN)), valid_BN)


def before_answers(valid_BN: Tensor, text_BN: Tensor, answer_BN: Tensor | None) -> Tensor:
    """Mark the token before every answer, or the last token where there is none."""
    return _or_last(_before_runs(valid_BN, answer_BN), valid_BN)


def all_text(valid_BN: Tensor, text_BN: Tensor, answer_BN: Tensor | None) -> Tensor:
    """Mark all text that is no answer: an answer must not choose what it is read from."""
    prompt_BN = valid_BN & text_BN
    return _or_last(prompt_BN if answer_BN is None else prompt_BN & ~answer_BN, valid_BN)


def published(valid_BN: Tensor, text_BN: Tensor, answer_BN: Tensor | None) -> Tensor:
    """Mark what the released code takes.

    As `before_answers`, but an answer that begins with the row looks back to the last token of the row, and a row
    without an answer has no query where answers are marked.
    """
    if answer_BN is None:
        return _last(valid_BN)
    first_BN = valid_BN & (valid_BN.cumsum(1) == 1)
    last_BN = _last(valid_BN)
    looks_back_B1 = (first_BN & answer_BN).any(1, keepdim=True) & (last_BN & ~answer_BN).any(1, keepdim=True)
    return _before_runs(valid_BN, answer_BN) | (last_BN & looks_back_B1)


QUERY_ROWS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "before_answers": before_answers,
    "last_prompt": last_prompt,
    "all_text": all_text,
    "published": published,
}
"""Setting -> function of bool ``valid_BN``, ``text_BN`` and ``answer_BN`` (None if nothing is said of answers), that
marks the query rows ``(B, N)``."""
