"""Documents packed into sequences of one length: which, in which order; a pure function of the seed and the epoch."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hico.data.batching import Key
from hico.data.tokens import TokenStore
from hico.prompt import IGNORE_INDEX


@dataclass(frozen=True)
class PackRule:
    """How documents become sequences.

    Args:
        length: tokens of a sequence.
        long_documents: tokens from which on a document is a long one.
        long_share: tokens that every domain is to give in long documents, as a share of its own, in [0, 1); where the
            share is greater as it is, or there are only long ones or none, it stays. None leaves all shares.
        across: whether a token sees the documents before its own in the sequence.
    """

    length: int
    long_documents: int = 4096
    long_share: float | None = None
    across: bool = True


@dataclass(frozen=True)
class Stream:
    """The documents of an epoch, one after the other.

    Args:
        documents: ``(m,)`` their numbers.
        ends: ``(m,)`` tokens up to the end of each; one that is cut loses tokens before its separator.
    """

    documents: np.ndarray
    ends: np.ndarray


def num_sequences(lengths: np.ndarray, rule: PackRule) -> int:
    """Return the sequences of an epoch: as many as the documents' tokens fill.

    Raises:
        ValueError: if they fill none.
    """
    total = int(lengths.sum())
    if total < rule.length:
        raise ValueError(
            f"the documents have {total:,} tokens, and one sequence has {rule.length:,}; lower max_length, set repeat "
            "in the mixture, or add documents"
        )
    return total // rule.length


def compose_stream(lengths: np.ndarray, domains: np.ndarray, *, rule: PackRule, seed: int, epoch: int) -> Stream:
    """Draw the documents of an epoch, long ones more often, with every domain's share of the tokens as it is.

    An epoch has as many tokens as the documents, rounded down to whole sequences. Every domain gets its share of
    them, and of that its long documents get ``rule.long_share``. Both kinds are taken in random order, all of a kind
    once before any comes again, until they have what they get; the last one is cut.

    Args:
        lengths: ``(n,)`` tokens of every document, separator included.
        domains: ``(n,)`` numbers of their domains.
        rule: see `PackRule`.
        seed: of all draws.
        epoch: number of the pass.

    Source: Fu et al., "Data Engineering for Scaling Language Models to 128K Context", arXiv:2402.10171, per-source
    upsampling of documents above 4K. Their share of long tokens is a setting here.
    """
    rng = np.random.default_rng((seed, epoch))
    budget = num_sequences(lengths, rule) * rule.length
    weights = np.bincount(domains, weights=lengths)
    shares = np.diff(np.round(np.concatenate([[0], weights.cumsum()]) * (budget / weights.sum())).astype(np.int64))
    drawn = []
    is_long = lengths >= rule.long_documents
    for domain, share in enumerate(shares.tolist()):
        long, short = (np.flatnonzero((domains == domain) & kind) for kind in (is_long, ~is_long))
        natural = lengths[long].sum() / max(1, lengths[long].sum() + lengths[short].sum())
        wanted = natural if rule.long_share is None or natural in (0, 1) else max(natural, rule.long_share)
        tokens = round(share * float(wanted))
        drawn += [_draw(long, lengths, tokens, rng), _draw(short, lengths, share - tokens, rng)]
    documents, sizes = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    order = rng.permutation(len(documents))
    return Stream(documents[order], sizes[order].cumsum())


def _draw(pool: np.ndarray, lengths: np.ndarray, budget: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Take documents of a pool until they have ``budget`` tokens; return their numbers and sizes, the last one cut."""
    documents, sizes = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    while budget > 0 and len(pool):
        order = rng.permutation(pool)
        ends = lengths[order].cumsum()
        count = int(np.searchsorted(ends, budget)) + 1
        taken = lengths[order[:count]].copy()
        taken[-1] -= max(0, int(taken.sum()) - budget)
        documents.append(order[:count])
        sizes.append(taken)
        budget -= int(taken.sum())
    return np.concatenate(documents), np.concatenate(sizes)


class PackedText(Dataset):
    """Sequences of packed documents.

    Args:
        store: the documents' tokens.
        rule: how they are packed.
        separator: id of the token at every document's end.
        seed: of all draws.
    """

    def __init__(self, store: TokenStore, rule: PackRule, *, separator: int, seed: int):
        self.store, self.rule, self.separator, self.seed = store, rule, separator, seed
        self._num_sequences = num_sequences(store.lengths, rule)
        self._composed: tuple[int, Stream] | None = None

    def __len__(self) -> int:
        return self._num_sequences

    def stream(self, epoch: int) -> Stream:
        """Return the documents of an epoch."""
        if self._composed is None or self._composed[0] != epoch:
            stream = compose_stream(
                self.store.lengths, self.store.domains, rule=self.rule, seed=self.seed, epoch=epoch
            )
            self._composed = epoch, stream
        return self._composed[1]

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        """Return a sequence.

        Args:
            key: epoch, and number of the sequence in it.

        Returns:
            ``input_ids`` and ``labels`` ``(S,)``: all tokens are learned but the first, before which there is none;
            and where documents do not see each other, ``position_ids``, which begin anew with each, and no document's
            first token is learned.
        """
        epoch, number = key
        stream, length = self.stream(epoch), self.rule.length
        begin = number * length
        place, filled = int(np.searchsorted(stream.ends, begin, side="right")), 0
        ids, positions = np.empty(length, dtype=np.int64), np.empty(length, dtype=np.int64)
        while filled < length:
            end = int(stream.ends[place])
            size = end - (int(stream.ends[place - 1]) if place else 0)
            start = size - (end - begin - filled)
            count = min(size - start, length - filled)
            ids[filled : filled + count] = self.store.read(int(stream.documents[place]), start, start + count)
            if start + count == size:
                ids[filled + count - 1] = self.separator  # also where the document is cut
            positions[filled : filled + count] = np.arange(count)
            filled, place = filled + count, place + 1
        input_ids = torch.from_numpy(ids)
        if self.rule.across:
            labels = input_ids.clone()
            labels[0] = IGNORE_INDEX
            return {"input_ids": input_ids, "labels": labels}
        position_ids = torch.from_numpy(positions)
        return {
            "input_ids": input_ids,
            "labels": input_ids.masked_fill(position_ids == 0, IGNORE_INDEX),
            "position_ids": position_ids,
        }


def collate_text(sequences: list[dict[str, Tensor]], *, length: int, separator: int) -> dict[str, Tensor]:
    """Stack sequences to ``(B, S)``; a device that has none gets one of ``length`` without anything to learn."""
    if not sequences:
        blank = torch.full((length,), separator)
        sequences = [{"input_ids": blank, "labels": torch.full_like(blank, IGNORE_INDEX)}]
    return {name: torch.stack([sequence[name] for sequence in sequences]) for name in sequences[0]}
