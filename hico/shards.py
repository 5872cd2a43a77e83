"""The weight files of a checkpoint: found, checked, and read one tensor at a time.

Nothing that a file says is run or followed out of its folder: pickles may hold tensors only, and an index names files
beside it.
"""

import json
import math
import os
import pickle
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from torch import Tensor

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in the headers of safetensors files."""
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_MAX_HEADER = 100_000_000
_PIECE_BYTES = 2**20  # what caches hold; sixteen times more takes five times as long

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where the weights of a folder are looked for, in this order."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file and says what to do."""


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of a tensor.

    Args:
        dtype: as safetensors writes it, such as ``"BF16"``.
        shape: of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.num_values * SAFETENSORS_DTYPES[self.dtype].itemsize


class Shard(ABC):
    """One file of tensors."""

    path: Path
    tensors: dict[str, TensorInfo]

    @abstractmethod
    def pieces(self, name: str) -> Iterator[bytes | memoryview]:
        """Read a tensor's bytes, row-major and little-endian, a megabyte at a time."""

    def copy(self, name: str, target: BinaryIO) -> None:
        """Write a tensor's bytes."""
        for piece in self.pieces(name):
            target.write(piece)

    def load(self, name: str) -> Tensor:
        """Read a tensor."""
        info, data = self.tensors[name], bytearray().join(self.pieces(name))
        dtype = SAFETENSORS_DTYPES[info.dtype]
        return (
            torch.frombuffer(data, dtype=dtype).reshape(info.shape) if data else torch.empty(info.shape, dtype=dtype)
        )


class SafetensorsShard(Shard):
    """A safetensors file. Only its header is held in memory."""

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{path}: no safetensors file, or cut off inside its header; download it again")
            try:
                header = dict(json.loads(file.read(length), object_pairs_hook=_refuse_duplicates))
            except (ValueError, TypeError, RecursionError) as error:
                raise CheckpointError(f"{path}: its header cannot be read ({error}); download it again") from error
        self._check_metadata(header.pop("__metadata__", {}))
        self._data = 8 + length
        self._offsets = {name: self._check(name, entry) for name, entry in header.items()}
        self.tensors = {name: TensorInfo(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        expected = self._data
        for name, (begin, end) in sorted(self._offsets.items(), key=lambda item: item[1]):
            if self._data + begin != expected:
                raise CheckpointError(f"{path}: {name!r} overlaps another tensor, or lies apart; download it again")
            expected = self._data + end
        if size != expected:
            state = "truncated" if size < expected else "damaged"
            raise CheckpointError(f"{path}: {state}, it has {size} bytes and not {expected}; download it again")

    def _check_metadata(self, metadata: Any) -> None:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"{self.path}: its __metadata__ does not map names to texts; save it again")

    def _check(self, name: str, entry: Any) -> tuple[int, int]:
        """Return the place of a tensor's bytes among the data."""
        try:
            begin, end = entry["data_offsets"]
            info = TensorInfo(entry["dtype"], tuple(entry["shape"]))
            is_shape = all(type(side) is int and side >= 0 for side in info.shape)
            sound = 0 <= begin <= end and is_shape and end - begin == info.nbytes
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: the header of {name!r} cannot be read ({error!r})") from error
        if not sound:
            raise CheckpointError(f"{self.path}: {name!r} has {end - begin} bytes, which do not make {info}")
        return begin, end

    def pieces(self, name: str) -> Iterator[bytes]:
        begin, end = self._offsets[name]
        with self.path.open("rb") as file:
            file.seek(self._data + begin)
            for start in range(begin, end, _PIECE_BYTES):
                yield file.read(min(_PIECE_BYTES, end - start))


class TensorShard(Shard):
    """Tensors in memory, or mapped into it, as if they were a file."""

    def __init__(self, path: Path, content: Mapping[str, Tensor]):
        self.path = path
        self._content = dict(content)
        for name, tensor in self._content.items():
            if tensor.dtype not in _DTYPE_NAMES:
                raise CheckpointError(f"{path}: {name!r} is {tensor.dtype}, which safetensors cannot hold")
            if tensor.layout != torch.strided or tensor.is_meta:
                raise CheckpointError(f"{path}: {name!r} is sparse or without values; save it as a plain tensor")
        self.tensors = {
            name: TensorInfo(_DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in self._content.items()
        }

    def pieces(self, name: str) -> Iterator[memoryview]:
        values = self._content[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(values), _PIECE_BYTES):
            yield values[start : start + _PIECE_BYTES].data


class PickleShard(TensorShard):
    """A file of ``torch.save``. Tensors stay on disk until they are asked for, if it was written by torch >= 1.6."""

    def __init__(self, path: Path):
        self.path = path
        content = self._read()
        for key in ("state_dict", "model", "module"):  # where training code keeps the weights among other things
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
                content = content[key]
        if not isinstance(content, Mapping) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
        ):
            raise CheckpointError(f"{path}: holds more than named tensors; save the state dict alone")
        super().__init__(path, content)

    def _read(self) -> Any:
        with self.path.open("rb") as file:
            starts_as_zip = file.read(2) == b"PK"
        is_zip = zipfile.is_zipfile(self.path)
        if starts_as_zip and not is_zip:
            raise CheckpointError(f"{self.path}: truncated, its table of contents is missing; download it again")
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=is_zip or None)
        except pickle.UnpicklingError as error:
            wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
            if wanted is None:
                message = f"{self.path}: damaged, its pickle ends early or is none; download it again"
                raise CheckpointError(message) from error
            raise CheckpointError(
                f"{self.path}: refused and not run, its pickle asks for {wanted[1]} beside tensors; if you trust it, "
                "save its tensors alone with safetensors where it was made"
            ) from error
        except Exception as error:  # a damaged pickle makes the reader fail in any way
            raise CheckpointError(f"{self.path}: cannot be read ({error!r}); download it again") from error


