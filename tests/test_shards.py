"""Weight files that are sound, damaged, or hostile."""

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hico.shards import (
    SAFETENSORS_DTYPES,
    CheckpointError,
    TensorInfo,
    TensorShard,
    check_shards,
    iterate_shards,
    list_shards,
    open_shard,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7, dtype=torch.int64), "c": torch.ones(0, 4)}


def write(path: Path, tensors=TENSORS) -> Path:
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def write_sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]], weight_map: dict | None = None) -> Path:
    for name, tensors in shards.items():
        write(folder / name, tensors)
    weight_map = weight_map or {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt", "pth"])
def test_tensors_come_back_as_they_were(tmp_path, suffix):
    shard = open_shard(write(tmp_path / f"x.{suffix}"))
    assert shard.tensors == {
        "a": TensorInfo("F32", (2, 3)),
        "b": TensorInfo("I64", ()),
        "c": TensorInfo("F32", (0, 4)),
    }
    for name, tensor in TENSORS.items():
        assert torch.equal(shard.load(name), tensor)
        with (tmp_path / "raw").open("wb") as file:
            shard.copy(name, file)
        assert (tmp_path / "raw").read_bytes() == tensor.numpy().tobytes()


@given(
    name=st.sampled_from(sorted(SAFETENSORS_DTYPES)),
    shape=st.lists(st.integers(0, 4), max_size=3),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=40)
def test_every_dtype_and_shape_is_read_bit_by_bit(tmp_path_factory, name, shape, seed):
    dtype = SAFETENSORS_DTYPES[name]
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    random = torch.Generator().manual_seed(seed)
    raw = torch.randint(high, (num_bytes,), dtype=torch.uint8, generator=random)
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    save_file({"t": raw.view(dtype).reshape(shape)}, path)
    shard = open_shard(path)
    assert shard.tensors["t"].nbytes == num_bytes
    assert torch.equal(shard.load("t").reshape(-1).view(torch.uint8), raw)


def test_weights_among_other_things_of_a_training_run_are_found(tmp_path):
    torch.save({"model": TENSORS, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "x.pt")
    assert open_shard(tmp_path / "x.pt").tensors.keys() == TENSORS.keys()


def test_old_pickles_are_read_too(tmp_path):
    torch.save(TENSORS, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(open_shard(tmp_path / "x.bin").load("a"), TENSORS["a"])


class Hostile:
    """Writes a file when it is unpickled by a reader that runs what it reads."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, is_zip):
    victim = tmp_path / "was_run"
    torch.save({"a": Hostile(victim)}, tmp_path / "x.bin", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=r"x\.bin: refused and not run, its pickle asks for posix\.system"):
        open_shard(tmp_path / "x.bin")
    assert not victim.exists()
    with (tmp_path / "x.bin").open("rb") as file:  # the trap does work
        (torch.load if is_zip else pickle.load)(file, **({"weights_only": False} if is_zip else {}))
    assert victim.exists() or not is_zip


def test_objects_beside_tensors_are_refused(tmp_path):
    torch.save({"a": TENSORS["a"], "n": 3}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="holds more than named tensors"):
        open_shard(tmp_path / "x.bin")
    torch.save({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=r"'a' is torch\.complex64, which safetensors cannot hold"):
        open_shard(tmp_path / "x.bin")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_named(tmp_path, suffix, share):
    path = write(tmp_path / f"x.{suffix}", {"a": torch.randn(300)})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=rf"x\.{suffix}: .*download it again"):
        open_shard(path)


@given(content=st.binary(max_size=64))
@settings(deadline=None, max_examples=60)
def test_garbage_is_one_clear_error(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("x")
    for name in ("x.safetensors", "x.bin"):
        (folder / name).write_bytes(content)
        if content.startswith(struct.pack("<Q", 2) + b"{}"):
            continue  # an empty safetensors file
        with pytest.raises(CheckpointError, match=name):
            open_shard(folder / name)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "X7", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"a": []},
        [],
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        },
        {"__metadata__": [], "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {"__metadata__": {"format": 1}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    ],
)
def test_a_header_that_does_not_add_up_is_refused(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        open_shard(tmp_path / "x.safetensors")


def test_json_nested_without_end_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 10**5) + b"[" * 10**5)
    (tmp_path / "model.safetensors.index.json").write_text("[" * 10**5)
    for read in (lambda: open_shard(tmp_path / "x.safetensors"), lambda: check_shards(tmp_path)):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read()


@pytest.mark.parametrize(
    "content",
    [{1: torch.zeros(2)}, {"a": torch.eye(2).to_sparse()}, {"a": torch.zeros(2, device="meta")}],
    ids=["number", "sparse", "meta"],
)
def test_tensors_that_safetensors_cannot_hold_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        open_shard(tmp_path / "x.bin")


def test_a_folder_without_weights_and_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no weights; hico looks for model\.safetensors"):
        list_shards(tmp_path)
    (tmp_path / "x.txt").touch()
    with pytest.raises(CheckpointError, match="not a weight file"):
        open_shard(tmp_path / "x.txt")
    with pytest.raises(CheckpointError, match="this file is missing"):
        open_shard(tmp_path / "y.bin")


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    write_sharded(tmp_path, {"m2.safetensors": {"b": TENSORS["b"]}, "m1.safetensors": {"a": TENSORS["a"]}})
    assert [path.name for path in list_shards(tmp_path)] == ["m1.safetensors", "m2.safetensors"]
    assert [list(shard.tensors) for shard in iterate_shards(tmp_path)] == [["a"], ["b"]]


@pytest.mark.parametrize(
    "name", ["../m1.safetensors", "/etc/m1.safetensors", "sub/../../m1.safetensors", "C:\\m1.bin"]
)
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, name):
    write(tmp_path / "m1.safetensors")
    folder = tmp_path / "inside"
    folder.mkdir()
    write_sharded(folder, {}, {"a": name})
    with pytest.raises(CheckpointError, match="which is not in this folder; do not trust it"):
        check_shards(folder)


def test_a_folder_that_is_a_link_to_elsewhere_is_refused_and_a_file_is_not(tmp_path):
    """The cache of the hub links files, and never folders."""
    (tmp_path / "blobs").mkdir()
    write(tmp_path / "blobs" / "m1.safetensors")
    folder = tmp_path / "inside"
    folder.mkdir()
    (folder / "sub").symlink_to(tmp_path / "blobs")
    write_sharded(folder, {}, {"a": "sub/m1.safetensors"})
    with pytest.raises(CheckpointError, match="which is not in this folder; do not trust it"):
        check_shards(folder)
    (folder / "m1.safetensors").symlink_to(tmp_path / "blobs" / "m1.safetensors")
    write_sharded(folder, {}, {"a": "m1.safetensors"})
    check_shards(folder)


def test_a_missing_shard_is_named(tmp_path):
    write_sharded(tmp_path, {"m1.safetensors": {"a": TENSORS["a"]}}, {"a": "m1.safetensors", "b": "m2.safetensors"})
    with pytest.raises(CheckpointError, match=r"m2\.safetensors: .* lists this shard, but it is missing"):
        check_shards(tmp_path)


@pytest.mark.parametrize("other", ["./m1.safetensors", "link.safetensors"])
def test_a_shard_listed_under_two_names_is_named(tmp_path, other):
    write(tmp_path / "m1.safetensors")
    (tmp_path / "link.safetensors").symlink_to("m1.safetensors")
    write_sharded(tmp_path, {}, {"a": "m1.safetensors", "b": other})
    with pytest.raises(CheckpointError, match=rf"lists the shard '{other}' twice, once as 'm1\.safetensors'"):
        check_shards(tmp_path)


def test_a_tensor_in_two_shards_is_named_with_both(tmp_path):
    shard = {"a": TENSORS["a"]}
    write_sharded(
        tmp_path,
        {"m1.safetensors": shard, "m2.safetensors": shard},
        {"a": "m1.safetensors", "b": "m2.safetensors"},
    )
    with pytest.raises(CheckpointError, match=r"m2\.safetensors: 'a' stands in m1\.safetensors too"):
        check_shards(tmp_path)


def test_a_tensor_listed_twice_in_an_index_is_named(tmp_path):
    text = '{"weight_map": {"a": "m1.safetensors", "a": "m2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"'a' is listed twice, with 'm1\.safetensors' and 'm2\.safet"):
        check_shards(tmp_path)


def test_an_index_without_metadata_is_named_to_those_who_load_it(tmp_path):
    write(tmp_path / "m1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "m1.safetensors")}))
    assert [shard.tensors.keys() for shard in iterate_shards(tmp_path)] == [TENSORS.keys()]
    with pytest.raises(CheckpointError, match=r'index\.json: has no "metadata", .*write "metadata": \{\} beside'):
        check_shards(tmp_path)
    index.write_text(json.dumps({"metadata": {}, **json.loads(index.read_text())}))
    check_shards(tmp_path)


def test_tensors_that_get_the_same_name_are_named(tmp_path):
    write_sharded(tmp_path, {"m1.safetensors": {"a": TENSORS["a"]}, "m2.safetensors": {"A": TENSORS["a"]}})
    check_shards(tmp_path)
    with pytest.raises(CheckpointError, match=r"m2\.safetensors: 'a' and 'A' both become 'a'; remove one"):
        check_shards(tmp_path, rename=str.lower)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', '{"weight_map": {}}']
)
def test_an_index_that_is_none_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: this index cannot be read"):
        check_shards(tmp_path)


def test_a_shard_is_let_go_before_the_next_one_is_opened(tmp_path, monkeypatch):
    write_sharded(tmp_path, {f"m{n}.safetensors": {f"t{n}": TENSORS["a"]} for n in range(3)})
    alive = []

    class Counted(TensorShard):
        def __init__(self, path):
            assert not alive, "two shards are open at a time"
            alive.append(path)
            super().__init__(path, {path.name: TENSORS["a"]})

        def __del__(self):
            alive.clear()

    monkeypatch.setattr("hico.shards.open_shard", Counted)
    check_shards(tmp_path)
