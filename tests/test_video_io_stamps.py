"""Video in: files whose stamps are shared, jump, are guessed, missing or trimmed, and streams without true keyframes.

Every file is read whole, sparsely and in a window, on one, two and four threads.
"""

import logging
import shutil
import subprocess

import av
import numpy as np
import pytest
import torch
from videos import (
    coloured_frame,
    cut_by_copy,
    indices_of,
    join,
    set_edit_list,
    truncate,
    write_video,
)

from hico.sampling import sample_frames
from hico.video_io import probe, read_video

THREADS = (1, 2, 4)


def check(path, caplog, expected, seconds, *, notes=0, says="", slack=2e-3):
    """Hold all ways of reading a file against the frames and times that are right."""
    caplog.set_level(logging.WARNING)
    info = probe(path)
    assert info.num_frames == len(expected)
    for num_threads in THREADS:
        for num_frames in (len(expected), 1, 3, 7, 20):
            caplog.clear()
            video = read_video(path, num_frames=num_frames, clip_len=1, num_threads=num_threads)
            wanted = sample_frames(len(expected), info.fps, num_frames=num_frames, clip_len=1)
            assert indices_of(video.frames) == [expected[position] for position in wanted]
            np.testing.assert_allclose(video.seconds, np.asarray(seconds)[wanted], atol=slack)
            assert video.num_lost == 0
            assert [record.levelno for record in caplog.records] == [logging.WARNING] * notes
            assert says in caplog.text
        whole = read_video(path, num_frames=len(expected), clip_len=1, num_threads=num_threads)
        start, end = whole.seconds[len(expected) // 2].item(), whole.seconds[-1].item()
        part = read_video(path, start=start, end=end, num_frames=500, clip_len=1, num_threads=num_threads)
        assert indices_of(part.frames) == expected[len(expected) // 2 : -1]


def write_part(path, first, num_frames, **settings):
    """Write frames ``first`` and following; the clock starts at 0."""
    whole = write_video(path.with_name("whole_" + path.name), first + num_frames, **{"gop": 1, **settings})
    with av.open(str(whole)) as read, av.open(str(path), "w") as write:
        stream = write.add_stream("mpeg2video" if path.suffix in {".vob", ".mpg"} else "libx264", rate=24)
        stream.height = stream.width = 64
        stream.pix_fmt, stream.codec_context.gop_size, stream.codec_context.max_b_frames = "yuv420p", 12, 2
        if stream.name == "libx264":
            stream.options = {"preset": "veryfast", "sc_threshold": "0"}
        for number, frame in enumerate(list(read.decode(video=0))[first:]):
            fresh = av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), format="rgb24")
            fresh.pts, fresh.time_base = number, 1 / stream.codec_context.framerate
            write.mux(stream.encode(fresh))
        write.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("suffix", ["ts", "mkv", "flv", "vob", "mpg"])
def test_joined_files_give_every_frame_and_times_that_go_on(tmp_path, caplog, suffix):
    parts = [write_part(tmp_path / f"a.{suffix}", 0, 30), write_part(tmp_path / f"b.{suffix}", 30, 30)]
    path = join(tmp_path / f"joined.{suffix}", *parts)
    check(path, caplog, list(range(60)), np.arange(60) / 24, notes=1, says="its clock starts anew")


@pytest.mark.parametrize("suffix", ["mkv", "webm", "flv", "ts"])
def test_more_than_two_joined_files_give_every_frame(tmp_path, caplog, suffix):
    settings = {"codec": "libvpx-vp9"} if suffix == "webm" else {"b_frames": 2}
    parts = [write_video(tmp_path / f"{number}.{suffix}", number, **settings) for number in (30, 20, 40, 25)]
    path = join(tmp_path / f"joined.{suffix}", *parts)
    expected = [*range(30), *range(20), *range(40), *range(25)]
    check(path, caplog, expected, np.arange(115) / 24, notes=1, says="its clock starts anew 3 times")


@pytest.mark.parametrize("as_bytes", [False, True])
def test_joined_flv_files_of_other_sizes_give_every_frame(tmp_path, as_bytes):
    """The second part needs the header of its own encoder, and reads begin behind it."""
    parts = [write_video(tmp_path / f"{side}.flv", 48, size=(side, side), b_frames=2) for side in (64, 128, 96)]
    path = join(tmp_path / "joined.flv", *parts)
    source = path.read_bytes() if as_bytes else path
    for num_threads in THREADS:
        settings = {"size": 64, "clip_len": 1, "num_threads": num_threads}
        assert indices_of(read_video(source, num_frames=144, **settings).frames) == [*range(48)] * 3
        for first in (30, 60, 80, 100, 130):
            start, end = (first - 0.4) / 24, (first + 5.6) / 24
            video = read_video(source, start=start, end=end, num_frames=6, **settings)
            assert indices_of(video.frames) == [number % 48 for number in range(first, first + 6)]
            assert video.num_lost == 0


