"""Decoding, sampling and resizing against the published path: decord at full size, then PIL.

    python benchmarks/decode.py [--quick] [--repeats 3] [--videos FOLDER]

Each measurement is a fresh process, so that the peak of its resident memory is its own; what the imports take is
subtracted. On a busy machine compare CPU times. Without decord, PyAV at full size stands in for it. The videos are
made on the first run and kept.
"""

import argparse
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
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
    """A video to make: h264, a keyframe every 250 frames, B-frames, drifting blocks under noise."""

    name: str
    seconds: int
    height: int
    width: int
    fps: int = 30

    def write(self, folder: Path) -> Path:
        path = folder / f"{self.name}_{self.seconds}s.mp4"
        if path.exists():
            return path
        print(f"  making {path} ...", flush=True)
        random = np.random.default_rng(0)
        blocks = random.integers(0, 256, (self.height // 4, self.width // 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        noises = random.integers(-24, 24, (4, self.height, self.width, 3), np.int16)
        unfinished = path.with_suffix(".part.mp4")
        with av.open(str(unfinished), "w") as container:
            options = {"preset": "veryfast", "crf": "23"}
            stream = container.add_stream("libx264", rate=self.fps, options=options)
            stream.height, stream.width, stream.pix_fmt = self.height, self.width, "yuv420p"
            stream.codec_context.gop_size = 250
            for number in range(self.seconds * self.fps):
                top = int((1 + np.sin(number / 50)) * self.height * 0.49)
                left = number * 3 % self.width
                view = blocks[top : top + self.height, left : left + self.width].astype(np.int16)
                picture = np.clip(view + noises[number % 4], 0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        unfinished.rename(path)
        return path


@dataclass(frozen=True)
class Way:
    """One way of getting the frames, run in a process of its own."""

    name: str
    path: str
    num_frames: int
    published: bool = False
    settings: dict = field(default_factory=dict)

    def run(self) -> torch.Tensor:
        if not self.published:
            return read_video(self.path, num_frames=self.num_frames, size=SIZE, clip_len=1, **self.settings).frames
        pictures = _decord_full(self) if has_decord() else _pyav_full(self)
        resized = [Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for picture in pictures]
        return torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)

    def measure(self) -> dict:
        """Run in a fresh process."""
        command = [sys.executable, __file__, "--way", json.dumps(asdict(self))]
        return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()[-1])


def has_decord() -> bool:
    return importlib.util.find_spec("decord") is not None


def _decord_full(way: Way) -> np.ndarray:
    import decord

    reader = decord.VideoReader(way.path, num_threads=1)
    return reader.get_batch(sample_frames(len(reader), reader.get_avg_fps(), num_frames=way.num_frames)).asnumpy()


def _pyav_full(way: Way) -> np.ndarray:
    with av.open(way.path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = set(sample_frames(stream.frames, float(stream.average_rate), num_frames=way.num_frames))
        frames = enumerate(container.decode(stream))
        return np.stack([frame.to_ndarray(format="rgb24") for number, frame in frames if number in wanted])


def _peak_bytes() -> int:
    """Return the highest resident memory so far. Unlike ``ru_maxrss`` it is not inherited from the parent."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024


def run_here(way: Way) -> None:
    torch.set_num_threads(1)
    before = _peak_bytes()
    start, busy = time.perf_counter(), time.process_time()
    frames = way.run()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    # Without the imports; the frames themselves are counted.
    megabytes = (_peak_bytes() - before) / 1e6
    digest = hashlib.sha1(frames.contiguous().numpy().tobytes()).hexdigest()
    print(json.dumps({"seconds": seconds, "busy": busy, "megabytes": megabytes, "digest": digest}))


def compare(title: str, ways: list[Way], repeats: int) -> None:
    """Print all ways and their ratios to the first one."""
    results = {way.name: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            results[way.name].append(way.measure())
    print(f"\n{title}")
    print(f"  {'':42} {'time':>9} {'faster':>7} {'CPU time':>9} {'less':>7} {'memory':>9} {'less':>7}  pixels")
    base = {}
    for name, runs in results.items():
        best = {key: min(run[key] for run in runs) for key in ("seconds", "busy", "megabytes")}
        base = base or {**best, "digest": runs[0]["digest"]}
        ratios = {key: base[key] / best[key] for key in best}
        pixels = "identical" if {run["digest"] for run in runs} == {base["digest"]} else "differ"
        print(
            f"  {name:42} {best['seconds']:7.2f} s {ratios['seconds']:6.2f}x {best['busy']:7.2f} s "
            f"{ratios['busy']:6.2f}x {best['megabytes']:6.0f} MB {ratios['megabytes']:6.1f}x  {pixels}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the length, to try the script")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--videos", type=Path, default=Path(tempfile.gettempdir()) / "hico-benchmark")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        run_here(Way(**json.loads(args.way)))
        return

    args.videos.mkdir(parents=True, exist_ok=True)
    shorter = 10 if args.quick else 1
    published = "decord full size, then PIL" if has_decord() else "PyAV full size, then PIL (no decord here)"
    clip = Clip("720p30", 60 // shorter, 720, 1280)
    path = str(clip.write(args.videos))
    for num_frames in (64 // shorter, 512 // shorter):
        ways = [
            Way(published, path, num_frames, published=True),
            Way("hico, 1 thread", path, num_frames, settings={"num_threads": 1}),
            Way("hico, 2 threads", path, num_frames, settings={"num_threads": 2}),
            Way("hico, 1 thread, fast scaler", path, num_frames, settings={"num_threads": 1, "scaler": "fast"}),
        ]
        compare(f"{num_frames} frames of {clip.seconds} s of 1280x720, to {SIZE} px", ways, args.repeats)

    clip = Clip("360p30", 600 // shorter, 360, 640)
    path = str(clip.write(args.videos))
    for num_frames in (600 // shorter, 64 // shorter):
        ways = [
            Way(published, path, num_frames, published=True),
            Way("hico, 1 thread", path, num_frames, settings={"num_threads": 1}),
            Way("hico, 2 threads", path, num_frames, settings={"num_threads": 2}),
            Way("hico, 1 thread, exact=False", path, num_frames, settings={"num_threads": 1, "exact": False}),
        ]
        compare(f"{num_frames} frames of {clip.seconds} s of 640x360, to {SIZE} px", ways, args.repeats)


if __name__ == "__main__":
    main()
