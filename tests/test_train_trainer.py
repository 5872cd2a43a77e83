import ctypes
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from train_corpus import history, losses, make, train, trainer_for, weights, write_model

from hico import HicoForConditionalGeneration, HicoProcessor
from hico.data.collator import Collator
from hico.data.dataset import BadRow, TrainingRows
from hico.data.decoding import SampleError
from hico.data.labels import label_marks
from hico.prompt import IGNORE_INDEX, label_mask
from hico.train import run
from hico.train.__main__ import main
from hico.train.throughput import TokenLoss


def examples(recipe, rows=range(12)):
    prepared = run.prepare(recipe)
    dataset = TrainingRows(prepared.mixture, prepared.processor, recipe, seed=3)
    return dataset, [dataset[0, row] for row in rows]


def batch_for(recipe, rows=range(6), **options):
    dataset, some = examples(recipe, rows)
    return Collator(dataset.processor, packing=recipe.packing, **options)(some)


def loss_and_gradients(model, batch):
    model.zero_grad()
    inputs = {
        name: value for name, value in batch.items() if name not in ("modality", "dataset", "num_rows", "bad_rows")
    }
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


# Parts -----------------------------------------------------------------------------------------------------------


def test_a_frozen_part_has_no_gradient_and_no_optimizer_state(folder):
    recipe = make(folder, trainable=["projector"], max_steps=2)
    trainer = train(recipe)
    before = weights(folder / "init")
    _, gradients = loss_and_gradients(trainer.model, batch_for(recipe))
    for name, parameter in trainer.model.named_parameters():
        learns = ".projector." in name
        assert (gradients[name] is not None) == learns
        assert (parameter in trainer.optimizer.state) == learns
        assert torch.equal(parameter.data, before[name].data) != learns


def test_text_alone_is_no_obstacle_where_the_llm_is_frozen(folder):
    trainer = train(make(folder, trainable=["projector"], per_device_train_batch_size=1))
    by_modality = [entry for entry in trainer.state.log_history if "loss_text" in entry]
    assert len(by_modality) == 4
    assert all(entry["grad_norm"] == 0 for entry in by_modality)


def test_parts_have_learning_rates_of_their_own(folder):
    recipe = make(folder, part_learning_rates={"encoder": 1e-3}, weight_decay=0.1)
    groups = {group["name"]: group for group in trainer_for(recipe).create_optimizer().param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "encoder": 1e-3,
        "encoder with decay": 1e-3,
        "projector": 1e-2,
        "projector with decay": 1e-2,
        "llm": 1e-2,
        "llm with decay": 1e-2,
    }
    assert all(group["weight_decay"] == (0.1 if "decay" in name else 0.0) for name, group in groups.items())
    assert all(parameter.dim() > 1 for parameter in groups["llm with decay"]["params"])


def test_parts_without_weights_cannot_be_all_that_learns(folder):
    with pytest.raises(ValueError, match=r"\['compressor'\] have no parameters"):
        trainer_for(make(folder, trainable=["compressor"]))


# Losses ----------------------------------------------------------------------------------------------------------


def test_the_loss_of_modalities_adds_up_to_the_loss(folder):
    trainer = train(make(folder, per_device_train_batch_size=12, max_steps=1))
    entry = trainer.state.log_history[0]
    _, some = examples(make(folder))
    counts = torch.zeros(3)
    for example in some:
        counts[example["modality"]] += (example["labels"][1:] != IGNORE_INDEX).sum()
    parts = torch.tensor([entry[f"loss_{kind}"] for kind in ("text", "image", "video")])
    assert (parts * counts).sum() / counts.sum() == pytest.approx(entry["loss"], rel=1e-5)


