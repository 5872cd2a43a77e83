"""Published checkpoints that are damaged or hostile, and conversions that stop halfway."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from published import tiny_llm, videochat_flash, write_checkpoint

from hico import HicoForConditionalGeneration, HicoProcessor
from hico.cli import main
from hico.convert import convert, inspect_checkpoint
from hico.published import SIZES_KEY
from hico.shards import CheckpointError


@pytest.mark.parametrize(("name", "text"), [("tokenizer.json", "{broken"), ("tokenizer_config.json", "[]")])
def test_a_damaged_tokenizer_is_named(flash, tmp_path, name, text):
    (flash / name).write_text(text)
    for use in (lambda: convert(flash, tmp_path / "hico"), lambda: HicoProcessor.from_pretrained(flash)):
        with pytest.raises(ValueError, match=rf"{flash}: its tokenizer cannot be read"):
            use()
    assert not (tmp_path / "hico").exists()


def test_a_tied_head_with_weights_of_its_own_is_refused(tmp_path):
    config, weights = videochat_flash(tiny_llm(), tie_word_embeddings=True)
    folder = write_checkpoint(tmp_path / "flash", config, weights)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        convert(folder, tmp_path / "hico")
    assert not (tmp_path / "hico").exists()
    with pytest.raises(ValueError, match=r"1 not what the config ties them to: lm_head\.weight"):
        HicoForConditionalGeneration.from_pretrained(folder)
    loose = HicoForConditionalGeneration.from_pretrained(folder, strict=False)
    assert torch.equal(loose.lm_head.weight, weights["lm_head.weight"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("model.norm.weight"), r"1 missing, such as model\.language_model\.norm\.weight"),
        (lambda weights: weights.update({"model.extra": torch.ones(1)}), r"1 left over, such as model\.extra"),
        (lambda weights: weights.update({"odd": torch.ones(1)}), r"1 left over, such as odd"),
        (lambda weights: weights.update({"lm_head.weight": torch.ones(3, 3)}), r"'lm_head.weight' is \(3, 3\), but"),
    ],
)
def test_a_tensor_too_few_too_many_or_of_another_shape_stops_the_conversion(tmp_path, change, words, capsys):
    config, weights = videochat_flash(tiny_llm())
    change(weights)
    folder = write_checkpoint(tmp_path / "flash", config, weights)
    with pytest.raises(CheckpointError, match=words):
        convert(folder, tmp_path / "hico")
    assert main(["convert", str(folder), str(tmp_path / "hico")]) == 1
    assert capsys.readouterr().err.startswith("hico convert: ")
    assert {path.name for path in tmp_path.iterdir()} == {"flash"}
    with pytest.raises(ValueError, match=r"not the weights of this HicoForConditionalGeneration|both become"):
        HicoForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("damage", ["truncated", "missing", "escaping"])
def test_a_damaged_shard_is_named_on_every_path(flash, tmp_path, damage):
    _, second = sorted(flash.glob("*.bin"))
    if damage == "truncated":
        second.write_bytes(second.read_bytes()[:-200])
    elif damage == "missing":
        second.unlink()
    else:
        index = flash / "pytorch_model.bin.index.json"
        index.write_text(index.read_text().replace(second.name, f"../{second.name}"))
        shutil.move(second, tmp_path / second.name)
    for use in (
        lambda: HicoForConditionalGeneration.from_pretrained(flash),
        lambda: convert(flash, tmp_path / "hico"),
        lambda: inspect_checkpoint(flash),
    ):
        with pytest.raises(CheckpointError, match=second.name):
            use()
    assert not (tmp_path / "hico").exists()


def test_an_index_without_metadata_loads_once_it_is_converted(flash, tmp_path):
    index = flash / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    with pytest.raises(CheckpointError, match='has no "metadata"'):
        HicoForConditionalGeneration.from_pretrained(flash)
    convert(flash, tmp_path / "hico")
    HicoForConditionalGeneration.from_pretrained(tmp_path / "hico")
    index.write_text(json.dumps({"metadata": {}, **json.loads(index.read_text())}))
    HicoForConditionalGeneration.from_pretrained(flash)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left on device")])
@pytest.mark.parametrize(
    "moment", ["hico.shards.TensorShard.copy", "hico.configuration_hico.HicoConfig.save_pretrained"]
)
def test_an_interrupted_conversion_leaves_nothing_that_loads(flash, tmp_path, monkeypatch, moment, error):
    seen = []

    def stop(*args, **kwargs):
        (partial,) = tmp_path.glob(".hico.partial-*")
        with pytest.raises((ValueError, OSError)):
            HicoForConditionalGeneration.from_pretrained(partial)
        seen.append(partial)
        raise error

    monkeypatch.setattr(moment, stop)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        convert(flash, tmp_path / "hico")
    assert len(seen) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"flash"}


@pytest.mark.parametrize("moment", ["hico.shards.TensorShard.copy", "hico.HicoConfig.save_pretrained"])
def test_a_killed_conversion_leaves_nothing_that_loads(flash, tmp_path, moment):
    module, _, attribute = moment.rpartition(".")
    code = f"""
