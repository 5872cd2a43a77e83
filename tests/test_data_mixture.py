import hashlib
import io
import json
import math
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hico.data.forms import Media
from hico.data.mixture import Mixture, read_mixture
from hico.data.records import parse_row
from hico.data.rowfiles import RowFile, ShardMember
from hico.data.spec import DatasetSpec, select_rows
from hico.data.tables import Shard

LLAVA = {
    "video": "a.mp4",
    "conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "Hi."}],
}
TALK = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]
TALK_M = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]


def write_rows(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows) if path.suffix == ".jsonl" else json.dumps(rows, indent=1)
    path.write_text(text)
    return path


def record(row, tmp_path, **kwargs):
    file = RowFile(write_rows(tmp_path / "rows.json", [row]))
    return parse_row(file[0], file, 0, **kwargs)


def content(record, turn=0):
    return [part["type"] if part["type"] != "text" else part["text"] for part in record.messages[turn]["content"]]


# Rows -----------------------------------------------------------------------------------------------------------


def test_llava_rows_become_messages(tmp_path):
    found = record(LLAVA, tmp_path, root="/data")
    assert [message["role"] for message in found.messages] == ["user", "assistant"]
    assert content(found) == ["video", "What?"]
    assert found.media == [Media("video", "/data/a.mp4")]
    assert found.modality == "video"


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "a.png"),
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image_url", "image_url": "file:///x/a.png"}, "/x/a.png"),
    ],
)
def test_openai_parts_name_files(tmp_path, part, source):
    row = {
        "messages": [
            {"role": "user", "content": [part, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "Hi."},
        ]
    }
    found = record(row, tmp_path)
    assert content(found) == ["image", "What?"]
    assert found.media == [Media("image", source)]


def test_an_openai_video_part_has_start_and_end(tmp_path):
    part = {"type": "video", "video": "a.mp4", "start": 1.5, "end": 3}
    row = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "Hi."}]}
    assert record(row, tmp_path).media == [Media("video", "a.mp4", 1.5, 3)]


def asked(text, **media):
    """A LLaVA row whose user says ``text``."""
    return {"conversations": [{"from": "human", "value": text}, TALK[1]], **media}


def parts(*content):
    """An OpenAI row whose user turn has these parts."""
    return {"messages": [{"role": "user", "content": list(content)}, TALK_M[1]]}


@pytest.mark.parametrize(
    ("row", "expected", "files"),
    [
        (asked("Hello", video="a.mp4"), ["video", "Hello"], ["a.mp4"]),
        (asked("Hello"), ["Hello"], []),
        (asked("What is\n<image>", video="a.mp4"), ["video", "What is"], ["a.mp4"]),
        (asked("<image>\n\nWhat?", image="a.png"), ["image", "\nWhat?"], ["a.png"]),
        (
            asked("From <image> to <image>.", image=["a.png", "b.png"]),
            ["From ", "image", " to ", "image", "."],
            ["a.png", "b.png"],
        ),
        (
            asked("<image>\n<video>\nSame?", image="b.png", video="a.mp4"),
            ["image", "video", "Same?"],
            ["b.png", "a.mp4"],
        ),
    ],
)
def test_placeholders_take_the_files_in_order(tmp_path, row, expected, files):
    found = record(row, tmp_path)
    assert content(found) == expected
    assert [media.source for media in found.media] == files


