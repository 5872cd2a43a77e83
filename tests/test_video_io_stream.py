"""Video in chunks: the same frames, few of them alive, and no thread left behind."""

import threading
import time

import pytest
import torch
from videos import (
    write_format,
)

from hico.video_io import VideoError, read_video, stream_video
from hico.video_io import pyav as pyav_reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def plain(folder):
    return write_format(folder, "h264.mp4")


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
