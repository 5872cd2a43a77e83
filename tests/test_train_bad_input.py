"""What a user can get wrong is one clear line, before the first step."""

import json
import shutil

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_mixture import LLAVA, TALK, TALK_M, write_shard
from train_corpus import make, write_corpus, write_model

from hico import HicoConfig, HicoProcessor
from hico.data.dataset import BadRow, TrainingRows
from hico.data.decoding import SampleError
from hico.data.labels import Labels
from hico.data.mixture import Mixture
from hico.data.records import parse_row
from hico.data.rowfiles import RowFile
from hico.data.spec import DatasetSpec
from hico.prompt import ANSWER_MARKS
from hico.tokenizer import byte_tokenizer
from hico.train.__main__ import main

# Rows -------------------------------------------------------------------------------------------------------------

WORDS = ["video", "image", "text", "user", "assistant", "human", "gpt", "system", "a.mp4", "<image>", "<video>\nWhat?"]
KEYS = ["conversations", "messages", "from", "value", "role", "content", "type", "text", "video", "videos", "image"]
KEYS += [
    "images",
    "image_url",
    "url",
    "path",
    "start",
    "end",
    "duration",
    "id",
    "fps",
    "clip",
    "system",
    "loss",
    "nope",
]
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*WORDS, "", " ", "\ud800", "3"])
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)
)
part = {"type": "video", "video": "a.mp4", "start": 1, "end": 2}
SEEDS = [
    LLAVA,
    {**LLAVA, "video": ["a.mp4"], "start": [1], "end": [2], "duration": 9},
    {"image": ["a.png", "b.png"], "conversations": [{"from": "human", "value": "<image> or <image>"}, TALK[1]]},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [part]}, TALK_M[1]]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}, TALK_M[1]], "image": "a.png"},
]


@st.composite
def rows(draw):
    """A sound row in which some places hold anything."""
    row = json.loads(json.dumps(draw(st.sampled_from(SEEDS))))
    for _ in range(draw(st.integers(0, 3))):
        place = row
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.booleans()):
                place = place[key]
                continue
            action = draw(st.sampled_from(["replace", "remove", "add"]))
            if action == "replace":
                place[key] = draw(values)
            elif action == "remove":
                del place[key]
            elif isinstance(place, dict):
                place[draw(st.sampled_from(KEYS))] = draw(values)
            else:
                place.append(draw(values))
            break
    return row


@pytest.fixture(scope="module")
def processor():
    return HicoProcessor.from_config(HicoConfig.preset("tiny"), byte_tokenizer())


@given(row=rows())
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_row_is_refused_with_its_place_or_can_be_learned_from(row, tmp_path, processor):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(row))
    file = RowFile(path)
    try:
        record, refusal = parse_row(file[0], file, 0, root="/data"), None
    except ValueError as error:
        record, refusal = None, str(error)
    if record is None:
        assert refusal.startswith(f"malformed row at {path}:2: ")
        assert len(refusal) < 1000
        return
    text = Labels(processor).mark(record.messages)
    learned = processor.tokenizer(text[text.index(ANSWER_MARKS[0]) + 1 :])["input_ids"]
    placed = [part["type"] for turn in record.messages for part in turn["content"] if part["type"] != "text"]
    assert any(learned)
    assert placed == [item.kind for item in record.media]
    assert all(item.start is None or item.end is None or 0 <= item.start < item.end for item in record.media)


@pytest.mark.parametrize("timeout", [None, 10.0])
def test_a_file_missing_from_a_shard_is_a_bad_row_when_it_is_read(tmp_path, timeout):
    write_model(tmp_path / "init")
    write_shard(tmp_path / "s.tar", {"1.json": json.dumps(LLAVA).encode()})
    mixture = Mixture([DatasetSpec(json_path=str(tmp_path / "s.tar"))], check_files=False)
    processor = HicoProcessor.from_pretrained(tmp_path / "init")

    def read(on_bad_sample):
        recipe = make(tmp_path, check_files=False, on_bad_sample=on_bad_sample, decode_timeout=timeout)
        return TrainingRows(mixture, processor, recipe, seed=0)[0, 0]

    bad = read("skip")
    assert isinstance(bad, BadRow)
    assert (bad.index, bad.where) == (0, f"{tmp_path}/s.tar:1.json")
    assert "there is no" in bad.reason
    assert "s.tar:a.mp4" in bad.reason
    with pytest.raises(SampleError, match=r"s\.tar:1\.json cannot be read: .*there is no .*s\.tar:a\.mp4"):
        read("raise")


# Recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, num_rows=6)
    (folder / "bad.jsonl").write_text(json.dumps({"conversations": TALK}) + "\n" + json.dumps({"messages": 3}))
    (folder / "text.json").write_text(json.dumps([{"conversations": TALK}] * 4))
    (folder / "gone.json").write_text(json.dumps([LLAVA, {**LLAVA, "video": "b.mp4"}, LLAVA]))
    return folder


RECIPE = {"model": "init", "output_dir": "out", "data": "mix.yaml", "min_frames": 4, "max_frames": 8}
RECIPE |= {"max_length": 2048, "per_device_train_batch_size": 2, "num_train_epochs": 1, "decode_timeout": None}
RECIPE |= {"save_strategy": "no", "use_cpu": True}
LORA = {"trainable": ["projector"]}


def complaints(folder, monkeypatch, capfd, recipe, *flags):
    """Run a recipe that cannot run; return the lines that it ends with."""
    monkeypatch.chdir(folder)
    shutil.rmtree(folder / "out", ignore_errors=True)
    path = folder / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    assert main(["--config", str(path), *flags]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("hico.train: ")]
    assert not (folder / "out").exists()
    return lines


@pytest.mark.parametrize("flags", [(), ("--dry_run",)], ids=["train", "dry"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
        ({"max_length": "long"}, "max_length is 'long'; it must be a whole number"),
        ({"extends": "aline"}, "did you mean 'align'"),
        ({"min_frames": 9}, "min_frames 9 and max_frames 8 contradict each other"),
        ({"frame_sampling": "twice"}, "unknown sampling mode 'twice'"),
        ({"optim": "adam"}, "adam is not a valid OptimizerNames"),
        ({"lr_scheduler_type": "cosin"}, "cosin is not a valid SchedulerType"),
        ({"remove_unused_columns": True}, "remove_unused_columns cannot be set"),
        ({"load_best_model_at_end": True, "eval_fraction": 0.3}, "save and eval strategy to match"),
        ({"logging_steps": 1.5}, "--logging_steps must be an integer"),
        ({"fp16": True, "bf16": True}, "At most one of fp16 and bf16"),
        ({"attn_implementation": "flash"}, "flash"),
        ({"video": {"scalar": "fast"}}, "unknown video setting 'scalar'; did you mean 'scaler'"),
        ({"video": {"mode": "middle"}}, "video sets 'mode'; set frame_sampling"),
        ({"video": {"reader": "pyaw"}}, "did you mean 'pyav'"),
        ({"video": {"size": 24}}, "video sets 'size'"),
        ({"model": "nowhere"}, "starts from nowhere, which does not exist"),
        ({"model": "rows.json"}, "starts from rows.json"),
        ({"model_config": {"encoder": {"width": 3}}}, "unexpected keyword argument 'width'"),
        ({"model_config": {"text_config": 3}}, "does not describe a model"),
        ({"model_config": {3: 3}}, "model_config is {3: 3}"),
        ({"model_config": {"encoder": {"hidden_size": 32}}}, "is (16,), but by the configuration it is (32,)"),
        ({"model_config": {"encoder": {"depth": 3}}}, "missing, such as model.encoder.blocks"),
        ({"model_config": {"text_config": {"vocab_size": 100}}}, "no model can be built from this configuration"),
        ({"model_config": {"compressor": "nope"}}, "unknown compressor 'nope'"),
        ({"image_size": 25}, "resize to 24 x 24"),
        ({"drop_schedule": "uniform@1"}, "write policy@layer:keep"),
        ({"drop_schedule": "uniform@1:1.5"}, "keeps the ratio 1.5"),
        ({"drop_schedule": [{"layer": 1, "policy": ["x"], "keep": 0.5}]}, "unknown drop policy"),
        ({"data": []}, "the mixture takes no row"),
        ({"data": "none.yaml"}, "none.yaml"),
        ({"data": [{"json_path": "rows.json", "data_root": 3}]}, "data_root is 3"),
        ({"data": [{"json_path": "bad.jsonl"}]}, "malformed row at bad.jsonl:2: 'messages' is 3"),
        ({"data": [{"json_path": "gone.json"}]}, "2 file(s) of the mixture are missing: a.mp4, b.mp4; check"),
        ({"global_batch_size": 3}, "global_batch_size 3 is not"),
        (
            {"extends": "align", "trainable": ["projector"]},
            "make 1 step(s), all with learning rate 0 (warmup_steps 0.03)",
        ),
        ({"learning_rate": 0}, "would learn nothing"),
        ({"trainable": ["projector"], "data": [{"json_path": "text.json"}]}, "its rows are text alone"),
        (LORA | {"lora": {"rank": 4}}, "lora {'rank': 4}: "),
        (LORA | {"lora": {"r": 0}}, "`r` should be a positive integer"),
        (LORA | {"lora": {"modules_to_save": ["x"]}}, "got multiple values for keyword argument 'modules_to_save'"),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value),
)
def test_a_bad_recipe_ends_in_one_line(corpus, monkeypatch, capfd, changes, message, flags):
    if "lora" in changes:
        pytest.importorskip("peft")
    (line,) = complaints(corpus, monkeypatch, capfd, {**RECIPE, **changes}, *flags)
    assert message in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (LORA | {"lora": {"target_modules": ["nope"]}}, "lora {'target_modules': ['nope']}: "),
        ({"trainable": ["compressor"]}, "have no parameters in this model"),
    ],
)
def test_a_dry_run_finds_what_loading_would(corpus, monkeypatch, capfd, changes, message):
    if "lora" in changes:
        pytest.importorskip("peft")
    (line,) = complaints(corpus, monkeypatch, capfd, {**RECIPE, **changes}, "--dry_run")
    assert message in line


