"""Moving shapes: what there is to see in a scene, and how it is drawn.

Places and lengths are shares of the frame's side, with the origin at the top left; times are seconds.
"""

from dataclasses import dataclass

import numpy as np

COLORS = {
    "red": (225, 45, 45),
    "green": (45, 200, 60),
    "blue": (55, 85, 240),
    "yellow": (235, 220, 50),
    "purple": (190, 60, 215),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SCENE_SECONDS = 4
"""How long a scene lasts: one clip of four frames at one frame per second."""
SIZES = (0.32, 0.42)
"""Sides of the square around a shape."""
SPEEDS = (0.083, 0.135)
"""Speeds of a moving shape, per second."""


@dataclass(frozen=True)
class Figure:
    """A shape, where its centre is when the scene begins, and where it goes."""

    shape: str
    color: str
    size: float
    start: tuple[float, float]
    velocity: tuple[float, float] = (0.0, 0.0)

    def center(self, second: float) -> tuple[float, float]:
        """Return the place of the centre, across and down."""
        return self.start[0] + second * self.velocity[0], self.start[1] + second * self.velocity[1]


@dataclass(frozen=True)
class Scene:
    """Figures on a grey floor, for `SCENE_SECONDS`."""

    figures: tuple[Figure, ...]
    floor: int
    """Grey level."""


def moving_scene(rng: np.random.Generator, *, shape: str, color: str, direction: str) -> Scene:
    """Let one figure cross the floor, at a random place and speed; all of it stays in the frame."""
    size, speed = rng.uniform(*SIZES), rng.uniform(*SPEEDS)
    velocity = np.array(DIRECTIONS[direction]) * speed
    reach = velocity * SCENE_SECONDS
    low = size / 2 - np.minimum(reach, 0)
    high = 1 - size / 2 - np.maximum(reach, 0)
    start = rng.uniform(low, high)
    return Scene((Figure(shape, color, size, tuple(start.tolist()), tuple(velocity.tolist())),), _floor(rng))


def still_scene(rng: np.random.Generator, *, kinds: list[tuple[str, str]]) -> Scene:
    """Put one to four still figures, given as shape and colour, into different quarters of the frame."""
    quarters = rng.permutation(4)[: len(kinds)]
    figures = []
    for quarter, (shape, color) in zip(quarters.tolist(), kinds, strict=True):
        size = rng.uniform(*SIZES)
        place = rng.uniform(size / 2, 0.5 - size / 2, 2) + 0.5 * np.array([quarter % 2, quarter // 2])
        figures.append(Figure(shape, color, size, tuple(place.tolist())))
    return Scene(tuple(figures), _floor(rng))


def draw_frame(scene: Scene, second: float, *, side: int) -> np.ndarray:
    """Draw a moment of a scene: ``(side, side, 3)`` uint8."""
    frame = np.full((side, side, 3), scene.floor, np.uint8)
    pixels = (np.arange(side) + 0.5) / side
    for figure in scene.figures:
        left, top = figure.center(second)
        across, down = (pixels[None] - left) / figure.size * 2, (pixels[:, None] - top) / figure.size * 2
        frame[_OUTLINES[figure.shape](across, down)] = COLORS[figure.color]
    return frame


_OUTLINES = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.88,
    "triangle": lambda x, y: (abs(x) <= (y + 1) / 2) & (y <= 1),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.33) & (np.maximum(abs(x), abs(y)) <= 1),
}
"""Inside or not, in coordinates that run from -1 to 1 across the figure."""


def _floor(rng: np.random.Generator) -> int:
    return int(rng.integers(20, 80))
