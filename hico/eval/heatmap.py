"""The picture of a needle test: context across, depth down."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

COLORS = "RdYlGn"


def draw_heatmap(
    path: str | Path,
    scores: Mapping[tuple[int, float], float],
    *,
    across: str = "tokens",
    trained: int | None = None,
    title: str = "",
    below: Mapping[int, float] | None = None,
    below_name: str = "perplexity",
) -> None:
    """Draw the share of needles found, by context length and depth.

    Args:
        path: of the png to write.
        scores: ``(length, depth)`` -> share in [0, 1]; what is missing stays white. Depth 0 is the beginning, on top.
        across: what the length counts: ``tokens`` or ``frames``.
        trained: length that the model was trained at, marked by a dashed line.
        title: over the picture.
        below: length -> a figure that is drawn as a curve under the heatmap.
        below_name: what that is.
    """
    lengths, depths = (sorted({cell[axis] for cell in scores}) for axis in (0, 1))
    grid = np.array([[scores.get((length, depth), np.nan) for length in lengths] for depth in depths])
    size = 2.4 + 0.48 * len(lengths), 1.5 + 0.26 * len(depths) + (1.3 if below else 0)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(
        2 if below else 1, 1, squeeze=False, sharex=True, height_ratios=[3, 1.3] if below else [1]
    )[:, 0]
    mesh = panels[0].imshow(grid, aspect="auto", cmap=COLORS, vmin=0, vmax=1, interpolation="nearest")
    panels[0].set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
    panels[0].set_ylabel("depth of the needle", fontsize=8)
    panels[0].set_title(title, fontsize=9)
    bar = figure.colorbar(mesh, ax=panels[0], fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("needles found", fontsize=8)
    if below:
        known = [(place, below[length]) for place, length in enumerate(lengths) if length in below]
        panels[1].plot(*zip(*known, strict=True), marker=".", color="#0969da", linewidth=1.2)
        panels[1].set_ylabel(below_name, fontsize=8)
        panels[1].set_yscale("log")
        panels[1].tick_params(labelsize=7)
        panels[1].grid(alpha=0.3)
    for panel in panels:
        if trained is not None:
            panel.axvline(_place(trained, lengths), color="black", linestyle="--", linewidth=1.2)
    last = panels[-1]
    last.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right", fontsize=7)
    mark = "" if trained is None else f" (trained up to {trained:,}: dashed)"
    last.set_xlabel(f"{across} of context{mark}", fontsize=8)
    figure.savefig(path, dpi=120)


def _place(trained: int, lengths: list[int]) -> float:
    """Say where a length lies across: columns are evenly spaced, and those up to it lie left of the line."""
    within = sum(length <= trained for length in lengths)
    return within - 0.5
