"""Which tokens of one call are still there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from hico.llm_dropout.policies import DropPolicy
from hico.llm_dropout.schedule import DropStage
from hico.ops.dropping import keep_count, share_budget

SCOPES = ("span", "row")


@dataclass
class Group:
    """Visual tokens that compete with each other.

    Args:
        columns: ``(num_tokens,)`` where the tokens that are left stand in the call.
        num_original: tokens before the first drop.
        ends_prompt: whether the last token of the prompt is one of them; that one is never dropped.
        seed: what chance starts from, the same for the same place in any row.
    """

    columns: Tensor
    num_original: int
    ends_prompt: bool
    seed: int

    def choose(self, policy: DropPolicy, num_keep: int, layer: int, scores_S: Tensor | None) -> Tensor:
        """Return the columns of the tokens that a policy keeps."""
        num_tokens = len(self.columns)
        scores = None if scores_S is None else scores_S[self.columns]
        if self.ends_prompt and scores is not None:
            scores[-1] = torch.inf  # a copy: the plan shows what the policy was given
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + layer) % 2**63)
        kept = policy.choose(num_tokens, num_keep, scores=scores, generator=generator).to(self.columns.device)
        if self.ends_prompt and scores is None and kept[-1] != num_tokens - 1:
            others = policy.choose(num_tokens - 1, num_keep - 1, generator=generator).to(kept)
            kept = torch.cat([others, kept.new_tensor([num_tokens - 1])])
        return self.columns[kept]


class Survivors:
    """Tokens of a call that no stage has dropped yet.

    Args:
        span_ids_BS: 0 is text, k the k-th span of the row, -1 text of an answer.
        valid_BS: bool, False at padding.
        scope: "span" (tokens compete within their video or image) or "row" (with all visual tokens of the row).
        seed: of all chance.
    """

    def __init__(self, span_ids_BS: Tensor, valid_BS: Tensor, *, scope: str, seed: int):
        self.valid_BS = valid_BS
        self.alive_BS = valid_BS.clone()
        valid_cpu = valid_BS.cpu()
        self.num_alive = valid_cpu.sum(1).tolist()
        self.pad_left = bool(valid_cpu[:, -1].all())
        ids_cpu = torch.where(valid_cpu, span_ids_BS.cpu(), -1)
        if scope == "row":
            ids_cpu = ids_cpu.clamp(max=1)
        self.groups_BS = ids_cpu.to(valid_BS.device)
        self.rows = [_groups(ids_S, seed, valid_BS.device) for ids_S in ids_cpu]

    @property
    def dropped_BS(self) -> Tensor:
        """Bool, True where a token was dropped; padding never was."""
        return self.valid_BS & ~self.alive_BS

    def drop(
        self, stage: DropStage, policy: DropPolicy, *, scores_BS: Tensor | None, skip_rows: Collection[int] = ()
    ) -> bool:
        """Apply one stage.

        Args:
            stage: asks how many tokens to keep.
            policy: chooses them.
            scores_BS: of all tokens of the call, if the policy needs them.
            skip_rows: rows that keep what they have.

        Returns:
            Whether a token was dropped.
        """
        before = sum(self.num_alive)
        for row, groups in enumerate(self.rows):
            if row in skip_rows:
                continue
            for group, num_asked in zip(groups, _num_asked(stage, groups), strict=True):
                num_tokens = len(group.columns)
                num_keep = policy.num_keep(num_tokens, max(num_asked, int(group.ends_prompt)))
                if num_keep < num_tokens:
                    scores_S = scores_BS[row] if policy.needs_scores else None
                    kept = group.choose(policy, num_keep, stage.layer, scores_S)
                    self.alive_BS[row, group.columns] = False
                    self.alive_BS[row, kept] = True
                    self.num_alive[row] -= num_tokens - num_keep
                    group.columns = kept
        return sum(self.num_alive) < before


def _groups(ids_S: Tensor, seed: int, device: torch.device) -> list[Group]:
    """List the spans of one row, whose padding is -1 like an answer."""
    prompt = (ids_S >= 0).nonzero()
    columns_by_id = ids_S.argsort(stable=True)
    ids, counts = ids_S[columns_by_id].unique_consecutive(return_counts=True)
    spans = [
        columns
        for span_id, columns in zip(ids.tolist(), columns_by_id.split(counts.tolist()), strict=True)
        if span_id > 0
    ]
    return [
        Group(columns.to(device), len(columns), bool(columns[-1] == prompt[-1]), seed * 1_000_003 + place)
        for place, columns in enumerate(spans)
    ]


def _num_asked(stage: DropStage, groups: list[Group]) -> list[int]:
    if isinstance(stage.keep, int):
        return share_budget([len(group.columns) for group in groups], stage.keep)
    return [max(1, keep_count(group.num_original, stage.keep)) for group in groups]
