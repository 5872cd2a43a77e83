"""The tiny course from end to end, cut short: that it teaches is shown by ``make demo``."""

import pytest
from PIL import Image

from hico import HicoForConditionalGeneration, HicoProcessor, answer
from hico.tiny.course import new_video, run_course
from hico.tiny.exam import read_exam, sit_blank_exam, sit_exam

STAGES = ("warmup_llm", "warmup_encoder", "stage1", "stage2", "stage3", "stage4")


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    overrides = {"max_steps": 2, "logging_steps": 1, "dataloader_num_workers": 0}
    return folder, *run_course(folder, scale=0.005, overrides=overrides)


@pytest.mark.slow
def test_a_course_of_two_steps_a_stage_leaves_models_and_pictures_but_no_knowledge(course):
    folder, final, has_learned = course
    assert not has_learned
    assert final == folder / "runs" / "stage4" / "final"
    assert all((folder / "runs" / stage / "final" / "model.safetensors").is_file() for stage in STAGES)
    for name in ("losses.png", "answers.png"):
        assert min(Image.open(folder / name).size) > 200


@pytest.mark.slow
def test_a_second_course_in_the_same_folder_only_examines(course, capsys):
    folder, final, _ = course
    changed = final.stat().st_mtime_ns
    run_course(folder, overrides={"max_steps": 2})
    assert final.stat().st_mtime_ns == changed
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines() if line.startswith(("warmup", "stage"))][1:] == list(STAGES)


@pytest.mark.slow
def test_a_trained_model_sees_twice_the_pixels_and_answers_in_words(course, tmp_path):
    folder, final, _ = course
    model = HicoForConditionalGeneration.from_pretrained(final).eval()
    processor = HicoProcessor.from_pretrained(final)
    assert processor.vision.image_size == 96
    rows = read_exam(folder / "held_out_short.jsonl")[:6]
    seen = sit_exam(model, processor, rows, folder=folder, batch_size=4)
    assert [result.truth for result in seen] == [row["conversations"][1]["value"] for row in rows]
    blank = sit_blank_exam(model, processor, rows)
    assert [result.question for result in blank] == [result.question for result in seen]
    story = new_video(tmp_path / "new.mp4")
    said = answer(model, processor, tmp_path / "new.mp4", story.questions[0][0], max_new_tokens=3)
    assert set(said.split()) <= set(processor.tokenizer.get_vocab())
