"""``hico ablate``, as a user meets it: a tiny untrained model, a handful of questions."""

import csv
import json

import numpy as np
import pytest
from train_corpus import write_model, write_video

from hico import HicoConfig
from hico.cli import main
from hico.eval.ablate import DEFAULT_GRID
from hico.eval.ablation_table import markdown
from hico.eval.answers import is_right, read_questions, wilson_interval
from hico.eval.cells import Cell, baselines, make_grid, read_part
from hico.eval.submitting import in_turn
from hico.registry import VIDEO_COMPRESSORS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A model of one token per frame, rows about two videos, and a recipe."""
    folder = tmp_path_factory.mktemp("corpus")
    rng, rows = np.random.default_rng(0), []
    for number in range(2):
        write_video(folder / f"{number}.mp4", num_frames=16 + 8 * number, rng=rng)
        for answer in ("A", "B"):
            said = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": answer}]
            rows.append({"video": f"{number}.mp4", "conversations": said, "choices": 2})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mix.yaml").write_text("datasets:\n  - {json_path: rows.jsonl, data_root: ., other_keys: [choices]}\n")
    (folder / "recipe.yaml").write_text(
        "{extends: pretrain, model: init, output_dir: out, data: mix.yaml, use_cpu: true, bf16: false, max_steps: 1, "
        "warmup_steps: 0, gradient_checkpointing: false, image_size: null, global_batch_size: 2, "
        "per_device_train_batch_size: 2, part_learning_rates: {}, min_frames: 8, max_frames: 8, max_length: 2048, "
        "save_strategy: no, report_to: none, dataloader_num_workers: 0, decode_timeout: null, disable_tqdm: true, "
        "seed: 3}\n"
    )
    write_model(folder / "init")
    return folder


def ablate(corpus, output, *words) -> int:
    small = ["--frames", "8", "--timed", "1", "--new-tokens", "2", "--device", "cpu", "--output", str(output)]
    return main(["ablate", "--model", str(corpus / "init"), "--data", str(corpus / "rows.jsonl"), *small, *words])


def lines_of(output) -> list[dict]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()[1:]]


def rows_of(output) -> list[dict]:
    return list(csv.DictReader((output / "table.csv").open()))


GRID = ["--video-compressors", "visionzip keep_ratio=0.5", "--drop-schedules", "attention@1:0.5"]


@pytest.fixture(scope="module")
def ablation(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("ablation")
    assert ablate(corpus, output, *GRID) == 0
    return output


def test_a_grid_of_three_cells_has_uniform_and_random_of_every_budget(ablation):
    rows = {(row["method"], row["setting"]): row for row in rows_of(ablation)}
    kept, dropped = "keep_ratio=0.5, 8 frames", "@1:0.5, 8 frames"
    assert list(rows) == [
        ("uncompressed", "8 frames"),
        ("visionzip", kept),
        ("attention@1", "attention" + dropped),
        ("uniform", kept),
        ("random", kept),
        ("uniform@1", "uniform" + dropped),
        ("random@1", "random" + dropped),
    ]
    assert {float(rows[name, kept]["retained"]) for name in ("visionzip", "uniform", "random")} == {0.5}
    assert float(rows["uncompressed", "8 frames"]["tokens_per_frame"]) == 1
    assert float(rows["attention@1", "attention" + dropped]["deep_tokens_per_frame"]) < 1
    whole = float(rows["uncompressed", "8 frames"]["llm_tflop"])
    assert all(float(row["llm_tflop"]) < whole for key, row in rows.items() if key[0] != "uncompressed")


def test_every_figure_is_there_with_its_count_and_interval(ablation):
    for row in rows_of(ablation):
        times = [float(row[f"{part}_s"]) for part in ("decode", "encode", "compress", "prefill")]
        assert min(times) > 0
        assert float(row["first_token_s"]) == pytest.approx(sum(times)), "of one timed question"
        assert float(row["tokens_per_s"]) > 0
        assert row["n"] == "4"
        assert float(row["low"]) <= float(row["accuracy"]) <= float(row["high"])
        assert float(row["frames"]) == 8
        assert row["error"] == ""


def test_table_and_plot_are_written(ablation):
    head, _, first, *rest = (ablation / "table.md").read_text().splitlines()
    assert head.count("|") == first.count("|") == rest[-1].count("|")
    assert first.startswith("| uncompressed | 8 frames | 1.00 | 1.00 | 100.0% |")
    assert (ablation / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_cell_is_never_run_again_and_a_new_one_is(corpus, ablation, monkeypatch, capsys):
    before = lines_of(ablation)
    monkeypatch.setattr("hico.eval.ablate._tried", lambda *args: pytest.fail("a finished cell was run again"))
    assert ablate(corpus, ablation, *GRID) == 0
    assert lines_of(ablation) == before
    monkeypatch.undo()
    assert ablate(corpus, ablation, *GRID, "--compressors", "pooling stride=1") == 0
    assert [line["method"] for line in lines_of(ablation)[len(before) :]] == ["pooling"]


def test_other_rows_or_weights_are_other_cells(corpus, ablation):
    before = len(lines_of(ablation))
    assert ablate(corpus, ablation, "--video-compressors", "uniform keep_ratio=0.5", "--limit", "2") == 0
    assert len(lines_of(ablation)) == before + 3


def test_a_failed_cell_is_reported_does_not_stop_the_rest_and_is_tried_again(corpus, tmp_path, capsys):
    words = ["--compressors", "resampler", "--video-compressors", "uniform keep_ratio=0.5"]
    for _ in range(2):
        assert ablate(corpus, tmp_path, *words) == 1
        printed = capsys.readouterr()
        assert "resampler 8 frames: failed: compressor 'resampler' has weights of its own" in printed.err
        assert "| resampler | 8 frames | failed: compressor 'resampler' has weights" in printed.out
    assert [line["method"] for line in lines_of(tmp_path)] == ["uncompressed", "uniform", "random"]
    assert [row["method"] for row in rows_of(tmp_path) if row["error"]] == ["resampler"]


def test_a_model_is_as_before_after_other_settings(corpus, tmp_path):
    words = ["--compressors", "pooling stride=1", "--video-compressors", "dtd threshold=-1"]
    assert ablate(corpus, tmp_path, *words, "--frames", "8", "4") == 0
    rows = {(row["method"], row["setting"]): row for row in rows_of(tmp_path)}
    assert float(rows["uncompressed", "4 frames"]["tokens_per_frame"]) == 1
    assert float(rows["pooling", "stride=1, 4 frames"]["tokens_per_frame"]) == 4
    assert float(rows["dtd", "threshold=-1, 8 frames"]["retained"]) <= 1


def test_every_cell_trains_the_recipe_with_its_own_parts(corpus, tmp_path):
    words = ["--recipe", str(corpus / "recipe.yaml"), "--compressors", "resampler tokens_per_frame=1"]
    words += ["--encoders", "{name: umt, image_size: 24, patch_size: 12, hidden_size: 16, depth: 3, num_heads: 2}"]
    assert ablate(corpus, tmp_path, *words) == 0
    assert [line["method"] for line in lines_of(tmp_path)] == ["uncompressed", "umt", "resampler"]
    configs = [HicoConfig.from_pretrained(path.parent) for path in tmp_path.glob("cells/*/final/config.json")]
    assert sorted(config.compressor["name"] for config in configs) == ["resampler", "token_merge", "token_merge"]
    assert sorted(config.encoder["depth"] for config in configs) == [2, 2, 3]


def test_a_grid_is_read_from_yaml_and_flags_win(corpus, tmp_path):
    (tmp_path / "grid.yaml").write_text("{video_compressors: [evs], keep_ratios: [0.5, 0.25], frames: [4]}\n")
    words = ["--grid", str(tmp_path / "grid.yaml"), "--keep-ratios", "0.5"]
    assert ablate(corpus, tmp_path, *words) == 0
    assert [line["setting"] for line in lines_of(tmp_path)] == ["8 frames", *["keep_ratio=0.5, 8 frames"] * 3]


@pytest.mark.parametrize("cluster", ["debug", pytest.param("local", marks=pytest.mark.slow)])
def test_cells_run_as_jobs(corpus, tmp_path, monkeypatch, cluster):
    pytest.importorskip("submitit", reason="jobs need the optional extra submitit")
    assert ablate(corpus, tmp_path, *GRID[:2], "--submit", cluster, "--job", "timeout_min=5") == 0
    assert [line["method"] for line in lines_of(tmp_path)] == ["uncompressed", "visionzip", "uniform", "random"]


def test_work_that_fails_yields_its_exception():
    done = list(in_turn(lambda number: 1 / number, [1, 0, 2]))
    assert [number for number, _ in done] == [1, 0, 2]
    assert isinstance(done[1][1], ZeroDivisionError)
    assert done[2][1] == 0.5


def test_a_grid_changes_one_thing_or_everything():
    choices = {"video_compressors": ["evs", "dycoke"], "keep_ratios": [0.5, 0.25], "drop_schedules": ["fastv"]}
    one = make_grid(**choices)
    assert [cell.method for cell in one] == ["uncompressed", "evs", "evs", "dycoke", "attention@2"]
    assert len(make_grid(**choices, frames=[8, 16])) == 2 * len(one)
    assert len(make_grid(**choices, cross=True)) == (1 + 3) * 2


def test_baselines_spend_the_same():
    cell = Cell(video_compressor={"name": "dtd"}, drop_schedule="uniform@4:0.75,attention@18:0.25", frames=8)
    uniform, chance = baselines(cell, retained=0.30412, tokens_ratio=0.30412)
    assert uniform.video_compressor == {"name": "uniform", "keep_ratio": 0.304}
    assert uniform.drop_schedule == "uniform@4:0.75,uniform@18:0.25"
    assert chance.drop_schedule == "random@4:0.75,random@18:0.25"
    clips = Cell(compressor={"name": "pooling", "stride": 4})
    assert [one.video_compressor for one in baselines(clips, retained=1.0, tokens_ratio=0.25)] == [
        {"name": "uniform", "keep_ratio": 0.25},
        {"name": "random", "keep_ratio": 0.25},
    ]
    assert baselines(clips, retained=1.0, tokens_ratio=2.0) == []
    assert baselines(Cell(video_compressor={"name": "dtd"}), retained=1.0, tokens_ratio=1.0) == []


def test_the_default_grid_has_every_method():
    assert {*DEFAULT_GRID["video_compressors"], "uniform", "random"} <= set(VIDEO_COMPRESSORS.names())
    assert len(make_grid(**DEFAULT_GRID)) >= 12


def test_accuracy_is_relative_to_the_uncompressed_model_at_the_same_frames():
    figures = {"right": 1, "n": 4, "low": 0.0, "high": 1.0}
    rows = [
        (Cell(frames=frames, **change), {**figures, "accuracy": accuracy})
        for frames, change, accuracy in (
            (8, {}, 0.5),
            (8, {"drop_schedule": "fastv"}, 0.25),
            (4, {}, 0.25),
            (4, {"drop_schedule": "fastv"}, 0.25),
        )
    ]
    shares = [line.split("|")[-2].strip() for line in markdown(rows).splitlines()[2:]]
    assert shares == ["100.0%", "100.0%", "100.0%", "50.0%"]


def test_answers_are_compared_exactly_and_intervals_are_wilsons():
    assert is_right(" red ", "red")
    assert not is_right("Red", "red")
    assert not is_right("red circle", "red")
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson_interval(0, 10)[0] == pytest.approx(0)
    assert wilson_interval(10, 10)[1] == pytest.approx(1)


def test_questions_are_spread_over_the_file(corpus):
    assert [question.truth for question in read_questions(corpus / "rows.jsonl")] == ["A", "B", "A", "B"]
    some = read_questions(corpus / "rows.jsonl", limit=2)
    assert [str(question.video)[-5:] for question in some] == ["0.mp4", "1.mp4"]


def test_parts_are_read_with_their_settings():
    assert read_part("evs keep_ratio=0.5", VIDEO_COMPRESSORS) == {"name": "evs", "keep_ratio": 0.5}
    assert read_part({"name": "evs"}, VIDEO_COMPRESSORS) == {"name": "evs"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--video-compressors", "evss"], "unknown video compressor 'evss'; did you mean 'evs'?"),
        (["--video-compressors", "evs 0.5"], "has '0.5'; write settings as key=value"),
        (["--drop-schedules", "attention"], "attention"),
        (["--frames", "0"], "frames are 0; give whole numbers of at least 1"),
        (["--limit", "0"], "--limit is 0; ask at least 1 question"),
        (["--timed", "0"], "--timed and --batch-size must be at least 1"),
        (["--encoders", "clip"], "--encoders need training; give the --recipe"),
        (["--set", "max_steps=1"], "--set changes a recipe, and there is none"),
        (["--job", "fast"], "--job has 'fast'; write key=value"),
        (["--grid", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--model", "/nowhere"], "there is no checkpoint '/nowhere'"),
        (["--data", "/nowhere.jsonl"], "there is no file of rows /nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(corpus, tmp_path, capsys, words, message):
    assert ablate(corpus, tmp_path / "out", *words) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A"}]}, "media are: none"),
        ({"video": "0.mp4", "conversations": [{"from": "human", "value": "Hi"}]}, "malformed|does not end"),
    ],
)
def test_rows_without_a_video_or_an_answer_are_refused(tmp_path, row, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "rows.jsonl")
