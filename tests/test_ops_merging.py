"""Token merging: the published numbers, and the laws that merging keeps."""

import pytest
import torch
from helpers import golden_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hico.ops import merging
from hico.ops.merging import (
    MergePlan,
    apply_merge,
    match_tokens,
    merge_tokens,
    plan_merge,
    similarity_metric,
)

CONNECTORS = [case for case in golden_cases("B") if "target_tokens" in case.config]
SINGLE_STEPS = [case for case in golden_cases("B") if "r_requested" in case.config]
DEGENERATE = [case for case in golden_cases("B") if "all_zero" in case.config]


def plan_from(assignment_NL: Tensor, num_groups: int) -> MergePlan:
    sizes = torch.nn.functional.one_hot(assignment_NL, num_groups).sum(dim=1)
    return MergePlan(assignment_NL, sizes)


def clip_tokens(case) -> Tensor:
    """Regroup the case's frames into clips."""
    features = case.tensors.get("features")
    features = case["features_f16"].float() if features is None else features
    return features.reshape(-1, case.config["tokens_in_per_clip"], case.config["mm_hidden"])


def textbook_merge(tokens_NLD: Tensor, *, num_keep: int, num_heads: int) -> Tensor:
    """Merge as the papers describe it: every round on the averaged wide tokens, in float64, one clip after another."""
    merged = []
    for tokens_LD in tokens_NLD.double():
        sizes_L = torch.ones(len(tokens_LD), dtype=torch.float64)
        while len(tokens_LD) > num_keep:
            num_merge = min(len(tokens_LD) - num_keep, len(tokens_LD) // 2)
            metric = tokens_LD.unflatten(-1, (num_heads, -1)).mean(dim=1)
            metric = metric / metric.norm(dim=-1, keepdim=True)
            best, target = (metric[0::2] @ metric[1::2].T).max(dim=-1)
            order = best.argsort(descending=True)
            sums, sizes = (tokens_LD * sizes_L[:, None])[1::2].clone(), sizes_L[1::2].clone()
            for source in order[:num_merge].tolist():
                sums[target[source]] += tokens_LD[2 * source] * sizes_L[2 * source]
                sizes[target[source]] += sizes_L[2 * source]
            left = 2 * order[num_merge:]
            tokens_LD = torch.cat([tokens_LD[left], sums / sizes[:, None]])
            sizes_L = torch.cat([sizes_L[left], sizes])
        merged.append(tokens_LD)
    return torch.stack(merged)


@pytest.mark.golden
@pytest.mark.parametrize("case", CONNECTORS, ids=lambda case: case.name)
def test_merged_tokens_and_sizes_match_the_published_connector(case):
    tokens = clip_tokens(case)
    plan = plan_merge(similarity_metric(tokens, num_heads=case.config["heads"]), case.config["target_tokens"])
    case.assert_close(apply_merge(tokens, plan), "merged")
    case.assert_close(plan.sizes_NK[..., None].float(), "sizes")


@pytest.mark.golden
@pytest.mark.parametrize("case", [c for c in CONNECTORS if "round0" in c.tensors], ids=lambda case: case.name)
def test_the_first_round_matches_the_published_connector(case):
    tokens = clip_tokens(case)[:1]
    num_keep = case.config["tokens_in_per_clip"] - case.config["r_per_round"][0]
    case.assert_close(merge_tokens(tokens, num_keep=num_keep, num_heads=case.config["heads"]), "round0")


@pytest.mark.golden
@pytest.mark.parametrize("case", SINGLE_STEPS, ids=lambda case: case.name)
def test_a_single_step_matches_the_published_one(case):
    assignment = match_tokens(case["metric"], num_merge=case.config["r_requested"])
    plan = plan_from(assignment, case.config["N"] - case.config["r_effective"])
    counts = plan.sizes_NK[..., None].float()
    case.assert_close(apply_merge(case["x"], plan) * counts, "sum_merge")

    prior = case.tensors.get("prior_sizes", torch.ones_like(case["x"][..., :1]))
    merged = apply_merge(case["x"] * prior, plan) / apply_merge(prior, plan)
    case.assert_close(merged, "merged")
    case.assert_close(apply_merge(prior, plan) * counts, "sizes")
    case.assert_close(merged.take_along_dim(assignment[..., None], dim=1), "unmerged")


@pytest.mark.golden
@pytest.mark.parametrize("case", DEGENERATE, ids=lambda case: case.name)
def test_zero_tokens_merge_into_finite_ones(case):
    """The published matching divides zero by zero here and ours does not, so only what both promise is compared."""
    for name in ("zero_destination", "zero_source"):
        metric, x, facts = case[f"{name}.metric"], case[f"{name}.x"], case.config[name]
        plan = plan_from(match_tokens(metric, num_merge=facts["r"]), metric.shape[1] - facts["r"])
        merged = apply_merge(x, plan)
        assert merged.isfinite().all() == facts["finite"]
        assert merged.shape == case[f"{name}.merged"].shape
        assert plan.sizes_NK.sum() == sum(facts["sizes"])

    facts = case.config["all_zero"]
    frames, tokens_per_frame, width = case["constant.features"].shape
    plan = plan_merge(torch.zeros(1, frames * tokens_per_frame, width), facts["shape"][1])
    sizes = plan.sizes_NK.sort(descending=True).values[0].float()
    assert sizes.sum() == facts["sizes_sum"]
    assert sizes[:5].tolist() == facts["sizes_sorted_desc_first5"]
    assert not apply_merge(torch.zeros(1, frames * tokens_per_frame, width), plan).any()


@pytest.mark.parametrize("num_keep", [1, 5, 12, 23, 24, 39])
def test_merging_equals_the_textbook_formulation_in_value_and_order(num_keep):
    tokens = torch.randn(3, 40, 24).double()
    expected = textbook_merge(tokens, num_keep=num_keep, num_heads=3)
    torch.testing.assert_close(merge_tokens(tokens, num_keep=num_keep, num_heads=3), expected)


sizes_and_targets = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@settings(max_examples=60, deadline=None)
@given(
    sizes_and_targets,
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(merging.ORDERS),
    st.integers(0, 9),
)
def test_laws_hold_for_every_size(size_and_target, num_rows, num_heads, order, seed):
    num_tokens, num_keep = size_and_target
    tokens = torch.randn(num_rows, num_tokens, 8, generator=torch.Generator().manual_seed(seed)).double()
    plan = plan_merge(similarity_metric(tokens, num_heads=num_heads), num_keep, order=order)
    merged = apply_merge(tokens, plan)

    assert merged.shape == (num_rows, num_keep, 8)
    assert plan.assignment_NL.min() >= 0
    assert plan.sizes_NK.min() >= 1
    assert torch.equal(plan.sizes_NK, plan_from(plan.assignment_NL, num_keep).sizes_NK)
    total = (merged * plan.sizes_NK[..., None]).sum(dim=1)
    torch.testing.assert_close(total, tokens.sum(dim=1))
    torch.testing.assert_close(merge_tokens(tokens, num_keep=num_keep, num_heads=num_heads, order=order), merged)


def test_order_by_position_is_a_reordering_by_first_member():
    tokens = torch.randn(2, 50, 16)
    metric = similarity_metric(tokens, num_heads=2)
    by_position, by_similarity = plan_merge(metric, 11, order="position"), plan_merge(metric, 11)
    for position, similarity in zip(
        by_position.assignment_NL.tolist(), by_similarity.assignment_NL.tolist(), strict=True
    ):
        firsts = [position.index(group) for group in range(11)]
        assert firsts == sorted(firsts)
        assert len(set(zip(position, similarity, strict=True))) == 11
    assert not torch.equal(by_position.assignment_NL, by_similarity.assignment_NL)


def test_as_many_tokens_as_there_are_come_back_unchanged():
    tokens = torch.randn(2, 9, 4, requires_grad=True)
    assert merge_tokens(tokens, num_keep=9, num_heads=2) is tokens
    for order in merging.ORDERS:
        plan = plan_merge(similarity_metric(tokens, num_heads=2), 9, order=order)
        assert torch.equal(plan.assignment_NL, torch.arange(9).expand(2, -1))
        assert torch.equal(apply_merge(tokens, plan), tokens)


def test_reordering_the_sources_changes_nothing():
    tokens = torch.randn(1, 30, 8)
    permuted = tokens.clone()
    permuted[:, 0::2] = tokens[:, 0::2].flip(1)
    for num_keep in (15, 20):
        merged, again = (merge_tokens(x, num_keep=num_keep, num_heads=1) for x in (tokens, permuted))
        torch.testing.assert_close(merged, again)


def test_scaling_all_tokens_changes_no_decision():
    metric = torch.randn(2, 40, 8)
    assert torch.equal(plan_merge(metric, 7).assignment_NL, plan_merge(metric * 1000, 7).assignment_NL)


@pytest.mark.parametrize("num_keep", [64, 130])
def test_a_row_alone_equals_the_row_in_a_batch_bit_for_bit(num_keep):
    tokens = torch.randn(5, 196, 64)
    batch = merge_tokens(tokens, num_keep=num_keep, num_heads=4)
    for row in range(5):
        assert torch.equal(merge_tokens(tokens[row : row + 1], num_keep=num_keep, num_heads=4)[0], batch[row])
    assert torch.equal(merge_tokens(tokens[1:4], num_keep=num_keep, num_heads=4), batch[1:4])


def test_the_result_does_not_depend_on_how_the_work_is_cut(monkeypatch):
    metric = torch.randn(4, 121, 16)
    whole = plan_merge(metric, 17)
    for limit in (1, 100, 61 * 60, 4 * 60 * 60):
        monkeypatch.setattr(merging, "_MAX_SIMILARITIES", {"default": limit})
        assert torch.equal(plan_merge(metric, 17).assignment_NL, whole.assignment_NL)


def test_one_and_two_threads_agree_bit_for_bit():
    tokens = torch.randn(8, 400, 64)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 2):
            torch.set_num_threads(num_threads)
            results.append(merge_tokens(tokens, num_keep=50, num_heads=4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])


