"""Sampling: the published indices, and the laws that the default rule keeps."""

import itertools
import math

import pytest
import torch
from helpers import golden_cases
from hypothesis import given
from hypothesis import strategies as st

from hico.sampling import pad_to_clips, sample_frames

FRAMES = st.integers(1, 20_000)
RATES = st.one_of(st.sampled_from([1.0, 23.976, 24.0, 25.0, 29.97, 30.0, 60.0]), st.floats(0.1, 120.0))
CLIPS = st.integers(1, 16)


def _published(args: dict) -> list[int]:
    mode = args["sample"]
    return sample_frames(
        args["vlen"],
        args.get("input_fps", 30.0),
        mode=mode,
        num_frames=args["num_frames"],
        min_frames=args.get("min_num_frames", 1),
        max_frames=args.get("max_num_frames", -1),
        clip_len=args["local_num_frames"],
        fix_start=args["fix_start"],
        bounds="published",
    )


def _index_cases() -> list[dict]:
    files = [case.facts for case in golden_cases("C")]
    return [case for file in files for case in file.get("cases", ()) if "vlen" in case.get("args", ())]


@pytest.mark.golden
@pytest.mark.parametrize("case", _index_cases(), ids=lambda case: "-".join(map(str, case["args"].values())))
def test_published_indices(case):
    if "error" in case:
        with pytest.raises(ValueError, match="Known"):
            _published(case["args"])
        return
    indices = _published(case["args"])
    assert len(indices) == case["n"]
    if "indices" in case:
        assert indices == case["indices"]
    else:
        assert (indices[:64], indices[-64:], sum(indices)) == (case["first64"], case["last64"], case["sum"])


CHAT = [row for case in golden_cases("R") for row in case.facts.get("cases", ())]
"""Frames per second, frames in the file, and those that the releases take to answer."""


@pytest.mark.golden
@pytest.mark.parametrize("bounds", ["max_wins", "published"])
def test_the_releases_answer_from_multiples_of_eight_frames(bounds):
    settings = {"mode": "dynamic_fps1", "min_frames": 64, "max_frames": 512, "clip_len": 4, "bounds": bounds}
    assert len(CHAT) == 236
    assert [sample_frames(count, fps, multiple_of=8, **settings) for fps, count, _ in CHAT] == [row[2] for row in CHAT]
    in_training = [sample_frames(count, fps, **settings) for fps, count, _ in CHAT]
    assert sum(ours != row[2] for ours, row in zip(in_training, CHAT, strict=True)) == 68


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "middle", "num_frames": 8}, "multiple_of = 8 has no effect in the sampling mode 'middle'"),
        ({"mode": "fps2"}, "multiple_of = 8 has no effect in the sampling mode 'fps2'"),
        ({"mode": "linspace", "num_frames": 8, "bounds": "published"}, "no effect in the sampling mode 'linspace'"),
        ({"mode": "dual", "clip_len": 3}, "multiple_of is 8; it must be a multiple of the 3 frames of a clip"),
    ],
)
def test_a_multiple_that_cannot_be_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        sample_frames(100, 25.0, multiple_of=8, **settings)


def test_longva_repeats_frames_evenly_as_published():
    def taken(num_source, num_frames, **settings):
        return sample_frames(num_source, 30.0, mode="linspace", num_frames=num_frames, **settings)

    assert taken(3, 7, bounds="published") == [0, 0, 0, 1, 1, 1, 2]
    assert taken(1, 3, bounds="published") == [0, 0, 0]
    assert taken(33, 5, bounds="published") == taken(33, 5) == [0, 8, 16, 24, 32]
    assert taken(3, 7) == [0, 1, 2]


def test_a_rate_takes_whole_multiples_too():
    assert len(sample_frames(300, 30.0, rate=2.0, multiple_of=8)) == 16
    assert len(sample_frames(300, 30.0, rate=2.0)) == 20
    assert len(sample_frames(3000, 30.0, mode="dynamic_fps1", max_frames=62, multiple_of=8)) == 56


