"""Several processes must do what one does: the same losses and the same gradients."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from train_corpus import make, write_corpus

from hico import HicoForConditionalGeneration
from hico.train import run
from hico.train.checkpoint import checkpoints

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("train_worker.py")

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    write_corpus(folder)
    return folder


def launch(folder, name, *, processes, stop_at=None, variables=None, **changes):
    """Train in ``processes`` processes; return what the first one recorded, or nothing if they were stopped."""
    recipe = make(folder, output_dir=str(folder / name), max_grad_norm=0.0, num_train_epochs=2, **changes)
    settings = {key: value for key, value in vars(recipe).items() if key != "arguments"} | recipe.arguments
    (folder / f"{name}.json").write_text(json.dumps(settings))
    arguments = [str(WORKER), str(folder / f"{name}.json"), str(folder / f"{name}.pt")]
    codes, errors = run_in(processes, arguments, **(variables or {}), **({"STOP_AT": str(stop_at)} if stop_at else {}))
    assert codes == [run.STOPPED if stop_at else 0] * processes, errors
    return None if stop_at else torch.load(folder / f"{name}.pt")


def run_in(processes, arguments, **variables):
    """Run Python in several processes that know of each other; return exit codes and what they complained of."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        **variables,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    several = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = []
    for rank in range(processes):
        own = {**several, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
        running.append(subprocess.Popen([sys.executable, *arguments], env={**common, **own}, **pipes))
    try:
        errors = [process.communicate(timeout=240)[1][-3000:] for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], "\n".join(errors)


@pytest.fixture(scope="module")
def alone(folder):
    """One process, four rows at a time: some steps have no video or image in one half."""
    return launch(folder, "alone", processes=1, per_device_train_batch_size=4)


def zero(stage):
    return json.loads((ROOT / f"train/deepspeed/zero{stage}.json").read_text())


def assert_same(found, expected, *, tolerance=1e-5):
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=1e-4, atol=1e-4)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(
            found["gradients"][name],
            gradient,
            rtol=1e-4,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    one, other = (
        HicoForConditionalGeneration.from_pretrained(result["final"]).state_dict() for result in (found, expected)
    )
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_one_process_with_accumulation(folder, alone):
    found = launch(folder, "small", processes=1, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_same(found, alone)


@pytest.mark.parametrize(("rows", "steps"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_two_processes_with_ddp(folder, alone, rows, steps):
    changes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
    assert_same(launch(folder, f"ddp{rows}", processes=2, **changes), alone)


@pytest.mark.slow
def test_two_processes_with_ddp_and_a_last_step_that_one_of_them_misses(folder):
    changes = {"trainable": ["encoder", "projector", "llm"], "per_device_train_batch_size": 5}
    expected = launch(folder, "odd1", processes=1, gradient_accumulation_steps=2, **changes)
    assert_same(launch(folder, "odd2", processes=2, **changes), expected)


@pytest.mark.slow
def test_two_processes_with_packed_rows(folder):
    changes = {"packing": True, "max_tokens_per_batch": 2048, "max_length": 512, "group_by_length": True}
    expected = launch(folder, "packed1", processes=1, gradient_accumulation_steps=2, **changes)
    assert_same(launch(folder, "packed2", processes=2, **changes), expected)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_with_zero(folder, alone, stage):
    settings = zero(stage)
    found = launch(folder, f"zero{stage}", processes=2, per_device_train_batch_size=2, deepspeed=settings)
    assert_same(found, alone)


@pytest.mark.slow
@needs_deepspeed
def test_zero_in_half_precision_follows_single_precision(folder, alone):
    changes = {"per_device_train_batch_size": 2, "bf16": True, "gradient_checkpointing": True, "deepspeed": zero(1)}
    found = launch(folder, "half", processes=2, **changes)
    assert found["losses"] == pytest.approx(alone["losses"], rel=0.02)


@pytest.mark.slow
@needs_deepspeed
def test_zero_with_frozen_parts(folder):
    settings = zero(3)
    expected = launch(folder, "frozen1", processes=1, per_device_train_batch_size=4, trainable=["projector"])
    found = launch(
        folder,
        "frozen2",
        processes=2,
        per_device_train_batch_size=2,
        trainable=["projector"],
        deepspeed=settings,
    )
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, *(pytest.param(stage, marks=needs_deepspeed) for stage in (1, 2, 3))])
def test_a_signal_to_one_process_stops_all_and_they_go_on(folder, alone, stage):
    changes = {"per_device_train_batch_size": 2, "processes": 2, **({"deepspeed": zero(stage)} if stage else {})}
    launch(folder, f"stopped{stage}", stop_at=2, **changes)
    assert [path.name for path in checkpoints(folder / f"stopped{stage}")] == ["checkpoint-3"]
    found = launch(folder, f"stopped{stage}", **changes)
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(alone["losses"]), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def fsdp2():
    """What `accelerate launch` says to its processes for the FSDP2 file."""
    settings = yaml.safe_load((ROOT / "train/accelerate/fsdp2.yaml").read_text())["fsdp_config"]
    variables = {name.upper(): str(value) for name, value in settings.items()}
    variables["FSDP_TRANSFORMER_CLS_TO_WRAP"] = variables.pop("FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP")
    return {"ACCELERATE_USE_FSDP": "true", **variables}


@pytest.mark.slow
def test_two_processes_with_fsdp2(folder, alone, fsdp2):
    found = launch(folder, "fsdp2", processes=2, per_device_train_batch_size=2, variables=fsdp2)
    assert found["sharded"]
    assert_same(found, alone)


@pytest.mark.slow
def test_fsdp2_is_stopped_and_goes_on(folder, alone, fsdp2):
    changes = {"processes": 2, "per_device_train_batch_size": 2, "variables": fsdp2}
    launch(folder, "fsdp2stopped", stop_at=2, **changes)
    found = launch(folder, "fsdp2stopped", **changes)
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(alone["losses"]), rtol=1e-4, atol=1e-4)


CHAIN = """
model: {folder}/init
output_dir: {folder}/chain{processes}
stages:
  - {{name: first, trainable: [projector], data: mix.yaml, max_steps: 2}}
  - {{name: second, data: mix.yaml, image_size: 48, max_steps: 3, deepspeed: {deepspeed}}}
max_frames: 4
max_length: 2048
global_batch_size: 4
per_device_train_batch_size: 2
logging_steps: 1
use_cpu: true
bf16: false
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "deepspeed", ["null", pytest.param(str(ROOT / "train/deepspeed/zero2.json"), marks=needs_deepspeed)]
)
def test_a_chain_runs_on_two_processes(folder, deepspeed):
    losses = []
    for processes in (1, 2):
        path = folder / f"chain{processes}.yaml"
        path.write_text(
            CHAIN.format(folder=folder, processes=processes, deepspeed="null" if processes == 1 else deepspeed)
        )
        shutil.rmtree(folder / f"chain{processes}", ignore_errors=True)
        codes, errors = run_in(processes, ["-m", "hico.train", "--config", str(path)])
        assert codes == [0] * processes, errors
        state = json.loads((folder / f"chain{processes}/second/final/trainer_state.json").read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
