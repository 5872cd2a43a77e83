"""The tiny world: its files show what its rows say, and nothing but the pixels tells the answers."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hico.configuration_hico import HicoConfig
from hico.data.mixture import read_mixture
from hico.processing_hico import HicoProcessor
from hico.tiny.corpus import CorpusSize, long_story, write_corpus
from hico.tiny.exam import Answered, accuracy, accuracy_by_question, chance, read_exam
from hico.tiny.model import write_untrained
from hico.tiny.scenes import COLORS, SCENE_SECONDS, draw_frame
from hico.tiny.stories import story_of_counting, story_of_events
from hico.train.recipes import load_recipes
from hico.video_io import read_video

RECIPE = Path(__file__).parents[1] / "train" / "tiny" / "all.yaml"
TRAINING = ("text", "tracks", "clip_captions", "pair_captions", "short", "counts", "long")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = write_corpus(tmp_path_factory.mktemp("tiny"), CorpusSize().scaled(0.01), processes=1)
    write_untrained(folder / "model")
    return folder


def rows_of(corpus: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (corpus / f"{name}.jsonl").read_text().splitlines()]


NOTES = ["labels", "boxes", "choices"]


def test_every_file_of_every_row_is_there(corpus):
    for name in (*TRAINING, "held_out_short", "held_out_long"):
        mixture = read_mixture(
            [{"json_path": str(corpus / f"{name}.jsonl"), "data_root": str(corpus), "other_keys": NOTES}]
        )
        assert len(mixture) == len(rows_of(corpus, name))


def test_the_box_of_a_track_has_the_color_of_its_label(corpus):
    for row in rows_of(corpus, "tracks"):
        video = read_video(corpus / row["video"], mode="dynamic_fps1", min_frames=4, max_frames=8)
        assert video.num_frames == len(row["boxes"]) == SCENE_SECONDS
        for frame, (left, top, right, bottom) in zip(video.frames, row["boxes"], strict=True):
            side = frame.shape[-1]
            pixel = frame[:, int((top + bottom) / 2 * side), int((left + right) / 2 * side)]
            nearest = min(COLORS, key=lambda name: abs(np.array(COLORS[name]) - pixel.numpy()).sum())
            assert nearest == row["labels"]["color"]


def test_a_figure_goes_where_its_label_says(corpus):
    axes = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}
    for row in rows_of(corpus, "tracks"):
        axis, sign = axes[row["labels"]["direction"]]
        path = np.array(row["boxes"])[:, [axis, 1 - axis]]
        assert (np.diff(path[:, 0]) * sign > 0.08).all()
        np.testing.assert_allclose(path[:, 1], path[0, 1], atol=1e-3)


def test_all_figures_stay_inside_the_frame_and_apart():
    rng = np.random.default_rng(0)
    for count in range(1, 5):
        for story in (story_of_events(rng, lengths=[1] * count), story_of_counting(rng, count=count)):
            for scene in story.scenes:
                for figure in scene.figures:
                    for second in (0.0, SCENE_SECONDS):
                        place = np.array(figure.center(second))
                        assert (place - figure.size / 2 >= 0).all()
                        assert (place + figure.size / 2 <= 1).all()
            shown = draw_frame(story.scenes[0], 0.0, side=96)
            colors = {tuple(color) for color in shown.reshape(-1, 3).tolist()}
            assert {COLORS[figure.color] for figure in story.scenes[0].figures} <= colors


def test_answers_are_drawn_evenly_whatever_the_question():
    rng = np.random.default_rng(0)
    stories = [story_of_events(rng, lengths=[1]) for _ in range(600)]
    stories += [long_story(rng, num_scenes=8, num_events=2 + n % 2) for n in range(600)]
    stories += [story_of_counting(rng, count=1 + n % 4) for n in range(600)]
    answers: dict[str, Counter] = {}
    choices = {}
    for story in stories:
        for (question, answer), count in zip(story.questions, story.choices, strict=True):
            answers.setdefault(question, Counter())[answer] += 1
            choices[question] = count
    assert len(answers) == 10
    for question, counter in answers.items():
        assert len(counter) == choices[question]
        expected = counter.total() / choices[question]
        chi_squared = sum((count - expected) ** 2 / expected for count in counter.values())
        assert chi_squared < 20.5, f"{question}: {counter}"  # five degrees of freedom, one in a thousand


def test_first_and_last_figures_differ_and_the_caption_names_all_in_order():
    rng = np.random.default_rng(0)
    for _ in range(50):
        story = long_story(rng, num_scenes=8, num_events=3)
        answers = dict(story.questions)
        assert answers["which shape is first?"] != answers["which shape is last?"]
        events = story.caption.split(" then ")
        assert len(events) == 3
        first = f"a {answers['which color is first?']} {answers['which shape is first?']} moves"
        assert events[0] == f"{first} {answers['which way does the first one move?']}"


def test_held_out_videos_are_not_those_of_training(corpus):
    contents = [(corpus / path).read_bytes() for path in sorted((corpus / "videos").iterdir())]
    assert len(set(contents)) == len(contents)


def test_the_same_seed_writes_the_same_corpus(corpus, tmp_path):
    size = CorpusSize().scaled(0.001)
    first, again, other = (
        write_corpus(tmp_path / name, size, seed=seed, processes=1) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert (first / "short.jsonl").read_bytes() == (again / "short.jsonl").read_bytes()
    assert (first / "short.jsonl").read_bytes() != (other / "short.jsonl").read_bytes()


def test_the_tokenizer_knows_every_word(corpus):
    tokenizer = HicoProcessor.from_pretrained(corpus / "model").tokenizer
    for name in (*TRAINING, "held_out_short", "held_out_long"):
        for row in rows_of(corpus, name):
            for turn in row["conversations"]:
                ids = tokenizer.encode(turn["value"].replace("<image>", ""))
                assert tokenizer.unk_token_id not in ids
    prompt = "<|im_start|>assistant\nWhich shape?<|im_end|>\n"
    words = ["<|im_start|>", "assistant", "\n", "which", "shape", "?", "<|im_end|>", "\n"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(prompt)) == words


def test_an_exam_asks_one_question_at_a_time_of_videos_four_times_as_long(corpus):
    short, long = (read_exam(corpus / f"held_out_{name}.jsonl") for name in ("short", "long"))
    assert all(len(row["conversations"]) == 2 for row in [*short, *long])
    assert {row["duration"] for row in long} == {4 * max(row["duration"] for row in short)}


def test_accuracy_and_chance():
    results = [
        Answered("a.mp4", "which?", "red", "red", 4),
        Answered("a.mp4", "what?", "red", "blue", 6),
        Answered("b.mp4", "what?", "red", "red", 6),
    ]
    assert accuracy(results) == pytest.approx(2 / 3)
    assert chance(results) == pytest.approx((1 / 4 + 1 / 6 + 1 / 6) / 3)
    assert accuracy_by_question(results) == {"which?": 1.0, "what?": 0.5}


def test_the_recipes_go_from_short_to_long_to_high_resolution(corpus, monkeypatch):
    monkeypatch.setenv("TINY", str(corpus))
    recipes = load_recipes(RECIPE)
    assert [recipe.name for recipe in recipes][-4:] == ["stage1", "stage2", "stage3", "stage4"]
    stage1, stage2, stage3, stage4 = recipes[-4:]
    assert stage1.trainable == ["compressor", "projector"]
    assert stage3.max_frames >= 4 * stage2.max_frames
    assert stage4.image_size == 2 * stage3.image_size
    assert "llm" not in stage4.trainable


def test_the_encoder_takes_positions_for_high_resolution_from_those_it_learned(corpus, monkeypatch):
    monkeypatch.setenv("TINY", str(corpus))
    encoder = HicoConfig.from_pretrained(corpus / "model").encoder
    assert {recipe.image_size // encoder["patch_size"] for recipe in load_recipes(RECIPE)[:-1]} == {
        encoder["trained_side"]
    }
