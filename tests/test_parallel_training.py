"""Recipes with ``sequence_parallel``: processes that share rows train as one does, and count what it counts."""

import re

import pytest
import torch
from test_train_devices import assert_same, fsdp2, launch, needs_deepspeed, zero
from train_corpus import make, write_corpus, write_pairs

from hico.train import plan
from hico.train.plan import prepare
from hico.train.report import dry_run

__all__ = ["fsdp2"]
LEARNED = ("loss_text", "loss_image", "loss_video", "learned_tokens_per_step", "eval_loss", "eval_loss_video")
COUNTED = (*LEARNED, "visual_tokens_per_step", "padding")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharing")
    write_corpus(folder)
    return folder


def assert_counted_once(found, expected, names=COUNTED):
    for seen, alone in zip(found["logs"], expected["logs"], strict=True):
        assert seen.keys() == alone.keys()
        for name in set(names) & seen.keys():
            assert seen[name] == pytest.approx(alone[name], rel=1e-3), name


@pytest.fixture(scope="module")
def alone(folder):
    return launch(folder, "alone", processes=1, per_device_train_batch_size=4, **evaluated(folder))


def evaluated(folder):
    return {"eval_data": str(folder / "mix.yaml"), "per_device_eval_batch_size": 3}


@pytest.mark.slow
def test_two_processes_that_share_rows(folder, alone):
    changes = {"per_device_train_batch_size": 4, "sequence_parallel": 2, **evaluated(folder)}
    found = launch(folder, "shared", processes=2, **changes)
    assert_same(found, alone)
    assert_counted_once(found, alone)


@pytest.mark.slow
def test_a_run_goes_on_with_rows_that_are_shared_from_now_on(folder, alone):
    changes = {"per_device_train_batch_size": 4, **evaluated(folder)}
    launch(folder, "stopped", processes=2, stop_at=2, sequence_parallel=2, **changes)
    found = launch(folder, "stopped", processes=1, **changes)
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(alone["losses"]), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("drop", ["uniform@1:0.5", "attention@1:0.5"])
def test_two_processes_that_share_rows_and_drop_tokens(folder, drop):
    changes = {
        "per_device_train_batch_size": 4,
        "drop_schedule": drop,
        "min_frames": 8,
        "gradient_checkpointing": True,
    }
    expected = launch(folder, f"dropping1 {drop}", processes=1, **changes)
    found = launch(folder, f"dropping2 {drop}", processes=2, sequence_parallel=2, **changes)
    assert_same(found, expected)
    assert_counted_once(found, expected)


@pytest.mark.slow
def test_two_processes_that_share_packed_rows(folder):
    changes = {"packing": True, "max_tokens_per_batch": 2048, "max_length": 512, "bf16": False}
    expected = launch(folder, "packed1", processes=1, **changes)
    found = launch(folder, "packed2", processes=2, sequence_parallel=2, **changes)
    assert_same(found, expected)
    assert_counted_once(found, expected)


@pytest.mark.slow
def test_two_processes_that_share_pairs_of_answers(folder):
    changes = {"objective": "preference", "data": str(write_pairs(folder)), "learning_rate": 1e-3}
    expected = launch(folder, "pairs1", processes=1, per_device_train_batch_size=4, **changes)
    found = launch(folder, "pairs2", processes=2, per_device_train_batch_size=4, sequence_parallel=2, **changes)
    assert_same(found, expected)
    assert_counted_once(found, expected, ("rewards/margins", "rewards/accuracies"))


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_groups_of_two_processes(folder, alone, fsdp2, sharded):
    changes = {"per_device_train_batch_size": 2, "sequence_parallel": 2, **evaluated(folder)}
    found = launch(folder, f"groups{sharded}", processes=4, variables=fsdp2 if sharded else None, **changes)
    assert found["sharded"] == sharded
    assert_same(found, alone)
    assert_counted_once(found, alone, LEARNED)  # two batches of two rows are padded less than one of four


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_over_processes_that_share_rows(folder, alone, stage):
    changes = {"per_device_train_batch_size": 2, "sequence_parallel": 2, **evaluated(folder)}
    found = launch(folder, f"zero{stage}", processes=4, deepspeed=zero(stage), **changes)
    assert_same(found, alone)


def test_weights_that_zero_shards_are_refused_before_the_first_step(folder, monkeypatch):
    monkeypatch.setattr(plan, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="sequence_parallel cannot be combined with ZeRO-3"):
        prepare(make(folder, sequence_parallel=2), world_size=4)


def test_what_cannot_be_shared_is_refused_before_the_first_step(folder):
    for changes, world_size, words in (
        ({"sequence_parallel": 3}, 4, r"sequence_parallel 3 does not divide the 4 process\(es\)"),
        ({"sequence_parallel": 4, "ulysses_size": 4}, 4, r"cannot divide 1 key-value heads; sizes that work are 1,"),
        ({"ulysses_size": 2}, 4, "set sequence_parallel too"),
        ({"sequence_parallel": 2, "attn_implementation": "eager"}, 4, "'eager' would do nothing"),
        ({"sequence_parallel": 2, "global_batch_size": 6}, 4, "x 2 groups of 2 devices x"),
        ({"sequence_parallel": 2, "model_config": WINDOW}, 4, r"sliding_attention \(of 64 tokens\)"),
        ({"sequence_parallel": 2, "objective": "tracks", "trainable": ["encoder"]}, 4, "leave out sequence_parallel"),
    ):
        with pytest.raises(ValueError, match=words):
            prepare(make(folder, **changes), world_size=world_size)


WINDOW = {"text_config": {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2}}


def test_a_step_has_the_rows_of_all_groups(folder):
    prepared = prepare(make(folder, sequence_parallel=2, global_batch_size=4), world_size=4)
    alone = prepare(make(folder, per_device_train_batch_size=2), world_size=2)
    assert prepared.recipe.gradient_accumulation(4) == 1
    assert prepared.steps(4) == alone.steps(2)


def test_a_device_keeps_its_part_of_the_activations(folder):
    kept = []
    for number in (1, 2):
        changes = {"packing": True, "max_tokens_per_batch": 4_000_000, "sequence_parallel": number}
        recipe = make(folder, **changes)
        report = dry_run(recipe, prepare(recipe, world_size=2), world_size=2)
        assert ("2 device(s), each row shared by 2, 1 micro-batch" in report) == (number == 2)
        kept.append(float(re.search(r"LLM activations +([\d.]+) GiB", report).group(1)))
    assert kept[1] == pytest.approx(kept[0] / 2, abs=0.01)
