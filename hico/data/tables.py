"""Rows in archives and tables: tar files, Parquet files, and folders that Hugging Face `datasets` saves."""

import hashlib
import json
import tarfile
from bisect import bisect_right
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from hico.data.rowfiles import RowFile, RowFiles, ShardMember, TextFile, file_sha256, parse_json_row


class Shard:
    """Rows of a tar file: per key a ``.json`` with the row, and the files that it names or that share its key.

    The digest covers names, places and sizes of the members and all rows, but not the media, which would have to be
    read in full.

    Args:
        path: an uncompressed tar file.

    Raises:
        ValueError: if it is not one.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._members: dict[str, ShardMember] = {}
        try:
            with tarfile.open(self.path, "r:") as tar:
                for info in tar:
                    if info.isfile():
                        self._members[info.name] = ShardMember(self.path, info.name, info.offset_data, info.size)
        except tarfile.TarError as error:
            raise ValueError(f"{self.path} is not an uncompressed tar file: {error}") from error
        self._rows = [member for name, member in self._members.items() if name.endswith(".json")]
        digest = hashlib.sha256(repr([(m.name, m.offset, m.size) for m in self._members.values()]).encode())
        for member in self._rows:
            digest.update(member.read())
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return parse_json_row(self._rows[index].read(), self.where(index))

    def where(self, index: int) -> str:
        """Return shard and member of a row."""
        return str(self._rows[index])

    def source(self, index: int, name: str, root: str) -> ShardMember:
        """Return a member by its name, or by its extension beside the row (``mp4`` or ``.mp4``).

        One that is not there is returned too, without a place.
        """
        key = self._rows[index].name.removesuffix(".json")
        folder = key.rpartition("/")[0]
        for candidate in (name, f"{folder}/{name}", f"{key}.{name.lstrip('.')}"):
            if candidate in self._members:
                return self._members[candidate]
        return ShardMember(self.path, name)


class Table:
    """Rows of a Parquet file, or of the Arrow files of a folder that `datasets` saved; needs pyarrow.

    Arrow files are mapped into memory. Of a Parquet file one row group is held at a time, so where rows hold their
    media and are drawn at random, an Arrow folder reads much faster.

    Args:
        path: the file or the folder.

    Raises:
        ImportError: if pyarrow is not installed.
        ValueError: if it is not such a table.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._files = [self.path] if self.path.endswith(".parquet") else _arrow_files(Path(self.path))
        self.sha256 = file_sha256(*self._files)
        self._parts, self._open_part = None, (None, None)
        self._ends = list(accumulate(len_ for len_, _ in self._load()))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        part = bisect_right(self._ends, index)
        if self._open_part[0] != part:
            self._open_part = part, self._load()[part][1]()
        (row,) = self._open_part[1].slice(index - (self._ends[part - 1] if part else 0), 1).to_pylist()
        return row

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": None, "_open_part": (None, None)}

    def where(self, index: int) -> str:
        """Return the table and the number of a row."""
        return f"{self.path}:{index}"

    source = RowFile.source

    def _load(self) -> list[tuple[int, Any]]:
        """Return rows of every part, and what reads it."""
        if self._parts is None:
            try:
                import pyarrow as arrow
                from pyarrow import parquet
            except ImportError as error:
                raise ImportError(f"{self.path} needs pyarrow; run `pip install pyarrow`") from error
            try:
                if self.path.endswith(".parquet"):
                    file = parquet.ParquetFile(self.path, memory_map=True)
                    sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
                    read = partial(file.read_row_group, use_threads=False)  # a forked worker has none
                    self._parts = [(size, partial(read, n)) for n, size in enumerate(sizes)]
                else:
                    streams = [arrow.ipc.open_stream(arrow.memory_map(name)) for name in self._files]
                    self._parts = [(len(table), lambda table=table: table) for table in map(_read_all, streams)]
            except arrow.ArrowInvalid as error:
                raise ValueError(f"{self.path} cannot be read: {error}") from error
        return self._parts


def open_rows(path: str) -> RowFiles:
    """Open a file of rows by the end of its name, or a folder that `datasets` saved."""
    if path.endswith(".tar"):
        return Shard(path)
    if path.endswith((".txt", ".md")):
        return TextFile(path)
    return Table(path) if path.endswith(".parquet") or Path(path).is_dir() else RowFile(path)


def _read_all(stream):
    return stream.read_all()


def _arrow_files(folder: Path) -> list[str]:
    state = folder / "state.json"
    if not state.is_file():
        splits = ", ".join(str(path.parent.name) for path in sorted(folder.glob("*/state.json")))
        hint = f"name one of its splits ({splits})" if splits else "save it with Dataset.save_to_disk"
        raise ValueError(f"{folder} is not the folder of one data set; {hint}")
    return [str(folder / entry["filename"]) for entry in json.loads(state.read_text())["_data_files"]]
