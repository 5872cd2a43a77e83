"""What is found out about files of rows: weights, splits, malformed rows, and that it is found out once."""

import json
import logging
import subprocess
import sys
from collections import Counter
from multiprocessing import current_process

import numpy as np
import pytest
from test_data_mixture import LLAVA, TALK, write_rows, write_shard
from train_corpus import make, trainer_for

from hico.data import cache, lengths, survey
from hico.data.dataset import BadRow, TrainingRows
from hico.data.mixture import Mixture
from hico.data.spec import DatasetSpec, select_rows
from hico.train.plan import prepare


def videos(folder, count, *, copies=1):
    """Write files and rows that name them."""
    for number in range(count):
        (folder / f"{number}.mp4").write_bytes(bytes(number))
    rows = [{**LLAVA, "video": f"{number}.mp4"} for number in range(count)] * copies
    return DatasetSpec(json_path=str(write_rows(folder / "rows.jsonl", rows)), data_root=str(folder))


# Weights ----------------------------------------------------------------------------------------------------------


def test_more_than_all_rows_are_drawn_several_times():
    counts = Counter(select_rows("random:250%", 10, seed=3).tolist())
    assert sorted(counts.values()) == [2] * 5 + [3] * 5
    assert select_rows("random:200%", 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert select_rows("random:300%", 0).tolist() == []


def test_repeated_rows_are_rows_of_their_own(tmp_path):
    spec = DatasetSpec(**{**vars(videos(tmp_path, 2)), "repeat": 3})
    mixture = Mixture([spec])
    assert [mixture.record(index).media[0].source[-5:] for index in range(6)] == ["0.mp4"] * 3 + ["1.mp4"] * 3
    assert len(mixture.modality) == len(mixture.text_bytes) == 6


# Malformed rows ---------------------------------------------------------------------------------------------------


def test_malformed_rows_are_reported_together_or_left_out(tmp_path, caplog):
    bad = [{"video": "a.mp4"}, {**LLAVA, "nope": 1}, {**LLAVA, "start": -1}, {"conversations": TALK[:1]}]
    path = write_rows(tmp_path / "rows.jsonl", [LLAVA, *bad, {"conversations": TALK}])
    path.write_text(path.read_text() + "{cut off\n")
    spec = DatasetSpec(json_path=str(path))
    with pytest.raises(ValueError, match=r"^5 malformed rows: .*rows\.jsonl:2: .*:3: .*'nope'.*:4: .*; \.\.\.$"):
        Mixture([spec], check_files=False)
    mixture = Mixture([spec], check_files=False, on_bad_sample="skip")
    assert [mixture.record(index).modality for index in range(len(mixture))] == ["video", "text"]
    assert "left out 5 malformed row(s)" in caplog.text
    assert mixture.manifest()[0]["rows_taken"] == 2


def test_a_run_that_skips_bad_rows_skips_malformed_ones(folder):
    rows = [*json.loads((folder / "rows.json").read_text()), {"video": "a.mp4"}]
    (folder / "more.json").write_text(json.dumps(rows))
    data = [{"json_path": str(folder / "more.json"), "data_root": str(folder)}]
    with pytest.raises(ValueError, match="neither 'conversations' nor 'messages'"):
        prepare(make(folder, data=data))
    assert len(prepare(make(folder, data=data, on_bad_sample="skip")).mixture) == len(rows) - 1


def test_a_long_file_is_surveyed_in_pieces_as_it_is_in_one(tmp_path, monkeypatch):
    rows = [LLAVA, {"nope": 1}, {**LLAVA, "video": ["a.mp4", "b.mp4"]}, {"conversations": TALK}, {"video": 3}]
    spec = DatasetSpec(json_path=str(write_rows(tmp_path / "rows.json", rows * 3)))
    whole = Mixture([spec], check_files=False, on_bad_sample="skip")
    monkeypatch.setattr(survey, "_AT_ONCE", 4)
    pieces = Mixture([spec], check_files=False, on_bad_sample="skip")
    assert pieces.facts.tobytes() == whole.facts.tobytes()
    assert [list(pieces.sources(n)) for n in range(len(pieces))] == [list(whole.sources(n)) for n in range(len(whole))]
    assert pieces.datasets[0].surveys[0].reasons == whole.datasets[0].surveys[0].reasons


def test_a_long_file_is_surveyed_where_no_process_may_be_started(tmp_path, monkeypatch):
    """As in a process that a user's own pool has started."""
    monkeypatch.setattr(survey, "_AT_ONCE", 4)
    monkeypatch.setitem(current_process()._config, "daemon", True)
    assert len(Mixture([videos(tmp_path, 12)])) == 12


# Held-out rows ----------------------------------------------------------------------------------------------------


def held_out(mixture, fraction):
    return {mixture.record(index).media[0].source.rpartition("/")[2] for index in mixture.split(fraction)[1]}


def test_a_held_out_video_is_held_out_in_every_stage(tmp_path):
    (tmp_path / "moved").mkdir()
    all_rows, moved = videos(tmp_path, 60, copies=2), videos(tmp_path / "moved", 60)
    first = held_out(Mixture([all_rows], seed=1), 0.3)
    assert 5 < len(first) < 35
    assert held_out(Mixture([moved], seed=2), 0.3) == first
    few = Mixture([all_rows], seed=3, sampling_strategy="random:40%")
    assert held_out(few, 0.3) == first & {few.record(i).media[0].source.rpartition("/")[2] for i in range(len(few))}
    assert held_out(Mixture([all_rows]), 0.2) < first
    kept, out = Mixture([all_rows]).split(0.3)
    assert sorted([*kept, *out]) == list(range(120))


def test_one_held_out_file_holds_the_row_out(tmp_path):
    spec = videos(tmp_path, 12)
    names = sorted(held_out(Mixture([spec]), 0.5))
    other = next(f"{number}.mp4" for number in range(12) if f"{number}.mp4" not in names)
    row = {"video": [other, names[0]], "conversations": [{"from": "human", "value": "What?"}, TALK[1]]}
    rows = [row, {**LLAVA, "video": other}]
    mixture = Mixture([DatasetSpec(json_path=str(write_rows(tmp_path / "two.jsonl", rows)), data_root=str(tmp_path))])
    assert [part.tolist() for part in mixture.split(0.5)] == [[1], [0]]


@pytest.mark.parametrize("root", ["", "0"])
def test_a_video_named_frame_by_frame_is_held_out_as_one(tmp_path, root):
    """Not once for each of its frames, of which some is nearly always held out; and whichever of them a row names."""
    by_name, by_folder, some = [], [], []
    for number in range(40):
        (tmp_path / root / str(number)).mkdir(parents=True)
        names = [f"{number}/{frame}.jpg" for frame in range(30)]
        for frame, name in enumerate(names):
            (tmp_path / root / name).write_bytes(bytes(100 * number + frame))
        rows = {"video": names}, {"video": str(number)}, {"video": names[number % 7 :: 3]}
        for row, taken in zip(rows, (by_name, by_folder, some), strict=True):
            taken.append({**LLAVA, **row})

    def parts(name, rows):
        path = write_rows(tmp_path / name, rows)
        mixture = Mixture([DatasetSpec(json_path=str(path), data_root=str(tmp_path / root))])
        return [part.tolist() for part in mixture.split(0.2)]

    held_out = parts("by_name.jsonl", by_name)
    assert 2 < len(held_out[1]) < 16
    assert parts("by_folder.jsonl", by_folder) == held_out == parts("some.jsonl", some)


def test_frames_of_several_videos_in_one_folder_are_told_by_the_first(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.jpg").write_bytes(bytes(number))
    rows = [{**LLAVA, "video": [f"{number}.jpg", "7.jpg"]} for number in range(40)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    _, held_out = Mixture([DatasetSpec(json_path=str(path), data_root=str(tmp_path))]).split(0.2)
    assert 2 < len(held_out) < 16


def test_a_fraction_that_holds_out_nothing_names_one_that_does(tmp_path):
    mixture = Mixture([videos(tmp_path, 3)])
    with pytest.raises(ValueError, match=r"holds out 0 of 3 rows, .* use one above 0"):
        mixture.split(1e-9)


# The cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HICO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "WORTH_KEEPING", 0.0)
    return tmp_path / "cache"


def test_rows_are_parsed_once_for_their_content(tmp_path, own_cache, monkeypatch):
    spec = videos(tmp_path, 5)
    before = Mixture([spec])
    calls = []
    parse = survey.parse_row
    monkeypatch.setattr(survey, "parse_row", lambda *args, **kwargs: calls.append(1) or parse(*args, **kwargs))
    (tmp_path / "renamed.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    again = Mixture([DatasetSpec(json_path=str(tmp_path / "renamed.jsonl"), data_root=str(tmp_path))])
    assert not calls
    assert before.facts.tobytes() == again.facts.tobytes()
    (tmp_path / "3.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.mp4"):
        Mixture([spec])
    (tmp_path / "rows.jsonl").write_text(json.dumps(LLAVA))
    assert len(Mixture([spec], check_files=False)) == len(calls) == 1


def test_a_damaged_or_unwritable_cache_is_no_obstacle(tmp_path, own_cache, monkeypatch, caplog):
    spec = videos(tmp_path, 5)
    Mixture([spec])
    for path in own_cache.iterdir():
        path.write_bytes(path.read_bytes()[:30])
    assert len(Mixture([spec])) == 5
    monkeypatch.setenv("HICO_CACHE", str(tmp_path / "rows.jsonl"))
    assert len(Mixture([spec])) == 5
    assert "cannot be kept" in caplog.text


def test_malformed_rows_come_from_the_cache_with_their_place(tmp_path, own_cache):
    path = write_rows(tmp_path / "rows.json", [LLAVA, {"video": "a.mp4"}])
    errors = []
    for _ in range(2):
        with pytest.raises(ValueError, match=r"rows\.json:\d+: it has neither") as caught:
            Mixture([DatasetSpec(json_path=str(path))], check_files=False)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_processes_that_start_together_make_it_once(tmp_path, own_cache):
    code = f"""
import time
import numpy as np
from hico.data.cache import cached
def make():
    open({str(tmp_path / "made")!r}, "a").write("x")
    time.sleep(1.5)
    return {{"a": np.arange(3)}}
assert cached("thing", ["1"], make)["a"].tolist() == [0, 1, 2]
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "made").read_text() == "x"


# Lengths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"frame_sampling": "dynamic_fps1"}, {"packing": True}, {"time_message": "long"}]
)
def test_a_budget_of_tokens_is_never_exceeded(folder, settings):
    recipe = make(folder, max_tokens_per_batch=512, max_length=512, **settings)
    trainer = trainer_for(recipe)
    sizes = [batch["input_ids"].numel() for batch in trainer.get_train_dataloader()]
    assert max(sizes) <= 512
    assert sum(sizes) > 0.5 * 512 * len(sizes)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("needed", ["pixels", "both"])
def test_a_budget_holds_what_a_batch_is_given_that_lacks_pixels(folder, monkeypatch, packing, needed):
    text = {"model_config": {"compressor": {"tokens_per_image": 4}}}
    recipe = make(folder, max_tokens_per_batch=400, max_length=300, packing=packing, **text)
    monkeypatch.setattr("hico.train.plan.Prepared.needed", lambda self, world_size: needed)
    trainer = trainer_for(recipe)
    batches = list(trainer.get_train_dataloader())
    assert all("pixel_values" in batch or "pixel_values_videos" in batch for batch in batches)
    assert max(batch["input_ids"].numel() for batch in batches) <= 400


def test_measured_lengths_bound_those_of_examples_closely(folder):
    recipe = make(folder, frame_sampling="dynamic_fps1", max_frames=64)
    prepared = prepare(recipe)
    measured = lengths.measure_lengths(prepared.mixture, prepared.processor, recipe)
    rows = TrainingRows(prepared.mixture, prepared.processor, recipe, seed=0)
    real = np.array([len(rows[0, index]["input_ids"]) for index in range(len(rows))])
    assert (measured >= real).all()
    assert (measured <= real + 8).all()
    assert (lengths.estimate_lengths(prepared.mixture, prepared.processor, recipe) > 1.4 * real).any()


def test_lengths_count_what_a_video_compressor_leaves(folder):
    changes = {"model_config": {"video_compressor": {"name": "evs", "keep_ratio": 0.5}}}
    prepared = prepare(recipe := make(folder, frame_sampling="middle", max_frames=32, **changes))
    rows = TrainingRows(prepared.mixture, prepared.processor, recipe, seed=0)
    real = np.array([len(rows[0, index]["input_ids"]) for index in range(len(rows))])
    assert (np.abs(lengths.measure_lengths(prepared.mixture, prepared.processor, recipe) - real) <= 8).all()
    plain = prepare(make(folder, frame_sampling="middle", max_frames=32))
    saved = lengths.estimate_lengths(plain.mixture, plain.processor, recipe)
    saved -= lengths.estimate_lengths(prepared.mixture, prepared.processor, recipe)
    assert saved.max() == plain.processor.vision.num_video_tokens(32) // 2


def test_what_cannot_be_measured_is_as_long_as_a_row_may_be(folder, own_cache, caplog):
    (folder / "0.mp4").unlink()
    (folder / "0.mp4").write_text("no video")
    recipe = make(folder, max_length=700)
    prepared = prepare(recipe)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            measured = lengths.measure_lengths(prepared.mixture, prepared.processor, recipe)
            assert measured[0] == 700 > measured[1:].max()
    assert caplog.text.count("measuring the videos and images of 12 rows") == 1


def test_a_long_row_follows_the_policy(folder):
    talk = [TALK[0], {"from": "gpt", "value": "A long story. " * 20}]
    data = [{"json_path": str(write_rows(folder / "long.json", [{"conversations": talk}]))}]
    examples = {}
    for policy in ("cut", "bad"):
        recipe = make(folder, data=data, on_long_sample=policy, on_bad_sample="skip", max_length=150)
        prepared = prepare(recipe)
        examples[policy] = TrainingRows(prepared.mixture, prepared.processor, recipe, seed=0)[0, 0]
    assert len(examples["cut"]["input_ids"]) == 150
    assert isinstance(examples["bad"], BadRow)
    assert "max_length is 150" in examples["bad"].reason
    with pytest.raises(ValueError, match="on_long_sample is 'drop'; it must be 'cut' or 'bad'"):
        make(folder, on_long_sample="drop")


# Tables -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    from PIL import Image

    Image.new("RGB", (6, 4), (10, 20, 30)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    talk = [{"from": "human", "value": "<image>\nWhat?"}, TALK[1]]
    return [{"id": n, "image": {"bytes": data, "path": None}, "video": None, "conversations": talk} for n in range(7)]


def check_pictures(path):
    mixture = Mixture([DatasetSpec(json_path=str(path))])
    assert len(mixture) == 7
    assert mixture.record(6).where == f"{path}:6"
    assert mixture.record(6).media[0].source.data[:4] == b"\x89PNG"
    assert mixture.num_images.tolist() == [1] * 7


def test_parquet_files_hold_rows_and_pictures(tmp_path, pictures):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(pictures), tmp_path / "p.parquet", row_group_size=3)
    check_pictures(tmp_path / "p.parquet")


def test_folders_of_datasets_hold_rows(tmp_path, pictures):
    """Written as `Dataset.save_to_disk` of `datasets` 5 writes them: streams of Arrow, and a file that names them."""
    arrow = pytest.importorskip("pyarrow")
    (tmp_path / "splits/train").mkdir(parents=True)
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, some in zip(names, (pictures[:4], pictures[4:]), strict=True):
        table = arrow.Table.from_pylist(some)
        with arrow.ipc.new_stream(str(tmp_path / "splits/train" / name), table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (tmp_path / "splits/train/state.json").write_text(json.dumps(state))
    check_pictures(tmp_path / "splits/train")
    (tmp_path / "splits/dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ValueError, match=r"name one of its splits \(train\)"):
        Mixture([DatasetSpec(json_path=str(tmp_path / "splits"))])


@pytest.mark.slow
def test_folders_that_datasets_itself_saves_hold_rows(tmp_path, pictures):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(pictures).save_to_disk(tmp_path / "d", num_shards=2)
    check_pictures(tmp_path / "d")


def test_a_table_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "p.parquet").write_bytes(b"")
    with pytest.raises(ImportError, match="needs pyarrow"):
        Mixture([DatasetSpec(json_path=str(tmp_path / "p.parquet"))])


def test_a_shard_is_surveyed_like_a_file(tmp_path, own_cache):
    row = {**LLAVA, "video": "mp4"}
    spec = DatasetSpec(
        json_path=str(write_shard(tmp_path / "s.tar", {"1.json": json.dumps(row).encode(), "1.mp4": b"v"}))
    )
    for _ in range(2):
        mixture = Mixture([spec])
        assert [str(source) for source in mixture.sources(0)] == [f"{tmp_path}/s.tar:1.mp4"]
