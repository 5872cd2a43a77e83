"""Shared set-up of the test suite."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_seed_everywhere():
    torch.manual_seed(0)
