"""Shared set-up of the test suite."""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _same_seed_everywhere():
    torch.manual_seed(0)
