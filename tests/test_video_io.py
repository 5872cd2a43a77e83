"""Video in: the right frames at the right times from every container, and one clear error for each bad file."""

import io
import logging
import math
import sys
import threading
import time
from pathlib import Path

import av
import av.video.stream
import numpy as np
import pytest
import torch
from helpers import SHARED_DATA, golden_cases
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from videos import (
    cut_by_copy,
    damage_packets,
    indices_of,
    truncate,
    write_audio,
    write_gif,
    write_images,
    write_video,
)

from hico.sampling import sample_frames
from hico.video_io import VideoError, probe, read_video, stream_video
from hico.video_io import pyav as pyav_reader
from hico.video_io.resize import ExactResizer
from hico.video_io.runs import SEEK_COST, nearest_keyframes, plan_runs

NUM_FRAMES, FPS, GOP = 48, 24, 12
UNEVEN = tuple(np.cumsum(np.random.default_rng(0).integers(10, 100, NUM_FRAMES) / 1000).tolist())
FORMATS = {
    "h264.mp4": {"b_frames": 3},
    "fragmented.mp4": {"b_frames": 2, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "hevc.mp4": {"codec": "libx265", "b_frames": 3},
    "av1.mp4": {"codec": "libsvtav1"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx"},
    "mpeg4.avi": {"codec": "mpeg4", "b_frames": 2},
    "h264.avi": {"b_frames": 2},
    "h264.mkv": {"b_frames": 2},
    "open_gop.mkv": {"b_frames": 3, "options": {"x264-params": "open-gop=1"}},
    "h264.ts": {"b_frames": 2},
    "mpeg2.mpg": {"codec": "mpeg2video", "b_frames": 2, "fps": 25},
    "h264.flv": {"b_frames": 2},
    "raw.h264": {"b_frames": 2, "fps": 25},
    "uneven.mp4": {"b_frames": 2, "seconds": UNEVEN},
    "late.mp4": {"b_frames": 2, "offset": 1.5},
    "intra.mp4": {"gop": 1},
    "one_keyframe.mp4": {"gop": 1000, "b_frames": 2},
    "with_sound.mp4": {"b_frames": 2, "audio": True},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Write each format when it is first asked for."""
    folder = tmp_path_factory.mktemp("videos")

    def path(name: str) -> Path:
        target = folder / name
        return target if target.exists() else write_video(target, NUM_FRAMES, **{"gop": GOP, **FORMATS[name]})

    return path


@pytest.fixture(scope="module")
def plain(videos):
    return videos("h264.mp4")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """80 seconds at 6 frames per second, a keyframe every 5 seconds."""
    return write_video(tmp_path_factory.mktemp("long") / "long.mp4", 480, fps=6, gop=30, b_frames=2)


needs_rotation = pytest.mark.skipif(
    not hasattr(av.video.stream.VideoStream, "set_display_rotation"), reason="PyAV 17 reads rotation, 18 writes it"
)


def all_frames(path, **settings):
    return read_video(path, num_frames=probe(path).num_frames, clip_len=1, **settings)


def expected_seconds(name: str) -> np.ndarray:
    settings = FORMATS[name]
    seconds = np.array(settings.get("seconds", np.arange(NUM_FRAMES) / settings.get("fps", FPS)))
    return seconds - seconds[0]


# Frames and times ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_frame_and_time_is_right(videos, name):
    video = all_frames(videos(name))
    assert indices_of(video.frames) == list(range(NUM_FRAMES))
    assert video.frames.shape == (NUM_FRAMES, 3, 64, 64)
    assert video.frames.dtype == torch.uint8
    # Matroska and FLV count in milliseconds.
    np.testing.assert_allclose(video.seconds, expected_seconds(name), atol=1e-3)
    assert video.num_lost == 0


@pytest.mark.parametrize("name", FORMATS)
def test_probe_knows_the_facts_without_decoding_all(videos, name):
    info = probe(videos(name))
    seconds = expected_seconds(name)
    assert (info.num_frames, info.height, info.width, info.rotation) == (NUM_FRAMES, 64, 64, 0)
    assert info.fps == pytest.approx(NUM_FRAMES / (seconds[-1] + 1 / FPS), rel=0.06)
    assert info.duration == pytest.approx(seconds[-1] + 1 / FPS, abs=0.1)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_seeking_parallel_and_streamed_equal_sequential(videos, name, num_threads):
    path = videos(name)
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
    assert (frames.float() - turned.float()).abs().max() <= (0 if scaler == "exact" else 1)


def test_two_samples_of_one_frame_are_the_same_frame(plain):
    video = read_video(plain, mode="fps48", end=0.5, clip_len=1)
    assert indices_of(video.frames) == sample_frames(12, FPS, mode="fps48")
    assert len(set(indices_of(video.frames))) < video.num_frames


# Sources ---------------------------------------------------------------------------------------------------------


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


# Sampling --------------------------------------------------------------------------------------------------------


def test_start_and_end_choose_by_time(plain):
    video = read_video(plain, start=0.5, end=1.0, num_frames=100, clip_len=1)
    assert indices_of(video.frames) == list(range(12, 24))
    assert video.seconds[0] == 0.5, "times stay those of the whole video"
    assert (video.start, video.duration) == (0.5, 0.5)
    assert read_video(plain, start=1.5).duration == pytest.approx(0.5)
    assert indices_of(read_video(plain, start=1.9, clip_len=1).frames) == [46, 47]


def test_start_and_end_follow_uneven_times(videos):
    seconds = expected_seconds("uneven.mp4")
    video = read_video(videos("uneven.mp4"), start=0.7, end=1.6, num_frames=100, clip_len=1)
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


# Size and pixels -------------------------------------------------------------------------------------------------


def _preprocessing_cases():
    return [case for case in golden_cases("A") if "resample" in case.entry.get("config", {})]


@pytest.mark.golden
@pytest.mark.parametrize("case", _preprocessing_cases(), ids=lambda case: case.name)
def test_resized_pixels_are_the_published_ones(case):
    resize = ExactResizer(tuple(case.config["size"]))
    mean, std = (torch.tensor(case.config[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    inputs = sorted(name for name in case.tensors if name.startswith("frames"))
    assert inputs
    for number, name in enumerate(inputs):
        resized = np.stack([resize.from_image(Image.fromarray(frame.numpy())) for frame in case[name]])
        pixels = (torch.from_numpy(resized).permute(0, 3, 1, 2) / 255 - mean) / std
        case.assert_close(pixels, f"pixel_values{number}")


@pytest.mark.parametrize("width", [64, 66, 96, 102], ids="width{}".format)
@pytest.mark.parametrize("size", [32, (24, 40), (64, 96), 100], ids=str)
def test_exact_pixels_are_full_size_frames_through_pil(tmp_path, width, size):
    path = write_video(tmp_path / "a.mp4", 4, size=(64, width))
    height_width = (size, size) if isinstance(size, int) else size
    frames = all_frames(path, size=size).frames
    assert frames.shape == (4, 3, *height_width)
    for frame, full in zip(frames, all_frames(path).frames, strict=True):
        image = Image.fromarray(full.permute(1, 2, 0).numpy())
        resized = np.asarray(image.resize(height_width[::-1], Image.Resampling.BICUBIC))
        assert np.array_equal(frame.permute(1, 2, 0).numpy(), resized)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize("width", [80, 82])
def test_both_colour_paths_give_the_same_pixels(tmp_path, pix_fmt, width):
    path = write_video(tmp_path / "a.mp4", 4, size=(64, width), pix_fmt=pix_fmt)
    with av.open(str(path)) as container:
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.array_equal(all_frames(path).frames.permute(0, 2, 3, 1).numpy(), np.stack(plain))


@needs_rotation
def test_the_fast_scaler_is_one_grey_level_off_at_most(tmp_path):
    path = write_video(tmp_path / "a.mp4", 8, size=(128, 192), rotation=90)
    for size in (48, (100, 36), 128):
        exact, fast = (all_frames(path, size=size, scaler=scaler).frames for scaler in ("exact", "fast"))
        assert (exact.int() - fast.int()).abs().max() <= 1
    folder = write_images(tmp_path / "frames", 3)
    exact, fast = (all_frames(folder, size=48, scaler=scaler).frames for scaler in ("exact", "fast"))
    assert (exact.int() - fast.int()).abs().max() <= 1


# Streams ---------------------------------------------------------------------------------------------------------


def num_decoding_threads() -> int:
    return sum(thread.name.startswith("decode") for thread in threading.enumerate())


def test_a_stream_knows_its_frames_beforehand(plain):
    stream = stream_video(plain, num_frames=18, clip_len=4, size=32, chunk_frames=8)
    video = read_video(plain, num_frames=18, clip_len=4, size=32)
    assert (stream.num_frames, stream.num_chunks, stream.size) == (20, 3, (32, 32))
    assert torch.equal(stream.seconds, video.seconds)
    assert (stream.duration, stream.fps, stream.name) == (video.duration, video.fps, str(plain))
    chunks = list(stream)
    assert [len(chunk) for chunk in chunks] == [8, 8, 4]
    assert torch.equal(torch.cat(chunks), video.frames)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_slow_consumer_keeps_few_chunks_alive(plain, num_threads):
    stream = stream_video(plain, num_frames=48, clip_len=1, chunk_frames=2, num_threads=num_threads)
    for _ in stream:
        time.sleep(0.01)
        assert len(stream._window._chunks) <= 3
    assert num_decoding_threads() == 0


@pytest.mark.parametrize("num_threads", [1, 3])
def test_leaving_early_stops_the_decoding(plain, num_threads):
    settings = {"num_frames": 48, "clip_len": 1, "chunk_frames": 2, "num_threads": num_threads}
    for _ in stream_video(plain, **settings):
        break
    assert num_decoding_threads() == 0
    with stream_video(plain, **settings) as stream:
        next(iter(stream))
    assert num_decoding_threads() == 0
    stream_video(plain, **settings).close()


def test_a_stream_is_read_once(plain):
    stream = stream_video(plain, num_frames=4)
    list(stream)
    with pytest.raises(RuntimeError, match="open it again"):
        list(stream)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_an_error_while_decoding_reaches_the_consumer(plain, num_threads, monkeypatch):
    def fail(self, here, *frame):
        if here >= 20:
            raise VideoError("broken")
        pyav_reader._Worker.put(self, here, *frame)

    monkeypatch.setattr(pyav_reader._Worker, "put", pyav_reader._Worker._finish, raising=False)
    monkeypatch.setattr(pyav_reader._Worker, "_finish", fail)
    stream = stream_video(plain, num_frames=48, clip_len=1, chunk_frames=4, num_threads=num_threads)
    with pytest.raises(VideoError, match="broken"):
        list(stream)
    assert num_decoding_threads() == 0
    with pytest.raises(VideoError, match="broken"):
        read_video(plain, num_frames=48, clip_len=1, num_threads=num_threads)


# Bad input -------------------------------------------------------------------------------------------------------


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


def test_a_chunk_holds_a_frame(plain):
    with pytest.raises(ValueError, match="chunk_frames is 0"):
        stream_video(plain, chunk_frames=0)


def test_a_folder_needs_a_positive_rate(tmp_path):
    with pytest.raises(VideoError, match="folder_fps is 0"):
        probe(write_images(tmp_path / "frames", 2), folder_fps=0)


# Other readers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reader", "module"), [("decord", "decord"), ("torchcodec", "torchcodec.decoders")])
def test_a_reader_that_is_not_installed_says_what_to_install(plain, monkeypatch, reader, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'pip install "hico\[{reader}\]", or use reader="pyav"'):
        read_video(plain, reader=reader)


@pytest.mark.parametrize("reader", ["decord", "torchcodec"])
@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm", "uneven.mp4", "late.mp4", "h264.mkv", "with_sound.mp4"])
def test_other_readers_give_the_same_pixels(videos, reader, name):
    _need(reader)
    settings = {"num_frames": 20, "size": 32}
    video = read_video(videos(name), reader=reader, **settings)
    expected = read_video(videos(name), **settings)
    assert torch.equal(video.frames, expected.frames)
    assert torch.equal(video.seconds, expected.seconds)
    data = videos(name).read_bytes()
    assert torch.equal(torch.cat(list(stream_video(data, reader=reader, **settings))), expected.frames)


@pytest.mark.parametrize("reader", ["decord", "torchcodec"])
@pytest.mark.parametrize("name", ["cut", *FORMATS])
def test_other_readers_are_right_or_refuse(videos, plain, tmp_path, reader, name):
    _need(reader)
    path = cut_by_copy(plain, tmp_path / "cut.mp4", 20 / FPS) if name == "cut" else videos(name)
    expected = read_video(path, num_frames=20, size=32)
    try:
        video = read_video(path, num_frames=20, size=32, reader=reader)
    except VideoError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert torch.equal(video.frames, expected.frames)
    assert not refusal or (str(path) in refusal and 'use reader="pyav"' in refusal)


def _need(reader: str) -> None:
    pytest.importorskip({"decord": "decord", "torchcodec": "torchcodec.decoders"}[reader], exc_type=Exception)


# Laws of the planning --------------------------------------------------------------------------------------------

FRAME_SETS = st.sets(st.integers(0, 3000), min_size=1, max_size=80).map(sorted)
STARTS = st.sets(st.integers(1, 3000), max_size=60).map(lambda starts: [0, *sorted(starts)])


@given(FRAME_SETS, STARTS, st.integers(1, 8))
def test_runs_cover_the_wanted_frames_in_order(wanted, starts, num_threads):
    runs = plan_runs(wanted, starts, num_threads=num_threads)
    assert [here for run in runs for here in range(run.first, run.last)] == list(range(len(wanted)))
    for run in runs:
        start = starts[run.keyframe]
        assert start <= wanted[run.first]
        assert run.keyframe + 1 == len(starts) or starts[run.keyframe + 1] > wanted[run.first]


@given(FRAME_SETS, STARTS)
def test_one_thread_decodes_least(wanted, starts):
    """Neither a seek per GOP nor one pass decodes fewer frames, a seek counted as SEEK_COST frames."""
    runs = plan_runs(wanted, starts)

    def cost(runs):
        return sum(wanted[run.last - 1] - starts[run.keyframe] + 1 + SEEK_COST for run in runs)

    one_pass = wanted[-1] - starts[runs[0].keyframe] + 1 + SEEK_COST
    assert cost(runs) <= one_pass


@given(FRAME_SETS, STARTS)
def test_nearest_keyframes_are_nearest(wanted, starts):
    seconds = np.arange(3001) / 0.5
    moved = nearest_keyframes(wanted, starts, seconds)
    assert moved == sorted(moved)
    for before, after in zip(wanted, moved, strict=True):
        assert after in starts
        assert abs(after - before) == min(abs(start - before) for start in starts)


# Real videos -----------------------------------------------------------------------------------------------------


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
