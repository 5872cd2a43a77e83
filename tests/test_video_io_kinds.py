"""Video in: mirrored pictures, covers, animations, names, failing sources, and files that claim too much."""

import io
import re
import resource
import socket
import struct
import threading
import time
from pathlib import Path

import av
import av.video.stream
import numpy as np
import pytest
import torch
from PIL import Image
from videos import coloured_frame, indices_of, write_format, write_images, write_video, write_with_cover

from hico.video_io import VideoError, probe, read_video, stream_video
from hico.video_io import mp4 as mp4_tables
from hico.video_io.index import build_index
from hico.video_io.source import as_source

needs_matrix = pytest.mark.skipif(
    not hasattr(av.video.stream.VideoStream, "set_display_matrix"), reason="PyAV 17 reads display matrices, 18 writes"
)
ONE = 1 << 16


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_format(tmp_path_factory.mktemp("videos"), "h264.mp4")


def all_frames(path, **settings):
    return read_video(path, num_frames=probe(path).num_frames, clip_len=1, **settings)


@needs_matrix
@pytest.mark.parametrize("scaler", ["exact", "fast"])
@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), lambda picture: picture),
        ((-1, 0, 0, 1), lambda picture: picture.flip(3)),
        ((1, 0, 0, -1), lambda picture: picture.flip(2)),
        ((-1, 0, 0, -1), lambda picture: picture.flip(2, 3)),
        ((0, 1, 1, 0), lambda picture: picture.transpose(2, 3)),
        ((0, -1, -1, 0), lambda picture: picture.transpose(2, 3).flip(2, 3)),
        ((0, 1, -1, 0), lambda picture: torch.rot90(picture, -1, (2, 3))),
        ((0, -1, 1, 0), lambda picture: torch.rot90(picture, 1, (2, 3))),
        ((0, 0, 0, 0), lambda picture: picture),
    ],
    ids=["upright", "hflip", "vflip", "180", "transpose", "antitranspose", "clockwise", "counterclockwise", "zero"],
)
def test_pictures_are_turned_and_mirrored_as_players_do(tmp_path, matrix, turn, scaler):
    """(a, b, c, d) of a display matrix: x' = ax + cy, y' = bx + dy, with y pointing down."""
    upright = all_frames(write_video(tmp_path / "upright.mp4", 2, size=(64, 96))).frames
    a, b, c, d = (ONE * value for value in matrix)
    path = write_video(tmp_path / "a.mp4", 2, size=(64, 96), matrix=(a, b, 0, c, d, 0, 0, 0, 1 << 30))
    shown = turn(upright)
    info = probe(path)
    assert (info.height, info.width) == shown.shape[2:]
    frames = all_frames(path, scaler=scaler).frames
    assert torch.equal(frames, shown)


@pytest.mark.parametrize("suffix", ["m4a", "mkv"])
def test_cover_art_is_no_video(tmp_path, suffix):
    path = write_with_cover(tmp_path / f"song.{suffix}")
    with pytest.raises(VideoError, match=r"has no video stream, only a cover picture, audio"):
        probe(path)


def test_cover_art_of_an_mp3_is_no_video(tmp_path):
    picture = io.BytesIO()
    Image.fromarray(coloured_frame(0)).save(picture, "JPEG")
    body = b"\0image/jpeg\0\3\0" + picture.getvalue()
    frame = b"APIC" + struct.pack(">IH", len(body), 0) + body
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    silence = (b"\xff\xfb\x90\xc4" + bytes(413)) * 40
    path = tmp_path / "song.mp3"
    path.write_bytes(b"ID3\3\0\0" + size + frame + silence)
    with pytest.raises(VideoError, match=r"has no video stream, only a cover picture, audio"):
        probe(path)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_video_beside_a_cover_is_the_video(tmp_path, suffix):
    path = write_with_cover(tmp_path / f"film.{suffix}", num_frames=12)
    assert probe(path).num_frames == 12
    assert indices_of(all_frames(path).frames) == list(range(12))


