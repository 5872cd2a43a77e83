"""Bad files and settings: the good frames, or one error that names the file and the remedy."""

import io
import logging
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from videos import (
    FPS,
    GOP,
    NUM_FRAMES,
    damage_packets,
    indices_of,
    truncate,
    write_audio,
    write_format,
    write_images,
    write_video,
)

from hico.video_io import VideoError, probe, read_video, stream_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def plain(folder):
    return write_format(folder, "h264.mp4")


def all_frames(path, **settings):
    return read_video(path, num_frames=probe(path).num_frames, clip_len=1, **settings)


@pytest.fixture
def bad_file(tmp_path, plain):
    def make(kind: str) -> Path:
        path = tmp_path / f"{kind}.mp4"
        if kind == "empty":
            path.write_bytes(b"")
        elif kind == "garbage":
            path.write_bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes())
        elif kind == "cut_off":
            path.write_bytes(plain.read_bytes())
            truncate(path, 0.5)
        elif kind == "sound_only":
            write_audio(path)
        elif kind == "no_images":
            path.mkdir()
        return path

    return make


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file; check the path"),
        ("empty", r"is empty \(0 bytes\); fetch it again"),
        ("garbage", "cannot be opened as a video .*Fetch it again"),
        ("cut_off", "cannot be opened as a video .*Fetch it again"),
        ("sound_only", "has no video stream, only audio; give a file with pictures"),
        ("no_images", "has no images; expected files that end in .*png"),
    ],
)
@pytest.mark.parametrize("call", [probe, read_video, stream_video])
def test_bad_files_are_named_with_a_remedy(bad_file, kind, message, call):
    path = bad_file(kind)
    with pytest.raises(VideoError, match=message) as error:
        call(path)
    assert str(path) in str(error.value)


def test_empty_bytes_and_file_objects_are_named():
    with pytest.raises(VideoError, match="<bytes>: is empty"):
        probe(b"")
    with pytest.raises(VideoError, match="<file object>: is empty"):
        probe(io.BytesIO())
    with pytest.raises(VideoError, match="<5000 bytes>: cannot be opened"):
        probe(bytes(5000))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_cut_off_file_gives_its_good_frames(tmp_path, caplog, num_threads):
    path = write_video(tmp_path / "a.mp4", gop=6, container_options={"movflags": "+faststart"})
    truncate(path, 0.7)
    with caplog.at_level(logging.WARNING):
        video = all_frames(path, num_threads=num_threads)
    assert 10 < video.num_frames < NUM_FRAMES
    assert indices_of(video.frames) == list(range(video.num_frames))
    missing = NUM_FRAMES - video.num_frames
    assert f"{missing} of {NUM_FRAMES} frames are missing at the end" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    ("damaged", "lost"),
    [([23], [23]), (range(12, 24), range(12, 24)), (range(24), range(24)), (range(36, 48), range(36, 48))],
    ids=["one that no other needs", "a GOP", "the first two GOPs", "the last GOP"],
)
def test_damaged_frames_are_replaced_and_counted(tmp_path, caplog, damaged, lost, num_threads):
    path = write_video(tmp_path / "a.mp4", codec="libvpx-vp9", gop=GOP)
    damage_packets(path, damaged)
    with caplog.at_level(logging.WARNING):
        video = all_frames(path, num_threads=num_threads)
    good = [index for index in range(NUM_FRAMES) if index not in set(lost)]
    for place, index in enumerate(indices_of(video.frames)):
        nearest = min(abs(index - place) for index in good)
        assert index in good
        assert abs(index - place) == nearest
        assert video.seconds[place] == pytest.approx(index / FPS, abs=1e-3)
    assert video.num_lost == len(lost)
    assert f"{len(lost)} of {NUM_FRAMES} sampled frames were lost" in caplog.text
    assert len(caplog.records) == 1
    stream = stream_video(path, num_frames=NUM_FRAMES, clip_len=1, chunk_frames=4, num_threads=num_threads)
    assert torch.equal(torch.cat(list(stream)), video.frames)
    assert torch.equal(stream.seconds, video.seconds)
    assert stream.num_lost == video.num_lost


