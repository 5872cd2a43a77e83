"""Facts as one HTML file that needs nothing else: neither network nor other files."""

import base64
import io
import json
from html import escape
from pathlib import Path
from string import Template

import torch
from PIL import Image
from torch import Tensor

from hico.view.facts import Facts, Step

PAGE = Path(__file__).with_name("page.html")


def check_output(path: str) -> Path:
    """Return where a page is to be written, before minutes are spent on it.

    Raises:
        ValueError: if it names no HTML file, or lies in no folder.
    """
    output = Path(path)
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output is {path}; give a name that ends in .html")
    if not output.parent.is_dir():
        raise ValueError(f"--output is {path}, but there is no folder {output.parent}; make it first")
    return output


def render(facts: Facts) -> str:
    """Write the page."""
    data = {
        "clipLen": facts.clip_len,
        "grid": facts.grid,
        "tokensPerClip": facts.tokens_per_clip,
        "groups": None if facts.groups_NL is None else facts.groups_NL.tolist(),
        "steps": [
            {"name": step.name, "kept": step.kept_K.tolist(), "heat": None if step.scores is None else _heat(step)}
            for step in facts.steps
        ],
    }
    mixed = "<p>The compressor mixes all patches of a clip: its tokens have no place in it.</p>"
    note = mixed if facts.groups_NL is None else ""
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        question=_text(facts.question),
        answer=_text(facts.answer) or "(nothing)",
        note=note,
        steps="\n".join(_strip(facts, place) for place in range(len(facts.steps))),
        first=f"{float(facts.seconds[0]):.1f} s",
        last=f"{float(facts.seconds[-1]):.1f} s",
        clips="\n".join(_clip(facts, start) for start in range(0, len(facts.frames_FCHW), facts.clip_len)),
        facts=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _text(text: str) -> str:
    return escape(text.encode(errors="replace").decode())


def _heat(step: Step) -> dict[str, float | list[float]]:
    """Scale scores for the eye: the square root of their share of the highest, since a few tokens tower above all."""
    highest = max(float(step.scores.max()), 1e-30)
    return {"highest": highest, "values": [round(v, 3) for v in (step.scores / highest).clamp(min=0).sqrt().tolist()]}


def _strip(facts: Facts, place: int) -> str:
    """Draw the row of a step: its name, which share of each moment's tokens is left, and how many are."""
    step, num_tokens = facts.steps[place], len(facts.steps[0].kept_K)
    per_unit = facts.tokens_per_unit
    left = torch.bincount(step.kept_K // per_unit, minlength=num_tokens // per_unit).tolist()
    bars = "".join(
        f'<rect x="{unit}" y="{1 - count / per_unit:.3f}" width=".92" height="{count / per_unit:.3f}">'
        f"<title>{count} of {per_unit} tokens</title></rect>"
        for unit, count in enumerate(left)
    )
    return (
        f'<button data-step="{place}"><b>{escape(step.name)}</b>'
        f'<svg viewBox="0 0 {len(left)} 1" preserveAspectRatio="none" aria-hidden="true">{bars}</svg>'
        f"<span>{len(step.kept_K):,} of {num_tokens:,}</span></button>"
    )


def _clip(facts: Facts, start: int) -> str:
    seconds = facts.seconds[start : start + facts.clip_len].tolist()
    figures = "".join(
        f'<figure data-frame="{start + place}"><img alt="frame at {second:.2f} s" src="{_jpeg(frame)}">'
        f"<canvas></canvas><figcaption>{second:.2f} s</figcaption></figure>"
        for place, (second, frame) in enumerate(zip(seconds, facts.frames_FCHW[start:], strict=False))
    )
    number = start // facts.clip_len
    return f'<section data-clip="{number}"><h2>clip {number + 1} <output></output></h2><div>{figures}</div></section>'


def _jpeg(frame_CHW: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(frame_CHW.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
