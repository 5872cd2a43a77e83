"""The world of the miniature transfer: that its texts are true, its pictures tile, its exam is right."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from hico import HicoForConditionalGeneration, HicoProcessor
from hico.eval.results import ResultsFile
from hico.tiny import transfer
from hico.tiny.transfer import LONG, NEEDLE_COLORS, QUESTION, SHORT, TOKENS, picture, run, take_exam, text, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, num_texts=40, num_long=4, num_pictures=24)
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_texts_fill_their_length_and_answer_truly(world):
    tokenizer = HicoProcessor.from_pretrained(world / "model").tokenizer
    for name, length in (("short", SHORT), ("long", LONG)):
        texts = [row["text"] for row in rows(world / f"{name}.jsonl")]
        assert {len(tokenizer.encode(one, add_special_tokens=False)) for one in texts} == {length - 1}
        assert all(tokenizer.unk_token_id not in tokenizer.encode(one) for one in texts)
        for one in texts:
            for tale, answer in re.findall(f"(.*)\n{re.escape(QUESTION)}\n(.*)\n", one):
                assert re.findall(f"a ({'|'.join(NEEDLE_COLORS)}) ", tale) == [answer]


def test_needles_are_as_often_far_as_near():
    rng = np.random.default_rng(0)
    texts = [text(rng, SHORT, whole=True) for _ in range(400)]
    places = [re.search("|".join(NEEDLE_COLORS), one).start() / one.index("\n") for one in texts]
    assert np.histogram(places, bins=4, range=(0, 1))[0].min() > 60
    answers = [one.split("\n")[2] for one in texts]
    assert min(answers.count(color) for color in NEEDLE_COLORS) > 50


def test_a_picture_is_cut_into_the_tiles_that_it_was_put_together_of(world):
    processor = HicoProcessor.from_pretrained(world / "model")
    sizes = set()
    for row in rows(world / "pictures.jsonl"):
        image = Image.open(world / row["image"])
        inputs = processor("<|image_pad|>", images=[image])
        grid = tuple(inputs["image_grids"][0].tolist())
        assert grid == (image.height // transfer.SIDE, image.width // transfer.SIDE)
        assert inputs["input_ids"].shape[1] == TOKENS * grid[0] * grid[1]
        assert row["conversations"][1]["value"] in NEEDLE_COLORS
        sizes.add(grid)
    assert len(sizes) > 4


def test_tiles_lie_row_by_row():
    figures = [
        ("red", "circle"),
        ("white", "square"),
        ("blue", "cross"),
        ("white", "cross"),
        *[("white", "square")] * 2,
    ]
    pixels = picture(figures, 2, np.random.default_rng(0))
    assert pixels.shape == (2 * transfer.SIDE, 3 * transfer.SIDE, 3)
    red, blue = ((pixels == transfer.COLORS[color]).all(-1) for color in ("red", "blue"))
    assert red[: transfer.SIDE, : transfer.SIDE].any()
    assert red.sum() == red[: transfer.SIDE, : transfer.SIDE].sum()
    assert blue.sum() == blue[: transfer.SIDE, 2 * transfer.SIDE :].sum() > 0


def test_the_exam_shows_the_color_at_its_depth_and_an_untrained_model_guesses(world, tmp_path, monkeypatch):
    model = HicoForConditionalGeneration.from_pretrained(world / "model").eval()
    processor = HicoProcessor.from_pretrained(world / "model")
    frames = []

    def seeing(model, pictures):
        frames.append(np.stack(pictures))
        return torch.from_numpy(frames[-1]).float().flatten(1)[:, :256].unflatten(1, (TOKENS, 64)) / 255

    def knowing(model, prompt, answer, visual_embeds):
        (embeds,) = visual_embeds
        needle = torch.from_numpy(frames[-1][0]).float().flatten()[:256].unflatten(0, (TOKENS, 64)) / 255
        places = [n for n, frame in enumerate(embeds.unflatten(0, (-1, TOKENS))) if torch.equal(frame, needle)]
        asked.append((len(embeds) // TOKENS, places, processor.tokenizer.decode(prompt).count("<|video_pad|>")))
        return True

    asked = []
    results = ResultsFile(tmp_path / "results.jsonl", {}, key=("test", "length", "depth"))
    with monkeypatch.context() as patched:
        patched.setattr(transfer, "_encode", seeing)
        patched.setattr(transfer, "knows_answer", knowing)
        take_exam(model, processor, results, frames=[5, 9], depths=[0.0, 0.5, 1.0], samples=1)
    assert [length for length, _, _ in asked] == [5, 5, 5, 9, 9, 9]
    assert all(place in places for (_, places, _), place in zip(asked, [0, 2, 4, 0, 4, 8], strict=True))
    assert [placeholders for _, _, placeholders in asked] == [20, 20, 20, 36, 36, 36]
    take_exam(model, processor, results, frames=[5, 8], depths=[0.5], samples=10)
    (line,) = [line for line in results if line["length"] == 8]
    assert line["score"] <= 0.6


@pytest.mark.slow
def test_both_chains_run_and_draw_their_heatmaps(tmp_path, monkeypatch):
    write_world(tmp_path, num_texts=64, num_long=8, num_pictures=32)
    monkeypatch.setattr(transfer, "FRAMES", (8, 64))
    load = transfer.load_recipes
    short = {"max_steps": 2, "dataloader_num_workers": 0}
    monkeypatch.setattr(transfer, "load_recipes", lambda path, changes: load(path, {**changes, **short}))
    assert abs(run(tmp_path)) <= 0.6, "two steps teach nothing"
    for name in ("extended", "unextended"):
        assert min(Image.open(tmp_path / name / "heatmap.png").size) > 200
    config = HicoForConditionalGeneration.from_pretrained(tmp_path / "runs" / "align" / "final").config.text_config
    assert config.rope_parameters["rope_theta"] == 1e6
    assert config.max_position_embeddings == LONG
