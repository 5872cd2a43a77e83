"""What is told about scenes: captions, questions and their answers, balanced so that guessing does not pay."""

from dataclasses import dataclass

import numpy as np

from hico.tiny.scenes import COLORS, DIRECTIONS, SHAPES, Scene, moving_scene, still_scene

COUNTS = ("one", "two", "three", "four")
CAPTION_REQUEST = "describe what you see"


@dataclass(frozen=True)
class Event:
    """One thing that happens, and for how many scenes in a row."""

    shape: str
    color: str
    direction: str
    num_scenes: int

    def __str__(self) -> str:
        return f"a {self.color} {self.shape} moves {self.direction}"


@dataclass(frozen=True)
class Story:
    """A video or picture to be: its scenes, and what can be said about it."""

    scenes: tuple[Scene, ...]
    caption: str
    questions: tuple[tuple[str, str], ...]
    """Questions and answers; every answer is one word."""
    choices: tuple[int, ...]
    """How many answers each question can have, all equally likely: a guess is right once in so many."""


def story_of_events(rng: np.random.Generator, *, lengths: list[int]) -> Story:
    """Let figures of different shapes and colours cross the floor, one after the other.

    Args:
        rng: draws everything, uniformly.
        lengths: scenes of each event; the figure crosses the floor anew in each.
    """
    shapes = rng.permutation(SHAPES)[: len(lengths)].tolist()
    colors = rng.permutation(list(COLORS))[: len(lengths)].tolist()
    directions = rng.choice(list(DIRECTIONS), len(lengths)).tolist()
    events = [Event(*facts) for facts in zip(shapes, colors, directions, lengths, strict=True)]
    scenes = [
        moving_scene(rng, shape=event.shape, color=event.color, direction=event.direction)
        for event in events
        for _ in range(event.num_scenes)
    ]
    if len(events) == 1:
        asked = _ask(events[0], "what shape is it?", "what color is it?", "which way does it move?")
    else:
        asked = [
            *_ask(events[0], "which shape is first?", "which color is first?", "which way does the first one move?"),
            *_ask(events[-1], "which shape is last?", "which color is last?", "which way does the last one move?"),
        ]
    questions, choices = zip(*asked, strict=True)
    return Story(tuple(scenes), " then ".join(map(str, events)), questions, choices)


def story_of_counting(rng: np.random.Generator, *, count: int, num_scenes: int = 1) -> Story:
    """Let one to four figures of any kind stand still."""
    kinds = [(rng.choice(SHAPES).item(), rng.choice(list(COLORS)).item()) for _ in range(count)]
    scene = still_scene(rng, kinds=kinds)
    noun = "shape stands" if count == 1 else "shapes stand"
    return Story(
        (scene,) * num_scenes,
        f"{COUNTS[count - 1]} {noun} still",
        (("how many shapes are there?", COUNTS[count - 1]),),
        (len(COUNTS),),
    )


def all_words() -> set[str]:
    """Return every word and mark that captions, questions and answers are made of."""
    rng = np.random.default_rng(0)
    stories = [story_of_events(rng, lengths=[1] * count) for count in (1, 2)]
    stories += [story_of_counting(rng, count=count) for count in (1, 2, 3, 4)]
    questions = [CAPTION_REQUEST, *(question for story in stories for question, _ in story.questions)]
    captions = [story.caption for story in stories]
    return {*" ".join([*captions, *questions]).replace("?", " ?").split(), *COLORS, *SHAPES, *DIRECTIONS, *COUNTS}


def _ask(event: Event, shape: str, color: str, direction: str) -> list[tuple[tuple[str, str], int]]:
    return [
        ((shape, event.shape), len(SHAPES)),
        ((color, event.color), len(COLORS)),
        ((direction, event.direction), len(DIRECTIONS)),
    ]
