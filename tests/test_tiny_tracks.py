"""Pre-training of an encoder on what moves in a clip."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hico.data.decoding import SampleError
from hico.encoders.umt import UMTEncoder
from hico.tiny.corpus import CorpusSize, write_corpus
from hico.tiny.model import write_untrained
from hico.tiny.tracks import TrackModel, TrackTrainer, shown_patches
from hico.train import checkpoint
from hico.train.recipes import make_recipe
from hico.train.run import run_stage


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = write_corpus(tmp_path_factory.mktemp("tracks"), CorpusSize().scaled(0.005), processes=1)
    write_untrained(folder / "model")
    return folder


def dataset(rows: Path, folder: Path) -> dict:
    return {"json_path": str(rows), "data_root": str(folder), "other_keys": ["labels", "boxes"]}


def recipe(corpus: Path, output_dir: Path, **changes):
    return make_recipe(
        {
            "name": "warmup",
            "objective": "tracks",
            "trainable": ["encoder"],
            "model": str(corpus / "model"),
            "output_dir": str(output_dir),
            "data": [dataset(corpus / "tracks.jsonl", corpus)],
            "max_frames": 4,
            "learning_rate": 1e-3,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **changes,
        }
    )


def test_a_patch_shows_a_figure_where_the_box_reaches_its_middle():
    # The box covers the top left quarter in frame 0 and the right column of patches in frame 1.
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.76, 0.0, 1.0, 1.0]]])
    shown = shown_patches(boxes, (2, 4, 4)).view(2, 4, 4)
    expected = torch.zeros(2, 4, 4, dtype=torch.bool)
    expected[0, :2, :2] = True
    expected[1, :, 3] = True
    assert torch.equal(shown, expected)


def test_a_finer_grid_shows_the_same_area():
    boxes = torch.tensor([[[0.25, 0.0, 0.75, 0.5]]])
    coarse, fine = (shown_patches(boxes, (1, side, side)).view(side, side) for side in (4, 8))
    assert torch.equal(fine, coarse.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_the_loss_reaches_every_weight():
    torch.manual_seed(0)
    encoder = UMTEncoder(image_size=48, patch_size=12, hidden_size=32, depth=3, num_heads=2)
    model = TrackModel(encoder, {"shape": ["circle", "square"], "color": ["blue", "red", "white"]})
    clips = torch.randint(0, 256, (2, 4, 3, 48, 48), dtype=torch.uint8)
    boxes = torch.rand(2, 4, 4).sort(dim=-1).values
    model(clips, torch.tensor([[1, 3], [2, 1]]), boxes)["loss"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_a_stage_changes_the_encoder_alone(corpus, tmp_path):
    final = run_stage(recipe(corpus, tmp_path / "out"))
    assert checkpoint.is_complete(final)
    before, after = (load_file(folder / "model.safetensors") for folder in (corpus / "model", final))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".encoder." in name}
    history = json.loads((final / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]


def test_rows_without_boxes_are_an_error_that_names_the_file(corpus, tmp_path):
    data = [{"json_path": str(corpus / "clip_captions.jsonl"), "data_root": str(corpus)}]
    with pytest.raises(ValueError, match=r"clip_captions\.jsonl:1 has no labels and no boxes"):
        run_stage(recipe(corpus, tmp_path, data=data))


def test_videos_of_several_clips_are_an_error(corpus, tmp_path):
    rows = [json.loads(line) for line in (corpus / "tracks.jsonl").read_text().splitlines()]
    longer = [{**row, "video": f"videos/pair_{number:05d}.mp4"} for number, row in enumerate(rows[:4])]
    path = tmp_path / "longer.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in longer))
    data = [dataset(path, corpus)]
    with pytest.raises(ValueError, match="4 videos make 8 clips"):
        run_stage(recipe(corpus, tmp_path / "out", data=data, max_frames=8))


def test_other_parts_cannot_learn_from_tracks(corpus, tmp_path):
    with pytest.raises(ValueError, match="trains the encoder alone"):
        recipe(corpus, tmp_path, trainable=["encoder", "projector"])


@pytest.mark.parametrize("stop", ["kill", "signal"])
def test_a_stopped_stage_goes_on_bit_for_bit(corpus, tmp_path, monkeypatch, stop):
    common = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2}
    whole = run_stage(recipe(corpus, tmp_path / "whole", **common))
    stage, real = recipe(corpus, tmp_path / "out", **common), TrackTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3 and stop == "kill":
            raise KeyboardInterrupt
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TrackTrainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt if stop == "kill" else SystemExit):
            run_stage(stage)
    newest = checkpoint.checkpoints(tmp_path / "out")[-1]
    assert newest.name == ("checkpoint-2" if stop == "kill" else "checkpoint-4")
    assert checkpoint.read_manifest(newest)["datasets"][0]["rows_taken"] > 0
    resumed = run_stage(stage)
    histories = [json.loads((final / "trainer_state.json").read_text())["log_history"] for final in (whole, resumed)]
    losses = [{entry["step"]: entry["loss"] for entry in history if "loss" in entry} for history in histories]
    assert losses[0] == losses[1]
    assert list(losses[0]) == list(range(1, 8))
    before, after = (load_file(final / "model.safetensors") for final in (whole, resumed))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_rows_that_cannot_be_read_are_left_out(corpus, tmp_path):
    rows = [json.loads(line) for line in (corpus / "tracks.jsonl").read_text().splitlines()]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    rows[1]["video"] = str(tmp_path / "broken.mp4")
    (tmp_path / "tracks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [dataset(tmp_path / "tracks.jsonl", corpus)]
    with pytest.raises(SampleError, match=r"tracks\.jsonl:2 cannot be read"):
        run_stage(recipe(corpus, tmp_path / "out", data=data))
    final = run_stage(recipe(corpus, tmp_path / "out", data=data, on_bad_sample="skip", max_bad_fraction=0.2))
    assert checkpoint.is_complete(final)
    (entry,) = (tmp_path / "out/bad_rows-0.jsonl").read_text().splitlines()
    assert json.loads(entry)["where"] == f"{tmp_path / 'tracks.jsonl'}:2"


def test_nothing_that_can_be_read_is_an_error(corpus, tmp_path):
    row = json.loads((corpus / "tracks.jsonl").read_text().splitlines()[0])
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "tracks.jsonl").write_text(json.dumps({**row, "video": "broken.mp4"}))
    data = [dataset(tmp_path / "tracks.jsonl", tmp_path)]
    with pytest.raises(SampleError, match=r"none of the 1 rows can be read; .*/bad_rows-0\.jsonl says why"):
        run_stage(recipe(corpus, tmp_path / "out", data=data, on_bad_sample="skip"))
