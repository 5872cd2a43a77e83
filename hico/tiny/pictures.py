"""Pictures of what was learned: loss curves, and a sheet of questions with the model's answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from hico.tiny.exam import Answered
from hico.video_io import read_video

RIGHT, WRONG = "#1a7f37", "#cf222e"


def draw_losses(path: str | Path, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Draw one panel of loss over steps per stage.

    Args:
        path: of the png to write.
        curves: stage -> steps and losses.
    """
    figure, panels = plt.subplots(1, len(curves), figsize=(2.6 * len(curves), 2.6), squeeze=False)
    for panel, (name, points) in zip(panels[0], curves.items(), strict=True):
        steps, losses = zip(*points, strict=True)
        panel.plot(steps, losses, color="#0969da", linewidth=1.5)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("step", fontsize=8)
        panel.set_ylim(bottom=0)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("loss", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_answers(path: str | Path, answers: Sequence[Answered], *, folder: str | Path, num_frames: int = 8) -> None:
    """Draw a film strip per video with its questions and the model's answers; wrong ones are red.

    Args:
        path: of the png to write.
        answers: to show; those about one video stand together.
        folder: that the videos are relative to.
        num_frames: of every strip.
    """
    groups: dict[str, list[Answered]] = {}
    for answer in answers:
        groups.setdefault(answer.video, []).append(answer)
    figure, rows = plt.subplots(
        len(groups), 2, figsize=(13, 1.15 * len(groups)), width_ratios=[num_frames, 5], squeeze=False
    )
    for (strip, text), (video, group) in zip(rows, groups.items(), strict=True):
        frames = read_video(Path(folder) / video, mode="middle", num_frames=num_frames, size=96)
        strip.imshow(_strip(frames.frames.numpy()), interpolation="nearest")
        strip.set_title(f"{frames.duration:.0f} s", fontsize=7, loc="left", pad=2)
        strip.axis("off")
        text.axis("off")
        for line, answer in enumerate(group):
            note = "" if answer.is_right else f" (it is {answer.truth})"
            text.text(
                0,
                0.9 - 0.17 * line,
                f"{answer.question} {answer.answer}{note}",
                color=RIGHT if answer.is_right else WRONG,
                fontsize=7.5,
                transform=text.transAxes,
            )
    figure.tight_layout(h_pad=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _strip(frames_FCHW: np.ndarray, gap: int = 4) -> np.ndarray:
    """Put frames side by side on white."""
    padded = np.pad(frames_FCHW.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
    return np.concatenate(list(padded), axis=1)