_READERS = {".safetensors": SafetensorsShard, ".bin": PickleShard, ".pt": PickleShard, ".pth": PickleShard}


def open_shard(path: Path) -> Shard:
    """Open one file of tensors.

    Raises:
        CheckpointError: if it is missing, damaged, or holds anything but tensors.
    """
    if path.suffix not in _READERS:
        raise CheckpointError(f"{path}: not a weight file; hico reads {', '.join(_READERS)}")
    if not path.is_file():
        raise CheckpointError(f"{path}: this file is missing; download it again")
    return _READERS[path.suffix](path)


def list_shards(source: Path) -> list[Path]:
    """Return the weight files of a checkpoint, in order.

    Args:
        source: a folder, or one file of weights.

    Raises:
        CheckpointError: if there are none, one is missing or listed twice, or an index names a file elsewhere.
    """
    if not source.is_dir():
        return [source]
    found = _weight_file(source)
    return _read_index(found) if found.suffix == ".json" else [found]


def _weight_file(folder: Path) -> Path:
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder}: holds no weights; hico looks for {', '.join(WEIGHT_FILES)}")
    return found


def iterate_shards(source: Path) -> Iterator[Shard]:
    """Open the weight files of a checkpoint one after the other.

    Raises:
        CheckpointError: as ``list_shards`` and ``open_shard``, and if a tensor stands in two files.
    """
    seen: dict[str, Path] = {}
    for path in list_shards(source):
        shard = open_shard(path)
        for name in shard.tensors:
            if name in seen:
                raise CheckpointError(f"{path}: {name!r} stands in {seen[name].name} too; remove one of the files")
            seen[name] = path
        yield shard
        del shard  # before the next one is opened


def check_shards(source: Path, *, rename: Callable[[str], str] = str) -> None:
    """Look at every weight file of a checkpoint that transformers is to load, without reading its tensors.

    Args:
        source: its folder.
        rename: what becomes of the names of its tensors.

    Raises:
        CheckpointError: as ``iterate_shards``, and if two tensors get the same name, or an index lacks what
            transformers asks of it.
    """
    seen: dict[str, str] = {}
    for shard in iterate_shards(source):
        for name in shard.tensors:
            if (other := seen.setdefault(rename(name), name)) != name:
                raise CheckpointError(f"{shard.path}: {other!r} and {name!r} both become {rename(name)!r}; remove one")
        del shard  # before the next one is opened
    file = _weight_file(source)
    if file.suffix == ".json" and not isinstance(json.loads(file.read_text()).get("metadata"), dict):
        raise CheckpointError(
            f'{file}: has no "metadata", without which transformers does not load it; write "metadata": {{}} beside '
            '"weight_map", or let `hico convert` make a new index'
        )


def _read_index(path: Path) -> list[Path]:
    try:
        weight_map = json.loads(path.read_text(), object_pairs_hook=_refuse_duplicates)["weight_map"]
        names = sorted(set(weight_map.values()))  # so that converted files keep their numbers
        if not names:
            raise ValueError("it lists no shard")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: this index cannot be read ({error}); download it again") from error
    files: dict[Any, str] = {}
    for name in names:
        relative = PurePosixPath(str(name))
        shard = path.parent / relative
        is_suspect = ".." in relative.parts or "\\" in str(name) or ":" in str(name)
        # A file may be a link, as in the cache of the hub.
        if is_suspect or not shard.parent.resolve().is_relative_to(path.parent.resolve()):
            raise CheckpointError(f"{path}: names the shard {name!r}, which is not in this folder; do not trust it")
        if not shard.is_file():
            raise CheckpointError(f"{shard}: {path.name} lists this shard, but it is missing; download it again")
        status = os.stat(shard)
        same = files.setdefault((status.st_dev, status.st_ino), name)
        if same != name:
            raise CheckpointError(f"{path}: lists the shard {same!r} twice, once as {name!r}; correct the index")
    return [path.parent / name for name in names]


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is listed twice, with {found[key]!r} and {value!r}")
        found[key] = value
    return found
