"""Which video or image each placeholder of a prompt belongs to."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def number_items(kind_BS: Tensor, groups: Sequence[tuple[str, Tensor, Sequence[int]]]) -> Tensor:
    """Number the videos and images of every row, and mark which of its placeholders are whose.

    Items take placeholders in order. A run of placeholders (unbroken, of one kind) holds whole items or a part of one,
    so text may stand inside an item, but no item begins in the middle of another one's run.

    Args:
        kind_BS: 0 at text, elsewhere the kind of the placeholder.
        groups: for items that fill placeholders by themselves: what to call them, their placeholders ``(B, S)``, and
            the tokens of each, row by row.

    Returns:
        ``(B, S)`` int64: 0 at text, k at the placeholders of the k-th item that begins in that row.

    Raises:
        ValueError: if the items do not fill the placeholders of their rows.
    """
    starts = [_find_items(kind_BS * mask_BS, sizes, name=name) for name, mask_BS, sizes in groups]
    numbers: dict[tuple[int, int], int] = {}
    last_row, number = -1, 0
    for row, column in sorted(start for some in starts for start in some):
        last_row, number = row, number + 1 if row == last_row else 1
        numbers[row, column] = number
    item_BS = torch.zeros_like(kind_BS, dtype=torch.long)
    for (_, mask_BS, sizes), some in zip(groups, starts, strict=True):
        sizes = [size for size in sizes if size]
        of_items = torch.tensor([numbers[start] for start in some], dtype=torch.long, device=item_BS.device)
        item_BS[mask_BS] = of_items.repeat_interleave(torch.tensor(sizes, dtype=torch.long, device=item_BS.device))
    return item_BS


def promised_sizes(kind_BS: Tensor, sizes: Sequence[int]) -> list[int]:
    """Say how many placeholders belong to items that may have fewer tokens than were promised for them.

    Args:
        kind_BS: 0 at text, elsewhere the kind of the placeholder.
        sizes: tokens of each item, row by row.

    Returns:
        The sizes if they fill all placeholders; otherwise the lengths of the unbroken runs, one for each item. Where
        there are not as many runs, or an item has more tokens than its run, the sizes again.
    """
    lengths = [length for *_, length in _runs(kind_BS)]
    fits = len(lengths) == len(sizes) and all(size <= length for size, length in zip(sizes, lengths, strict=True))
    return lengths if fits and sum(sizes) != sum(lengths) else list(sizes)


def _find_items(kind_BS: Tensor, sizes: Sequence[int], *, name: str) -> list[tuple[int, int]]:
    """Return row and column of the first placeholder of every item that has tokens."""
    runs = _runs(kind_BS)
    num_placeholders = sum(length for *_, length in runs)
    if num_placeholders != sum(sizes):
        raise ValueError(
            f"the prompt has {num_placeholders} {name} placeholders, but the {len(sizes)} {name}(s) given make "
            f"{sum(sizes)} tokens; let HicoProcessor of the same model write the prompt"
        )
    items = iter([(index, size) for index, size in enumerate(sizes) if size])
    starts: list[tuple[int, int]] = []
    place, missing = (0, 0), 0  # row and kind of the last item, and how many of its tokens have no placeholder yet
    for row, column, kind, length in runs:
        if missing:
            fits = place == (row, kind) and length <= missing
            missing -= length
        else:
            place, free = (row, kind), length
            while free > 0:
                index, size = next(items)
                starts.append((row, column + length - free))
                free -= size
            missing = -free
            fits = not missing or size == length + missing
        if not fits:
            lengths = [length for other, _, _, length in runs if other == place[0]]
            raise ValueError(
                f"row {place[0]} has runs of {lengths} {name} placeholders, and {name} {index + 1} of {len(sizes)}, "
                f"which belongs there, makes {size} tokens; a run holds whole items or a part of one, so let "
                "HicoProcessor of the same model write the prompt"
            )
    return starts


def _runs(kind_BS: Tensor) -> list[tuple[int, int, int, int]]:
    """List row, column, kind and length of every unbroken run of one kind but 0, row by row."""
    is_start_BS = (kind_BS != 0) & (kind_BS != nn.functional.pad(kind_BS[:, :-1], (1, 0)))
    run_n = is_start_BS.flatten().cumsum(0)[kind_BS.flatten() != 0] - 1
    rows, columns = is_start_BS.nonzero(as_tuple=True)
    lengths = torch.bincount(run_n, minlength=len(rows))
    return torch.stack([rows, columns, kind_BS[rows, columns], lengths], 1).tolist()