import os, signal
import hico, hico.convert, hico.shards
{module}.{attribute} = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
hico.convert.convert({str(flash)!r}, {str(tmp_path / "hico")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "hico").exists()
    (partial,) = tmp_path.glob(".hico.partial-*")
    with pytest.raises((ValueError, OSError)):
        HicoForConditionalGeneration.from_pretrained(partial)
    convert(flash, tmp_path / "hico")


def test_code_beside_a_checkpoint_is_not_run(flash, tmp_path):
    trap = f"import pathlib\npathlib.Path({str(tmp_path / 'was_run')!r}).touch()\nclass Trap: pass\n"
    (flash / "trap.py").write_text(trap)
    for name, classes in (
        ("config.json", {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["trap.Trap", "trap.Trap"]}),
    ):
        content = json.loads((flash / name).read_text())
        (flash / name).write_text(json.dumps({**content, "auto_map": classes}))
    HicoForConditionalGeneration.from_pretrained(flash)
    HicoProcessor.from_pretrained(flash)
    convert(flash, tmp_path / "hico")
    assert not (tmp_path / "was_run").exists()
    for name in ("config.json", "tokenizer_config.json"):
        assert "trap" not in (tmp_path / "hico" / name).read_text()
    assert not (tmp_path / "hico" / "trap.py").exists()


@pytest.mark.parametrize("trust", [None, True])
def test_code_beside_our_own_layout_is_neither_run_nor_offered(flash, tmp_path, monkeypatch, trust):
    convert(flash, tmp_path / "hico")
    trap = f"import pathlib\npathlib.Path({str(tmp_path / 'was_run')!r}).touch()\nclass Trap: pass\n"
    (tmp_path / "hico" / "trap.py").write_text(trap)
    file = tmp_path / "hico" / "tokenizer_config.json"
    content = {
        **json.loads(file.read_text()),
        "tokenizer_class": "Trap",
        "auto_map": {"AutoTokenizer": ["trap.Trap"] * 2},
    }
    file.write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asks whether to run it"))
    kwargs = {} if trust is None else {"trust_remote_code": trust}
    with pytest.raises(ValueError, match="custom code"):
        HicoProcessor.from_pretrained(tmp_path / "hico", **kwargs)
    assert not (tmp_path / "was_run").exists()
    HicoProcessor.from_pretrained(flash, **kwargs)


def test_what_is_there_is_not_overwritten(flash, tmp_path):
    (tmp_path / "hico").mkdir()
    (tmp_path / "hico" / "mine").touch()
    with pytest.raises(ValueError, match="exists already; remove it or choose another name"):
        convert(flash, tmp_path / "hico")
    assert (tmp_path / "hico" / "mine").exists()
    (tmp_path / "hico" / "mine").unlink()
    convert(flash, tmp_path / "hico")


def test_a_config_cannot_choose_the_files_of_weights(flash, tmp_path):
    convert(flash, tmp_path / "hico")
    file = tmp_path / "hico" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "transformers_weights": "other.safetensors"}))
    HicoForConditionalGeneration.from_pretrained(tmp_path / "hico")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_cannot_ask_for_a_kernel_to_be_downloaded(flash, tmp_path, key):
    convert(flash, tmp_path / "hico")
    file = tmp_path / "hico" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: "someone/kernel"}))
    assert HicoForConditionalGeneration.from_pretrained(tmp_path / "hico").config._attn_implementation == "sdpa"
    asked = HicoForConditionalGeneration.from_pretrained(tmp_path / "hico", attn_implementation="eager")
    assert asked.config._attn_implementation == "eager"


def test_conversions_that_make_no_sense_are_refused(flash, tmp_path):
    convert(flash, tmp_path / "hico")
    for source, arguments, words in (
        (tmp_path / "hico", {}, "is in our layout already"),
        (flash, {"to": "published"}, "is not in our layout"),
        (flash, {"to": "gguf"}, "unknown layout 'gguf'; use one of hico, published"),
        (flash, {"encoder": "x.pt"}, "encoder, projector and preset go with an LLM"),
        (tmp_path / "nothing", {}, "there is no such file or folder"),
        (tmp_path, {}, r"has no config\.json"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(source, tmp_path / "other", **arguments)
    assert not (tmp_path / "other").exists()


def test_inspect_describes_what_cannot_be_loaded(flash, capsys):
    config = json.loads((flash / "config.json").read_text())
    (flash / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "resnet"}))
    found = inspect_checkpoint(flash)
    assert "mm_vision_tower is 'resnet', which hico cannot run" in found.fault
    assert found.num_parameters["LLM"] > 0
    assert "cannot be loaded" in found.report()
    for command in (
        ["convert", str(flash), str(flash.parent / "hico")],
        ["chat", "x.mp4", "?", "--model", str(flash)],
    ):
        assert main(command) == 1
        assert "hico cannot run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{"rope_parameters": {"rope_type": None}}, {SIZES_KEY: {"img": 128, "dim": 0}}, {SIZES_KEY: {"img": "a"}}],
)
def test_settings_that_contradict_each_other_are_a_fault(flash, tmp_path, capsys, change):
    config = json.loads((flash / "config.json").read_text())
    tower = {"mm_vision_tower": "clip-vit-large-patch14-336"} if SIZES_KEY in change else {}
    (flash / "config.json").write_text(json.dumps({**config, **change, **tower}))
    assert inspect_checkpoint(flash).fault
    assert main(["convert", str(flash), str(tmp_path / "new")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["null", "3", "[]", '"x"', "[" * 100_000, '{"model_type": []}', '{"model_type": "hico", "encoder": 5}']
)
def test_a_config_that_is_none_is_one_line(flash, tmp_path, capsys, text):
    (flash / "config.json").write_text(text)
    inspected = main(["inspect", str(flash)])
    assert main(["convert", str(flash), str(tmp_path / "new")]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert inspected == (0 if text.startswith("{") else 1)
