import json
import os

import pytest

from hico.train import checkpoint


def stage(output_dir, name, files=("model.bin", "sub/optimizer.bin")):
    folder = output_dir / checkpoint.STAGING / name
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"12345")
    return folder


def save(output_dir, step):
    name = f"checkpoint-{step}"
    checkpoint.publish(stage(output_dir, name), output_dir / name, {"seed": 1, "step": step})
    return output_dir / name


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_published_checkpoint_is_complete_and_described(tmp_path):
    folder = save(tmp_path, 5)
    assert checkpoint.is_complete(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.pop("id") != json.loads((save(tmp_path, 6) / "manifest.json").read_text())["id"]
    assert manifest == {"seed": 1, "step": 5}


def test_what_is_not_published_is_absent(tmp_path):
    stage(tmp_path, "checkpoint-5")
    assert checkpoint.checkpoints(tmp_path) == []
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == []


def test_checkpoints_are_listed_by_step(tmp_path):
    for step in (100, 9, 20):
        save(tmp_path, step)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-20",
        "checkpoint-100",
    ]


def test_a_folder_without_a_manifest_is_passed_over(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "manifest.json").unlink()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-1"]


def test_publishing_replaces_an_incomplete_folder(tmp_path):
    folder = save(tmp_path, 2)
    (folder / "manifest.json").unlink()
    (folder / "stale.bin").write_bytes(b"")
    save(tmp_path, 2)
    assert checkpoint.is_complete(folder)
    assert not (folder / "stale.bin").exists()


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    checkpoint.rotate(tmp_path, 2, keep=str(tmp_path / "checkpoint-2"))
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-5"]
    checkpoint.rotate(tmp_path, None)
    assert len(checkpoint.checkpoints(tmp_path)) == 2


def test_a_half_removed_checkpoint_never_carries_the_name(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)

    def killed(path, **kwargs):
        if not kwargs:
            (path / "model.bin").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.discard(tmp_path / "checkpoint-1")
    monkeypatch.undo()
    assert not (tmp_path / "checkpoint-1").exists()
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == ["checkpoint-2"]


def test_files_are_flushed_before_the_name_is_given(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a)))
    save(tmp_path, 1)
    # Three files, two folders, then the name, then the folder that holds the name.
    assert calls == ["fsync"] * 5 + ["rename", "fsync"]
