"""Training survives being killed at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from train_corpus import make, write_corpus

from hico.train.checkpoint import STAGING, checkpoints, is_complete
from hico.train.run import STOPPED

NUM_KILLS = 12
NUM_STEPS = 120


def command(folder, name):
    recipe = make(
        folder,
        output_dir=str(folder / name),
        max_steps=NUM_STEPS,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        dataloader_num_workers=1,
        decode_timeout=20.0,
    )
    settings = {key: value for key, value in vars(recipe).items() if key != "arguments"} | recipe.arguments
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return [sys.executable, "-m", "hico.train", "--config", str(folder / f"{name}.yaml")]


def start(words):
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "start_new_session": True}
    return subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, **quiet)


def wait_for(condition, process, *, seconds=60.0):
    """Wait until the condition holds; say whether it did before the process ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    return True


def newest(output_dir):
    return max((int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*")), default=0)


def losses(output_dir):
    state = json.loads((output_dir / "final/trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def test_a_run_killed_many_times_ends_like_one_that_was_not(tmp_path):
    write_corpus(tmp_path)
    whole = start(command(tmp_path, "whole"))
    assert whole.wait(timeout=300) == 0
    chance, output_dir = random.Random(0), tmp_path / "killed"
    killed_while_saving = 0
    for number in range(NUM_KILLS):
        before = newest(output_dir)
        process = start(command(tmp_path, "killed"))
        if number % 2:
            # In the middle of saving, a step or two after the last checkpoint.
            assert wait_for(lambda before=before: newest(output_dir) > before, process)
            staged = output_dir / STAGING
            assert wait_for(lambda staged=staged: staged.exists() and any(staged.glob("*/*")), process)
            time.sleep(chance.uniform(0, 0.004))
        else:
            assert wait_for(lambda before=before: newest(output_dir) > before, process)
            time.sleep(chance.uniform(0, 0.1))
        assert process.poll() is None
        process.kill()
        process.communicate()
        killed_while_saving += any((output_dir / STAGING).glob("*/*"))
        assert checkpoints(output_dir)
        assert newest(output_dir) < NUM_STEPS, "the run ended before it was killed often enough"
    last = start(command(tmp_path, "killed"))
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors[-3000:]
    assert killed_while_saving >= 2
    assert losses(output_dir) == losses(tmp_path / "whole")
    assert len(losses(output_dir)) == NUM_STEPS
    assert is_complete(output_dir / "final")
    one, other = (Path(tmp_path / name / "final/model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert one == other


@pytest.mark.slow
def test_sigterm_to_the_whole_group_ends_in_a_checkpoint(tmp_path):
    write_corpus(tmp_path)
    longer = ["--max_steps", "300", "--save_steps", "1000"]
    assert start([*command(tmp_path, "whole"), *longer]).wait(timeout=300) == 0
    output_dir = tmp_path / "stopped"
    for _ in range(3):
        before = newest(output_dir)
        process = start([*command(tmp_path, "stopped"), *longer])
        # A worker and its decoder: training has begun.
        assert wait_for(lambda process=process: len(children(process.pid)) >= 2, process)
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == STOPPED, errors[-3000:]
        assert 300 > newest(output_dir) > before
    assert start([*command(tmp_path, "stopped"), *longer]).wait(timeout=300) == 0
    assert losses(output_dir) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_killing_a_run_leaves_no_process_behind(tmp_path):
    write_corpus(tmp_path)
    process = start(command(tmp_path, "orphans"))
    assert wait_for(lambda: newest(tmp_path / "orphans") > 0, process)
    family = children(process.pid)
    assert len(family) >= 2, "a data worker and its decoder"
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() and not is_zombie(pid) for pid in family):
        assert time.monotonic() < deadline, "processes outlive the run"
        time.sleep(0.2)


def children(pid):
    """Return the descendants of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def is_zombie(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


FAILING = """
import sys
from hico.train.__main__ import main
from hico.train.trainer import HicoTrainer

def fail(*args, **kwargs):
    raise RuntimeError("out of luck")

HicoTrainer.compute_loss = fail
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_failing_run_ends_though_its_workers_outlive_a_signal(tmp_path):
    write_corpus(tmp_path)
    arguments = command(tmp_path, "failing")[3:]
    process = start([sys.executable, "-c", FAILING, *arguments])
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.rstrip().endswith("RuntimeError: out of luck")
