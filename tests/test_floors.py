"""Imports point down only, and importing hico costs next to nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_imports_point_down():
    # In a process of its own: import-linter sets logging up anew and silences every logger there is.
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"an import points up or sideways, see docs/design.md\n{result.stdout}"


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_hico_loads_neither_torch_nor_an_optional_package():
    heavy = ["torch", "av", "decord", "torchcodec", "timm", "deepspeed", "flash_attn", "peft", "liger_kernel"]
    loaded = json.loads(run_python("import transformers, hico, sys, json; print(json.dumps(list(sys.modules)))"))
    without = json.loads(run_python("import transformers, sys, json; print(json.dumps(list(sys.modules)))"))
    assert not set(heavy) & (set(loaded) - set(without))


def test_auto_classes_know_hico_whichever_is_imported_first():
    for first, second in (("import hico", "import transformers"), ("import transformers", "import hico")):
        code = f"""
{first}
{second}
config = hico.HicoConfig.preset("tiny")
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
assert AutoConfig.for_model("hico").model_type == "hico"
print(type(AutoModel.from_config(config)).__name__, type(AutoModelForImageTextToText.from_config(config)).__name__)
print(PROCESSOR_MAPPING[type(config)].__name__)
"""
        assert run_python(code).split() == ["HicoModel", "HicoForConditionalGeneration", "HicoProcessor"]


def test_unknown_attributes_are_named():
    import hico

    with pytest.raises(AttributeError, match="HicoConfg"):
        hico.HicoConfg  # noqa: B018
    assert "HicoModel" in dir(hico)
