"""Decoding, sampling and resizing against the published path (decord at full size, then PIL) and today's readers.

    python benchmarks/decode.py [--quick] [--repeats 3] [--threads 1] [--case WORD] [--videos FOLDER] [--before TREE]

Each way of a case has a process of its own, so that the peak of its resident memory is its own; what the imports and
the first frame of a small video take is left out. The processes take turns; the medians are shown, and their ratios to
hico's default. On a busy machine compare CPU times. Ways whose package is missing are named and left out; without
decord, PyAV at full size stands in for the published path. The videos are made on the first run and kept. ``--before``
names another checkout of hico to be measured in the same turns.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from hico.sampling import sample_frames
from hico.video_io import read_video

SIZE = 224


@dataclass(frozen=True)
class Clip:
    """A video to make: a keyframe every 250 frames, drifting blocks under noise; long ones repeat a minute."""

    name: str
    seconds: int
    height: int
    width: int
    fps: int = 30
    codec: str = "libx264"

    def path(self, folder: Path) -> Path:
        return folder / f"{self.name}_{self.seconds}s.mp4"

    def write(self, folder: Path) -> Path:
        path = self.path(folder)
        if path.exists():
            return path
        print(f"  making {path} ...", flush=True)
        unfinished = path.with_suffix(".part.mp4")
        if self.seconds > 600:
            _repeat(replace(self, seconds=60).write(folder), self.seconds // 60, unfinished)
        else:
            self._encode(unfinished)
        unfinished.rename(path)
        return path

    def _encode(self, path: Path) -> None:
        random = np.random.default_rng(0)
        blocks = random.integers(0, 256, (self.height // 4, self.width // 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        noises = random.integers(-24, 24, (4, self.height, self.width, 3), np.int16)
        options = {"libx264": {"preset": "veryfast", "crf": "23"}}
        options["libx265"] = {"preset": "ultrafast", "x265-params": "log-level=none"}
        with av.open(str(path), "w") as container:
            stream = container.add_stream(self.codec, rate=self.fps, options=options[self.codec])
            stream.height, stream.width, stream.pix_fmt = self.height, self.width, "yuv420p"
            stream.codec_context.gop_size = 250
            for number in range(self.seconds * self.fps):
                top = int((1 + np.sin(number / 50)) * self.height * 0.49)
                left = number * 3 % self.width
                view = blocks[top : top + self.height, left : left + self.width].astype(np.int16)
                picture = np.clip(view + noises[number % 4], 0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))


def _repeat(source: Path, times: int, path: Path) -> None:
    """Write a video several times in a row, without coding it again."""
    with av.open(str(source)) as read:
        stream = read.streams.video[0]
        length = stream.duration
        with av.open(str(path), "w") as write:
            copy = write.add_stream_from_template(stream)
            for number in range(times):
                read.seek(0)
                for packet in read.demux(stream):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + number * length, packet.dts + number * length
                        packet.stream = copy
                        write.mux(packet)


SMALL = Clip("clip", 2, 360, 640)


@dataclass(frozen=True)
class Way:
    """One way of getting the frames, run in a process of its own.

    Args:
        name: what it is called.
        kind: ``published``, ``hico``, ``torchcodec``, ``decord`` or ``pyav``.
        paths: the videos.
        num_frames: frames of each.
        start: seconds, where the part of the video begins.
        end: seconds; None for the whole video.
        settings: of ``read_video``.
        tree: where hico is imported from; None for this checkout.
    """

    name: str
    kind: str
    paths: list[str]
    num_frames: int
    start: float | None = None
    end: float | None = None
    settings: dict = field(default_factory=dict)
    tree: str | None = None

    @property
    def is_here(self) -> bool:
        return self.kind not in {"torchcodec", "decord"} or importlib.util.find_spec(self.kind) is not None

    def run(self) -> torch.Tensor:
        read = {"hico": _hico, "torchcodec": _torchcodec, "decord": _decord, "pyav": _pyav, "published": _published}
        return torch.cat([read[self.kind](self, path) for path in self.paths])

    def wanted(self, num_frames: int, fps: float) -> list[int]:
        """Return the frames, at a constant rate."""
        first = round((self.start or 0) * fps)
        last = num_frames if self.end is None else round(self.end * fps)
        return [first + number for number in sample_frames(last - first, fps, num_frames=self.num_frames, clip_len=1)]

    def launch(self) -> subprocess.Popen:
        """Start the process, which measures once for each line that it is given."""
        command = [sys.executable, __file__, "--way", json.dumps(asdict(self))]
        there = {**os.environ, "PYTHONPATH": self.tree or str(Path(__file__).parents[1])}
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=there
        )


def measure(process: subprocess.Popen) -> dict:
    process.stdin.write("\n")
    return json.loads(process.stdout.readline())


def has_decord() -> bool:
    return importlib.util.find_spec("decord") is not None


def _hico(way: Way, path: str) -> torch.Tensor:
    settings = {"num_frames": way.num_frames, "size": SIZE, "clip_len": 1, **way.settings}
    return read_video(path, start=way.start, end=way.end, **settings).frames


def _published(way: Way, path: str) -> torch.Tensor:
    pictures = _decord_full(way, path) if has_decord() else _pyav_full(way, path)
    resized = [Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for picture in pictures]
    return torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)


def _decord_full(way: Way, path: str) -> np.ndarray:
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    return reader.get_batch(way.wanted(len(reader), reader.get_avg_fps())).asnumpy()


def _pyav_full(way: Way, path: str) -> np.ndarray:
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = set(way.wanted(stream.frames, float(stream.average_rate)))
        frames = enumerate(container.decode(stream))
        return np.stack([frame.to_ndarray(format="rgb24") for number, frame in frames if number in wanted])


def _torchcodec(way: Way, path: str) -> torch.Tensor:
    """Its usual code: all frames at full size, then torch's filter."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=way.settings.get("num_threads", 1))
    wanted = way.wanted(len(decoder), decoder.metadata.average_fps)
    frames = decoder.get_frames_at(wanted).data
    return torch.nn.functional.interpolate(frames, (SIZE, SIZE), mode="bicubic", antialias=True)


