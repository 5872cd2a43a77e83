"""The slurm script with stand-ins for Slurm and Python: what is started, and when the job is requeued."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "train/launch/slurm.sh"

SRUN = """#!/usr/bin/env bash
[[ $1 = --kill-on-bad-exit=1 ]] || exit 99
status=0
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "${@:2}" || status=$?
done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
[[ $1 = requeue ]] && echo "$@" >> "$LOG"
[[ $1 = show ]] && printf 'node1\\nnode2\\n'
exit 0
"""
PYTHON = """#!/usr/bin/env bash
echo "$RANK/$WORLD_SIZE local $LOCAL_RANK at $MASTER_ADDR:$MASTER_PORT cpus $SRUN_CPUS_PER_TASK: $*" >> "$LOG"
[[ $ENDS = TERM ]] && kill -TERM $PPID && exit 143
exit "$ENDS"
"""


def sbatch(folder: Path, ends: str) -> tuple[int, list[str]]:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "12"}
    variables = {**os.environ, **slurm, "LOG": str(folder / "log"), "ENDS": ends}
    variables["PATH"] = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", SCRIPT, "r.yaml", "--seed", "3"], cwd=folder, env=variables, timeout=30, check=False
    )
    assert not list(folder.glob(".hico-stopped*"))
    return done.returncode, (folder / "log").read_text().splitlines()


@pytest.mark.parametrize(
    ("ends", "status", "requeued"), [("0", 0, False), ("1", 1, False), ("143", 143, True), ("TERM", 143, True)]
)
def test_the_job_is_requeued_if_it_was_stopped_and_not_if_it_failed(tmp_path, ends, status, requeued):
    code, log = sbatch(tmp_path, ends)
    assert code == status
    tasks = [
        f"{rank}/2 local {rank} at node1:29500 cpus 12: -m hico.train --config r.yaml --seed 3" for rank in (0, 1)
    ]
    assert log == tasks + ["requeue 7"] * requeued


LEAVE = """
import atexit, sys
from hico.train.__main__ import leave
def run():
    print("begun")
    {end}
atexit.register(print, "cleaned up")
leave(run)
"""


@pytest.mark.parametrize(
    ("end", "status", "said"), [("return 1", 1, ""), ("sys.exit(143)", 143, ""), ("1 / 0", 1, "ZeroDivisionError")]
)
def test_a_launched_process_ends_with_its_status_and_all_it_said(end, status, said):
    command = [sys.executable, "-c", LEAVE.format(end=end)]
    done = subprocess.run(
        command, env={**os.environ, "RANK": "0"}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (status, "begun\ncleaned up\n")
    assert said in done.stderr
