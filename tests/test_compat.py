"""What we lean on of transformers' insides is there, or one error names the version."""

import subprocess
import sys

import pytest
import torch
import transformers
from transformers import Trainer

from hico.compat import CACHE_NAME, cache_argument, require, save_under_own_names


def test_a_cache_is_named_as_the_installed_version_names_it():
    newer = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
    assert ("cache" if newer else "past_key_values") == CACHE_NAME
    assert cache_argument(None, None) == {}
    assert cache_argument("keys", None) == cache_argument(None, "keys") == {CACHE_NAME: "keys"}


def test_a_method_that_is_gone_is_named_with_the_version():
    require(Trainer, "_save_checkpoint")
    with pytest.raises(RuntimeError, match=rf"Trainer of transformers {transformers.__version__} has no _stow, _put"):
        require(Trainer, "_stow", "_save_checkpoint", "_put")


def test_a_model_whose_loaded_names_are_kept_elsewhere_is_not_saved_under_them():
    with pytest.raises(RuntimeError, match="_weight_conversions"):
        save_under_own_names(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["AutoProcessor", "AutoModelForImageTextToText", "AutoConfig", "Trainer"])
def test_hico_may_be_imported_before_anything_of_transformers(name):
    code = f"import hico; from transformers import {name}; hico.HicoModel"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
