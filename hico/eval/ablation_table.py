"""What an ablation shows: CSV, a Markdown table as papers print it, and accuracy over tokens per frame."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from hico.eval.cells import BASELINES, Cell

Row = tuple[Cell, Mapping[str, Any]]
"""A cell and its figures, or its ``error``."""
COLORS = colormaps["tab20"]
FIGURES = (
    *("frames", "tokens_per_frame", "deep_tokens_per_frame", "retained", "encode_tflop", "compress_tflop"),
    *("llm_tflop", "decode_s", "encode_s", "compress_s", "prefill_s", "first_token_s", "tokens_per_s", "peak_bytes"),
    *("right", "n", "accuracy", "low", "high", "relative"),
)
"""Columns of the CSV behind method and setting; ``relative`` is accuracy over that of the uncompressed model."""
HEADINGS = (
    *("method", "setting", "tokens / frame", "in the LLM", "retained", "encoder GFLOP", "LLM GFLOP"),
    *("decode ms", "encode ms", "compress ms", "prefill ms", "first token ms", "tokens / s", "peak MiB"),
    *("accuracy", "95 % interval", "n", "of uncompressed"),
)


def with_relative(rows: Sequence[Row]) -> list[Row]:
    """Add to every cell its accuracy as a share of that of the uncompressed model at the same frames."""
    whole = {cell.frames: figures.get("accuracy") for cell, figures in rows if cell.is_whole}

    def relative(cell: Cell, figures: Mapping[str, Any]) -> float | None:
        base = whole.get(cell.frames)
        return figures["accuracy"] / base if base and "accuracy" in figures else None

    return [(cell, {**figures, "relative": relative(cell, figures)}) for cell, figures in rows]


def write_csv(path: str | Path, rows: Sequence[Row]) -> None:
    """Write all figures, a line per cell; times in seconds, operations in units of 1e12, memory in bytes."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("method", "setting", *FIGURES, "error"))
        for cell, figures in with_relative(rows):
            known = (figures.get(name) for name in FIGURES)
            writer.writerow((cell.method, cell.setting, *known, figures.get("error")))


def markdown(rows: Sequence[Row]) -> str:
    """Lay the cells out as a table: by frames, the uncompressed model first, then by tokens in the LLM."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---|" + "---:|" * (len(HEADINGS) - 2)]
    for cell, figures in sorted(with_relative(rows), key=_order):
        cells = [cell.method, cell.setting, *_cells(figures)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_tradeoff(path: str | Path, rows: Sequence[Row], *, title: str = "") -> None:
    """Draw accuracy against tokens per frame, a line per method, the baselines dashed.

    Tokens are those that a layer of the LLM sees on average, so that a drop schedule shows what it saves. Bars are the
    intervals of 95 %.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    panel = figure.subplots()
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for cell, figures in rows:
        if "error" not in figures:
            lines.setdefault(cell.method, []).append(figures)
    for number, (method, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda point: point["deep_tokens_per_frame"])
        across, up = ([point[name] for point in points] for name in ("deep_tokens_per_frame", "accuracy"))
        bars = [[max(0.0, point["accuracy"] - point["low"]) for point in points]]
        bars.append([max(0.0, point["high"] - point["accuracy"]) for point in points])
        is_baseline = any(name in method for name in BASELINES)
        look = {"linestyle": "--", "color": "#777777" if "random" in method else "black"} if is_baseline else {}
        look = look or {"color": COLORS(number % COLORS.N)}
        marker = "*" if method == "uncompressed" else "osv^D<>Px"[number % 9]
        line = panel.errorbar(across, up, yerr=bars, marker=marker, elinewidth=0.5, capsize=2, label=method, **look)
        line[0].set_alpha(0.9)
    panel.set_xlabel("visual tokens per frame, mean over the layers of the LLM")
    panel.set_ylabel("accuracy")
    panel.set_title(title, fontsize=10)
    panel.grid(alpha=0.3)
    if lines:
        panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def _order(row: Row) -> tuple:
    cell, figures = row
    return (cell.frames or 0, not cell.is_whole, -figures.get("deep_tokens_per_frame", 0), cell.method)


def _cells(figures: Mapping[str, Any]) -> list[str]:
    if "error" in figures:
        return [f"failed: {figures['error']}".replace("|", "\\|"), *[""] * (len(HEADINGS) - 3)]

    def said(name: str, style: str, unit: float = 1.0) -> str:
        return "" if figures.get(name) is None else f"{figures[name] / unit:{style}}"

    times = [said(f"{part}_s", ".1f", 1e-3) for part in ("decode", "encode", "compress", "prefill", "first_token")]
    return [
        *(said("tokens_per_frame", ".2f"), said("deep_tokens_per_frame", ".2f"), said("retained", ".1%")),
        *(said("encode_tflop", ".3g", 1e-3), said("llm_tflop", ".3g", 1e-3)),
        *times,
        *(said("tokens_per_s", ".0f"), said("peak_bytes", ".1f", 2**20)),
        *(said("accuracy", ".1%"), f"{said('low', '.1%')} to {said('high', '.1%')}", str(figures["n"])),
        said("relative", ".1%"),
    ]