def _decord(way: Way, path: str) -> torch.Tensor:
    """At size, by swscale."""
    import decord

    reader = decord.VideoReader(path, width=SIZE, height=SIZE, num_threads=way.settings.get("num_threads", 1))
    frames = reader.get_batch(way.wanted(len(reader), reader.get_avg_fps())).asnumpy()
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def _pyav(way: Way, path: str) -> torch.Tensor:
    """A plain loop: one seek to the beginning, then every frame up to the last one wanted, at a constant rate."""
    pictures = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = way.settings.get("num_threads", 1)
        stream.codec_context.thread_type = "AUTO"
        fps = float(stream.average_rate)
        wanted = way.wanted(stream.frames, fps)
        container.seek(round(wanted[0] / fps / stream.time_base), stream=stream)
        missing = set(wanted)
        for frame in container.decode(stream):
            number = round(frame.pts * stream.time_base * fps)
            if number in missing:
                missing.discard(number)
                pictures.append(frame.to_ndarray(format="rgb24", width=SIZE, height=SIZE, threads=1))
            if not missing:
                break
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _peak_bytes() -> int:
    """Return the highest resident memory so far. Unlike ``ru_maxrss`` it is not inherited from the parent."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024


def run_here(way: Way) -> None:
    torch.set_num_threads(way.settings.get("num_threads", 1))
    replace(way, paths=[str(SMALL.path(Path(way.paths[0]).parent))], num_frames=1, start=None, end=None).run()
    before, peak = _peak_bytes(), 0
    for _ in sys.stdin:
        start, busy = time.perf_counter(), time.process_time()
        frames = way.run()
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        peak = peak or _peak_bytes()  # Of the first turn; the frames themselves are counted.
        digest = hashlib.sha1(frames.contiguous().numpy().tobytes()).hexdigest()
        result = {"seconds": seconds, "busy": busy, "megabytes": (peak - before) / 1e6, "digest": digest}
        print(json.dumps(result), flush=True)
        del frames


def compare(title: str, ways: list[Way], repeats: int) -> None:
    """Print all ways, medians of turns, and their ratios to the first one."""
    missing = sorted({way.kind for way in ways if not way.is_here})
    print(f"\n{title}{''.join(f'; {kind} is not installed' for kind in missing)}")
    print(f"  {'':42} {'time':>9} {'ratio':>7} {'CPU time':>10} {'ratio':>7} {'memory':>9} {'ratio':>7}  pixels")
    ways = [way for way in ways if way.is_here]
    processes = [way.launch() for way in ways]
    turns = [[measure(process) for process in processes] for _ in range(repeats)]
    for process in processes:
        process.communicate()
    base = None
    for way, runs in zip(ways, zip(*turns, strict=True), strict=True):
        middle = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "busy", "megabytes")}
        base = base or {**middle, "digest": runs[0]["digest"]}
        ratios = {key: middle[key] / base[key] for key in middle}
        pixels = "identical" if {run["digest"] for run in runs} == {base["digest"]} else "differ"
        print(
            f"  {way.name:42} {middle['seconds']:7.3f} s {ratios['seconds']:6.2f}x {middle['busy']:8.3f} s "
            f"{ratios['busy']:6.2f}x {middle['megabytes']:6.0f} MB {ratios['megabytes']:6.1f}x  {pixels}",
            flush=True,
        )


def ways_of(
    paths: list[str],
    num_frames: int,
    *,
    published: bool = False,
    threads: int = 1,
    before: str | None = None,
    **part: float,
) -> list[Way]:
    """Return hico's default, to which the others are compared, its other settings, and what else there is."""
    default = {"num_threads": threads}
    exact = {**default, "scaler": "exact"}
    ways = [
        ("hico", "hico", default),
        ('hico, scaler="exact"', "hico", exact),
        ("torchcodec, then torch", "torchcodec", default),
        ("decord at size", "decord", default),
        ("a plain PyAV loop", "pyav", default),
    ]
    if published:
        ways.append(("decord full size, then PIL" if has_decord() else "PyAV full size, then PIL", "published", {}))
        ways.append(("hico, exact=False", "hico", {**default, "exact": False}))
    ways = [Way(name, kind, paths, num_frames, settings=settings, **part) for name, kind, settings in ways]
    if before:
        ways += [
            Way("hico before", "hico", paths, num_frames, settings=default, tree=before, **part),
            Way(
                'hico before, scaler="fast"',
                "hico",
                paths,
                num_frames,
                settings={**default, "scaler": "fast"},
                tree=before,
                **part,
            ),
        ]
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the length, to try the script")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", default="", help="only the cases whose title has this word")
    parser.add_argument("--videos", type=Path, default=Path(tempfile.gettempdir()) / "hico-benchmark")
    parser.add_argument("--before", help="another checkout of hico, to be compared")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        run_here(Way(**json.loads(args.way)))
        return

    args.videos.mkdir(parents=True, exist_ok=True)
    shorter = 10 if args.quick else 1
    hd, minutes = Clip("720p30", 60 // shorter, 720, 1280), Clip("360p30", 600 // shorter, 360, 640)
    hevc = Clip("hevc", 60 // shorter, 720, 1280, codec="libx265")
    half_hour, two_hours = (Clip("long", seconds, 360, 640) for seconds in (1800, 7200))
    SMALL.write(args.videos)
    cases = [
        (hd, 1, 64 // shorter, {"published": True}),
        (hd, 1, 512 // shorter, {"published": True}),
        (minutes, 1, 600 // shorter, {"published": True}),
        (minutes, 1, 64 // shorter, {"published": True}),
        (SMALL, 200 // shorter, 16, {}),
        (half_hour, 1, 16, {"start": 1500.0, "end": 1508.0}),
        (two_hours, 1, 16, {"start": 6000.0, "end": 6008.0}),
        (hevc, 1, 64 // shorter, {}),
        (two_hours, 1, 64, {}),
    ]
    for clip, times, num_frames, settings in cases:
        many = f" of each of {times} videos" if times > 1 else ""
        part = f", {settings['start']:.0f} to {settings['end']:.0f} s" if "start" in settings else ""
        kind = f"{clip.seconds} s of {clip.width}x{clip.height} {clip.codec[3:]}"
        title = f"{num_frames} frames{many} of {kind}{part}, to {SIZE} px, {args.threads} thread"
        if args.case in title:
            paths = [str(clip.write(args.videos))] * times
            compare(
                title, ways_of(paths, num_frames, threads=args.threads, before=args.before, **settings), args.repeats
            )


if __name__ == "__main__":
    main()
