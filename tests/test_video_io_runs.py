"""Laws of the plan: what is decoded, from where, and which keyframe is nearest."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hico.video_io.runs import SEEK_COST, nearest_keyframes, plan_runs

FRAME_SETS = st.sets(st.integers(0, 3000), min_size=1, max_size=80).map(sorted)
STARTS = st.sets(st.integers(1, 3000), max_size=60).map(lambda starts: [0, *sorted(starts)])


@given(FRAME_SETS, STARTS, st.integers(1, 8))
def test_runs_cover_the_wanted_frames_in_order(wanted, starts, num_threads):
    runs = plan_runs(wanted, starts, num_threads=num_threads)
    assert [here for run in runs for here in range(run.first, run.last)] == list(range(len(wanted)))
    for run in runs:
        start = starts[run.start]
        assert start <= wanted[run.first]
        assert run.start + 1 == len(starts) or starts[run.start + 1] > wanted[run.first]


@given(FRAME_SETS, STARTS)
def test_one_thread_decodes_least(wanted, starts):
    """Neither a seek per GOP nor one pass decodes fewer frames, a seek counted as SEEK_COST frames."""
    runs = plan_runs(wanted, starts)

    def cost(runs):
        return sum(wanted[run.last - 1] - starts[run.start] + 1 + SEEK_COST for run in runs)

    one_pass = wanted[-1] - starts[runs[0].start] + 1 + SEEK_COST
    assert cost(runs) <= one_pass


@given(FRAME_SETS, STARTS)
def test_nearest_keyframes_are_nearest(wanted, starts):
    seconds = np.arange(3001) / 0.5
    moved = nearest_keyframes(wanted, starts, seconds)
    assert moved == sorted(moved)
    for before, after in zip(wanted, moved, strict=True):
        assert after in starts
        assert abs(after - before) == min(abs(start - before) for start in starts)