def test_similarities_are_exact_so_no_order_of_summation_changes_them():
    units = torch.nn.functional.normalize(torch.randn(1, 50, 64, dtype=torch.float64), dim=-1)
    units = (units * merging._UNIT).round()
    exact = units[0].long() @ units[0].long().T
    assert torch.equal((units @ units.mT)[0].long(), exact)
    assert exact.abs().max() < 2**53


def test_equal_tokens_tie_and_the_lowest_index_wins():
    row = torch.randn(1, 1, 8)
    plan = plan_merge(row.expand(2, 20, 8), 13)
    # sources 0, 2, ... tie: the first seven go to the first target, the last three stay in front
    expected = torch.tensor([3, 3, 3, 4, 3, 5, 3, 6, 3, 7, 3, 8, 3, 9, 0, 10, 1, 11, 2, 12])
    assert torch.equal(plan.assignment_NL, expected.expand(2, -1))


def test_constant_tokens_stay_constant():
    tokens = torch.randn(8).expand(1, 100, 8)
    torch.testing.assert_close(merge_tokens(tokens, num_keep=64, num_heads=2), tokens[:, :64])


def test_nan_and_infinity_stay_within_their_row_and_output_token():
    tokens = torch.randn(2, 60, 16)
    clean = merge_tokens(tokens, num_keep=9, num_heads=2)
    tokens[1, 5, 3] = float("nan")
    tokens[1, 6, 4] = float("inf")
    merged = merge_tokens(tokens, num_keep=9, num_heads=2)
    assert torch.equal(merged[0], clean[0])
    assert 7 <= merged[1].isfinite().all(dim=-1).sum() < 9


