"""Peak memory of answering about a video, by number of frames.

    python benchmarks/memory.py [--frames 64 256 1024] [--size 720x1280]

Every case runs in a process of its own with the `tiny` preset, on one video that the script writes. Beyond the process
itself, memory should hold the visual tokens and nothing else that grows with the number of frames.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import peak_resident_megabytes, resident_megabytes


def measure(video: str, num_frames: int) -> dict:
    """Encode and answer in this process; return peak memory and the size of what has to stay."""
    import hico
    from hico.cli import load

    model, processor = load("tiny", device="cpu")
    hico.answer(model, processor, video, "What happens?", num_frames=4, max_new_tokens=4)  # loads what is loaded late
    before = resident_megabytes()
    start = time.perf_counter()
    session = hico.Session(model, processor, video, num_frames=num_frames)
    encoded = peak_resident_megabytes()
    seconds = time.perf_counter() - start
    session.ask("What happens?", max_new_tokens=4)
    tokens = session.visual_tokens
    return {
        "frames": num_frames,
        "tokens": len(tokens),
        "token_mb": tokens.numel() * tokens.element_size() / 1e6,
        "encode_mb": encoded - before,
        "answer_mb": peak_resident_megabytes() - before,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--size", default="720x1280", help="height x width of the video")
    parser.add_argument("--seconds", type=int, default=60, help="length of the video, at 30 frames per second")
    parser.add_argument("--one", nargs=2, metavar=("VIDEO", "FRAMES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]))))
        return
    from hico.demo import write_moving_square

    with tempfile.TemporaryDirectory() as folder:
        video = str(Path(folder) / "video.mp4")
        height, width = map(int, args.size.split("x"))
        write_moving_square(video, num_frames=args.seconds * 30, fps=30, size=(height, width))
        print(f"{args.seconds} s of {width}x{height}, tiny preset; MB beyond the loaded model")
        print(" frames  tokens  their MB  encode MB  ratio  and answer MB      s")
        first = None
        for num_frames in args.frames:
            command = [sys.executable, __file__, "--one", video, str(num_frames)]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            first = first or row["encode_mb"]
            print(
                f"{row['frames']:7d} {row['tokens']:7d} {row['token_mb']:9.2f} {row['encode_mb']:10.1f} "
                f"{row['encode_mb'] / first:6.2f} {row['answer_mb']:14.1f} {row['seconds']:6.2f}"
            )


if __name__ == "__main__":
    main()
