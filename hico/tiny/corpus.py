"""Write the corpus of moving shapes: mp4 and png files, and rows of captions and questions about them."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from hico.tiny.scenes import SCENE_SECONDS, draw_frame
from hico.tiny.stories import CAPTION_REQUEST, Story, story_of_counting, story_of_events

SIDE = 96
"""Pixels per side of the files; the first three stages see them at half of it."""
FPS = 2
LONG_SCENES = 8
"""Scenes of a long video: 32 seconds, four times the 8 seconds of the longest short one."""


@dataclass(frozen=True, kw_only=True)
class CorpusSize:
    """How much of everything there is."""

    texts: int = 6400
    """Conversations without anything to see."""
    clips: int = 2400
    """Videos of one scene with a moving figure, 4 s."""
    counts: int = 1000
    """Videos of one to four still figures, 4 s."""
    images: int = 800
    """Pictures of one to four still figures."""
    pairs: int = 1600
    """Videos of two figures, one after the other, 8 s."""
    long: int = 800
    """Videos of two or three figures, one after the other, 16 or 32 s."""
    held_out: int = 40
    """Held-out videos of each kind, of 4, 4, 8 and 32 s."""

    def scaled(self, factor: float) -> "CorpusSize":
        """Return a smaller or larger corpus, with at least four of everything."""
        return CorpusSize(**{name: max(4, round(count * factor)) for name, count in asdict(self).items()})


def write_corpus(folder: str | Path, size: CorpusSize = CorpusSize(), *, seed: int = 0, processes: int = 2) -> Path:
    """Write files and rows.

    Nothing but the pixels tells the answers: they are drawn uniformly, whatever the question, the length of the video
    or its file's name. Training and held-out stories come from different streams of chance.

    Args:
        folder: to be made. Rows go to ``<name>.jsonl`` in it, files to folders in it.
        size: how many of everything.
        seed: of all chance.
        processes: that draw and encode.

    Returns:
        The folder.
    """
    folder = Path(folder)
    for name in ("videos", "images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    counts = [1, 2, 3, 4]
    kinds = {
        "clip": (size.clips, lambda rng, n: story_of_events(rng, lengths=[1])),
        "count": (size.counts, lambda rng, n: story_of_counting(rng, count=counts[n % 4])),
        "image": (size.images, lambda rng, n: story_of_counting(rng, count=counts[n % 4])),
        "pair": (size.pairs, lambda rng, n: story_of_events(rng, lengths=[1, 1])),
        "long": (
            size.long,
            lambda rng, n: long_story(rng, num_scenes=LONG_SCENES // (1 + n % 2), num_events=2 + n // 2 % 2),
        ),
        "held_out_clip": (size.held_out, lambda rng, n: story_of_events(rng, lengths=[1])),
        "held_out_count": (size.held_out, lambda rng, n: story_of_counting(rng, count=counts[n % 4])),
        "held_out_pair": (size.held_out, lambda rng, n: story_of_events(rng, lengths=[1, 1])),
        "held_out_long": (size.held_out, lambda rng, n: long_story(rng, num_scenes=LONG_SCENES, num_events=2 + n % 2)),
    }
    stories: dict[str, list[tuple[str, Story]]] = {}
    for number, (kind, (count, tell)) in enumerate(kinds.items()):
        rng = np.random.default_rng((seed, number))
        pattern = "images/{}_{:05d}.png" if kind == "image" else "videos/{}_{:05d}.mp4"
        stories[kind] = [(pattern.format(kind, n), tell(rng, n)) for n in range(count)]
    files = [item for items in stories.values() for item in items]
    with get_context("spawn").Pool(processes) as pool:
        for _ in pool.imap_unordered(partial(_write_file, folder), files, chunksize=50):
            pass

    rng = np.random.default_rng((seed, len(kinds)))
    _write_rows(folder / "text.jsonl", text_rows(rng, size.texts))
    _write_rows(folder / "tracks.jsonl", (track_row(rng, *item) for item in stories["clip"]))
    for name, make, members in (
        ("clip_captions", caption_row, ("clip", "count", "image")),
        ("pair_captions", caption_row, ("pair",)),
        ("short", question_row, ("clip", "pair")),
        ("counts", question_row, ("count", "image")),
        ("long", question_row, ("long",)),
    ):
        _write_rows(folder / f"{name}.jsonl", (make(rng, *item) for kind in members for item in stories[kind]))
    for name, members in {"short": ("clip", "count", "pair"), "long": ("long",)}.items():
        held_out = [item for kind in members for item in stories[f"held_out_{kind}"]]
        _write_rows(folder / f"held_out_{name}.jsonl", (row for item in held_out for row in exam_rows(*item)))
    return folder


def long_story(rng: np.random.Generator, *, num_scenes: int, num_events: int) -> Story:
    """Tell a story of several events whose lengths are drawn at random."""
    cuts = np.sort(rng.choice(np.arange(1, num_scenes), num_events - 1, replace=False))
    return story_of_events(rng, lengths=np.diff([0, *cuts, num_scenes]).tolist())


def caption_row(rng: np.random.Generator, path: str, story: Story) -> dict[str, Any]:
    """Return a LLaVA row that asks for the caption."""
    return _row(path, story, [(CAPTION_REQUEST, story.caption)])


def question_row(rng: np.random.Generator, path: str, story: Story) -> dict[str, Any]:
    """Return a LLaVA row that asks all questions, in random order."""
    return _row(path, story, [story.questions[n] for n in rng.permutation(len(story.questions))])


def exam_rows(path: str, story: Story) -> Iterator[dict[str, Any]]:
    """Yield a LLaVA row per question, so that no answer can help another; ``choices`` tells what guessing gives."""
    for question, choices in zip(story.questions, story.choices, strict=True):
        yield {**_row(path, story, [question]), "choices": choices}


def text_rows(rng: np.random.Generator, count: int) -> Iterator[dict[str, Any]]:
    """Yield conversations about captions in place of videos: what an LLM knows before it sees."""
    for n in range(count):
        if n % 4 == 0:
            story = story_of_counting(rng, count=1 + n // 4 % 4)
        else:
            story = story_of_events(rng, lengths=[1] * (n % 4))
        turns = [*story.questions, (CAPTION_REQUEST, story.caption)]
        turns = [turns[i] for i in rng.permutation(len(turns))[:2]]
        turns[0] = (f"{story.caption}\n{turns[0][0]}", turns[0][1])
        yield {"conversations": _conversation(turns)}


def track_row(rng: np.random.Generator, path: str, story: Story) -> dict[str, Any]:
    """Return a caption row with what `hico.tiny.tracks` needs: what moves, and its box in every second of a scene.

    Boxes are left, top, right, bottom, as shares of the frame's sides.
    """
    figure = story.scenes[0].figures[0]
    boxes = []
    for second in range(SCENE_SECONDS):
        x, y = figure.center(second)
        half = figure.size / 2
        boxes.append([round(value, 4) for value in (x - half, y - half, x + half, y + half)])
    answers = [answer for _, answer in story.questions]
    labels = dict(zip(("shape", "color", "direction"), answers, strict=True))
    return {**caption_row(rng, path, story), "labels": labels, "boxes": boxes}


def write_video(path: str | Path, story: Story) -> None:
    """Write a story as an mp4 of `FPS` frames per second, a keyframe at the start of every scene."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options={"preset": "ultrafast"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = SCENE_SECONDS * FPS
        stream.codec_context.thread_count = 1
        for scene in story.scenes:
            for number in range(SCENE_SECONDS * FPS):
                frame = draw_frame(scene, number / FPS, side=SIDE)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_image(path: str | Path, story: Story) -> None:
    """Write the beginning of a story as a png."""
    Image.fromarray(draw_frame(story.scenes[0], 0.0, side=SIDE)).save(path)


def _write_file(folder: Path, item: tuple[str, Story]) -> None:
    path, story = item
    (write_image if path.endswith(".png") else write_video)(folder / path, story)


def _row(path: str, story: Story, turns: Iterable[tuple[str, str]]) -> dict[str, Any]:
    turns = [(f"<image>\n{question}" if n == 0 else question, answer) for n, (question, answer) in enumerate(turns)]
    row = {"conversations": _conversation(turns)}
    if path.endswith(".png"):
        return {"image": path, **row}
    return {"video": path, "duration": len(story.scenes) * SCENE_SECONDS, **row}


def _conversation(turns: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
