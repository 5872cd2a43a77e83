"""Write checkpoints one tensor at a time, and whole or not at all."""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from hico.convert.plan import Move
from hico.shards import SAFETENSORS_DTYPES, Shard


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a folder to write into, which gets its name only when all is written.

    Raises:
        ValueError: if there is something of that name already.
    """
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already; remove it or choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        yield partial
        for path in [*(path for path in partial.rglob("*") if path.is_file()), partial]:
            _flush(path)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial)
        raise
    _flush(target.parent)


def write_weights(folder: Path, moves: Sequence[Move], open_shard: Callable[[Path], Shard]) -> list[Path]:
    """Write tensors as safetensors, a file for each file that they come from.

    One file is open and a piece of one tensor in memory at a time. The bytes of a tensor are not touched.

    Args:
        folder: where to.
        moves: grouped by the file that they come from.
        open_shard: opens such a file.

    Returns:
        The files.
    """
    groups = [(shard, list(group)) for shard, group in groupby(moves, key=lambda move: move.shard)]
    count = len(groups)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    names = names if count > 1 else ["model.safetensors"]
    weight_map = {}
    for name, (shard, group) in zip(names, groups, strict=True):
        _write_file(folder / name, group, open_shard(shard))
        weight_map |= {move.target: name for move in group}
    if count > 1:
        index = {"metadata": {"total_size": sum(move.info.nbytes for move in moves)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    return [folder / name for name in names]


def _write_file(path: Path, moves: list[Move], shard: Shard) -> None:
    # Wide dtypes first, so that every tensor starts at a multiple of its item size.
    moves = sorted(moves, key=lambda move: -SAFETENSORS_DTYPES[move.info.dtype].itemsize)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for move in moves:
        begin, end = end, end + move.info.nbytes
        header[move.target] = {"dtype": move.info.dtype, "shape": move.info.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for move in moves:
            shard.copy(move.name, file)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
