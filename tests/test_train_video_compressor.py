"""Training with a video compressor: by recipe, padded and packed, with exact counts and by content."""

import pytest
import torch
from train_corpus import losses, make, trainer_for

from hico import HicoForConditionalGeneration

SETTINGS = {
    "padded": {"frame_sampling": "middle", "max_steps": 2},
    "packed": {
        "frame_sampling": "middle",
        "max_steps": 2,
        "packing": True,
        "max_length": 400,
        "max_tokens_per_batch": 400,
        "global_batch_size": None,
    },
}
SPECS = [{"name": "dtd", "threshold": 0.9}, {"name": "visionzip", "keep_ratio": 0.5}]


@pytest.mark.parametrize(("spec", "batches"), zip(SPECS, ["packed", "padded"], strict=True), ids=["dtd", "visionzip"])
def test_a_recipe_trains_and_saves_a_model_with_its_video_compressor(folder, spec, batches):
    trainer = trainer_for(make(folder, model_config={"video_compressor": spec}, **SETTINGS[batches]))
    trainer.train()
    found = losses(trainer.state.log_history)
    assert len(found) == 2
    assert all(torch.tensor(loss).isfinite() and loss > 0 for loss in found.values())
    trainer.save_model(folder / "saved")
    again = HicoForConditionalGeneration.from_pretrained(folder / "saved")
    assert again.config.video_compressor == spec


def test_the_loss_of_packed_rows_is_that_of_padded_ones(folder):
    found = []
    for packing in (False, True):
        settings = {"packing": True, "max_tokens_per_batch": 9999} if packing else {"per_device_train_batch_size": 4}
        recipe = make(folder, frame_sampling="middle", model_config={"video_compressor": SPECS[0]}, **settings)
        trainer = trainer_for(recipe)
        rows = [trainer.train_dataset[0, row] for row in range(4)]
        batch = trainer.data_collator(rows)
        for name in ("modality", "dataset", "num_rows", "bad_rows"):
            batch.pop(name)
        model = trainer.model.eval().double()
        with torch.no_grad():
            output = model(**batch, logits_to_keep=1)
        assert output.trim is not None
        found.append(output.loss)
    torch.testing.assert_close(*found)