@given(FRAMES, RATES, CLIPS, st.sampled_from(["dual", "dynamic_fps1"]), st.integers(1, 600), st.integers(1, 600))
def test_whole_clip_modes_keep_bounds_and_clips(num_source, fps, clip_len, mode, one, other):
    least, most = sorted((one, other))
    indices = sample_frames(
        num_source, fps, mode=mode, min_frames=least, max_frames=most, clip_len=clip_len, bounds="max_wins"
    )
    assert 1 <= len(indices) <= most
    assert len(indices) % clip_len == 0 or most < clip_len
    whole = num_source // clip_len * clip_len
    assert len(indices) >= min(least, whole, most // clip_len * clip_len)
    assert indices == sorted(indices)
    assert indices[0] >= 0
    assert indices[-1] < num_source
    if num_source >= clip_len:
        assert len(set(indices)) == len(indices)


@given(FRAMES, RATES, st.sampled_from(["middle", "rand"]), st.integers(1, 600), st.integers(0, 2**31))
def test_intervals_give_distinct_frames_in_order(num_source, fps, mode, num_frames, seed):
    generator = torch.Generator().manual_seed(seed) if mode == "rand" else None
    indices = sample_frames(num_source, fps, mode=mode, num_frames=num_frames, generator=generator)
    assert len(indices) == min(num_frames, num_source)
    assert indices == sorted(set(indices))
    assert indices[0] >= 0
    assert indices[-1] < num_source


@given(FRAMES, RATES, st.sampled_from(["fps0.25", "fps1", "fps2", "fps30"]), st.integers(1, 600), CLIPS)
def test_rates_are_thinned_evenly_and_never_empty(num_source, fps, mode, most, clip_len):
    indices = sample_frames(num_source, fps, mode=mode, max_frames=most, clip_len=clip_len)
    assert 1 <= len(indices) <= most
    assert indices == sorted(indices)
    assert indices[-1] < num_source
    if most >= 8 and len(indices) > most // 2:
        assert indices[-1] >= num_source / 2, "the end of the video is sampled too"


def test_random_frames_follow_the_generator():
    def draw(seed: int) -> list[int]:
        return sample_frames(900, 30, mode="rand", num_frames=32, generator=torch.Generator().manual_seed(seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(2, 60), (10, 148), (34, 508), (35, 64), (100, 100), (600, 512)],
    ids=lambda value: str(value),
)
def test_dual_is_dense_for_short_and_sparse_for_long_videos(seconds, expected):
    assert len(sample_frames(30 * seconds, 30.0)) == expected


def test_a_rate_is_kept_until_the_maximum():
    assert len(sample_frames(3000, 30.0, rate=2)) == 200
    assert len(sample_frames(300, 30.0, rate=2)) == 20
    indices = sample_frames(30_000, 30.0, rate=2, max_frames=100)
    assert len(indices) == 100
    assert max(b - a for a, b in itertools.pairwise(indices)) <= 300


def test_the_minimum_beats_the_maximum_only_as_published():
    with pytest.raises(ValueError, match="min_frames 64 exceeds max_frames 8"):
        sample_frames(3000, 30.0, mode="dynamic_fps1", min_frames=64, max_frames=8)
    published = sample_frames(3000, 30.0, mode="dynamic_fps1", min_frames=64, max_frames=8, bounds="published")
    assert len(published) == 64


def test_a_maximum_between_two_clips_is_rounded_down():
    assert len(sample_frames(3000, 30.0, mode="dynamic_fps1", max_frames=18)) == 16
    assert len(sample_frames(3000, 30.0, mode="fps1", max_frames=18)) == 16
    assert len(sample_frames(3000, 30.0, mode="dynamic_fps1", max_frames=3)) == 3


def test_a_missing_minimum_or_maximum_gives_way_to_the_other():
    assert len(sample_frames(30_000, 30.0, max_frames=16)) == 16
    assert len(sample_frames(30_000, 30.0, min_frames=800)) == 800
    assert len(sample_frames(90_000, 30.0, mode="dynamic_fps1", max_frames=0)) == 3000


def test_a_start_inside_the_interval_stays_inside():
    assert sample_frames(8, 30.0, num_frames=4, fix_start=9) == [1, 3, 5, 7]


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf])
def test_a_frame_rate_must_be_positive(fps):
    with pytest.raises(ValueError, match="fps is"):
        sample_frames(10, fps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "midle", "num_frames": 4}, "did you mean 'middle'"),
        ({"mode": "fps0"}, "unknown sampling mode"),
        ({"mode": "middle"}, "needs num_frames"),
        ({"mode": "dual", "num_frames": 4}, "num_frames = 4 has no effect"),
        ({"mode": "fps2", "rate": 2}, "rate = 2 has no effect"),
        ({"mode": "rand", "num_frames": 4, "fix_start": 1}, "fix_start = 1 has no effect"),
        ({"num_frames": 0}, "at least 1, not 0"),
        ({"rate": math.nan}, "rate is nan"),
        ({"fix_start": -1}, "fix_start is -1"),
        ({"clip_len": 0}, "clip_len is 0"),
        ({"bounds": "publish"}, "did you mean 'published'"),
    ],
)
def test_bad_settings_name_the_value_and_the_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        sample_frames(100, 30.0, **settings)


def test_no_frames_is_an_error():
    with pytest.raises(ValueError, match="nothing to sample"):
        sample_frames(0, 30.0)


def test_padding_repeats_the_last_frame_or_refuses():
    assert pad_to_clips([3, 5, 9], 4) == [3, 5, 9, 9]
    assert pad_to_clips([3, 5, 9, 11], 4) == [3, 5, 9, 11]
    with pytest.raises(ValueError, match="3 frames do not split into clips of 4; drop 3, sample 1 more"):
        pad_to_clips([3, 5, 9], 4, pad="error")
    with pytest.raises(ValueError, match="unknown pad 'repeats'; did you mean 'repeat'"):
        pad_to_clips([3], 4, pad="repeats")


def test_a_rate_beyond_that_of_the_source_takes_every_frame_once():
    assert sample_frames(60, 30.0, mode="fps2000000") == list(range(60))
    assert sample_frames(60, 30.0, mode="fps30") == list(range(60))
