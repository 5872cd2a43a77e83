"""Compressors: the contract that every registered name keeps, the published numbers, and each one's own laws."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import golden_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hico.compressors.identity import IdentityCompressor
from hico.compressors.pooling import PoolingCompressor
from hico.compressors.resampler import ResamplerCompressor
from hico.compressors.temporal_merge import TemporalMergeCompressor
from hico.compressors.token_merge import TokenMergeCompressor
from hico.compressors.uneven import UnevenCompressor
from hico.ops.positions import sinusoid_table
from hico.registry import COMPRESSORS

TINY = {
    "token_merge": {"tokens_per_frame": 4, "tokens_per_image": 8},
    "temporal_merge": {"tokens_per_frame": 10},
    "pooling": {"stride": 2},
    "uneven": {"first_tokens": 16, "other_tokens": 4, "tokens_per_image": 9},
    "resampler": {"tokens_per_frame": 3},
    "identity": {},
}
"""Small settings of every compressor; clips of 3 x 4 x 6 tokens and images of 1 x 5 x 4 must be possible."""
GRIDS = [(3, 4, 6), (1, 5, 4)]
WIDTH, HEADS = 16, 2

every_compressor = pytest.mark.parametrize("name", COMPRESSORS.names())
every_grid = pytest.mark.parametrize("grid", GRIDS)


def build(name: str):
    if name not in TINY:
        pytest.fail(f"compressor {name!r} has no small settings; add a line to TINY in {__file__}")
    torch.manual_seed(0)
    return COMPRESSORS.build({"name": name, **TINY[name]}, hidden_size=WIDTH, num_heads=HEADS)


def tokens_for(grid: tuple[int, int, int], *, num_clips: int = 2) -> Tensor:
    return torch.randn(num_clips, math.prod(grid), WIDTH)


@every_compressor
@every_grid
def test_as_many_tokens_come_out_as_announced(name, grid):
    compressor = build(name)
    tokens = compressor(tokens_for(grid), grid)
    assert tokens.shape == (2, compressor.num_output_tokens(grid), WIDTH)
    assert tokens.isfinite().all()
    with torch.device("meta"):
        assert build(name).num_output_tokens(grid) == tokens.shape[1]


@every_compressor
@every_grid
def test_a_batch_equals_its_clips_one_by_one(name, grid):
    compressor, tokens = build(name).eval().double(), tokens_for(grid, num_clips=3).double()
    alone = torch.cat([compressor(clip, grid) for clip in tokens.split(1)])
    torch.testing.assert_close(compressor(tokens, grid), alone)
    assert torch.equal(compressor(tokens, grid), compressor(tokens, grid))


@every_compressor
@every_grid
def test_gradients_reach_the_tokens_and_every_parameter(name, grid):
    compressor, tokens = build(name), tokens_for(grid).requires_grad_()
    compressor(tokens, grid).square().sum().backward()
    assert tokens.grad.isfinite().all()
    assert tokens.grad.any(dim=-1).float().mean() > 0.5
    assert [n for n, p in compressor.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_compressor
@every_grid
def test_bfloat16_stays_close(name, grid):
    compressor, tokens = build(name).eval(), tokens_for(grid).bfloat16()
    expected = compressor(tokens.float(), grid)
    compressed = compressor.bfloat16()(tokens, grid)
    assert compressed.dtype == torch.bfloat16
    torch.testing.assert_close(compressed.float(), expected, rtol=0.02, atol=0.02)


@every_compressor
@every_grid
def test_saving_and_loading_gives_the_same_tokens(name, grid):
    compressor, tokens = build(name).eval(), tokens_for(grid)
    other = build(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    other.load_state_dict(compressor.state_dict())
    assert torch.equal(other.eval()(tokens, grid), compressor(tokens, grid))
    assert torch.equal(copy.deepcopy(compressor)(tokens, grid), compressor(tokens, grid))


@every_compressor
def test_tokens_that_do_not_fill_the_grid_are_named(name):
    with pytest.raises(ValueError, match="73 tokens per clip do not fill a grid of 3 x 4 x 6"):
        build(name)(torch.randn(2, 73, WIDTH), (3, 4, 6))


@every_compressor
@every_grid
def test_output_tokens_are_laid_out_in_steps_and_what_is_known_of_tokens_follows_them(name, grid):
    compressor, tokens = build(name).eval().double(), tokens_for(grid).double()
    num_kept, num_steps = compressor.num_output_tokens(grid), compressor.num_steps(grid)
    assert num_kept % num_steps == 0
    assert grid[0] % num_steps == 0
    if not compressor.carries:
        return
    step_of = torch.arange(grid[0], dtype=torch.float64).repeat_interleave(grid[1] * grid[2])
    facts = torch.stack([torch.ones_like(step_of), step_of], dim=-1).expand(2, -1, -1)
    carried = compressor.carry(facts, tokens, grid)
    assert carried.shape == (2, num_kept, 2)
    torch.testing.assert_close(carried[..., 0], torch.ones(2, num_kept, dtype=torch.float64))
    if num_steps == grid[0]:
        expected = torch.arange(num_steps, dtype=torch.float64).repeat_interleave(num_kept // num_steps)
        torch.testing.assert_close(carried[..., 1], expected.expand(2, -1))


# token_merge -------------------------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize(
    "case", [c for c in golden_cases("B") if "target_tokens" in c.config], ids=lambda case: case.name
)
def test_token_merge_matches_the_published_connector(case):
    config = case.config
    width, side, target = config["mm_hidden"], config["side"], config["target_tokens"]
    features = case.tensors["features"] if "features" in case.tensors else case["features_f16"].float()
    tokens = features.reshape(-1, config["tokens_in_per_clip"], width)
    grid = (config["tokens_in_per_clip"] // side**2, side, side)
    a_frame_is_no_image = {"tokens_per_image": 16} if config["compress"] else {}
    compressor = TokenMergeCompressor(hidden_size=width, num_heads=config["heads"], **a_frame_is_no_image)
    assert compressor.num_output_tokens(grid) == target
    case.assert_close(compressor(tokens, grid), "merged")


def test_token_merge_tells_an_image_from_a_clip():
    compressor = TokenMergeCompressor(hidden_size=8, num_heads=2, tokens_per_frame=3, tokens_per_image=5)
    assert compressor.num_output_tokens((1, 4, 4)) == 5
    assert compressor.num_output_tokens((2, 4, 4)) == 6


def test_token_merge_with_nothing_to_merge_returns_the_tokens_unchanged():
    compressor = TokenMergeCompressor(hidden_size=8, num_heads=2, tokens_per_image=12)
    tokens = torch.randn(2, 12, 8)
    assert compressor(tokens, (1, 3, 4)) is tokens


def test_token_merge_asked_for_more_than_there_is_names_both_numbers():
    compressor = TokenMergeCompressor(hidden_size=8, num_heads=2)
    with pytest.raises(ValueError, match=r"the 24 tokens of grid \(2, 3, 4\) into 32.*tokens_per_frame <= 12"):
        compressor.num_output_tokens((2, 3, 4))
    with pytest.raises(ValueError, match=r"the 12 tokens of grid \(1, 3, 4\) into 64.*tokens_per_image <= 12"):
        compressor(torch.randn(1, 12, 8), (1, 3, 4))


def test_token_merge_orders_differ_in_order_only():
    tokens, grid = torch.randn(1, 48, 8), (2, 4, 6)
    by_similarity, by_position = (
        TokenMergeCompressor(hidden_size=8, num_heads=2, tokens_per_frame=5, order=order)(tokens, grid)[0]
        for order in ("similarity", "position")
    )
    matches = (by_similarity[:, None] == by_position).all(dim=-1)
    assert (matches.sum(dim=1) == 1).all()
    assert not torch.equal(by_similarity, by_position)


def test_token_merge_settings_that_cannot_work_are_named():
    with pytest.raises(ValueError, match="hidden_size 8 does not split into 3 heads"):
        TokenMergeCompressor(hidden_size=8, num_heads=3)
    with pytest.raises(ValueError, match="tokens_per_frame 0"):
        TokenMergeCompressor(hidden_size=8, num_heads=2, tokens_per_frame=0)
    with pytest.raises(ValueError, match="'time'"):
        TokenMergeCompressor(hidden_size=8, num_heads=2, order="time")


# pooling -----------------------------------------------------------------------------------------------------------

VIDEOS = [
    (case, index)
    for case in golden_cases("F")
    for index, item in enumerate(case.config.get("items", []))
    if item.get("kind") == "video"
]


@pytest.mark.golden
@pytest.mark.parametrize(("case", "index"), VIDEOS, ids=[f"{case.name}-{index}" for case, index in VIDEOS])
def test_pooling_matches_the_published_order_and_values(case, index):
    projected, side = case[f"item{index}.projected"], case.config["side"]
    mode = case.config["pool"].split()[0]
    pooling = PoolingCompressor(hidden_size=projected.shape[-1], num_heads=1, mode=mode)
    tokens = pooling(projected.reshape(1, -1, projected.shape[-1]), (len(projected), side, side))
    case.assert_close(tokens[0], f"item{index}.tokens")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.sampled_from(["average", "max"]))
def test_pooling_reduces_each_window_of_each_frame(steps, rows, columns, stride, mode):
    pooling = PoolingCompressor(hidden_size=2, num_heads=1, stride=stride, mode=mode)
    if min(rows, columns) < stride:
        with pytest.raises(ValueError, match=f"{rows} x {columns} tokens are too small for windows of {stride}"):
            pooling.num_output_tokens((steps, rows, columns))
        return
    maps = torch.randn(1, steps, rows, columns, 2)
    reduce = {"average": torch.mean, "max": torch.amax}[mode]
    expected = [
        reduce(maps[:, t, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride], dim=(1, 2))
        for t in range(steps)
        for i in range(rows // stride)
        for j in range(columns // stride)
    ]
    assert pooling.num_output_tokens((steps, rows, columns)) == len(expected)
    tokens = pooling(maps.flatten(1, 3), (steps, rows, columns))
    torch.testing.assert_close(tokens, torch.stack(expected, dim=1))


@pytest.mark.parametrize("mode", ["average", "max"])
def test_pooling_to_a_square_gives_that_many_tokens_whatever_the_frame(mode):
    pooling = PoolingCompressor(hidden_size=4, num_heads=1, tokens_per_frame=9, mode=mode)
    for grid in [(2, 6, 6), (1, 7, 5), (3, 3, 4)]:
        tokens = pooling(torch.randn(1, math.prod(grid), 4), grid)
        assert tokens.shape[1] == pooling.num_output_tokens(grid) == 9 * grid[0]
    divides = torch.randn(1, 36, 4)
    windows = PoolingCompressor(hidden_size=4, num_heads=1, stride=2, mode=mode)
    torch.testing.assert_close(pooling(divides, (1, 6, 6)), windows(divides, (1, 6, 6)))
    with pytest.raises(ValueError, match="frames of 2 x 9 tokens are too small for 3 x 3 tokens"):
        pooling.num_output_tokens((1, 2, 9))


def test_pooling_settings_that_cannot_work_are_named():
    with pytest.raises(ValueError, match=r"stride \(2\) or tokens_per_frame \(16\), not both"):
        PoolingCompressor(hidden_size=4, num_heads=1, stride=2, tokens_per_frame=16)
    with pytest.raises(ValueError, match="tokens_per_frame 15 is not a square number; use 9 or 16"):
        PoolingCompressor(hidden_size=4, num_heads=1, tokens_per_frame=15)
    with pytest.raises(ValueError, match="stride 0 must be at least 1"):
        PoolingCompressor(hidden_size=4, num_heads=1, stride=0)
    with pytest.raises(ValueError, match=r"'mean'; known: average, max, bilinear"):
        PoolingCompressor(hidden_size=4, num_heads=1, mode="mean")


@pytest.mark.parametrize("mode", ["average", "max", "bilinear"])
def test_pooling_over_time_takes_windows_of_steps_together_and_leaves_images(mode):
    tokens, kind = torch.randn(2, 4 * 6 * 6, 8), torch.amax if mode == "max" else torch.mean
    frames = PoolingCompressor(hidden_size=8, num_heads=1, mode=mode)(tokens, (4, 6, 6)).unflatten(1, (2, 2, 9))
    pooling = PoolingCompressor(hidden_size=8, num_heads=1, mode=mode, temporal_stride=2)
    pooled = pooling(tokens, (4, 6, 6))
    assert pooled.shape[1] == pooling.num_output_tokens((4, 6, 6)) == 18
    torch.testing.assert_close(pooled, kind(frames, dim=2).flatten(1, 2))
    assert pooling.num_output_tokens((1, 6, 6)) == 9
    with pytest.raises(ValueError, match="3 steps of time do not split into windows of 2"):
        pooling.num_output_tokens((3, 6, 6))


def test_bilinear_pooling_samples_the_middle_of_each_window():
    pooling = PoolingCompressor(hidden_size=1, num_heads=1, stride=3, mode="bilinear")
    tokens = torch.randn(1, 36, 1)
    middles = tokens.view(6, 6)[1::3, 1::3]
    torch.testing.assert_close(pooling(tokens, (1, 6, 6)).view(2, 2), middles)


@pytest.mark.parametrize("name", ["pooling", "resampler", "temporal_merge", "token_merge", "uneven"])
@pytest.mark.parametrize("tokens_per_frame", [16, 49, 196])
def test_a_frame_takes_the_tokens_of_the_papers_or_the_error_says_what_it_can_take(name, tokens_per_frame):
    images = {"tokens_per_image": 64} if name == "token_merge" else {}
    settings = {"name": name, "tokens_per_frame": tokens_per_frame, **images}
    compressor, grid = COMPRESSORS.build(settings, hidden_size=8, num_heads=2), (4, 14, 14)
    if (name, tokens_per_frame) in {("temporal_merge", 16), ("uneven", 16), ("uneven", 196)}:
        told = {"temporal_merge": "leaves 49 to 196", "uneven": "tokens_per_frame can be .*13"}[name]
        if tokens_per_frame == 196:
            told = "tokens_per_frame can be"
        with pytest.raises(ValueError, match=told):
            compressor.num_output_tokens(grid)
        return
    assert compressor.num_output_tokens(grid) == 4 * tokens_per_frame
    assert compressor(torch.randn(1, 4 * 196, 8), grid).shape == (1, 4 * tokens_per_frame, 8)


# uneven, temporal_merge, resampler ---------------------------------------------------------------------------------


def test_uneven_pools_the_first_frame_finely_and_the_others_coarsely():
    uneven = UnevenCompressor(hidden_size=8, num_heads=1, tokens_per_frame=49)
    tokens, grid = torch.randn(2, 4 * 196, 8), (4, 14, 14)
    assert uneven.sides_of(grid) == [11, 5, 5, 5]
    frames = tokens.unflatten(1, (4, 196))
    fine, coarse = (PoolingCompressor(hidden_size=8, num_heads=1, tokens_per_frame=n) for n in (121, 25))
    expected = [fine(frames[:, 0], (1, 14, 14)), *(coarse(frames[:, t], (1, 14, 14)) for t in (1, 2, 3))]
    torch.testing.assert_close(uneven(tokens, grid), torch.cat(expected, dim=1))
    with pytest.raises(ValueError, match="frames of 3 x 4 tokens are too small for 4 x 4"):
        UnevenCompressor(hidden_size=8, num_heads=1, first_tokens=16, other_tokens=4).num_output_tokens((2, 3, 4))


@pytest.mark.parametrize(
    "wrong", [{}, {"first_tokens": 9}, {"tokens_per_frame": 4, "first_tokens": 9, "other_tokens": 4}]
)
def test_uneven_wants_one_way_of_saying_its_budget(wrong):
    with pytest.raises(ValueError, match=r"give tokens_per_frame .* or both first_tokens"):
        UnevenCompressor(hidden_size=8, num_heads=1, **wrong)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 10**6), st.data())
def test_merging_over_time_averages_the_most_similar_neighbours_of_each_place(steps, places, seed, data):
    num_keep = steps * data.draw(st.integers(-(-places // steps), places))
    tokens = torch.randn(steps, places, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    links = [
        (-float(torch.cosine_similarity(tokens[t, p], tokens[t - 1, p], dim=0)), t, p)
        for t in range(1, steps)
        for p in range(places)
    ]
    held = {(t, p) for _, t, p in sorted(links)[: steps * places - num_keep]}
    groups: dict[tuple[int, int], list] = {}
    first = {}
    for t in range(steps):
        for p in range(places):
            first[t, p] = first[t - 1, p] if (t, p) in held else (t, p)
            groups.setdefault(first[t, p], []).append(tokens[t, p])
    expected = torch.stack([torch.stack(members).mean(dim=0) for members in groups.values()])
    merge = TemporalMergeCompressor(hidden_size=4, num_heads=1, tokens_per_frame=num_keep // steps)
    torch.testing.assert_close(merge(tokens.flatten(0, 1)[None], (steps, 1, places))[0], expected)


def test_merging_over_time_leaves_images_whole():
    tokens = torch.randn(1, 12, 8)
    assert TemporalMergeCompressor(hidden_size=8, num_heads=2, tokens_per_frame=4)(tokens, (1, 3, 4)) is tokens


def test_the_resampler_reads_by_content_and_tells_times_apart():
    torch.manual_seed(0)
    resampler, grid = ResamplerCompressor(hidden_size=16, num_heads=2, tokens_per_frame=3).double(), (2, 3, 4)
    tokens = torch.randn(1, 24, 16, dtype=torch.float64)
    weights = {name: value.double() for name, value in resampler.state_dict().items()}
    times, rows, columns = (sinusoid_table(n, 16).double() for n in grid)
    keys = F.layer_norm(tokens[0], (16,)) + torch.stack(
        [times[t] + rows[h] + columns[w] for t in range(2) for h in range(3) for w in range(4)]
    )
    read = []
    for t in range(2):
        for query in F.layer_norm(weights["queries"], (16,)):
            q = weights["q_proj.weight"] @ (query + times[t]) + weights["q_proj.bias"]
            heads = []
            for head in (slice(0, 8), slice(8, 16)):
                k = keys @ weights["k_proj.weight"][head].T
                v = F.layer_norm(tokens[0], (16,)) @ weights["v_proj.weight"][head].T + weights["v_proj.bias"][head]
                heads.append(torch.softmax(k @ q[head] / 8**0.5, dim=0) @ v)
            read.append(weights["out_proj.weight"] @ torch.cat(heads) + weights["out_proj.bias"])
    torch.testing.assert_close(resampler(tokens, grid)[0], torch.stack(read))


def test_identity_returns_the_tokens_themselves():
    tokens = torch.randn(2, 24, 8)
    assert IdentityCompressor(hidden_size=8, num_heads=2)(tokens, (2, 3, 4)) is tokens
