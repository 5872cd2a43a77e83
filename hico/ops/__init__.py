"""Tensor maths: pure functions, tensors in, tensors out."""

from hico.ops.merging import MergePlan, apply_merge, match_tokens, merge_tokens, plan_merge, similarity_metric

__all__ = ["MergePlan", "apply_merge", "match_tokens", "merge_tokens", "plan_merge", "similarity_metric"]