@pytest.mark.parametrize("name", ["12:30.mp4", "http:a.mp4", "a%03d.mp4", "~x.mp4"])
def test_names_are_taken_as_they_are(plain, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(plain.read_bytes())
    assert read_video(name, num_frames=4).num_frames == 4


@pytest.mark.parametrize("name", ["a" * 300 + ".mp4", "~nobody/x.mp4", "a\0b.mp4", "plain.txt/a.mp4"])
def test_names_that_cannot_be_opened_are_video_errors(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("plain.txt").write_text("a")
    with pytest.raises(VideoError, match=re.escape(name)):
        probe(name)


def test_an_animated_webp_is_read(tmp_path):
    path = tmp_path / "a.webp"
    pictures = [Image.fromarray(coloured_frame(index)) for index in range(12)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[100] * 6 + [200] * 6, lossless=True)
    info = probe(path)
    assert (info.num_frames, info.width, info.height, info.codec) == (12, 64, 64, "webp")
    assert info.duration == pytest.approx(1.8)
    video = all_frames(path)
    assert indices_of(video.frames) == list(range(12))
    np.testing.assert_allclose(video.seconds, [*np.arange(6) / 10, *(0.6 + np.arange(6) / 5)])
    assert indices_of(torch.cat(list(stream_video(path.read_bytes(), num_frames=2, clip_len=1)))) == [2, 8]


class _Failing(io.BytesIO):
    """A file object whose storage goes away after some reads."""

    def __init__(self, data, reads, error):
        super().__init__(data)
        self._reads, self._error, self.name = reads, error, "remote.mp4"

    def read(self, size=-1):
        self._reads -= 1
        if self._reads < 0:
            raise self._error
        return super().read(size)


@pytest.mark.parametrize("error", [OSError("connection lost"), RuntimeError("expired"), KeyError("part")], ids=repr)
@pytest.mark.parametrize("reads", [0, 1, 2, 4])
def test_a_file_object_that_fails_is_named(plain, reads, error):
    data = plain.read_bytes()
    with pytest.raises(VideoError, match=r"remote.mp4: the file object failed while it was read"):
        read_video(_Failing(data, reads, error), num_frames=8)


def test_a_pipe_that_fails_is_named():
    class Pipe(_Failing):
        def seekable(self):
            return False

    with pytest.raises(VideoError, match=r"remote.mp4: cannot be read \(gone\)"):
        probe(Pipe(b"", 0, OSError("gone")))


def test_a_huge_picture_of_a_folder_is_refused(tmp_path):
    folder = write_images(tmp_path / "frames", 2)
    Image.new("1", (30000, 30000)).save(folder / "frame0.png")
    with pytest.raises(VideoError, match=f"{folder}: frame0.png cannot be opened as an image .*900000000 pixels"):
        probe(folder)


def test_a_small_gif_with_a_huge_screen_is_refused(tmp_path):
    path = tmp_path / "bomb.gif"
    screen = struct.pack("<HH", 16000, 16000)
    path.write_bytes(b"GIF89a" + screen + b"\x80\0\0\0\0\0\xff\xff\xff" + b",\0\0\0\0" + screen + b"\0\2\2\x44\1\0;")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(VideoError, match=f"{path}: has pictures of 16000 x 16000 pixels"):
        probe(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB"


def test_an_mp4_that_claims_millions_of_samples_is_refused(plain, tmp_path):
    data = bytearray(plain.read_bytes())
    at = data.index(b"stsz") + 8
    data[at : at + 8] = struct.pack(">II", 1, 60_000_000)
    path = tmp_path / "claims.mp4"
    path.write_bytes(bytes(data))
    with pytest.raises(VideoError, match=rf"claims.mp4: claims 60000000 samples in {len(data)} bytes"):
        probe(path)
    with pytest.raises(VideoError, match="claims 60000000 samples"):
        probe(bytes(data))


def test_text_is_no_video(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("one two three\n" * 400)
    with pytest.raises(VideoError, match=r"notes.txt: (is text|cannot be opened)"):
        probe(path)


@pytest.mark.parametrize("call", [probe, read_video])
def test_a_server_that_never_answers_is_given_up(call):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.mp4"
        begin = time.monotonic()
        with pytest.raises(VideoError, match=rf"{url}: did not answer within 0.4 s; .* longer timeout"):
            call(url, timeout=0.4)
        assert time.monotonic() - begin < 20
    with pytest.raises(ValueError, match="timeout is 0"):
        call("http://127.0.0.1/a.mp4", timeout=0)


def test_a_server_that_stops_answering_is_given_up(plain):
    """It sends the header and then keeps silent."""
    data = plain.read_bytes()

    def serve(server):
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            client.recv(4096)
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data[:3000])
            clients.append(client)

    clients = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        thread = threading.Thread(target=serve, args=(server,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.mp4"
        with pytest.raises(VideoError, match=url):
            read_video(url, timeout=0.4)
        server.shutdown(socket.SHUT_RDWR)
    for client in clients:
        client.close()


@pytest.mark.parametrize("name", ["h264.mp4", "uneven.mp4", "late.mp4", "with_sound.mp4", "hevc.mp4", "av1.mp4"])
def test_the_tables_of_an_mp4_say_what_its_packets_do(tmp_path, monkeypatch, name):
    path = write_format(tmp_path, name)
    tables = build_index(as_source(path))
    monkeypatch.setattr(mp4_tables, "_samples", lambda *_: None)
    listed = build_index(as_source(path))
    assert tables.info == listed.info
    assert tables.starts == listed.starts
    for column in ("pts", "dts", "position", "size", "flags"):
        assert np.array_equal(getattr(tables.packets, column), getattr(listed.packets, column))
    np.testing.assert_array_equal(tables.seconds, listed.seconds)


def test_the_tables_of_an_mp4_spare_reading_its_packets(tmp_path):
    path = write_video(tmp_path / "long.mp4", 240, size=(192, 192), gop=1, options={"qp": "2"})
    data, read = path.read_bytes(), []

    class Counting(io.BytesIO):
        def read(self, size=-1):
            read.append((self.tell(), size))
            return super().read(size)

    assert probe(Counting(data)).num_frames == 240
    middle = range(len(data) // 2, len(data) * 3 // 4)
    assert not [at for at, size in read if at in middle and size > 16], "the headers of boxes at most"
