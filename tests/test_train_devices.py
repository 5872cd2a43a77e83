"""Several processes must do what one does: the same losses and the same gradients."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_corpus import make, write_corpus

from hico import HicoForConditionalGeneration

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("train_worker.py")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    write_corpus(folder)
    return folder


def launch(folder, name, *, processes, **changes):
    """Train in ``processes`` processes; return what the first one recorded."""
    recipe = make(folder, output_dir=str(folder / name), max_grad_norm=0.0, num_train_epochs=2, **changes)
    settings = {key: value for key, value in vars(recipe).items() if key != "arguments"} | recipe.arguments
    (folder / f"{name}.json").write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [sys.executable, str(WORKER), str(folder / f"{name}.json"), str(folder / f"{name}.pt")]
    several = processes > 1
    running = [
        subprocess.Popen(
            command,
            env={**os.environ, **(common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if several else {})},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        outcomes = [(process.communicate(timeout=240)[1], process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(code == 0 for _, code in outcomes), "\n".join(text[-3000:] for text, _ in outcomes)
    return torch.load(folder / f"{name}.pt")


@pytest.fixture(scope="module")
def alone(folder):
    """One process, four rows at a time: some steps have no video or image in one half."""
    return launch(folder, "alone", processes=1, per_device_train_batch_size=4)


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


def test_one_process_with_accumulation(folder, alone):
    found = launch(folder, "small", processes=1, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_same(found, alone)


@pytest.mark.parametrize(("rows", "steps"), [(2, 1), (1, 2)])
def test_two_processes_with_ddp(folder, alone, rows, steps):
    changes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
    assert_same(launch(folder, f"ddp{rows}", processes=2, **changes), alone)


def test_two_processes_with_ddp_and_a_last_step_that_one_of_them_misses(folder):
    changes = {"trainable": ["encoder", "projector", "llm"], "per_device_train_batch_size": 5}
    expected = launch(folder, "odd1", processes=1, gradient_accumulation_steps=2, **changes)
    assert_same(launch(folder, "odd2", processes=2, **changes), expected)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_with_zero(folder, alone, stage):
    settings = json.loads((ROOT / f"train/deepspeed/zero{stage}.json").read_text())
    found = launch(folder, f"zero{stage}", processes=2, per_device_train_batch_size=2, deepspeed=settings)
    assert_same(found, alone)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_zero_with_frozen_parts(folder):
    settings = json.loads((ROOT / "train/deepspeed/zero3.json").read_text())
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