@pytest.mark.parametrize("offset", [1000, 60])
def test_a_clock_that_jumps_ahead_in_a_broadcast_is_mended(tmp_path, caplog, offset):
    first = write_video(tmp_path / "a.ts", 24, b_frames=2)
    second = write_video(tmp_path / "b.ts", 24, b_frames=2, offset=offset)
    path = join(tmp_path / "joined.ts", first, second)
    expected = [*range(24), *range(24)]
    check(path, caplog, expected, np.arange(48) / 24, notes=1, says="its clock starts anew")


def test_a_standstill_in_other_containers_is_no_jump(tmp_path, caplog):
    seconds = [*(np.arange(24) / 24), *(30 + np.arange(24) / 24)]
    path = write_video(tmp_path / "a.mkv", 48, seconds=seconds, b_frames=2)
    check(path, caplog, list(range(48)), seconds)


def test_a_playlist_with_a_discontinuity_gives_every_frame(tmp_path, caplog):
    for name in "ab":
        write_part(tmp_path / f"{name}.ts", 30 * (name == "b"), 30)
    path = tmp_path / "list.m3u8"
    path.write_text(
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.25,\na.ts\n#EXT-X-DISCONTINUITY\n"
        "#EXTINF:1.25,\nb.ts\n#EXT-X-ENDLIST\n"
    )
    check(path, caplog, list(range(60)), np.arange(60) / 24, notes=1, says="its clock starts anew")


@pytest.mark.parametrize("b_frames", [0, 3])
def test_frames_that_share_a_stamp_are_all_there(tmp_path, caplog, b_frames):
    """Matroska counts milliseconds: at 2,000 frames per second each stamp stands for two."""
    path = write_video(tmp_path / "fast.mkv", 60, fps=2000, b_frames=b_frames)
    says = "have the time of the frame before"
    check(path, caplog, list(range(60)), np.arange(60) / 2000, notes=1, says=says, slack=6e-4)


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("suffix", ["mp4", "ts", "mkv"])
def test_a_recovery_point_is_no_keyframe(tmp_path, caplog, suffix, b_frames):
    """With intra refresh the stream heals in the course of a second after what is marked as a keyframe."""
    options = {"x264-params": "intra-refresh=1:keyint=24"}
    path = write_video(tmp_path / f"a.{suffix}", 120, size=(128, 128), gop=24, b_frames=b_frames, options=options)
    check(path, caplog, list(range(120)), np.arange(120) / 24)
    whole = read_video(path, num_frames=120, clip_len=1, num_threads=1).frames
    for num_threads in THREADS:
        video = read_video(path, num_frames=5, clip_len=1, num_threads=num_threads)
        assert torch.equal(video.frames, whole[sample_frames(120, 24, num_frames=5, clip_len=1)]), "to the last bit"


@pytest.mark.parametrize("b_frames", [1, 2])
@pytest.mark.parametrize("suffix", ["avi", "asf", "mkv", "mp4"])
def test_mpeg4_comes_in_order_where_stamps_are_guessed(tmp_path, caplog, suffix, b_frames):
    path = write_video(tmp_path / f"a.{suffix}", 48, codec="mpeg4", gop=12, b_frames=b_frames)
    check(path, caplog, list(range(48)), np.arange(48) / 24)


@pytest.mark.parametrize("suffix", ["avi", "asf"])
def test_h264_comes_in_order_where_stamps_are_guessed(tmp_path, caplog, suffix):
    path = write_video(tmp_path / f"a.{suffix}", 48, b_frames=3)
    check(path, caplog, list(range(48)), np.arange(48) / 24)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="only FFmpeg's command line can encode with libxvid")
@pytest.mark.parametrize("b_frames", [1, 2, 3])
def test_packed_b_frames_come_in_order(tmp_path, b_frames):
    path, frames = tmp_path / "xvid.avi", b"".join(coloured_frame(index).tobytes() for index in range(60))
    command = (
        f"ffmpeg -v error -f rawvideo -pix_fmt rgb24 -s 64x64 -r 25 -i - -c:v libxvid -bf {b_frames} -g 12 {path}"
    )
    if subprocess.run(command.split(), input=frames).returncode:
        pytest.skip("this FFmpeg has no libxvid")
    count = probe(path).num_frames
    assert count >= 57, "the encoder drops a few"
    for num_threads in THREADS:
        video = read_video(path, num_frames=count, clip_len=1, num_threads=num_threads)
        assert indices_of(video.frames)[:55] == list(range(55))
        part = indices_of(read_video(path, num_frames=9, clip_len=1, num_threads=num_threads).frames)
        assert part == sample_frames(count, 25, num_frames=9, clip_len=1)
        assert video.num_lost == 0


