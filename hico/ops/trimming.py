"""Leaving columns out of the rows of a batch, and padding what is left to one length again."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hico.ops.dropping import gather_rows, pack_rows


@dataclass(frozen=True)
class Trim:
    """Which tokens of a prompt are left.

    Args:
        columns_BN: ``(B, N)`` their places in the prompt, in order, and -1 at padding.
        dropped_before_BS: ``(B, S)`` how many tokens were left out before each.
    """

    columns_BN: Tensor
    dropped_before_BS: Tensor

    def gather(self, values: Tensor, *, fill: float | int | bool = 0) -> Tensor:
        """Shorten ``(B, S, ...)`` of the prompt to ``(B, N, ...)``, with ``fill`` at padding."""
        return gather_rows(values, self.columns_BN, fill=fill)

    def renumber(self, position_ids: Tensor) -> Tensor:
        """Shorten positions ``(B or 1, S)`` and close the gaps, in every sequence that was packed into a row."""
        restarts_BS = torch.zeros_like(position_ids, dtype=torch.bool)
        restarts_BS[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
        before_BS = self.dropped_before_BS.to(position_ids.device)
        start_BS = (before_BS * restarts_BS).cummax(1).values
        return self.gather(position_ids - (before_BS - start_BS))


def trim_rows(keep_BS: Tensor, attention_mask: Tensor | None) -> tuple[Trim, Tensor | None]:
    """Leave columns out of rows.

    Args:
        keep_BS: bool, False where a token is left out.
        attention_mask: ``(B, S)``, 0 where padded, on either side; None if nothing is.

    Returns:
        What is left, padded to one length on the side where the rows were padded, on the left if they were not; and
        its attention mask, None if nothing is padded.
    """
    valid_BS = torch.ones_like(keep_BS) if attention_mask is None else attention_mask.to(keep_BS.device).bool()
    keep_BS = keep_BS & valid_BS
    counts = keep_BS.sum(1).tolist()
    columns_BN = pack_rows(keep_BS, max(counts), pad_left=bool(valid_BS[:, -1].all()))
    dropped_BS = (valid_BS & ~keep_BS).long()
    trim = Trim(columns_BN, dropped_BS.cumsum(1) - dropped_BS)
    if attention_mask is None and min(counts) == max(counts):
        return trim, None
    mask_BN = columns_BN >= 0
    return trim, mask_BN.long() if attention_mask is None else mask_BN.to(attention_mask.dtype)
