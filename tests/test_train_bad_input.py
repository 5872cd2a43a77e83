"""What a user can get wrong is one clear line, before the first step."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_train_mixture import LLAVA, TALK, TALK_M, write_shard
from train_corpus import make, write_model

from hico import HicoConfig, HicoProcessor
from hico.prompt import label_mask
from hico.tokenizer import byte_tokenizer
from hico.train.dataset import BadRow, TrainingRows, label_marks
from hico.train.decoding import SampleError
from hico.train.mixture import DatasetSpec, Mixture
from hico.train.records import parse_row
from hico.train.rowfiles import RowFile

# Rows -------------------------------------------------------------------------------------------------------------

WORDS = ["video", "image", "text", "user", "assistant", "human", "gpt", "system", "a.mp4", "<image>", "<video>\nWhat?"]
KEYS = ["conversations", "messages", "from", "value", "role", "content", "type", "text", "video", "videos", "image"]
KEYS += ["images", "image_url", "url", "path", "start", "end", "duration", "id"]
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
    text = processor.apply_chat_template(record.messages)
    learned = label_mask(processor.tokenizer(text)["input_ids"], **label_marks(processor.tokenizer))
    placed = [part["type"] for turn in record.messages for part in turn["content"] if part["type"] != "text"]
    assert any(learned)
    assert placed == [item.kind for item in record.media]
    assert record.num_text_bytes > 0
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