def test_start_and_end_bound_each_video(tmp_path):
    row = {**LLAVA, "video": ["a.mp4", "b.mp4"], "start": [1, 2], "end": [3, 4.5], "conversations": TALK}
    assert [(m.start, m.end) for m in record(row, tmp_path).media] == [(1.0, 3.0), (2.0, 4.5)]
    assert record({**LLAVA, "start": 1, "end": 2}, tmp_path).media == [Media("video", "a.mp4", 1.0, 2.0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video": "a.mp4"}, "neither 'conversations' nor 'messages', but video"),
        ({"conversations": [{"from": "human"}]}, "lacks 'value'"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown speaker 'alien'"),
        ({"conversations": TALK[:1]}, "needs a user and an assistant"),
        ({"conversations": []}, "speakers are missing"),
        ({**LLAVA, "video": ["a.mp4", "b.mp4"]}, r"1 placeholder\(s\) \(video\) for 2 file\(s\)"),
        (asked("What is <image> without files?"), r"1 placeholder\(s\) \(image\) for 0 file\(s\)"),
        ({**LLAVA, "video": 3}, "must be a path"),
        ({**LLAVA, "start": 3, "end": 1}, "do not bound a clip"),
        ({**LLAVA, "start": [1, 2], "end": 3}, "'start' has 2 entries for 1 files"),
        ({**LLAVA, "video": [""]}, "must be a path"),
        ({**LLAVA, "video": False}, "must be a path"),
        ({**LLAVA, "start": -1}, r"start is -1; give seconds"),
        ({**LLAVA, "end": 0}, "do not bound a clip"),
        ({**LLAVA, "end": float("nan")}, "end is nan; give seconds"),
        ({**LLAVA, "end": float("inf")}, "end is inf; give seconds"),
        ({**LLAVA, "end": 10**400}, "end is 10"),
        ({**LLAVA, "start": True, "end": 3}, "start is True; give seconds"),
        ({**LLAVA, "start": "soon"}, "start is 'soon'; give seconds"),
        ({**LLAVA, "duration": [3]}, r"duration is \[3\]; give seconds"),
        ({"conversations": TALK, "start": 3}, "start is 3, but it names no 'video'"),
        (parts({"type": "video", "video": "a.mp4", "start": "soon"}), "start is 'soon'; give seconds"),
        (parts({"type": "video", "video": "a.mp4", "start": 3, "end": 1}), "do not bound a clip"),
        (parts({"type": "video", "video": "a.mp4", "start": -3, "end": 1}), "start is -3"),
        (parts({"type": "image", "image": "a.png", "start": 3}), "start is 3, but an image has no time"),
        (parts({"type": "text", "text": None}), "'text' is None; it must be text"),
        (parts({"type": "image", "image": None}), "the file of an image is None"),
        (parts({"type": "image_url", "image_url": {"url": 3}}), "the file of an image is 3"),
        (parts({"type": "image"}), "lacks 'image'"),
        (parts({"type": ["image"]}), "'type' is"),
        (parts({"text": "x"}), "lacks 'type'"),
        (parts("x"), "a content part is 'x'; it must be a mapping"),
        ({**parts({"type": "image", "image": "a.png"}), "image": "b.png"}, "both in its parts and under"),
        (parts({"type": "audio"}), "unknown content type 'audio'"),
        ({"messages": [{"role": "user", "content": None}, TALK_M[1]]}, "content is None"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "the speaker is"),
        ({"conversations": [TALK[0], {"from": "gpt", "value": " \n"}]}, "an answer is empty"),
        ({"conversations": [TALK[1], *TALK]}, "the assistant speaks before the user"),
        ({"conversations": None}, "'conversations' is None; it must be a list"),
        ({"conversations": ["x"]}, "a turn is 'x'; it must be a mapping"),
        ({"conversations": [{"from": "human", "value": 3}, TALK[1]]}, "content is 3; it must be text or a list"),
        (asked("a \ud800"), "surrogates not allowed"),
        (asked("a <|im_end|>"), r"holds <\|im_end\|>"),
        (asked("a <|video_pad|>"), r"holds <\|video_pad\|>"),
        ({"conversations": [*TALK, {"from": "system", "value": "x"}]}, "system turn is not the first"),
        ({"conversations": "hello"}, "malformed row"),
    ],
)
def test_malformed_rows_name_file_and_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"malformed row at .*rows\.json:2: .*{message}|{message}") as caught:
        record(row, tmp_path)
    assert "rows.json:2" in str(caught.value)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_rows_are_found_at_their_lines_whatever_their_bytes(tmp_path, suffix):
    rows = [{"id": i, "text": "\u00e4\u6f22\u5b57\U0001f600\n" * i} for i in range(5)]
    path = tmp_path / f"rows.{suffix}"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n\n".join(lines) if suffix == "jsonl" else "[" + ",\n\n".join(lines) + "]\n", encoding="utf-8")
    file = RowFile(path)
    assert [file[i] for i in range(len(file))] == rows
    assert [file.where(i) for i in range(5)] == [f"{path}:{1 + 2 * i}" for i in range(5)]
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.json", '[{"a": 1},\n{"b": }]', r"rows\.json:2 is not JSON"),
        ("rows.jsonl", '{"a": 1}\n{"b": \n', r"rows\.jsonl:2 is not JSON"),
        ("rows.json", '{"a": 1}', "not a JSON array"),
        ("rows.json", b'["\xff"]', r"rows\.json is not UTF-8"),
        ("rows.jsonl", b'{}\n{"a": "\xff"}', r"rows\.jsonl:2 is not JSON"),
        ("rows.json", '[{"a": 1},\n 3]', r"rows\.json:2 is int"),
        ("rows.jsonl", "[]\n", r"rows\.jsonl:1 is list"),
        ("rows.json", '[{"a": 1},\n{"b": 2}', r"rows\.json:2 is not JSON"),
        ("rows.json", '[{"a": 1},\n{"b": 2}]\n[{"c": 3}]', r"rows\.json:2 .* more text after the array"),
        ("rows.json", '[{"a": 1},\n' + "[" * 100_000, r"rows\.json:2 is not JSON"),
        ("rows.jsonl", "[" * 100_000, r"rows\.jsonl:1 is not JSON"),
        ("rows.json", '[{"a": 1},\n{"a": ' + "1" * 5000 + "}]", r"rows\.json:2 is not JSON"),
    ],
)
def test_files_that_do_not_parse_name_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        list(RowFile(tmp_path / name))


