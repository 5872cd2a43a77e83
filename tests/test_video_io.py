"""Video in: the right frames at the right times from every container."""

import io
from pathlib import Path

import av
import av.video.stream
import numpy as np
import pytest
import torch
from helpers import SHARED_DATA
from videos import (
    FORMATS,
    FPS,
    NUM_FRAMES,
    cut_by_copy,
    expected_seconds,
    indices_of,
    write_format,
    write_gif,
    write_images,
    write_video,
)

from hico.sampling import sample_frames
from hico.video_io import VideoError, probe, read_video, stream_video
from hico.video_io import pyav as pyav_reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def plain(folder):
    return write_format(folder, "h264.mp4")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """80 seconds at 6 frames per second, a keyframe every 5 seconds."""
    return write_video(tmp_path_factory.mktemp("long") / "long.mp4", 480, fps=6, gop=30, b_frames=2)


needs_rotation = pytest.mark.skipif(
    not hasattr(av.video.stream.VideoStream, "set_display_rotation"), reason="PyAV 17 reads rotation, 18 writes it"
)


def all_frames(path, **settings):
    return read_video(path, num_frames=probe(path).num_frames, clip_len=1, **settings)


@pytest.mark.parametrize("name", FORMATS)
def test_every_frame_and_time_is_right(folder, name):
    video = all_frames(write_format(folder, name))
    assert indices_of(video.frames) == list(range(NUM_FRAMES))
    assert video.frames.shape == (NUM_FRAMES, 3, 64, 64)
    assert video.frames.dtype == torch.uint8
    # Matroska and FLV count in milliseconds.
    np.testing.assert_allclose(video.seconds, expected_seconds(name), atol=1e-3)
    assert video.num_lost == 0


@pytest.mark.parametrize("name", FORMATS)
def test_probe_knows_the_facts_without_decoding_all(folder, name):
    info = probe(write_format(folder, name))
    seconds = expected_seconds(name)
    assert (info.num_frames, info.height, info.width, info.rotation) == (NUM_FRAMES, 64, 64, 0)
    assert info.fps == pytest.approx(NUM_FRAMES / (seconds[-1] + 1 / FPS), rel=0.06)
    assert info.duration == pytest.approx(seconds[-1] + 1 / FPS, abs=0.1)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_seeking_parallel_and_streamed_equal_sequential(folder, name, num_threads):
    path = write_format(folder, name)
    whole = all_frames(path)
    for num_frames in (1, 3, 17, 31):
        wanted = sample_frames(NUM_FRAMES, FPS, num_frames=num_frames)
        settings = {"num_frames": num_frames, "clip_len": 1, "num_threads": num_threads}
        video = read_video(path, **settings)
        assert torch.equal(video.frames, whole.frames[wanted])
        assert torch.equal(video.seconds, whole.seconds[wanted])
        stream = stream_video(path, chunk_frames=5, **settings)
        assert torch.equal(torch.cat(list(stream)), video.frames)
        assert torch.equal(stream.seconds, video.seconds)
        assert video.num_lost == stream.num_lost == 0


def test_long_gaps_are_jumped_over(long, monkeypatch):
    decoded = []
    finish = pyav_reader._Decoder._decode
    monkeypatch.setattr(
        pyav_reader._Decoder,
        "_decode",
        lambda self, packet: [decoded.append(f.pts) or f for f in finish(self, packet)],
    )
    video = read_video(long, num_frames=8, clip_len=1)
    assert indices_of(video.frames) == sample_frames(480, 6, num_frames=8)
    assert len(decoded) < 480 / 2, "at most the half GOP before each of 8 samples"


def test_frames_hidden_by_an_edit_list_are_not_counted(plain, tmp_path):
    path = cut_by_copy(plain, tmp_path / "cut.mp4", 20 / FPS)
    video = all_frames(path)
    assert indices_of(video.frames) == list(range(20, NUM_FRAMES))
    np.testing.assert_allclose(video.seconds, np.arange(NUM_FRAMES - 20) / FPS, atol=1e-3)
    assert indices_of(read_video(path, num_frames=2, clip_len=1, num_threads=2).frames) == [26, 40]


