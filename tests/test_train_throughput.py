import copy
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from train_corpus import make, write_corpus

from hico import HicoConfig, HicoForConditionalGeneration
from hico.data.collator import Collator
from hico.data.dataset import TrainingRows
from hico.data.lengths import estimate_lengths
from hico.llm_dropout.schedule import DropSchedule
from hico.train import run
from hico.train.lora import add_lora
from hico.train.parts import freeze
from hico.train.throughput import FlopCounter, Meter, TokenLoss
from hico.train.trainer import row_sizes, unwrapped

EVERYTHING = ["encoder", "projector", "llm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("throughput")
    write_corpus(folder)
    rows = json.loads((folder / "rows.json").read_text())
    talk = [{"from": "human", "value": "<image>\n" + "Hello " * 150}, {"from": "gpt", "value": "number 12"}]
    (folder / "rows.json").write_text(json.dumps([*rows, {"image": "1.png", "conversations": talk}]))
    return folder


def batch_of(folder, rows, **changes):
    recipe = make(folder, **changes)
    prepared = run.prepare(recipe)
    dataset = TrainingRows(prepared.mixture, prepared.processor, recipe, seed=0)
    batch = Collator(dataset.processor, packing=recipe.packing)([dataset[0, row] for row in rows])
    return dataset, batch


def counted(model, dataset, batch, schedule=None):
    clips = batch["pixel_values_videos"].shape[0] if "pixel_values_videos" in batch else 0
    tiles = len(batch["pixel_values"]) if "pixel_values" in batch else 0
    learned = int((batch["labels"] != -100).sum())
    counter = FlopCounter(model, schedule or DropSchedule())
    sizes = row_sizes(batch, dataset.visual_ids)
    return counter(sizes, num_clips=clips, num_tiles=tiles, num_learned=learned)


@pytest.mark.parametrize("rows", [[0, 3], [1, 4], [9], [12]], ids=["videos", "images", "video", "long"])
@pytest.mark.parametrize("trainable", [EVERYTHING, ["projector"], ["llm"], ["encoder", "projector"]])
def test_the_arithmetic_counts_what_torch_does(folder, rows, trainable):
    dataset, batch = batch_of(folder, rows, frame_sampling="middle")
    # Torch counts attention as the products that it is where it is written out.
    eager = {**HicoConfig.from_pretrained(folder / "init").encoder, "attn_implementation": "eager"}
    model = HicoForConditionalGeneration.from_pretrained(
        folder / "init", encoder=eager, attn_implementation="eager"
    ).train()
    freeze(model, trainable)
    inputs = {
        name: value for name, value in batch.items() if name not in ("modality", "dataset", "num_rows", "bad_rows")
    }
    with FlopCounterMode(display=False) as mode:
        model(**inputs).loss.backward()
    # Nobody asks for the gradient of the pixels. In a model this small that shows.
    frames = sum(
        batch[name].flatten(0, -4).shape[0] for name in ("pixel_values", "pixel_values_videos") if name in batch
    )
    pixels = 2 * 4 * frames * model.model.encoder.patch_embed.proj.weight.numel() * ("encoder" in trainable)
    assert counted(model, dataset, batch) - pixels == pytest.approx(mode.get_total_flops(), rel=0.05)


def test_adapters_cost_no_gradient_of_the_weights_below(folder):
    pytest.importorskip("peft")
    dataset, batch = batch_of(folder, [9])
    model = HicoForConditionalGeneration.from_pretrained(folder / "init")
    freeze(model, ["projector"])
    frozen = counted(model, dataset, batch)
    adapted = add_lora(model, {"r": 1}, trainable=["projector"])
    freeze(adapted, ["projector"])
    assert frozen < counted(unwrapped(adapted), dataset, batch) < 1.3 * frozen


def test_a_drop_schedule_saves_what_the_layers_behind_it_do_not_see(folder):
    dataset, batch = batch_of(folder, [0, 3])
    model = HicoForConditionalGeneration.from_pretrained(folder / "init")
    whole = counted(model, dataset, batch)
    dropped = [counted(model, dataset, batch, DropSchedule.parse(f"uniform@1:{keep}")) for keep in (1.0, 0.5, 0.25)]
    assert whole == dropped[0] > dropped[1] > dropped[2]


def test_row_sizes_are_the_same_padded_and_packed(folder):
    dataset, padded = batch_of(folder, range(6))
    _, packed = batch_of(folder, range(6), packing=True, max_tokens_per_batch=9999)
    assert row_sizes(padded, dataset.visual_ids) == row_sizes(packed, dataset.visual_ids)


def test_estimated_lengths_are_near(folder):
    recipe = make(folder, frame_sampling="middle")
    prepared = run.prepare(recipe)
    dataset = TrainingRows(prepared.mixture, prepared.processor, recipe, seed=0)
    actual = torch.tensor([len(dataset[0, row]["input_ids"]) for row in range(13)])
    estimated = torch.from_numpy(estimate_lengths(prepared.mixture, prepared.processor, recipe))
    assert (estimated / actual - 1).abs().max() < 0.1


def test_known_durations_make_shorter_estimates(folder):
    recipe = make(folder, frame_sampling="dynamic_fps1", max_frames=64)
    prepared = run.prepare(recipe)
    unknown = estimate_lengths(prepared.mixture, prepared.processor, recipe)
    mixture = copy.copy(prepared.mixture)
    mixture.seconds = torch.tensor([5.0, *[float("nan")] * 12]).numpy()
    known = estimate_lengths(mixture, prepared.processor, recipe)
    tokens = prepared.processor.vision.num_video_tokens(4)
    assert unknown[0] - known[0] == 16 * tokens - 2 * tokens
    assert (known[1:] == unknown[1:]).all()


def test_the_loss_is_the_mean_and_remembers_each_token():
    loss = TokenLoss()
    logits, targets = torch.randn(5, 7, requires_grad=True), torch.arange(5)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(loss(logits, None, 7, shift_labels=targets), expected)
    with loss.remembered() as losses:
        both = [
            loss(logits[part], None, 7, shift_labels=targets[part], num_items_in_batch=torch.tensor(10))
            for part in (slice(2), slice(2, None))
        ]
    torch.testing.assert_close(sum(both), expected / 2)
    assert [len(some) for some in losses] == [2, 3]
    torch.testing.assert_close(torch.cat(losses).mean(), expected.detach())
    empty = loss(logits[:0], None, 7, shift_labels=targets[:0])
    assert empty == 0
    assert empty.requires_grad


def test_a_meter_adds_up_over_devices():
    meter = Meter(["cats", "dogs", "cats"], peak_tflops=1e-3)
    meter.add_losses(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 2, 2]), torch.tensor([0, 1, 2]))
    meter.add_losses(torch.tensor([2.0]), torch.tensor([0]), torch.tensor([0]))
    meter.add(steps=4, rows=4, tokens=100, visual_tokens=40, learned_tokens=8, padding=25, frames=8)
    meter.add(flops=2e9, wait=0.5, seconds=2.0)
    figures = meter.report(lambda sums: 2 * sums, world_size=2)
    assert figures == {
        "loss_text": 1.5,
        "loss_video": 4.0,
        "loss_of_cats": pytest.approx(8 / 3),
        "loss_of_dogs": 3.0,
        "rows_per_second": 4.0,
        "tokens_per_second": 100.0,
        "frames_per_second": 8.0,
        "data_wait": 0.25,
        "mfu": 1.0,
        "visual_tokens_per_step": 20.0,
        "learned_tokens_per_step": 4.0,
        "padding": 0.2,
    }
    assert meter.report(lambda sums: sums, world_size=1) == {}
    assert "loss_of_cats" not in Meter(["cats", "cats"]).fields
