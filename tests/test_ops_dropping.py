import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hico.ops import dropping
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

COUNTS = st.integers(1, 300).flatmap(lambda num_tokens: st.tuples(st.just(num_tokens), st.integers(0, num_tokens)))


def is_ordered_choice(indices, num_tokens, num_keep):
    return (
        indices.dtype == torch.int64
        and len(indices) == num_keep
        and bool((indices.diff() > 0).all())
        and (num_keep == 0 or 0 <= indices[0] <= indices[-1] < num_tokens)
    )


@given(COUNTS)
def test_choices_are_strictly_increasing_and_in_range(counts):
    num_tokens, num_keep = counts
    generator = torch.Generator().manual_seed(num_tokens)
    assert is_ordered_choice(uniform_keep_indices(*counts), *counts)
    assert is_ordered_choice(random_keep_indices(*counts, generator=generator), *counts)
    assert is_ordered_choice(top_keep_indices(torch.rand(num_tokens, generator=generator), num_keep), *counts)


@given(COUNTS)
@example((187, 175))
def test_uniform_choice_is_even_and_keeps_the_ends(counts):
    num_tokens, num_keep = counts
    indices = uniform_keep_indices(num_tokens, num_keep)
    if num_keep > 1:
        assert (indices[0], indices[-1]) == (0, num_tokens - 1)
        # As whole numbers: the i-th of K steps from 0 to L - 1 lies within one token of i * (L - 1) / (K - 1).
        distance = indices * (num_keep - 1) - torch.arange(num_keep) * (num_tokens - 1)
        assert distance.abs().max() <= num_keep - 1


def test_top_choice_prefers_high_scores_then_early_tokens():
    scores = torch.tensor([0.0, 3.0, 1.0, 0.0, 3.0, 1.0])
    assert top_keep_indices(scores, 3).tolist() == [1, 2, 4]
    assert top_keep_indices(scores, 5).tolist() == [0, 1, 2, 4, 5]
    assert top_keep_indices(torch.zeros(100), 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("num_keep", [-1, 6])
def test_choices_out_of_range_say_so(num_keep):
    for choose in (
        lambda: uniform_keep_indices(5, num_keep),
        lambda: top_keep_indices(torch.rand(5), num_keep),
        lambda: random_keep_indices(5, num_keep, generator=torch.Generator()),
    ):
        with pytest.raises(ValueError, match=f"cannot keep {num_keep} of 5 tokens; ask for 0 to 5"):
            choose()


def test_random_choice_follows_its_generator():
    chosen = [random_keep_indices(50, 20, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_a_ratio_keeps_no_more_than_there_is(num_tokens, ratio):
    assert 0 <= keep_count(num_tokens, ratio) <= num_tokens


@given(st.lists(st.integers(0, 500), max_size=12), st.integers(0, 3000))
def test_a_budget_is_spent_whole_and_in_proportion(counts, budget):
    shares = share_budget(counts, budget)
    total = sum(counts)
    assert sum(shares) == min(budget, total)
    for share, count in zip(shares, counts, strict=True):
        assert 0 <= share <= count
        if budget < total:
            assert abs(share * total - budget * count) < total


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4), st.booleans())
def test_packed_rows_list_what_is_kept(keep, pad_left):
    keep_BS = torch.tensor(keep)
    length = int(keep_BS.sum(1).max())
    packed = pack_rows(keep_BS, length, pad_left=pad_left)
    for row, kept in zip(packed.tolist(), keep, strict=True):
        positions = [place for place, stays in enumerate(kept) if stays]
        padding = [-1] * (length - len(positions))
        assert row == (padding + positions if pad_left else positions + padding)


def test_gathered_rows_follow_their_index_and_padding_holds_the_fill():
    values = torch.arange(24.0, requires_grad=True).view(2, 4, 3)
    index = torch.tensor([[3, 0, -1], [-1, 1, 2]])
    gathered = gather_rows(values, index, fill=-7.0)
    pad = torch.full((3,), -7.0)
    expected = torch.stack(
        [torch.stack([values[0, 3], values[0, 0], pad]), torch.stack([pad, values[1, 1], values[1, 2]])]
    )
    assert torch.equal(gathered, expected)
    shared = gather_rows(values[:1], index)
    assert torch.equal(shared[1, 1:], values[0, 1:3])
    (gradient,) = torch.autograd.grad(gathered.sum(), values)
    assert gradient.sum((1, 2)).tolist() == [6, 6]
    assert torch.equal(
        gather_rows(torch.eye(4, dtype=torch.bool)[:2], index), torch.tensor([[0, 1, 0], [0, 1, 0]]) > 0
    )


def test_spans_are_runs_of_a_bool_mask_or_given_numbers():
    mask = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0]]) > 0
    assert span_ids(mask).tolist() == [[1, 1, 0, 2, 0, 3, 3], [0] * 7]
    numbers = torch.tensor([[2, 2, 1, 1, 0]], dtype=torch.int32)
    assert span_ids(numbers).tolist() == numbers.tolist()
    with pytest.raises(TypeError, match="float32"):
        span_ids(mask.float())
    with pytest.raises(ValueError, match=r"shape \(7,\)"):
        span_ids(mask[0])
    with pytest.raises(ValueError, match="holds -2"):
        span_ids(-numbers)


def full_attention_scores(queries, keys, index, scaling, mask, window):
    """Every row by row, with repeated keys: what `query_row_scores` must not do, and must equal."""
    batch, num_heads = queries.shape[:2]
    keys = keys.repeat_interleave(num_heads // keys.shape[1], 1)
    scores = torch.zeros(batch, keys.shape[2])
    for row in range(batch):
        seen_by = [(place, position) for place, position in enumerate(index[row].tolist()) if position >= 0]
        for place, position in seen_by:
            seen = torch.arange(keys.shape[2]) <= position
            if window is not None:
                seen &= torch.arange(keys.shape[2]) > position - window
            seen &= mask[row]
            if not seen.any():
                continue
            logits = (keys[row] @ queries[row, :, place, :, None])[..., 0] * scaling
            weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
            scores[row] += weights.mean(0) / len(seen_by)
    return scores


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("limit", [2**26, 1])
def test_query_row_scores_equal_full_attention(window, limit, monkeypatch):
    monkeypatch.setattr(dropping, "MAX_SCORE_ELEMENTS", limit)
    queries, keys = torch.randn(3, 6, 4, 8), torch.randn(3, 2, 11, 8)
    index = torch.tensor([[0, 5, 10, 7], [3, -1, 9, -1], [-1, -1, -1, -1]])
    mask = torch.rand(3, 11) > 0.3
    mask[0, 0] = False  # the first query sees nothing at all
    scores = query_row_scores(queries, keys, index, scaling=0.4, key_mask_BN=mask, window=window)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, full_attention_scores(queries, keys, index, 0.4, mask, window))
    assert scores[2].tolist() == [0.0] * 11
    everything = torch.ones(3, 11, dtype=torch.bool)
    unmasked = query_row_scores(queries, keys, index, scaling=0.4, window=window)
    torch.testing.assert_close(unmasked, full_attention_scores(queries, keys, index, 0.4, everything, window))


def test_scores_of_half_precision_are_float32():
    queries, keys = torch.randn(1, 2, 1, 8).bfloat16(), torch.randn(1, 1, 5, 8).bfloat16()
    index = torch.tensor([[4]])
    scores = query_row_scores(queries, keys, index, scaling=1.0)
    torch.testing.assert_close(scores, query_row_scores(queries.float(), keys.float(), index, scaling=1.0))
    torch.testing.assert_close(scores.sum(), torch.tensor(1.0))
