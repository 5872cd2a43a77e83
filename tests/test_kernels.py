"""No test of numbers depends on the rounding of one kernel: they pass with those of other processors as well."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
EXACT = {"test_train_resume.py", Path(__file__).name}
"""Those of the files that compare bit by bit, in minutes, and this one."""
NUMERIC = sorted(
    path for path in TESTS.glob("test_*.py") if path.name not in EXACT and "assert_close(" in path.read_text()
)

SETTINGS = {
    "SSE4 in one thread": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE",
        "OMP_NUM_THREADS": "1",
    },
    "AVX2 in two threads": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OMP_NUM_THREADS": "2",
    },
    "the machine's own in one thread": {"OMP_NUM_THREADS": "1"},
    "the machine's own in two threads": {"OMP_NUM_THREADS": "2"},
    "sums from the last term to the first": {"OMP_NUM_THREADS": "1", "PYTEST_PLUGINS": "backwards"},
}
"""What chooses kernels, and one that no processor has. A setting that a processor does not know changes nothing."""


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_tests_of_numbers_pass_with_the_kernels_of(setting):
    chosen = SETTINGS[setting]
    ours = {name: value for name, value in os.environ.items() if name not in {k for s in SETTINGS.values() for k in s}}
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *map(str, NUMERIC)],
        cwd=TESTS.parent,
        env={**ours, **chosen, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    backwards = " products were added up backwards" in result.stdout
    assert backwards == ("PYTEST_PLUGINS" in chosen)
