"""Which queries meet which keys: causal attention over pieces of rows as a list of blocks that need no mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Interval = tuple[int, int]
"""First token, and the one after the last."""


@dataclass(frozen=True)
class Block:
    """Queries that see all of some keys, or, of equally many, those up to their own.

    Args:
        rows: of the batch.
        queries, keys: where they stand in what attention is given.
        causal: whether the i-th query sees the first i keys only.
    """

    rows: slice
    queries: slice
    keys: slice
    causal: bool


def find_documents(attention_mask: Tensor | None, position_ids: Tensor | None) -> list[list[Interval]] | None:
    """List the stretches of every row within which tokens see each other, read as transformers reads them.

    Args:
        attention_mask: ``(B, S)``, 0 where padded.
        position_ids: ``(B or 1, S)``; where they do not go on by one, a document begins, unless there is a mask.

    Returns:
        Intervals of every row; one row may stand for all. None if tokens see everything before them, padding behind
        the rows included: what sees it is padding too.
    """
    if attention_mask is not None:
        valid_BS = attention_mask.bool()
        if not (valid_BS[:, 1:] & ~valid_BS[:, :-1]).any():
            return None
        ids_BS = torch.where(valid_BS, 0, -1)
    elif position_ids is not None and (breaks := position_ids.diff(dim=1) != 1).any():
        ids_BS = torch.nn.functional.pad(breaks.cumsum(1), (1, 0))
    else:
        return None
    return [_runs(ids_S) for ids_S in ids_BS.cpu()]


def _runs(ids_S: Tensor) -> list[Interval]:
    ids, counts = ids_S.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return [(a, b) for number, a, b in zip(ids.tolist(), starts, ends, strict=True) if number >= 0]


def blocks_between(
    queries: Sequence[int], keys: Sequence[int], width: int, documents: list[list[Interval]] | None
) -> list[Block]:
    """List the blocks of attention between pieces of rows.

    Args:
        queries: where each piece of the queries begins in its row, ascending.
        keys: the same of the keys; two pieces are the same or have no token in common.
        width: tokens of every piece.
        documents: see `find_documents`.
    """
    if documents is None:
        return _whole_blocks(queries, keys, width)
    blocks = []
    for row, intervals in enumerate(documents):
        rows = slice(row, row + 1) if len(documents) > 1 else slice(None)
        for begin, end in intervals:
            seen = [(place, *_cut(start, width, begin, end)) for place, start in enumerate(keys)]
            for query_place, query_start in enumerate(queries):
                low, high = _cut(query_start, width, begin, end)
                if low == high:
                    continue
                at = slice(query_place * width + low, query_place * width + high)
                for place, first, last in seen:
                    if first < last and keys[place] <= query_start:
                        part = slice(place * width + first, place * width + last)
                        blocks.append(Block(rows, at, part, keys[place] == query_start))
    return blocks


def _cut(start: int, width: int, begin: int, end: int) -> Interval:
    """Return the part of an interval that lies in a piece, counted from the beginning of the piece."""
    low = min(max(begin - start, 0), width)
    return low, max(low, min(end - start, width))


def _whole_blocks(queries: Sequence[int], keys: Sequence[int], width: int) -> list[Block]:
    """List blocks of rows that are one document, as few and as large as can be."""
    everything = slice(None)
    if list(queries) == list(keys):
        return [Block(everything, slice(0, len(queries) * width), slice(0, len(keys) * width), True)]
    blocks: list[Block] = []
    for place, start in enumerate(queries):
        number = sum(key < start for key in keys)
        at = slice(place * width, (place + 1) * width)
        if blocks and blocks[-1].keys.stop == number * width:
            at = slice(blocks.pop().queries.start, at.stop)
        if number:
            blocks.append(Block(everything, at, slice(0, number * width), False))
    return blocks