def test_a_broadcast_joined_in_the_middle_starts_at_its_first_keyframe(folder, tmp_path):
    data = write_format(folder, "h264.ts").read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(data[len(data) // 188 // 3 * 188 :])
    video = all_frames(path)
    assert indices_of(video.frames) == list(range(24, NUM_FRAMES))
    np.testing.assert_allclose(video.seconds, np.arange(24) / FPS, atol=1e-3)
    assert video.num_lost == 0


def test_gif_frames_build_on_each_other(tmp_path):
    path = write_gif(tmp_path / "a.gif", 12, milliseconds=100)
    video = all_frames(path)
    assert indices_of(video.frames) == list(range(12))
    np.testing.assert_allclose(video.seconds, np.arange(12) / 10)
    assert indices_of(read_video(path, num_frames=2, clip_len=1).frames) == [2, 8]


@needs_rotation
@pytest.mark.parametrize("scaler", ["exact", "fast"])
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_applied(tmp_path, rotation, scaler):
    path = write_video(tmp_path / "turned.mp4", 4, size=(64, 96), rotation=rotation)
    upright = all_frames(write_video(tmp_path / "upright.mp4", 4, size=(64, 96))).frames
    turned = torch.rot90(upright, rotation // 90, dims=(2, 3))
    info = probe(path)
    assert (info.height, info.width) == turned.shape[2:]
    assert info.rotation == rotation
    frames = all_frames(path, scaler=scaler).frames
    assert (frames.float() - turned.float()).abs().max() <= (0 if scaler == "exact" else 2)


def test_two_samples_of_one_frame_are_the_same_frame(plain):
    video = read_video(plain, mode="fps48", end=0.5, clip_len=1, bounds="published")
    assert indices_of(video.frames) == sample_frames(12, FPS, mode="fps48", bounds="published")
    assert len(set(indices_of(video.frames))) < video.num_frames


class _Pipe(io.RawIOBase):
    """A file object that can only be read forward."""

    def __init__(self, data):
        self._file = io.BytesIO(data)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self._file.readinto(buffer)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("kind", [str, Path.read_bytes, lambda p: io.BytesIO(p.read_bytes()), open, _Pipe], ids=str)
def test_sources_are_paths_bytes_and_file_objects(plain, kind, num_threads):
    source = {open: lambda path: path.open("rb"), _Pipe: lambda path: _Pipe(path.read_bytes())}.get(kind, kind)(plain)
    video = read_video(source, num_frames=16, num_threads=num_threads)
    assert torch.equal(video.frames, read_video(plain, num_frames=16).frames)
    if hasattr(source, "read"):
        assert not source.closed


def test_a_source_that_is_none_of_these_is_a_type_error():
    with pytest.raises(TypeError, match="not int"):
        probe(7)


def test_images_of_a_folder_come_in_natural_order(tmp_path):
    folder = write_images(tmp_path / "frames", 12)
    (folder / "notes.txt").write_text("not an image")
    (folder / "folder.png").mkdir()
    video = all_frames(folder)
    assert indices_of(video.frames) == list(range(12))
    assert video.seconds.tolist() == list(range(12))
    assert (video.fps, video.duration) == (1, 12)
    assert probe(folder, folder_fps=4).duration == 3
    assert indices_of(read_video(folder, folder_fps=4, start=1, end=2).frames) == [4, 5, 6, 7]
    stream = stream_video(folder, num_frames=8, size=32, chunk_frames=4)
    assert [chunk.shape for chunk in stream] == [(4, 3, 32, 32)] * 2


def test_a_broken_image_is_replaced_by_its_neighbour(tmp_path, caplog):
    folder = write_images(tmp_path / "frames", 6)
    (folder / "frame0.png").write_bytes(b"broken")
    (folder / "frame3.png").write_bytes(b"")
    with pytest.raises(VideoError, match=r"frame0.png cannot be opened"):
        probe(folder)
    (folder / "frame0.png").write_bytes((folder / "frame1.png").read_bytes())
    video = read_video(folder, num_frames=6, clip_len=1)
    assert indices_of(video.frames) == [1, 1, 2, 2, 4, 5]
    assert video.seconds.tolist() == [0, 1, 2, 2, 4, 5]
    assert video.num_lost == 1
    assert "1 of 6 sampled frames were lost" in caplog.text


def test_start_and_end_choose_by_time(plain):
    video = read_video(plain, start=0.5, end=1.0, num_frames=100, clip_len=1)
    assert indices_of(video.frames) == list(range(12, 24))
    assert video.seconds[0] == 0.5, "times stay those of the whole video"
    assert (video.start, video.duration) == (0.5, 0.5)
    assert read_video(plain, start=1.5).duration == pytest.approx(0.5)
    assert indices_of(read_video(plain, start=1.9, clip_len=1).frames) == [46, 47]


def test_start_and_end_follow_uneven_times(folder):
    seconds = expected_seconds("uneven.mp4")
    video = read_video(write_format(folder, "uneven.mp4"), start=0.7, end=1.6, num_frames=100, clip_len=1)
    assert indices_of(video.frames) == np.flatnonzero((seconds >= 0.7) & (seconds < 1.6)).tolist()


def test_the_last_clip_is_filled_with_the_last_frame_or_refused(plain):
    video = read_video(plain, num_frames=6, clip_len=4)
    assert indices_of(video.frames) == [*sample_frames(NUM_FRAMES, FPS, num_frames=6), 43, 43]
    assert video.seconds[-1] == video.seconds[-3]
    with pytest.raises(ValueError, match="6 frames do not split into clips of 4"):
        read_video(plain, num_frames=6, clip_len=4, pad="error")


def test_a_rate_and_bounds_reach_the_sampling(long):
    assert read_video(long, fps=1).num_frames == 80
    assert read_video(long, fps=1, max_frames=16).num_frames == 16
    assert read_video(long).num_frames == 80
    assert read_video(long, mode="dynamic_fps1", min_frames=8, max_frames=4, bounds="published").num_frames == 8


def test_random_frames_follow_the_generator(plain):
    def read(seed):
        generator = torch.Generator().manual_seed(seed)
        return indices_of(read_video(plain, mode="rand", num_frames=8, generator=generator).frames)

    assert read(0) == read(0)
    assert read(0) != read(1)


def test_inexact_sparse_samples_are_keyframes_at_their_true_times(long):
    exact = read_video(long, num_frames=16)
    video = read_video(long, num_frames=16, exact=False)
    indices = indices_of(video.frames)
    assert all(index % 30 == 0 for index in indices)
    np.testing.assert_allclose(video.seconds, np.array(indices) / 6)
    assert (video.seconds - exact.seconds).abs().max() <= 2.5
    stream = stream_video(long, num_frames=16, exact=False)
    assert torch.equal(stream.seconds, video.seconds)
    assert torch.equal(torch.cat(list(stream)), video.frames)


def test_inexact_dense_samples_stay_exact(long):
    exact = read_video(long, fps=3)
    assert torch.equal(read_video(long, fps=3, exact=False).frames, exact.frames)


def test_inexact_samples_stay_between_start_and_end(long):
    video = read_video(long, start=7, end=23, num_frames=8, exact=False)
    assert set(indices_of(video.frames)) == {60, 90, 120}
    assert indices_of(read_video(long, start=6, end=9, num_frames=2, exact=False, clip_len=1).frames) == [40, 49]


@pytest.mark.parametrize("path", sorted((SHARED_DATA / "videos").glob("*.mp4")), ids=lambda path: path.name)
def test_real_videos(path):
    info = probe(path)
    assert info.duration > 1
    video = read_video(path, num_frames=16, size=56)
    assert video.num_lost == 0
    assert video.seconds[-1] < info.duration
    np.testing.assert_allclose(video.seconds.diff(), info.duration / 16, rtol=0.05)
    assert torch.equal(torch.cat(list(stream_video(path, num_frames=16, size=56, num_threads=2))), video.frames)
    assert (video.frames[0].float() - video.frames[-1].float()).abs().mean() > 1