def test_bfloat16_tokens_are_planned_and_averaged_as_in_float32():
    tokens = torch.randn(2, 196, 64).bfloat16()
    half, full = (similarity_metric(x, num_heads=4) for x in (tokens, tokens.float()))
    assert half.dtype == torch.float32
    assert torch.equal(plan_merge(half, 64).assignment_NL, plan_merge(full, 64).assignment_NL)
    merged = merge_tokens(tokens, num_keep=64, num_heads=4)
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged, merge_tokens(tokens.float(), num_keep=64, num_heads=4).bfloat16())


def test_autocast_changes_nothing():
    tokens = torch.randn(2, 196, 64)
    expected = merge_tokens(tokens, num_keep=64, num_heads=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(merge_tokens(tokens, num_keep=64, num_heads=4), expected)


def test_the_gradient_of_a_mean_is_shared_equally():
    tokens = torch.randn(2, 30, 8, requires_grad=True)
    plan = plan_merge(similarity_metric(tokens, num_heads=2), 7)
    weights = torch.randn(2, 7, 8)
    (apply_merge(tokens, plan) * weights).sum().backward()
    expected = (weights / plan.sizes_NK[..., None]).take_along_dim(plan.assignment_NL[..., None], dim=1)
    torch.testing.assert_close(tokens.grad, expected)


def test_gradients_match_finite_differences():
    tokens = torch.randn(2, 12, 4, dtype=torch.float64, requires_grad=True)
    plan = plan_merge(similarity_metric(tokens, num_heads=2), 5)
    assert torch.autograd.gradcheck(lambda x: apply_merge(x, plan), tokens)


def test_no_rows_give_no_rows():
    assert merge_tokens(torch.zeros(0, 16, 8), num_keep=4, num_heads=2).shape == (0, 4, 8)


def test_errors_name_the_numbers():
    tokens = torch.randn(1, 10, 8)
    with pytest.raises(ValueError, match="10 tokens into 11"):
        merge_tokens(tokens, num_keep=11, num_heads=2)
    with pytest.raises(ValueError, match="10 tokens into 0"):
        merge_tokens(tokens, num_keep=0, num_heads=2)
    with pytest.raises(ValueError, match="width 8 do not split into 3 heads"):
        merge_tokens(tokens, num_keep=5, num_heads=3)
    with pytest.raises(ValueError, match=r"'similar'.*similarity, position"):
        merge_tokens(tokens, num_keep=5, num_heads=2, order="similar")
    for num_tokens, num_merge in ((1, 1), (10, 0)):
        with pytest.raises(ValueError, match=f"cannot merge {num_merge} of {num_tokens} tokens"):
            match_tokens(tokens[:, :num_tokens], num_merge=num_merge)
    plan = plan_merge(similarity_metric(tokens, num_heads=2), 5)
    with pytest.raises(ValueError, match=r"\(1, 10\).*\(1, 9\)"):
        apply_merge(tokens[:, :9], plan)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_repeats_itself_and_plans_as_the_cpu():
    tokens = torch.randn(9, 784, 256)
    metric = similarity_metric(tokens, num_heads=16)
    plan, on_cpu = plan_merge(metric.cuda(), 64), plan_merge(metric, 64)
    assert torch.equal(plan.assignment_NL.cpu(), on_cpu.assignment_NL)
    runs = [merge_tokens(tokens.cuda(), num_keep=64, num_heads=16) for _ in range(5)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    alone = merge_tokens(tokens[3:4].cuda(), num_keep=64, num_heads=16)
    assert torch.equal(alone[0], runs[0][3])
    torch.testing.assert_close(runs[0].cpu(), apply_merge(tokens, on_cpu))
