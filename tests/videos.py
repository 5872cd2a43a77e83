"""Writers of small synthetic videos. Every frame carries its own index, readable after lossy coding and resizing."""

import io
import os
import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.stream import Disposition
from PIL import Image

CELLS = 4
"""Cells per side: a frame is a CELLS x CELLS board whose dark and light cells are the bits of its index."""

MILLISECOND = Fraction(1, 1000)

ENCODER_OPTIONS = {
    "libx264": {"preset": "veryfast", "sc_threshold": "0"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:scenecut=0"},
    "libsvtav1": {"preset": "10"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
}
"""Fast, quiet, and with keyframes only where ``gop`` puts them."""

os.environ.setdefault("SVT_LOG", "1")


def coloured_frame(index: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """Draw the frame of an index: ``(h, w, 3)`` uint8, bit k of the index in cell k, a gradient to tell rows apart."""
    height, width = size
    bits = (index >> np.arange(CELLS * CELLS)) & 1
    rows = np.arange(height) * CELLS // height
    columns = np.arange(width) * CELLS // width
    board = bits.reshape(CELLS, CELLS)[rows[:, None], columns[None, :]]
    shade = np.linspace(0, 40, height)[:, None]
    return np.repeat((30 + 160 * board + shade)[..., None], 3, axis=2).astype(np.uint8)


def index_of(frame: torch.Tensor) -> int:
    """Read the index of a decoded ``(3, h, w)`` frame back."""
    grey = frame.float().mean(0)
    cells = torch.nn.functional.adaptive_avg_pool2d(grey[None, None], CELLS).flatten()
    return int(sum(1 << k for k, level in enumerate(cells.tolist()) if level > 130))


def indices_of(frames: Iterable[torch.Tensor]) -> list[int]:
    """Read the indices of ``(F, 3, h, w)`` frames back."""
    return [index_of(frame) for frame in frames]


def write_video(
    path: Path,
    num_frames: int = 48,
    *,
    codec: str = "libx264",
    fps: int | Fraction = 24,
    size: tuple[int, int] = (64, 64),
    gop: int = 12,
    b_frames: int = 0,
    pix_fmt: str = "yuv420p",
    seconds: Sequence[float] | None = None,
    offset: float = 0.0,
    rotation: int = 0,
    matrix: Sequence[int] | None = None,
    audio: bool = False,
    format: str | None = None,
    container_options: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write an index-coloured video.

    Args:
        path: where to; the suffix chooses the container unless ``format`` does.
        gop: largest distance of two keyframes, in frames.
        b_frames: bidirectional frames in a row.
        seconds: time of each frame, for a variable frame rate; evenly spaced if omitted.
        offset: seconds before the first frame.
        rotation: degrees, counter-clockwise, written as display metadata.
        matrix: the nine numbers of a display matrix.
        audio: add a silent AAC track.
    """
    is_variable = seconds is not None
    if not is_variable:
        seconds = [float(index / Fraction(fps)) for index in range(num_frames)]
    with av.open(str(path), "w", format=format, container_options=container_options or {}) as container:
        stream = container.add_stream(
            codec, rate=Fraction(fps), options={**ENCODER_OPTIONS.get(codec, {}), **(options or {})}
        )
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.time_base = MILLISECOND if is_variable else 1 / Fraction(fps)
        if rotation:
            stream.set_display_rotation(rotation)
        if matrix:
            stream.set_display_matrix(matrix)
        sound = container.add_stream("aac", rate=8000, layout="mono") if audio else None
        for index, second in enumerate(seconds):
            frame = av.VideoFrame.from_ndarray(coloured_frame(index, size), format="rgb24")
            frame.time_base = stream.codec_context.time_base
            frame.pts = round((second + offset) / frame.time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _write_silence(container, sound, seconds[-1] + offset)
    return Path(path)


def _write_silence(container: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    for start in range(0, int(seconds * 8000) + 1, 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, start, Fraction(1, 8000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_audio(path: Path, seconds: float = 1.0) -> Path:
    """Write a file that has sound and no picture."""
    with av.open(str(path), "w") as container:
        _write_silence(container, container.add_stream("aac", rate=8000, layout="mono"), seconds)
    return Path(path)


def write_gif(path: Path, num_frames: int = 12, *, milliseconds: int = 100, size: tuple[int, int] = (64, 64)) -> Path:
    """Write an animated gif whose frames store only what changed."""
    images = [Image.fromarray(coloured_frame(index, size)) for index in range(num_frames)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    return Path(path)


def write_images(folder: Path, num_frames: int = 12, *, size: tuple[int, int] = (64, 64)) -> Path:
    """Write a folder of numbered images: 0.png .. 11.png, so that text order and natural order differ."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num_frames):
        Image.fromarray(coloured_frame(index, size)).save(folder / f"frame{index}.png")
    return folder


def cut_by_copy(source: Path, path: Path, start: float) -> Path:
    """Cut the beginning off without coding again: the file keeps the keyframe before, hidden by an edit list."""
    with av.open(str(source)) as read, av.open(str(path), "w") as write:
        stream = read.streams.video[0]
        copy = write.add_stream_from_template(stream)
        shift = round(start / stream.time_base)
        read.seek(shift, stream=stream, backward=True)
        for packet in read.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                write.mux(packet)
    return Path(path)


def truncate(path: Path, fraction: float) -> Path:
    """Keep the first part of a file only."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return path


def damage_packets(path: Path, damaged: Iterable[int]) -> Path:
    """Overwrite the packets of these positions (in coding order) with noise, headers and index left alone."""
    with av.open(str(path)) as container:
        spans = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    noise = np.random.default_rng(0)
    for position in damaged:
        begin, size = spans[position]
        data[begin : begin + size] = noise.integers(0, 256, size, dtype=np.uint8).tobytes()
    path.write_bytes(bytes(data))
    return path


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
"""What can be written: container and codec by file name, with the arguments of ``write_video``."""


def write_format(folder: Path, name: str) -> Path:
    """Write one of ``FORMATS``, unless it is there already."""
    path = folder / name
    return path if path.exists() else write_video(path, NUM_FRAMES, **{"gop": GOP, **FORMATS[name]})


def expected_seconds(name: str) -> np.ndarray:
    """Return when the frames of one of ``FORMATS`` are shown, the first one at 0."""
    settings = FORMATS[name]
    seconds = np.array(settings.get("seconds", np.arange(NUM_FRAMES) / settings.get("fps", FPS)))
    return seconds - seconds[0]


def join(path: Path, *parts: Path) -> Path:
    """Join files byte by byte, as ``cat`` does."""
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def set_edit_list(path: Path, entries: Sequence[tuple[int, int]]) -> Path:
    """Give an mp4, whose tables come last, another edit list: ``(length in ms, first tick of the track)`` each."""
    data = path.read_bytes()
    edits = struct.pack(">II", 0, len(entries)) + b"".join(struct.pack(">IiHH", *entry, 1, 0) for entry in entries)
    box = struct.pack(">I4s", len(edits) + 8, b"elst") + edits
    box = struct.pack(">I4s", len(box) + 8, b"edts") + box
    moov, trak, edts = (data.rindex(kind) - 4 for kind in (b"moov", b"trak", b"edts"))
    length = int.from_bytes(data[edts : edts + 4], "big")
    data = bytearray(data[:edts] + box + data[edts + length :])
    for at in (moov, trak):
        size = int.from_bytes(data[at : at + 4], "big") + len(box) - length
        data[at : at + 4] = size.to_bytes(4, "big")
    path.write_bytes(bytes(data))
    return path


def write_with_cover(path: Path, *, num_frames: int = 0) -> Path:
    """Write sound with a cover picture, and a video if ``num_frames`` says so; as mp4 or Matroska, by the suffix."""
    is_matroska = path.suffix == ".mkv"
    with av.open(str(path), "w", format=None if is_matroska else "mp4") as container:
        streams = [container.add_stream("libx264", rate=25)] if num_frames else []
        if is_matroska:
            cover = io.BytesIO()
            Image.fromarray(coloured_frame(0)).save(cover, "JPEG")
            container.add_attachment("cover.jpg", "image/jpeg", cover.getvalue())
        else:
            streams.append(container.add_stream("mjpeg", rate=25))
            streams[-1].disposition = Disposition.attached_pic
        for stream in streams:
            stream.height = stream.width = 64
            stream.pix_fmt = "yuvj420p" if stream.name == "mjpeg" else "yuv420p"
        sound = container.add_stream("aac", rate=8000, layout="mono")
        for stream in streams:
            for number in range(1 if stream.name == "mjpeg" else num_frames):
                frame = av.VideoFrame.from_ndarray(coloured_frame(number), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        _write_silence(container, sound, 1.0)
    return path