def test_random_damage_gives_frames_or_one_error(folder, tmp_path):
    random = np.random.default_rng(0)
    for name in ("h264.mp4", "h264.ts", "vp9.webm", "h264.mkv", "mpeg4.avi"):
        data = write_format(folder, name).read_bytes()
        for number in range(8):
            damaged = bytearray(data)
            for position in random.integers(0, len(data), 30):
                damaged[position] = random.integers(0, 256)
            path = tmp_path / f"{number}_{name}"
            path.write_bytes(damaged)
            try:
                video = read_video(path, num_frames=8, clip_len=1, size=16, num_threads=2)
            except VideoError as error:
                seen = str(error)
            else:
                seen = video.name
                assert 1 <= video.num_frames <= 8
                assert 0 <= video.seconds.min() <= video.seconds.max() <= video.info.duration
            assert seen.startswith(str(path))


def test_a_file_without_any_good_frame_is_an_error(tmp_path):
    path = write_video(tmp_path / "a.mp4", codec="libvpx-vp9", gop=GOP)
    damage_packets(path, range(NUM_FRAMES))
    with pytest.raises(VideoError, match=r"a.mp4: none of its 48 frames could be decoded.*Fetch it again"):
        read_video(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 5}, r"no frame appears between start 5 s and end 2.0\d* s; the video lasts 2.00 s"),
        ({"start": 0.51, "end": 0.52}, "no frame appears .* Choose a longer part inside it"),
        ({"start": 1, "end": 1}, "start 1 s is not before end 1 s; swap them"),
        ({"start": 2, "end": 1}, "start 2 s is not before end 1 s"),
        ({"start": -1}, "start is -1; it counts seconds"),
        ({"end": math.nan}, "end is nan; it counts seconds"),
        ({"start": math.inf}, "start is inf"),
        ({"mode": "fps0.01", "bounds": "published"}, "finds no frame in 2.00 s; sample at a higher rate"),
    ],
)
def test_impossible_parts_name_the_file_and_the_remedy(plain, settings, message):
    with pytest.raises(VideoError, match=message) as error:
        read_video(plain, **settings)
    assert str(plain) in str(error.value)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"reader": "pyva"}, ValueError, "unknown video reader 'pyva'; did you mean 'pyav'. Known: decord, pyav"),
        ({"scaler": "fats"}, ValueError, "unknown scaler 'fats'; did you mean 'fast'"),
        ({"mode": "midle"}, ValueError, "unknown sampling mode 'midle'; did you mean 'middle'"),
        ({"frames": 8}, TypeError, "unknown video setting 'frames'; did you mean 'num_frames'"),
        ({"size": 0}, ValueError, "size is 0"),
        ({"num_threads": 0}, ValueError, "num_threads is 0"),
    ],
)
def test_unknown_and_impossible_settings(plain, settings, error, message):
    with pytest.raises(error, match=message):
        read_video(plain, **settings)


@pytest.mark.parametrize("size", [224.0, "224", (8, 8, 3), (8, 0)])
def test_a_size_is_one_or_two_numbers_of_pixels(plain, size):
    with pytest.raises(ValueError, match=r"size is .* pixels"):
        read_video(plain, num_frames=4, size=size)
    assert read_video(plain, num_frames=4, size=np.int64(8)).frames.shape == (4, 3, 8, 8)


def test_a_pipe_an_empty_path_and_files_that_cannot_be_read_are_named(plain, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VideoError, match="pipe: is neither a file nor a folder; save it"):
        probe(tmp_path / "pipe")
    with pytest.raises(VideoError, match="no such file"):
        probe("")
    with plain.open("rb") as file:
        pass
    with pytest.raises(VideoError, match=f"{plain}: is closed; open it again"):
        probe(file)
    with plain.open() as file, pytest.raises(TypeError, match="is open as text; open it with mode 'rb'"):
        probe(file)


def test_a_chunk_holds_a_frame(plain):
    with pytest.raises(ValueError, match="chunk_frames is 0"):
        stream_video(plain, chunk_frames=0)


def test_a_folder_needs_a_positive_rate(tmp_path):
    with pytest.raises(VideoError, match="folder_fps is 0"):
        probe(write_images(tmp_path / "frames", 2), folder_fps=0)
