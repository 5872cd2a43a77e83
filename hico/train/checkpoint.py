"""Checkpoints that are complete or absent.

A checkpoint is written under another name, flushed to disk, described by a manifest and renamed into place. Whatever
moment a run is killed at, the folder that carries a checkpoint's name holds all of it.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

MANIFEST = "manifest.json"
STAGING = ".saving"
FINAL = "final"
LOGS = "tensorboard"
_DISCARDED = ".discarded"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

logger = logging.getLogger(__name__)


def publish(staged: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    """Give a folder that is written in full its name.

    Args:
        staged: the folder, on the file system of ``target``.
        target: its name from now on; an incomplete folder of that name is replaced.
        manifest: what to say about it; a unique ``id`` is added.
    """
    (staged / MANIFEST).write_text(json.dumps({**manifest, "id": uuid4().hex}, indent=1))
    for path in [*staged.rglob("*"), staged]:
        _flush(path)
    discard(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(staged, target)
    _flush(target.parent)
    with suppress(OSError):  # something else may lie there
        staged.parent.rmdir()


def is_complete(folder: Path) -> bool:
    """Say whether a folder was published."""
    return read_manifest(folder) is not None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return what was said about a checkpoint, if the folder is one of ours."""
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.is_file() else None


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the oldest first."""
    found = [(int(match[1]), path) for path in _entries(output_dir) if (match := _CHECKPOINT.fullmatch(path.name))]
    complete = []
    for _, path in sorted(found):
        if is_complete(path):
            complete.append(path)
        else:
            logger.warning("%s is not complete and is passed over", path)
    return complete


def rotate(output_dir: Path, limit: int | None, *, keep: str | None = None) -> None:
    """Remove the oldest checkpoints beyond ``limit``; the newest and ``keep`` always stay."""
    if not limit:
        return
    found = checkpoints(output_dir)
    protected = {found[-1], *([Path(keep)] if keep else [])} if found else set()
    excess = len(found) - max(limit, len(protected))
    for path in [path for path in found if path not in protected][: max(0, excess)]:
        discard(path)


def discard(folder: Path) -> None:
    """Remove a folder that may be there; it loses its name first, so that it never looks whole when half gone."""
    doomed = folder.with_name(f"{_DISCARDED}-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def discard_run(output_dir: Path) -> None:
    """Remove the result, all checkpoints and logs of a run, for one that begins anew in its folder."""
    for path in _entries(output_dir):
        if path.name in (FINAL, LOGS) or _CHECKPOINT.fullmatch(path.name):
            discard(path)


def clean(output_dir: Path) -> None:
    """Remove what a killed run left unfinished."""
    for path in _entries(output_dir):
        if path.name == STAGING or path.name.startswith(_DISCARDED):
            shutil.rmtree(path)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