def test_adapters_are_checked_with_the_model_below(corpus, monkeypatch, capfd, tmp_path):
    adapters = tmp_path / "adapters"
    shutil.copytree(corpus / "init", adapters, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((adapters / "config.json").read_text())
    config["encoder"]["hidden_size"] = 32
    (adapters / "config.json").write_text(json.dumps(config))
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(corpus / "init")}))
    (line,) = complaints(corpus, monkeypatch, capfd, {**RECIPE, "model": str(adapters)}, "--dry_run")
    assert f"{corpus}/init/model.safetensors" in line
    assert "by the configuration it is (32," in line


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "config.json: cannot be read"),
        ("config.json", '{"model_type": "qwen2"}', "holds qwen2 and not a whole model; make one with `hico convert"),
        ("tokenizer_config.json", "{}", "has no padding token"),
        ("chat_template.jinja", "{% if", "the chat template cannot be used: unexpected"),
        (
            "chat_template.jinja",
            "{{ raise_exception('no system turn') }}",
            "the chat template cannot be used: no system",
        ),
        ("chat_template.jinja", "{{ messages[0].role }}", "loses What?, Yes."),
        ("model.safetensors", "", "cut off inside its header"),
        ("adapter_config.json", "{}", "names no model that its adapters belong to"),
        (
            "adapter_config.json",
            '{"base_model_name_or_path": "gone"}',
            "holds adapters for gone, which does not exist",
        ),
        ("adapter_config.json", '{"base_model_name_or_path": "damaged"}', "does not exist or is itself"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--dry_run",)], ids=["train", "dry"])
def test_a_damaged_checkpoint_is_named(corpus, monkeypatch, capfd, name, text, message, flags):
    shutil.copytree(corpus / "init", corpus / "damaged", dirs_exist_ok=True)
    (corpus / "damaged" / name).write_text(text)
    (line,) = complaints(corpus, monkeypatch, capfd, {**RECIPE, "model": "damaged"}, *flags)
    shutil.rmtree(corpus / "damaged")
    assert message in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "recipe.yaml is not YAML"),
        ("model: a\nmodel: b", "'model' stands twice"),
        ("- 1", "must hold recipe keys"),
        ("output_dir: out\nstages: [none.yaml]", "no recipe or mixture file"),
        ("output_dir: out\nstages: [{data: mix.yaml, stages: []}]", "unknown recipe key 'stages'"),
    ],
)
def test_a_bad_recipe_file_ends_in_one_line(corpus, monkeypatch, capfd, text, message):
    (line,) = complaints(corpus, monkeypatch, capfd, text)
    assert message in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trainable", "[llm"], "the value of --trainable is not YAML"),
        (["learning_rate"], "expected a flag"),
    ],
)
def test_a_bad_flag_ends_in_one_line(corpus, monkeypatch, capfd, flags, message):
    (line,) = complaints(corpus, monkeypatch, capfd, RECIPE, *flags)
    assert message in line


def test_a_dry_run_reports_every_stage_of_a_chain(corpus, monkeypatch, capfd):
    stages = [{"name": "a", "optim": "x"}, {"name": "b"}, {"name": "c", "data": "none.yaml"}]
    lines = complaints(corpus, monkeypatch, capfd, {**RECIPE, "stages": stages}, "--dry_run")
    assert [line[:21] for line in lines] == ["hico.train: stage a: ", "hico.train: stage c: "]


def test_a_chain_is_checked_before_its_first_stage_runs(corpus, monkeypatch, capfd):
    stages = [{"name": "a"}, {"name": "b", "optim": "x"}]
    (line,) = complaints(corpus, monkeypatch, capfd, {**RECIPE, "stages": stages})
    assert "x is not a valid OptimizerNames" in line
