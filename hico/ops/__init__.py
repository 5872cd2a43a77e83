"""Tensor maths: pure functions, tensors in, tensors out."""

from hico.ops.dropping import (
    gather_rows,
    keep_count,
    pack_rows,
    query_row_scores,
    random_keep_indices,
    share_budget,
    span_ids,
    top_keep_indices,
    uniform_keep_indices,
)
from hico.ops.merging import (
    MergePlan,
    apply_merge,
    match_tokens,
    merge_tokens,
    plan_merge,
    plan_merge_over_time,
    similarity_metric,
)

__all__ = [
    "MergePlan",
    "apply_merge",
    "gather_rows",
    "keep_count",
    "match_tokens",
    "merge_tokens",
    "pack_rows",
    "plan_merge",
    "plan_merge_over_time",
    "query_row_scores",
    "random_keep_indices",
    "share_budget",
    "similarity_metric",
    "span_ids",
    "top_keep_indices",
    "uniform_keep_indices",
]
