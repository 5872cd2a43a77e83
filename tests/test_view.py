"""`hico view`: the facts are those of the model, and the page holds all it needs."""

import json
import re
import shutil
import subprocess

import pytest
import torch

from hico.cli import load, main
from hico.demo import write_moving_square
from hico.ops.merging import plan_merge, similarity_metric
from hico.preprocessing import normalize_pixels
from hico.processing_hico import split_clips
from hico.view import collect, render

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "square.mp4"
    write_moving_square(str(path), num_frames=30)
    return str(path)


@pytest.fixture(scope="module")
def seen(clip):
    """The tiny model with a video compressor and a drop stage that scores, and the facts of one answer."""
    model, processor = load("tiny", device="cpu")
    model.set_video_compressor("vidcom2")
    model.set_drop_schedule("attention@1:0.5")
    processor.vision = model.config.vision
    facts = collect(
        model, processor, clip, "What <b>?", video_settings={"num_frames": 8}, max_new_tokens=2, do_sample=False
    )
    return model, processor, facts


def test_groups_are_the_merge_plan(seen):
    model, _, facts = seen
    inner = model.model
    clips = split_clips(facts.frames_FCHW, facts.clip_len)
    with torch.no_grad():
        tokens = inner.encoder(normalize_pixels(clips, mean=inner.encoder.image_mean, std=inner.encoder.image_std))
    metric = similarity_metric(tokens, num_heads=inner.compressor.num_heads)
    plan = plan_merge(metric, facts.tokens_per_clip, order=inner.compressor.order)
    assert torch.equal(facts.groups_NL, plan.assignment_NL)


def test_every_step_keeps_what_the_model_kept(seen):
    model, _, facts = seen
    clips = split_clips(facts.frames_FCHW, facts.clip_len)
    with torch.no_grad():
        compressed = model.model.encode_video(clips, num_clips=len(clips))
    whole, videos, stage = facts.steps
    assert len(whole.kept_K) == len(clips) * facts.tokens_per_clip
    assert torch.equal(videos.kept_K, compressed.indices_K)
    assert len(stage.kept_K) == len(videos.kept_K) // 2
    best = stage.scores[videos.kept_K].sort(descending=True, stable=True).indices[: len(stage.kept_K)]
    assert torch.equal(stage.kept_K, videos.kept_K[best].sort().values)


def test_the_page_needs_nothing_else_and_escapes_what_it_quotes(seen):
    page = render(seen[2])
    assert not re.search(r"https?://|<link|<script[^>]+src|@import|url\(", page)
    assert all(source.startswith("data:image/jpeg;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert "What &lt;b&gt;?" in page
    assert "What <b>?" not in page


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; apt-get install chromium")
def test_a_browser_greys_out_what_was_dropped_as_arrow_keys_step(seen, tmp_path):
    facts = seen[2]
    press = "<script>document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));</script>"
    rows_by_columns = facts.grid[1] * facts.grid[2]
    patches = facts.groups_NL + facts.tokens_per_clip * torch.arange(len(facts.groups_NL))[:, None]
    for presses, step in enumerate(facts.steps):
        path = tmp_path / f"{presses}.html"
        # The page's own policy allows inline scripts alone, of which these are some.
        path.write_text(render(facts).replace("</html>", press * presses + "</html>"), encoding="utf-8")
        dom = _dom(path, tmp_path / "profile")
        assert f"{step.name}: {len(step.kept_K)} of" in dom
        removed = [int(n) for n in re.findall(r'data-removed="(\d+)"', dom)]
        gone = ~torch.isin(patches, step.kept_K)
        assert removed == gone.view(-1, rows_by_columns).sum(1).tolist()


def _dom(path, profile):
    switches = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    switches += " disable-component-update disable-sync dump-dom"
    command = [CHROMIUM, *(f"--{name}" for name in switches.split()), f"--user-data-dir={profile}", path.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def test_the_command_writes_the_page(clip, tmp_path, capsys):
    output = tmp_path / "view.html"
    arguments = ["view", clip, "--frames", "8", "--schedule", "uniform@1:0.5", "--max-new-tokens", "2"]
    assert main([*arguments, "--device", "cpu", "--output", str(output)]) == 0
    data = re.search(r'id="facts">(.*?)</script>', output.read_text(encoding="utf-8"))[1]
    assert [len(step["kept"]) for step in json.loads(data)["steps"]] == [32, 16]
    assert str(output) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--output", "view.mp4"], "give a name that ends in .html"),
        (["--output", "/no/such/view.html"], "there is no folder /no/such"),
        (["--schedule", "uniform@9:0.5"], "lies beyond the decoder"),
        (["--video-compressor", "evz"], "evs"),
    ],
)
def test_bad_input_is_one_line(clip, capsys, options, words):
    assert main(["view", clip, "--device", "cpu", *options]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
