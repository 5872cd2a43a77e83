"""How the rows of one call are cut over the processes that share them."""

from __future__ import annotations

import torch
from torch import Tensor

from hico.parallel.blocks import Block, Interval, blocks_between
from hico.parallel.exchange import all_gather, all_reduce, all_to_all
from hico.parallel.mesh import SequenceMesh


class Layout:
    """Rows of S tokens in zigzag pieces: of 2N pieces, process r of N has the r-th and the r-th from the end.

    So all have equal work where tokens see those before them. Rows are padded to pieces of one length. Everything
    else goes by these verbs, and what they do not say is nobody else's business: `shard` and `gather` values, `take`
    tokens, `move` to another layout, `total` what is computed of the parts; `to_heads`, `to_tokens` and `blocks` are
    for attention. All differentiate, with true adjoints, see `hico.parallel.exchange`.

    Args:
        mesh: the processes, and which of them this is.
        length: S, tokens of every row.
        documents: see `hico.parallel.blocks.find_documents`.

    Source: zigzag order of Zhang et al., "LongVA", arXiv:2406.16852, as released; but rows that do not divide are
    padded by as few tokens as needed, and by none if they do.
    """

    def __init__(self, mesh: SequenceMesh, length: int, documents: list[list[Interval]] | None = None):
        self._mesh, self._length, self._documents = mesh, length, documents
        self._piece = -(-length // (2 * mesh.size))
        self._blocks: dict[int, list[Block]] = {}
        self.num_attended = 0
        """How often attention was asked for by this layout."""

    @property
    def num_local(self) -> int:
        """Tokens of a row that this process has, padding included."""
        return 2 * self._piece

    @property
    def positions(self) -> Tensor:
        """``(n,)`` where this process's tokens stand in their rows; what pads rows comes after all of them."""
        places = [torch.arange(self._piece) + place * self._piece for place in self._places(self._mesh.rank)]
        return torch.cat(places)

    @property
    def mesh(self) -> SequenceMesh:
        """The processes."""
        return self._mesh

    @property
    def is_one_document(self) -> bool:
        """Whether every token of a row sees all before it."""
        return self._documents is None

    def shard(self, values: Tensor, *, fill: float | int | bool = 0) -> Tensor:
        """Take this process's part of values that all have: ``(B, S, ...)`` to ``(B, n, ...)``."""
        parts = []
        for place in self._places(self._mesh.rank):
            part = values[:, place * self._piece : (place + 1) * self._piece]
            missing = self._piece - part.shape[1]
            if missing:
                part = torch.cat([part, part.new_full((len(part), missing, *part.shape[2:]), fill)], 1)
            parts.append(part)
        return torch.cat(parts, 1)

    def gather(self, values: Tensor) -> Tensor:
        """Put together the parts of all processes: ``(B, n, ...)`` to ``(B, S, ...)``."""
        return _in_order(all_gather(values, self._mesh.group), axis=1)[:, : self._length]

    def take(self, values: Tensor, index_BK: Tensor) -> Tensor:
        """Give all processes some tokens: ``(B, n, ...)`` to ``(B, K, ...)``.

        Args:
            values: of this process.
            index_BK: ``(B or 1, K)`` positions in the rows; at -1 there will be zeros.
        """
        owner_BK, offset_BK = self._find(index_BK.to(values.device).expand(len(values), -1))
        own_BK = owner_BK == self._mesh.rank
        rows_B1 = torch.arange(len(values), device=values.device)[:, None]
        taken = values[rows_B1, torch.where(own_BK, offset_BK, 0)]
        return all_reduce(taken * own_BK.reshape(*own_BK.shape, *[1] * (values.ndim - 2)), self._mesh.group)

    def keep(self, values: Tensor, keep: int | Tensor) -> Tensor:
        """Give all processes the tokens that ``logits_to_keep`` of transformers names: the last ones, or positions."""
        if isinstance(keep, int) and keep == 0:
            return self.gather(values)
        index = torch.arange(self._length)[slice(-keep, None) if isinstance(keep, int) else keep.cpu()]
        return self.take(values, index[None])

    def total(self, value: Tensor) -> Tensor:
        """Add up what every process computed of its part."""
        return all_reduce(value, self._mesh.group)

    def log_total(self, values: Tensor) -> Tensor:
        """Add up what every process computed of its part, of logarithms; no gradient."""
        with torch.no_grad():
            return all_gather(values, self._mesh.group).logsumexp(0)

    def move(self, values: Tensor, index_BK: Tensor) -> tuple[Tensor, Layout]:
        """Keep some tokens and cut them into balanced parts anew.

        Every token goes straight to the process that gets it.

        Args:
            values: ``(B, n, ...)`` of this process.
            index_BK: ``(B, K)`` the tokens to keep by their positions in the rows, in order; -1 where a row has fewer.

        Returns:
            ``(B, n', ...)``, zero where there is no token, and the layout of K tokens that it is in.
        """
        index_BK, device = index_BK.cpu(), values.device
        padded = bool((index_BK[:, :-1] < 0).logical_and(index_BK[:, 1:] >= 0).any())
        documents = None
        if padded:  # in front, where what comes after would see it
            first_B = (index_BK < 0).sum(1).tolist()
            documents = [[(first, index_BK.shape[1])] for first in first_B]
        moved = Layout(self._mesh, index_BK.shape[1], documents)
        wanted = torch.stack([moved._part(rank, index_BK) for rank in range(self._mesh.size)]).flatten(1)
        rows = torch.arange(len(values)).repeat_interleave(moved.num_local).expand_as(wanted)
        owner, offset = self._find(wanted)
        mine = owner == self._mesh.rank
        source = (rows * self.num_local + offset)[mine].to(device)
        arriving = owner[self._mesh.rank]
        order = arriving.argsort(stable=True)[(arriving < 0).sum() :]
        received = arriving[arriving >= 0].bincount(minlength=self._mesh.size).tolist()
        parts = all_to_all(
            values.flatten(0, 1).index_select(0, source), self._mesh.group, mine.sum(1).tolist(), received
        )
        kept = parts.new_zeros(len(values) * moved.num_local, *parts.shape[1:])
        kept = kept.index_copy(0, order.to(device), parts)
        return kept.unflatten(0, (len(values), moved.num_local)), moved

    # For attention: after `to_heads` a process has the tokens of its place in the ring, and some of the heads.

    def to_heads(self, values_BAnC: Tensor) -> Tensor:
        """Exchange tokens for heads: ``(B, A, n, C)`` to ``(B, A / U, U * n, C)``, U being the Ulysses size."""
        mesh = self._mesh
        if mesh.ulysses_size == 1:
            return values_BAnC
        parts = values_BAnC.unflatten(1, (mesh.ulysses_size, -1)).movedim(1, 0)
        return _in_order(all_to_all(parts, mesh.ulysses_group), axis=2)

    def to_tokens(self, values_BAMC: Tensor) -> Tensor:
        """Undo `to_heads`."""
        mesh = self._mesh
        if mesh.ulysses_size == 1:
            return values_BAMC
        first, second = values_BAMC.chunk(2, 2)
        pairs = zip(first.chunk(mesh.ulysses_size, 2), reversed(second.chunk(mesh.ulysses_size, 2)), strict=True)
        parts = torch.stack([torch.cat(pair, 2) for pair in pairs])
        return all_to_all(parts, mesh.ulysses_group).movedim(0, 1).flatten(1, 2)

    def blocks(self, source: int) -> list[Block]:
        """List the blocks of attention between the tokens of this place in the ring and those of another."""
        if source not in self._blocks:
            self._blocks[source] = self._find_blocks(source)
        return self._blocks[source]

    def _find_blocks(self, source: int) -> list[Block]:
        mesh, width = self._mesh, self._piece * self._mesh.ulysses_size
        own, other = (
            [place * width for place in (ring_rank, 2 * mesh.ring_size - 1 - ring_rank)]
            for ring_rank in (mesh.ring_rank, source)
        )
        return blocks_between(own, other, width, self._documents)

    # Places

    def _places(self, rank: int) -> tuple[int, int]:
        return rank, 2 * self._mesh.size - 1 - rank

    def _part(self, rank: int, index_BK: Tensor) -> Tensor:
        """Return what a process is to have of a table that all know, -1 where that is nothing."""
        full = torch.nn.functional.pad(index_BK, (0, 2 * self._mesh.size * self._piece - self._length), value=-1)
        pieces = full.split(self._piece, 1)
        return torch.cat([pieces[place] for place in self._places(rank)], 1)

    def _find(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Say which process has a token, and where among its own; what is found for -1 is in nobody's part."""
        place, within = index.div(self._piece, rounding_mode="floor"), index % self._piece
        is_second = place >= self._mesh.size
        owner = torch.where(is_second, 2 * self._mesh.size - 1 - place, place)
        return owner, within + is_second * self._piece


def _in_order(parts: Tensor, axis: int) -> Tensor:
    """Join the parts ``(P, ...)`` of P neighbours along an axis of theirs, second halves backwards."""
    first, second = parts.chunk(2, axis + 1)
    return torch.cat([*first, *second.flip(0)], axis)
