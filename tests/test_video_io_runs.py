"""Laws of the plan: what is decoded, from where, and which keyframe is nearest."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from videos import NUM_FRAMES, indices_of, write_format, write_video

from hico.video_io import index, probe, pyav, read_video, recent
from hico.video_io.runs import SEEK_COST, nearest_keyframes, plan_runs
from hico.video_io.source import Source

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


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("name", ["h264.mp4", "hevc.mp4", "one_keyframe.mp4", "late.mp4"])
def test_a_clip_is_opened_once_and_no_packet_decoded_twice(tmp_path, monkeypatch, name, num_threads):
    """What the index has decoded goes on in the same decoder."""
    path = write_format(tmp_path, name)
    whole = read_video(path, num_frames=NUM_FRAMES, clip_len=1).frames
    opened, numbers = [], []
    open_source, decode = Source.open, pyav._Decoder._decode
    monkeypatch.setattr(Source, "open", lambda source: opened.append(source) or open_source(source))
    monkeypatch.setattr(
        pyav._Decoder, "_decode", lambda self, packet: numbers.append(packet and packet.pts) or decode(self, packet)
    )
    video = read_video(path, end=0.5, num_frames=12, clip_len=1, num_threads=num_threads)
    assert torch.equal(video.frames, whole[:12])
    assert len(opened) == 1
    fed = [number for number in numbers if number is not None]
    assert len(set(fed)) == len(fed)
    assert 0 not in fed, "decoded for the index"


def test_a_file_without_a_table_is_read_through_once(tmp_path, monkeypatch):
    """Windows of one recording share its index, until the file changes."""
    monkeypatch.setattr(recent, "MIN_PACKETS", 40)
    listed = []
    list_packets = index.list_packets
    monkeypatch.setattr(
        index, "list_packets", lambda *given, **named: listed.append(1) or list_packets(*given, **named)
    )
    path = write_video(tmp_path / "a.mkv", 72, b_frames=2)
    for first in (0, 30, 60, 12):
        start, end = max(0, first - 0.4) / 24, (first + 7.6) / 24
        assert indices_of(read_video(path, start=start, end=end, num_frames=8).frames) == list(range(first, first + 8))
    assert probe(path).num_frames == 72
    assert len(listed) == 1
    write_video(path, 48, b_frames=0)
    assert probe(path).num_frames == 48
    assert indices_of(read_video(path, num_frames=48, clip_len=1).frames) == list(range(48))
    assert len(listed) == 2
    table = write_video(tmp_path / "a.mp4", 72)
    monkeypatch.setattr(recent, "MAX_PACKETS", 100)
    for number in range(3):
        probe(write_video(tmp_path / f"{number}.mkv", 48))
        probe(table)
    assert [key[0] for key in recent._KEPT] == [str(tmp_path / f"{number}.mkv") for number in (1, 2)]