@pytest.mark.parametrize("codec", ["mpeg2video", "mpeg1video", "libx264"])
@pytest.mark.parametrize("suffix", ["mpg", "vob"])
@pytest.mark.parametrize("size", [64, 256])
def test_program_streams_lose_nothing_after_a_seek(tmp_path, caplog, suffix, codec, size):
    path = write_video(tmp_path / f"a.{suffix}", 120, codec=codec, fps=25, b_frames=2, size=(size, size))
    check(path, caplog, list(range(120)), np.arange(120) / 25)


def test_empty_chunks_of_avi_take_their_time(tmp_path, caplog):
    """FFmpeg fills gaps of the clock with empty chunks, as a screen recorder does."""
    seconds = [index / 24 for index in (*range(24), *range(24, 72, 2))]
    path = write_video(tmp_path / "a.avi", 48, b_frames=0, gop=12)
    with av.open(str(path)) as read, av.open(str(tmp_path / "gaps.avi"), "w") as write:
        stream = write.add_stream_from_template(read.streams.video[0])
        for number, packet in enumerate(read.demux(read.streams.video[0])):
            if packet.size:
                packet.stream = stream
                packet.pts = packet.dts = round(seconds[number] * 24)
                write.mux(packet)
    check(tmp_path / "gaps.avi", caplog, list(range(48)), seconds)


def test_an_edit_list_that_trims_the_end_is_no_damage(tmp_path, caplog):
    path = set_edit_list(write_video(tmp_path / "a.mp4", 48, b_frames=2), [(1000, 1024)])
    check(path, caplog, list(range(24)), np.arange(24) / 24)


def test_an_edit_list_of_two_entries_loses_nothing(tmp_path, caplog):
    path = write_video(tmp_path / "a.mp4", 48, b_frames=0, gop=12)
    set_edit_list(path, [(500, 0), (1000, 18 * 512)])
    expected = [*range(12), *range(18, 42)]
    check(path, caplog, expected, np.arange(36) / 24)


def test_a_packet_without_a_stamp_is_alone(tmp_path, caplog):
    """Cut by copy at an open GOP, Matroska has frames below time 0 that nothing can decode."""
    options = {"x264-params": "open-gop=1"}
    whole = write_video(tmp_path / "whole.mkv", 60, b_frames=3, gop=12, options=options)
    path = tmp_path / "cut.mkv"
    with (
        av.open(str(whole)) as read,
        av.open(str(path), "w", container_options={"avoid_negative_ts": "disabled"}) as write,
    ):
        stream = write.add_stream_from_template(read.streams.video[0])
        packets = [packet for packet in read.demux(read.streams.video[0]) if packet.size]
        first = [number for number, packet in enumerate(packets) if packet.is_keyframe][1]
        shift = packets[first].pts
        for packet in packets[first:]:
            packet.stream = stream
            packet.pts -= shift
            packet.dts = None if packet.dts is None else packet.dts - shift
            write.mux(packet)
    begin = round(shift * 24 / 1000)
    check(path, caplog, list(range(begin, 60)), np.arange(60 - begin) / 24)


@pytest.mark.parametrize("fraction", [0.5, 0.7])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("a.mkv", {}),
        ("a.webm", {"codec": "libvpx-vp9"}),
        ("fragmented.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("a.flv", {}),
        ("mpeg4.avi", {"codec": "mpeg4"}),
        ("h264.avi", {}),
        ("a.ts", {}),
        ("a.mp4", {"container_options": {"movflags": "+faststart"}}),
    ],
)
def test_a_cut_off_file_says_so_once(tmp_path, caplog, name, settings, fraction):
    path = write_video(tmp_path / name, 240, gop=12, **settings)
    assert read_video(path, num_frames=4).num_lost == 0
    assert not caplog.records, "whole files say nothing"
    truncate(path, fraction + 1e-3 * (name == "a.ts"))
    for num_threads in THREADS:
        caplog.clear()
        video = read_video(path, num_frames=240, clip_len=1, num_threads=num_threads)
        assert indices_of(video.frames) == list(range(video.num_frames))
        assert 40 < video.num_frames < 240
        assert len(caplog.records) == 1
        assert "is cut off" in caplog.text


def test_a_cut_at_an_edit_list_still_hides_its_beginning(tmp_path, caplog):
    path = cut_by_copy(write_video(tmp_path / "a.mp4", 48, b_frames=2), tmp_path / "cut.mp4", 20 / 24)
    check(path, caplog, list(range(20, 48)), np.arange(28) / 24)


def test_times_of_a_variable_rate_are_sampled_by_time(tmp_path):
    seconds = [*(np.arange(9) / 24), *(30.4 + np.arange(9) / 24)]
    path = write_video(tmp_path / "a.mp4", 18, seconds=seconds)
    video = read_video(path, mode="fps2", clip_len=1)
    targets = np.arange(0.25, 30.4 + 9 / 24, 0.5)
    nearest = np.abs(np.asarray(seconds)[None] - targets[:, None]).argmin(1)
    assert indices_of(video.frames) == nearest.tolist()
    assert read_video(path, mode="fps2", clip_len=1, max_frames=8).num_frames == 8
