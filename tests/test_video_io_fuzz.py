"""Random files and requests against decoding everything in order; mutated files. Slow."""

import warnings

import av
import numpy as np
import pytest
import torch
from PIL import Image
from videos import coloured_frame, indices_of, write_video

from hico.sampling import sample_frames
from hico.video_io import VideoError, probe, read_video, stream_video

REQUESTS_PER_FILE = 4
NUM_FILES = 125

CONTAINERS = {
    "mp4": ("libx264", "libx265", "mpeg4", "libvpx-vp9"),
    "mov": ("libx264", "mpeg4", "mjpeg"),
    "mkv": ("libx264", "libx265", "mpeg4", "mpeg2video", "libvpx"),
    "webm": ("libvpx", "libvpx-vp9"),
    "avi": ("mpeg4", "libx264", "mjpeg", "msmpeg4", "mpeg2video"),
    "asf": ("libx264", "mpeg4", "wmv2", "msmpeg4"),
    "flv": ("libx264", "flv"),
    "ts": ("libx264", "libx265", "mpeg2video"),
    "mpg": ("mpeg2video", "mpeg1video"),
    "vob": ("mpeg2video", "libx264"),
    "h264": ("libx264",),
}
RATES = (24, 25, 30, 50, 60)
REORDERING = ("libx264", "libx265", "mpeg4", "mpeg2video", "mpeg1video")


def random_video(folder, seed):
    """Write a video whose container, codec, GOP, B-frames, rate and size are drawn; returns path, frames and rate."""
    random = np.random.default_rng(seed)
    container = list(CONTAINERS)[seed % len(CONTAINERS)]
    codec = str(random.choice(CONTAINERS[container]))
    fps = 25 if container == "h264" else int(random.choice(RATES))
    num_frames = int(random.integers(5, 90))
    b_frames = int(random.integers(0, 4)) if codec in REORDERING else 0
    if codec in ("mpeg4", "mpeg2video", "mpeg1video"):
        b_frames = min(b_frames, 2)
    side = int(random.choice([64, 128, 192]))
    options = {"bf": str(b_frames)} if codec == "libvpx" else {}
    if codec == "libx264" and random.random() < 0.3:
        options["x264-params"] = "open-gop=1"
    if codec == "libx264" and not b_frames and random.random() < 0.3:
        options["x264-params"] = "intra-refresh=1"
    path = write_video(
        folder / f"{seed}.{container}",
        num_frames,
        codec=codec,
        fps=fps,
        size=(side, side),
        gop=int(random.choice([1, 5, 12, 30, 250])),
        b_frames=b_frames,
        pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p",
        offset=float(random.choice([0, 0, 2])) if container in ("mp4", "mkv", "ts") and codec != "mpeg4" else 0.0,
        audio=bool(container in ("mp4", "mkv", "ts") and random.random() < 0.3),
        options={key: value for key, value in options.items() if key != "bf"},
    )
    return path, num_frames, fps


def decode_in_order(path):
    """Decode everything with one thread, without a seek."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(NUM_FILES))
def test_random_files_and_requests_agree_with_decoding_everything(tmp_path, caplog, seed):
    path, num_frames, fps = random_video(tmp_path, seed)
    truth = decode_in_order(path)
    assert indices_of(truth) == list(range(num_frames)), "what was written"
    seconds = np.arange(num_frames) / fps
    random = np.random.default_rng(seed + 1000)
    for _ in range(REQUESTS_PER_FILE):
        begin = int(random.integers(0, num_frames))
        end = int(random.integers(begin + 1, num_frames + 1))
        part = (
            {} if random.random() < 0.5 else {"start": (begin - 0.4) / fps if begin else 0.0, "end": (end - 0.4) / fps}
        )
        first, last = (begin, end) if part else (0, num_frames)
        settings = {
            "num_frames": int(random.integers(1, 40)),
            "clip_len": 1,
            "num_threads": int(random.integers(1, 5)),
        }
        wanted = [first + k for k in sample_frames(last - first, fps, num_frames=settings["num_frames"], clip_len=1)]
        if random.random() < 0.5:
            video = read_video(path, **part, **settings)
            frames = video.frames
        else:
            video = stream_video(path, chunk_frames=int(random.integers(1, 9)), **part, **settings)
            frames = torch.cat(list(video))
        assert indices_of(frames) == wanted
        assert torch.equal(frames, truth[wanted])
        np.testing.assert_allclose(video.seconds, seconds[wanted], atol=2e-3)
        assert video.num_lost == 0
    assert not caplog.records, "nothing is wrong with these files"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm", "avi", "asf", "flv", "ts", "mpg", "gif", "webp"])
def test_mutated_files_give_frames_or_one_error(tmp_path, kind):
    """150 files of each kind: bytes changed, cut out, doubled, or the end left out."""
    whole = tmp_path / f"whole.{kind}"
    if kind in ("gif", "webp"):
        pictures = [Image.fromarray(coloured_frame(index)) for index in range(12)]
        pictures[0].save(whole, save_all=True, append_images=pictures[1:], duration=100)
    else:
        codec = {"webm": "libvpx-vp9", "avi": "mpeg4", "mpg": "mpeg2video"}.get(kind, "libx264")
        write_video(whole, 36, codec=codec, fps=25, b_frames=0 if kind == "webm" else 2)
    data = np.frombuffer(whole.read_bytes(), np.uint8)
    random = np.random.default_rng(0)
    for number in range(150):
        path = tmp_path / f"{number}.{kind}"
        _mutated(data, random, number).tofile(path)
        if not path.stat().st_size:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                video = read_video(path, num_frames=8, clip_len=1, size=16, num_threads=1 + number % 2)
        except VideoError as error:
            seen = str(error)
        else:
            seen = video.name
            assert 1 <= video.num_frames <= 8
            assert 0 <= video.seconds.min() <= video.seconds.max() <= video.info.duration
            assert probe(path).num_frames == video.info.num_frames
        assert seen.startswith(str(path))


def _mutated(data, random, number):
    data = data.copy()
    begin, length = int(random.integers(0, len(data))), int(random.integers(1, len(data) // 3))
    if number % 5 < 2:
        places = random.integers(0, len(data) if number % 2 else min(2000, len(data)), int(random.integers(1, 40)))
        data[places] = random.integers(0, 256, len(places))
    elif number % 5 == 2:
        data = np.delete(data, slice(begin, begin + length))
    elif number % 5 == 3:
        data = np.insert(data, begin, data[begin : begin + length])
    else:
        data = data[:begin]
    return data
