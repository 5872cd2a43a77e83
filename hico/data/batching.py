"""Which rows form a batch, on which device, in which order: pure functions of the seed and the epoch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader, Sampler

Key = tuple[int, int]
"""Epoch and row: all that a row's content depends on, so that it is the same in any worker and after any restart."""


@dataclass(frozen=True)
class BatchRule:
    """How rows are put together.

    Args:
        batch_size: rows of a batch on one device.
        max_tokens: token budget of a batch instead, from the estimated lengths.
        packed: rows of a batch share one sequence, so a batch costs their sum and no padding.
        group: batches of one modality and similar length.
        needed: what every batch must have, as `hico.data.collator.Collator` says; what that adds counts in the budget.
        blank_tokens: tokens of a black image and of a black clip.
    """

    batch_size: int
    max_tokens: int | None = None
    packed: bool = False
    group: bool = False
    needed: str = "rows"
    blank_tokens: tuple[int, int] = (0, 0)

    def blanks(self, modality: set[int]) -> list[int]:
        """Return the tokens of the rows that are added to a batch with rows of some modalities (text, image, video).

        A video row may hold images too; it is taken for one that does not.
        """
        image, clip = self.blank_tokens
        if self.needed == "both":
            return [clip] * (2 not in modality) + [image] * (1 not in modality)
        return [image] * (self.needed == "pixels" and modality == {0})


def compose_batches(
    rule: BatchRule, *, lengths: np.ndarray, modality: np.ndarray, seed: int, epoch: int
) -> list[list[int]]:
    """Put every row into one batch.

    Batches of an epoch are as many as those of any other: with a token budget, only their order changes.

    Args:
        rule: how.
        lengths: ``(n,)`` tokens of every row.
        modality: ``(n,)`` its modality as a number.
        seed: of the shuffling.
        epoch: number of the pass over the data.

    Returns:
        Row numbers of every batch, in the order of training.
    """
    rng = np.random.default_rng((seed, 0 if rule.max_tokens else epoch))
    order = rng.permutation(len(lengths))
    if rule.group:
        pools = [order[modality[order] == kind] for kind in np.unique(modality)]
        # Sorting within large blocks keeps the draw random while neighbours have similar lengths.
        block = 50 * rule.batch_size if rule.max_tokens is None else max(1, len(order))
        pools = [np.concatenate([_by_length(part, lengths) for part in _chunks(pool, block)]) for pool in pools]
    else:
        pools = [order]
    batches = [batch for pool in pools for batch in _cut(pool, lengths, modality, rule)]
    if rule.group or rule.max_tokens is not None:
        shuffled = np.random.default_rng((seed, epoch, 1)).permutation(len(batches))
        batches = [batches[number] for number in shuffled]
    return batches


class BatchSampler(Sampler[list[Key]]):
    """The batches of one device.

    Devices take turns, so an optimizer step sees the same rows on any number of devices with the same global batch.
    Where batches do not divide, the last ones are empty: every device has equally many.

    Args:
        rule: how batches are composed.
        rows: numbers of the rows in the mixture.
        lengths: ``(n,)`` estimated tokens of these rows.
        modality: ``(n,)`` their modality.
        seed: of the shuffling; ``None`` keeps the rows in order, for evaluation.
        rank: of this device.
        world_size: number of devices.
    """

    def __init__(
        self,
        rule: BatchRule,
        rows: np.ndarray,
        *,
        lengths: np.ndarray,
        modality: np.ndarray,
        seed: int | None,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.rule, self.rows, self.lengths, self.modality, self.seed = rule, rows, lengths, modality, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._num_batches = len(self._compose())

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass over the data that the next iteration makes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self._num_batches // self.world_size)

    def __iter__(self) -> Iterator[list[Key]]:
        batches = self._compose()
        batches += [[]] * (-len(batches) % self.world_size)
        for batch in batches[self.rank :: self.world_size]:
            yield [(self.epoch, int(self.rows[number])) for number in batch]

    def _compose(self) -> list[list[int]]:
        if self.seed is None:
            return _cut(np.arange(len(self.rows)), self.lengths, self.modality, self.rule)
        return compose_batches(
            self.rule, lengths=self.lengths, modality=self.modality, seed=self.seed, epoch=self.epoch
        )


class EpochLoader(DataLoader):
    """A data loader that tells its sampler the epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def _cut(rows: Sequence[int], lengths: np.ndarray, modality: np.ndarray, rule: BatchRule) -> list[list[int]]:
    if rule.max_tokens is None:
        return [list(map(int, part)) for part in _chunks(rows, rule.batch_size)]
    batches, current, total, longest, kinds = [], [], 0, 0, set()
    for row in map(int, rows):
        length, kind = int(lengths[row]), int(modality[row])
        blanks = rule.blanks({*kinds, kind})
        if rule.packed:
            grown = total + length + sum(blanks)
        else:
            grown = max(longest, length, *blanks) * (len(current) + 1 + len(blanks))
        if current and grown > rule.max_tokens:
            batches.append(current)
            current, total, longest, kinds = [], 0, 0, set()
        current.append(row)
        total, longest = total + length, max(longest, length)
        kinds.add(kind)
    return [*batches, current] if current else batches


def _chunks(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _by_length(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return rows[np.argsort(-lengths[rows], kind="stable")]