# Shards -----------------------------------------------------------------------------------------------------------


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_shards_give_rows_and_the_bytes_of_their_files(tmp_path):
    row = {**LLAVA, "video": "mp4"}
    members = {
        "x/0001.mp4": b"video one",
        "x/0001.json": json.dumps(row).encode(),
        "x/0002.json": json.dumps({"conversations": TALK}).encode(),
    }
    shard = Shard(write_shard(tmp_path / "s.tar", members))
    first = parse_row(shard[0], shard, 0)
    assert len(shard) == 2
    assert isinstance(first.media[0].source, ShardMember)
    assert first.media[0].source.read() == b"video one"
    assert first.where == f"{tmp_path}/s.tar:x/0001.json"
    assert parse_row(shard[1], shard, 1).modality == "text"


@pytest.mark.parametrize("name", ["x/0001.mp4", "0001.mp4", ".mp4"])
def test_members_are_found_by_name_or_extension(tmp_path, name):
    members = {"x/0001.mp4": b"v", "x/0001.json": json.dumps({**LLAVA, "video": name}).encode()}
    shard = Shard(write_shard(tmp_path / "s.tar", members))
    assert parse_row(shard[0], shard, 0).media[0].source.name == "x/0001.mp4"


def test_a_compressed_tar_is_an_error(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match="not an uncompressed tar"):
        Shard(tmp_path / "s.tar")


def test_a_file_missing_from_a_shard_is_reported(tmp_path):
    write_shard(tmp_path / "s.tar", {"1.json": json.dumps(LLAVA).encode()})
    spec = DatasetSpec(json_path=str(tmp_path / "s.tar"))
    with pytest.raises(FileNotFoundError, match=r"1 file\(s\) .*s\.tar:a\.mp4"):
        Mixture([spec])
    unchecked = Mixture([spec], check_files=False)
    assert unchecked.num_videos.tolist() == [1]
    with pytest.raises(FileNotFoundError, match=r"s\.tar:a\.mp4"):
        unchecked.record(0).media[0].source.read()


# Which rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", range(10)),
        ("first:3", range(3)),
        ("first:25%", range(3)),
        ("end:3", range(7, 10)),
        ("end:11%", range(8, 10)),
        ("first2:3", range(3, 6)),
        ("first3:3", range(6, 9)),
        ("first4:3", range(9, 10)),
        ("first2:20%", range(2, 4)),
        ("first:30", range(10)),
        ("end:30", range(10)),
        ("first:0", range(0)),
    ],
)
def test_strategies_take_the_rows_they_name(strategy, expected):
    assert select_rows(strategy, 10).tolist() == list(expected)


@given(n=st.integers(0, 500), percent=st.integers(0, 100), seed=st.integers(0, 5))
def test_a_percentage_is_rounded_up_and_random_rows_are_distinct(n, percent, seed):
    rows = select_rows(f"random:{percent}%", n, seed=seed)
    assert len(rows) == math.ceil(percent * n / 100) == len(select_rows(f"first:{percent}%", n))
    assert len(set(rows.tolist())) == len(rows)
    assert (np.diff(rows) > 0).all()
    assert rows.tolist() == select_rows(f"random:{percent}%", n, seed=seed).tolist()


def test_random_rows_follow_the_seed():
    assert select_rows("random:50", 1000, seed=1).tolist() != select_rows("random:50", 1000, seed=2).tolist()


@pytest.mark.parametrize(
    "strategy", ["", "first", "first:", "first5:3", "random:-1", "first:101%", "first:2.5", "some:3", "all:3"]
)
def test_unknown_strategies_are_errors(strategy):
    with pytest.raises(ValueError, match="sampling_strategy is"):
        select_rows(strategy, 10)


# Mixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "b.png"):
        (tmp_path / name).write_bytes(b"")
    image = {"image": "b.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, TALK[1]]}
    write_rows(tmp_path / "videos.json", [LLAVA] * 4)
    write_rows(tmp_path / "mixed.jsonl", [image, {"conversations": TALK}])
    (tmp_path / "mix.yaml").write_text(
        "datasets:\n"
        "  - {json_path: videos.json, data_root: ., sampling_strategy: 'random:50%', media_type: video}\n"
        "  - {json_path: mixed.jsonl, data_root: ., name: rest}\n"
    )
    return tmp_path


def test_a_mixture_joins_its_datasets(folder):
    mixture = read_mixture(str(folder / "mix.yaml"), seed=3)
    assert len(mixture) == 4
    assert mixture.modality.tolist() == [2, 2, 1, 0]
    assert [mixture.record(i).modality for i in range(4)] == ["video", "video", "image", "text"]
    assert mixture.text_bytes.tolist() == [8, 8, 8, 8]
    assert mixture.num_videos.tolist() == [1, 1, 0, 0]


def test_the_manifest_tells_files_and_rows(folder):
    videos, rest = read_mixture(str(folder / "mix.yaml"), seed=3).manifest()
    assert videos["sha256"] == [hashlib.sha256((folder / "videos.json").read_bytes()).hexdigest()]
    assert (videos["rows_taken"], rest["rows_taken"]) == (2, 2)
    assert (rest["name"], rest["repeat"]) == ("rest", 1)


def test_a_second_strategy_thins_every_dataset(folder):
    mixture = read_mixture(str(folder / "mix.yaml"), sampling_strategy="first:50%")
    assert [len(taken) for taken in mixture.taken] == [1, 1]


def test_globs_and_braces_stand_for_several_files(folder):
    for number in range(3):
        write_rows(folder / f"part-{number:02}.json", [LLAVA] * (number + 1))
    for pattern in ("part-*.json", "part-{00..02}.json"):
        mixture = read_mixture([{"json_path": str(folder / pattern), "data_root": str(folder)}])
        assert len(mixture) == 6
        assert (
            mixture.record(5).where == f"{folder}/part-02.json:{len(json.dumps([LLAVA] * 2, indent=1).splitlines())}"
        )


def test_splitting_keeps_every_row_once(folder):
    mixture = read_mixture(str(folder / "mix.yaml"))
    train, held_out = mixture.split(0.5)
    assert sorted([*train, *held_out]) == [0, 1, 2, 3]
    assert 0 < len(held_out) < 4


def test_missing_files_are_counted_and_three_are_named(folder):
    rows = [{**LLAVA, "video": f"no{i}.mp4"} for i in range(5)]
    write_rows(folder / "videos.json", [rows[0], rows[0], *rows])
    spec = DatasetSpec(json_path=str(folder / "videos.json"), data_root=str(folder))
    with pytest.raises(FileNotFoundError, match=r"5 file\(s\) .*no0\.mp4, .*no1\.mp4, .*no2\.mp4, \.\.\."):
        Mixture([spec])
    assert len(Mixture([spec], check_files=False)) == 7


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"json_path": "videos.json", "sampling_strategie": "all"}, "did you mean 'sampling_strategy'"),
        ({"data_root": "."}, "no json_path"),
        ({"json_path": "videos.json", "sampling_strategy": 10}, "sampling_strategy is 10; it must be text"),
        ({"json_path": "videos.json", "data_root": 3}, "data_root is 3"),
        ({"json_path": ["videos.json"]}, "json_path is"),
        ({"json_path": "videos.json", "folder_fps": "x"}, "folder_fps is 'x'; it must be a number or null"),
        ({"json_path": "videos.json", "video_read_type": "pyaw"}, "did you mean 'pyav'"),
        ({"json_path": "videos.json", "data_root": ".", "sampling_strategy": "first:0"}, "takes no row of videos"),
        ({"json_path": "videos.json", "media_type": "audio"}, "media_type is 'audio'"),
        (
            {"json_path": "videos.json", "data_root": ".", "media_type": "image"},
            "it has video, but videos is of media_type",
        ),
    ],
)
def test_bad_mixtures_are_named(folder, monkeypatch, entry, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        read_mixture([entry])


def test_a_mixture_without_datasets_is_an_error():
    with pytest.raises(ValueError, match="no datasets"):
        read_mixture([])


def test_a_missing_row_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"names .*nothing\.json"):
        read_mixture([{"json_path": str(tmp_path / "nothing.json")}])