def test_accumulated_steps_equal_one_large_batch(folder):
    large = train(make(folder, per_device_train_batch_size=4, max_steps=3))
    small = train(make(folder, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=3))
    for one, other in zip(large.state.log_history[:3], small.state.log_history[:3], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_the_loss_in_chunks_of_tokens_is_the_same(folder, monkeypatch):
    whole = train(make(folder, gradient_checkpointing=True, eval_data=str(folder / "mix.yaml")))
    monkeypatch.setattr(HicoForConditionalGeneration, "tokens_per_loss_chunk", 5)
    chunked = train(make(folder, gradient_checkpointing=True, eval_data=str(folder / "mix.yaml")))
    for one, other in zip(whole.state.log_history[:7], chunked.state.log_history[:7], strict=True):
        for name in one:
            if "loss" in name or name == "grad_norm":
                assert other[name] == pytest.approx(one[name], rel=1e-5), name


@pytest.mark.parametrize("rows", [range(6), [0], [2, 5, 8], [0, 3, 6]])
def test_packing_equals_padding(folder, rows):
    model = HicoForConditionalGeneration.from_pretrained(folder / "init").train()
    padded = batch_for(make(folder), rows)
    packed = batch_for(make(folder, packing=True, max_tokens_per_batch=8192), rows)
    assert packed["input_ids"].shape[0] == 1
    assert packed["input_ids"].shape[1] == int(padded["attention_mask"].sum())
    loss, gradients = loss_and_gradients(model, padded)
    other_loss, other_gradients = loss_and_gradients(model, packed)
    torch.testing.assert_close(other_loss, loss)
    torch.testing.assert_close(other_gradients, gradients)


def test_a_packed_row_does_not_see_its_neighbours(folder):
    model = HicoForConditionalGeneration.from_pretrained(folder / "init").eval()
    recipe = make(folder, packing=True, max_tokens_per_batch=8192)
    alone, together = batch_for(recipe, [5]), batch_for(recipe, [2, 5])
    logits = [
        model(**{name: batch[name] for name in ("input_ids", "position_ids", "use_cache")}).logits
        for batch in (alone, together)
    ]
    torch.testing.assert_close(logits[1][:, -logits[0].shape[1] :], logits[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("needed", ["pixels", "both"])
def test_blank_rows_add_nothing_and_reach_every_part(folder, needed, packed):
    changes = {"packing": True, "max_tokens_per_batch": 8192} if packed else {}
    model = HicoForConditionalGeneration.from_pretrained(folder / "init").train()
    loss, gradients = loss_and_gradients(model, batch_for(make(folder, **changes), [2, 5]))
    batch = batch_for(make(folder, **changes), [2, 5], needed=needed)
    assert ("pixel_values_videos" in batch) == (needed == "both")
    assert "pixel_values" in batch
    with_blanks, reached = loss_and_gradients(model, batch)
    torch.testing.assert_close(with_blanks, loss)
    for name, gradient in reached.items():
        assert gradient is not None, name
        expected = torch.zeros_like(gradient) if gradients[name] is None else gradients[name]
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("needed", ["rows", "pixels", "both"])
def test_a_device_without_rows_has_a_batch_that_weighs_nothing(folder, needed):
    dataset, _ = examples(make(folder), [])
    batch = Collator(dataset.processor, needed=needed)([BadRow(0, "x", "y")])
    assert [row.where for row in batch["bad_rows"]] == ["x"]
    assert (batch["labels"] == IGNORE_INDEX).all()
    model = HicoForConditionalGeneration.from_pretrained(folder / "init").train()
    model.loss_function = TokenLoss()
    loss, gradients = loss_and_gradients(model, {**batch, "num_items_in_batch": torch.tensor(10)})
    assert loss == 0
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("scheme", ["assistant", "published", "longva"])
def test_labels_follow_the_scheme_and_never_fall_on_visual_tokens(folder, scheme):
    recipe = make(folder, label_scheme=scheme)
    dataset, some = examples(recipe)
    marks = label_marks(dataset.processor.tokenizer)
    for example in some:
        ids, labels = example["input_ids"], example["labels"]
        learned = torch.tensor(label_mask(ids.tolist(), scheme=scheme, **marks))
        learned[0] = False
        assert torch.equal(labels != IGNORE_INDEX, learned)
        assert not torch.isin(labels, dataset.visual_ids).any()
        assert torch.equal(labels[learned], ids[learned])


def test_a_row_cut_at_max_length_keeps_its_media_or_is_bad(folder):
    _, (whole,) = examples(make(folder), [0])
    length = len(whole["input_ids"])
    _, (cut,) = examples(make(folder, max_length=length - 3), [0])
    assert torch.equal(cut["input_ids"], whole["input_ids"][:-3])
    with pytest.raises(SampleError, match="would cut a video"):
        examples(make(folder, max_length=30), [0])
    with pytest.raises(SampleError, match="nothing in its"):
        examples(make(folder, max_length=length - 15), [0])


def test_a_trained_processor_chooses_frames_as_in_training(folder):
    sampled = run.prepare(make(folder, video={"scaler": "fast"})).processor.video
    assert sampled == {"mode": "middle", "num_frames": 8, "scaler": "fast"}
    long = run.prepare(make(folder, frame_sampling="dynamic_fps1", max_frames=16)).processor.video
    assert long == {"mode": "dynamic_fps1", "min_frames": 4, "max_frames": 16}
    (folder / "text.jsonl").write_text(json.dumps(json.loads((folder / "rows.json").read_text())[2]))
    assert run.prepare(make(folder, data=[{"json_path": str(folder / "text.jsonl")}])).processor.video == {}
    final = run.run_stage(make(folder, max_steps=1))
    assert HicoProcessor.from_pretrained(final).video == {"mode": "middle", "num_frames": 8}


def test_training_keeps_the_crop_of_a_processor_and_its_own_line_after_a_video(folder):
    start = folder / "released"
    shutil.copytree(Path(make(folder).model), start)
    processor = HicoProcessor.from_pretrained(start)
    processor.video, processor.time_message = {"fit": "crop", "multiple_of": 8}, "chat"
    processor.save_pretrained(start)
    trained = run.prepare(make(folder, model=str(start))).processor
    assert trained.video == {"fit": "crop", "mode": "middle", "num_frames": 8}
    assert trained.time_message == "short"
    assert run.prepare(make(folder, video={"fit": "stretch"}, model=str(start))).processor.video["fit"] == ("stretch")


def test_random_frames_follow_seed_epoch_and_row_alone(folder):
    recipe = make(folder, max_frames=4)
    dataset, _ = examples(recipe, [])
    first = dataset[0, 9]["pixel_values_videos"]
    dataset[0, 6]
    assert torch.equal(dataset[0, 9]["pixel_values_videos"], first)
    assert not torch.equal(dataset[1, 9]["pixel_values_videos"], first)


# Evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_weighs_tokens_alike_and_the_best_model_is_loaded(folder):
    recipe = make(
        folder,
        eval_data=str(folder / "mix.yaml"),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
        learning_rate=0.3,
        lr_scheduler_type="constant",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        save_total_limit=1,
    )
    final = run.run_stage(recipe)
    evaluations = [entry for entry in history(final) if "eval_loss" in entry]
    assert {"eval_loss_text", "eval_loss_image", "eval_loss_video"} <= evaluations[0].keys()
    best = min(evaluations, key=lambda entry: entry["eval_loss"])
    assert best is not evaluations[-1]
    model = HicoForConditionalGeneration.from_pretrained(final).eval()
    dataset, some = examples(make(folder))
    batch = Collator(dataset.processor)(some)
    inputs = {
        name: value for name, value in batch.items() if name not in ("modality", "dataset", "num_rows", "bad_rows")
    }
    assert model(**inputs).loss.item() == pytest.approx(best["eval_loss"], rel=1e-2)


def test_held_out_rows_are_not_trained_on(folder, monkeypatch):
    read = []
    real = TrainingRows.__getitem__
    monkeypatch.setattr(TrainingRows, "__getitem__", lambda self, key: (read.append(key[1]), real(self, key))[1])
    train(make(folder, eval_fraction=0.25, eval_strategy="no"))
    assert len(set(read)) == len(read) == 9


# Rows that cannot be read -----------------------------------------------------------------------------------------


@pytest.fixture
def broken(folder):
    (folder / "3.mp4").unlink()
    (folder / "3.mp4").write_bytes(b"no video")
    return folder


def test_a_bad_row_is_an_error_that_names_it(broken):
    with pytest.raises(SampleError, match=r"row at .*rows\.json:\d+ cannot be read: VideoError: .*3\.mp4"):
        run.run_stage(make(broken))


def test_bad_rows_are_skipped_counted_and_listed(broken, caplog):
    recipe = make(broken, on_bad_sample="skip", max_bad_fraction=0.5, num_train_epochs=2)
    final = run.run_stage(recipe)
    lines = (Path(recipe.output_dir) / "bad_rows-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["where"].split(":")[0] for line in lines] == [str(broken / "rows.json")] * 2
    assert "3.mp4" in json.loads(lines[0])["reason"]
    assert sum("left out the row" in message for message in caplog.messages) == 1
    assert sum(entry.get("bad_rows", 0) for entry in history(final)) == 2


def test_too_many_bad_rows_stop_the_run(broken):
    with pytest.raises(SampleError, match=r"1 of \d+ rows could not be read, more than max_bad_fraction 0\.005"):
        run.run_stage(make(broken, on_bad_sample="skip", max_bad_fraction=0.005))


def test_missing_files_are_an_error_before_the_first_step(folder):
    (folder / "3.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 file\(s\) of the mixture are missing: .*3\.mp4"):
        run.run_stage(make(folder))


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop_schedule": "uniform@9:0.5"}, "beyond the decoder"),
        (
            {
                "drop_schedule": {
                    "llm_compress_type": "attention",
                    "llm_compress_layer_list": [1],
                    "llm_image_token_ratio_list": [1.0, 1.5],
                }
            },
            r"keeps the ratio 1\.5",
        ),
        ({"model_config": {"encoder": {"hidden_size": 32}}}, "other sizes"),
        ({"model_config": {"compresor": {}}}, "model_config sets 'compresor'; did you mean 'compressor'"),
        ({"model_config": {"text_config": {"rope_thetas": 1}}}, "text_config sets 'rope_thetas'"),
        ({"model_config": {"clip_len": "four"}}, "does not describe a model"),
    ],
)
def test_bad_input_is_one_clear_error(folder, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        trainer_for(make(folder, **changes))


def test_the_command_line_gives_one_line_and_a_status(folder, capsys):
    path = folder / "r.yaml"
    path.write_text("model: nowhere\noutput_dir: out\ndata: mix.yaml\n")
    assert main(["--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hico.train: stage 'r' starts from nowhere")
    assert error.count("\n") == 1


# Other ways in and out -------------------------------------------------------------------------------------------


def test_shards_train_like_files(folder):
    rows = json.loads((folder / "rows.json").read_text())
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for number, row in enumerate(rows):
            members = {f"{number:03}.json": json.dumps(row).encode()}
            for name in filter(None, (row.get("video"), row.get("image"))):
                members[name] = (folder / name).read_bytes()
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    from_files = train(make(folder))
    from_shard = train(make(folder, data=[{"json_path": str(folder / "rows.tar")}]))
    assert losses(from_shard.state.log_history) == losses(from_files.state.log_history)


def test_a_folder_of_frames_is_a_video(folder):
    (folder / "frames").mkdir()
    for number in range(10):
        Image.new("RGB", (30, 20), (20 * number, 0, 0)).save(folder / f"frames/{number:03}.png")
    talk = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    (folder / "folder.json").write_text(json.dumps([{"video": "frames", "conversations": talk}]))
    data = {"json_path": str(folder / "folder.json"), "data_root": str(folder), "video_read_type": "img"}
    settings = {"frame_sampling": "dynamic_fps1", "max_frames": 8}
    for fps, num_clips in ((None, 2), (2.0, 1)):
        recipe = make(folder, data=[{**data, "folder_fps": fps}], **settings)
        _, (example,) = examples(recipe, [0])
        assert example["pixel_values_videos"].shape[0] == num_clips
        red = example["pixel_values_videos"][..., 0, 5, 5].flatten().float()
        assert (red.diff() > 0).all()


def test_start_and_end_choose_the_part_of_a_video(folder):
    rows = json.loads((folder / "rows.json").read_text())
    whole = {**rows[9], "start": None}
    part = {**rows[9], "start": 1.0, "end": 3.0}
    (folder / "parts.json").write_text(json.dumps([whole, part]))
    recipe = make(folder, data=[{"json_path": str(folder / "parts.json"), "data_root": str(folder)}])
    dataset, (_, cut) = examples(recipe, [0, 1])
    assert "lasts for 2.00 seconds" in dataset.processor.tokenizer.decode(cut["input_ids"])


def test_a_stuck_decoder_is_a_bad_row(folder, monkeypatch):
    def stuck(source, **settings):
        ctypes.CDLL(None).sleep(60)

    recipe = make(folder, on_bad_sample="skip", decode_timeout=0.3)
    dataset, _ = examples(recipe, [])
    monkeypatch.setattr("hico.data.media.read_video", stuck)
    bad = dataset[0, 0]
    assert isinstance(bad, BadRow)
    assert "longer than 0.3 s" in bad.reason
    assert not isinstance(dataset[0, 1], BadRow)


def test_a_drop_schedule_is_one_line(folder):
    plain = train(make(folder, max_steps=3))
    dropped = train(make(folder, max_steps=3, drop_schedule="uniform@1:0.5"))
    assert losses(plain.state.log_history) != losses(dropped.state.log_history)
    assert all(torch.isfinite(torch.tensor(list(losses(dropped.state.log_history).values()))))


def test_gradient_checkpointing_changes_nothing(folder):
    plain, checkpointed = (train(make(folder, max_steps=3, gradient_checkpointing=on)) for on in (False, True))
    expected = losses(plain.state.log_history)
    assert losses(checkpointed.state.log_history) == pytest.approx(expected, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_in_half_precision(folder):
    on_cpu = train(make(folder, max_steps=3))
    on_gpu = train(make(folder, max_steps=3, use_cpu=False, bf16=True, gradient_checkpointing=True))
    expected = losses(on_cpu.state.log_history)
    assert losses(on_gpu.state.log_history) == pytest.approx(expected, rel=0.02)


def test_the_utilisation_is_reported_if_the_peak_is_known(folder):
    trainer = train(make(folder, max_steps=2, peak_tflops=0.1))
    entry = trainer.state.log_history[0]
    assert {"rows_per_second", "tokens_per_second", "frames_per_second", "data_wait", "mfu"} <= entry.keys()
    assert 0 < entry["mfu"] < 1
    assert 0 <= entry["data_wait"] <= 1


def test_a_checkpoint_of_other_sizes_is_refused(folder):
    write_model(folder / "other", clip_len=2)
    write_model(folder / "wide")
    config = json.loads((folder / "wide/config.json").read_text())
    config["text_config"]["intermediate_size"] = 48
    (folder / "wide/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="other sizes"):
        trainer_for(make(folder, model=str(folder / "wide")))


@pytest.mark.slow
def test_tensorboard_gets_losses_by_modality(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = train(make(folder, report_to="tensorboard", max_steps=3, eval_fraction=0.25))
    (events,) = Path(trainer.args.output_dir).rglob("events.out.*")
    found = accumulator.EventAccumulator(str(events))
    found.Reload()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(logged)
    assert {"train/loss_video", "train/tokens_per_second", "eval/loss"} <= set(found.Tags()["scalars"])
