"""Another kernel, for tests of numbers: matrix products of float32 add up from the last term to the first.

A plugin of pytest, ``-p backwards``: what it changes is what another processor changes, the order of the sums.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
FACTORS = {aten.mm.default: (0, 1), aten.bmm.default: (0, 1), aten.addmm.default: (1, 2), aten.baddbmm.default: (1, 2)}
"""Where a product's arguments have its factors."""


class Backwards(TorchDispatchMode):
    """Turn the axis that is summed over, in both factors."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args, kwargs = list(args), kwargs or {}
        if func in FACTORS and all(type(arg) is Tensor and arg.dtype == torch.float32 for arg in args[:2]):
            one, other = FACTORS[func]
            args[one], args[other] = args[one].flip(-1), args[other].flip(-2)
            Backwards.calls += 1
        elif func is aten.convolution.default and args[1].dtype == torch.float32 and args[8] == 1:
            args[0], args[1] = args[0].flip(1), args[1].flip(1)
            Backwards.calls += 1
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def _sums_run_backwards():
    with Backwards():
        yield


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{Backwards.calls} products were added up backwards")
