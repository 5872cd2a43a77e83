"""Mixtures: which rows of which files are trained on."""

import glob
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hico.data.fields import check_keys, check_ranges, check_types
from hico.data.records import Record, parse_row
from hico.data.rowfiles import RowFile, Shard, ShardMember, exists
from hico.data.yaml_files import read_yaml
from hico.video_io import READERS

MODALITIES = ("text", "image", "video")
_STRATEGY = re.compile(r"(first[234]?|end|random):(\d+(?:\.\d+)?)(%?)")


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One entry of a mixture file."""

    json_path: str
    """A ``.json``, ``.jsonl`` or ``.tar`` file; ``*`` and ``{000..012}`` stand for several."""
    data_root: str = ""
    """Folder that the rows' file names are relative to."""
    sampling_strategy: str = "all"
    """Which rows to take, see `select_rows`."""
    media_type: str | None = None
    """``video``, ``image`` or ``text``: rows with other media are an error. Rows decide for themselves if omitted."""
    video_read_type: str | None = None
    """How videos are opened: a reader of `hico.video_io`, or ``img`` for folders of frames, which need none."""
    folder_fps: float | None = None
    """Frames per second of folders of frames; 1 if omitted."""
    name: str | None = None
    """How logs call it; the file's name if omitted."""

    @property
    def video_settings(self) -> dict[str, Any]:
        """What it says about videos, in the words of `hico.video_io.read_video`."""
        reader = None if self.video_read_type == "img" else self.video_read_type
        settings = {"reader": reader, "folder_fps": self.folder_fps}
        return {key: value for key, value in settings.items() if value is not None}


@dataclass(frozen=True)
class _Dataset:
    spec: DatasetSpec
    files: list[RowFile | Shard]
    offsets: np.ndarray
    """Number of the first row of every file, and at last the number of rows."""

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def name(self) -> str:
        return self.spec.name or Path(self.spec.json_path).stem

    def place(self, row: int) -> tuple[RowFile | Shard, int]:
        which = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return self.files[which], row - int(self.offsets[which])

    def record(self, row: int) -> Record:
        file, index = self.place(row)
        record = parse_row(file[index], file, index, root=self.spec.data_root)
        if self.spec.media_type is not None and record.modality not in (self.spec.media_type, "text"):
            raise ValueError(
                f"malformed row at {record.where}: it has {record.modality}, but {self.name} is of media_type "
                f"{self.spec.media_type!r}; leave media_type out to let rows decide"
            )
        return record


class Mixture:
    """Rows of several datasets, parsed when asked for.

    Args:
        specs: the datasets.
        seed: of ``random:`` strategies.
        sampling_strategy: applied to every dataset after its own.
        check_files: look for every file that a row names.

    Raises:
        ValueError: if a row is malformed (the message gives file and line), or no row is taken.
        FileNotFoundError: if files are missing; the message counts them and names the first three.
    """

    def __init__(
        self, specs: Sequence[DatasetSpec], *, seed: int = 42, sampling_strategy: str = "all", check_files: bool = True
    ):
        self.seed = seed
        self.datasets = [_open(spec) for spec in specs]
        self.taken: list[np.ndarray] = []
        for number, dataset in enumerate(self.datasets):
            rows = np.arange(len(dataset))
            for turn, strategy in enumerate((dataset.spec.sampling_strategy, sampling_strategy)):
                rows = rows[select_rows(strategy, len(rows), seed=(seed, number, turn))]
            self.taken.append(rows)
        pairs = [
            np.stack([np.full(len(rows), number), rows], axis=1) for number, rows in enumerate(self.taken) if len(rows)
        ]
        if not pairs:
            names = ", ".join(f"{d.name} ({len(d)} rows, {d.spec.sampling_strategy})" for d in self.datasets)
            raise ValueError(f"the mixture takes no row of {names or 'no datasets'}; change sampling_strategy")
        self.rows = np.concatenate(pairs)
        self._survey(check_files)

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int) -> Record:
        """Return a row of the mixture by its number."""
        dataset, row = self.rows[index].tolist()
        return self.datasets[dataset].record(row)

    def raw_row(self, index: int) -> dict[str, Any]:
        """Return a row as its file has it, with keys that a `Record` does not hold."""
        dataset, row = self.rows[index].tolist()
        file, place = self.datasets[dataset].place(row)
        return file[place]

    def spec(self, index: int) -> DatasetSpec:
        """Return the dataset that a row belongs to."""
        return self.datasets[int(self.rows[index, 0])].spec

    def manifest(self) -> dict[str, Any]:
        """Describe what is trained on, so that a checkpoint can say it: files with sha256, rows taken, seed.

        Which rows were taken is told by strategy and seed, and checked by the digest of their numbers (int64, little
        end first).
        """
        return {
            "seed": self.seed,
            "datasets": [
                {
                    "name": dataset.name,
                    "files": [{"path": f.path, "sha256": f.sha256, "rows": len(f)} for f in dataset.files],
                    "sampling_strategy": dataset.spec.sampling_strategy,
                    "rows_taken": len(rows),
                    "rows_sha256": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest(),
                }
                for dataset, rows in zip(self.datasets, self.taken, strict=True)
            ],
        }

    def split(self, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Split the row numbers, by the seed, into training and held-out ones; at least one of each."""
        order = np.random.default_rng((self.seed, len(self))).permutation(len(self))
        count = min(max(1, round(fraction * len(self))), len(self) - 1)
        return np.sort(order[count:]), np.sort(order[:count])

    def _survey(self, check_files: bool) -> None:
        """Parse every row once: catch what is wrong, and note what batches are made by."""
        count = len(self)
        self.modality = np.zeros(count, dtype=np.int8)
        self.text_bytes = np.zeros(count, dtype=np.int32)
        self.num_images = np.zeros(count, dtype=np.int32)
        self.num_videos = np.zeros(count, dtype=np.int32)
        self.seconds = np.full(count, np.nan, dtype=np.float32)
        known: dict[str | ShardMember, bool] = {}
        for index in range(count):
            record = self.record(index)
            self.modality[index] = MODALITIES.index(record.modality)
            self.text_bytes[index] = record.num_text_bytes
            self.num_videos[index] = sum(media.kind == "video" for media in record.media)
            self.num_images[index] = len(record.media) - self.num_videos[index]
            self.seconds[index] = _seconds(record)
            for media in record.media if check_files else ():
                if media.source not in known:
                    known[media.source] = exists(media.source)
        missing = [str(source) for source, is_there in known.items() if not is_there]
        if missing:
            some = ", ".join(f"{name:.300}" for name in missing[:3])
            raise FileNotFoundError(
                f"{len(missing)} file(s) of the mixture are missing: {some}{', ...' if len(missing) > 3 else ''}; "
                "check data_root, or set check_files: false and on_bad_sample: skip"
            )


def read_mixture(data: str | list, **options: Any) -> Mixture:
    """Open a mixture file, or the list of its datasets; see `Mixture` for the options.

    A ``json_path`` or ``data_root`` is looked for beside the mixture file, then from the working directory.

    Raises:
        ValueError: if an entry has an unknown key; the message names the nearest one.
        FileNotFoundError: if the file, or one that it names, is missing.
    """
    folder = Path(data).parent if isinstance(data, str) else Path()
    entries = read_yaml(Path(data)) if isinstance(data, str) else data
    if isinstance(entries, dict) and set(entries) == {"datasets"}:
        entries = entries["datasets"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{data} must hold `datasets:`, a list of mappings with json_path and data_root")
    known = [field.name for field in fields(DatasetSpec)]
    specs = []
    for entry in entries:
        try:
            check_keys(entry, known, what="dataset")
            check_types(entry, DatasetSpec)
            check_ranges(entry, {"above 0": ["folder_fps"]})
        except ValueError as error:
            raise ValueError(f"{data}: {error}") from error
        if "json_path" not in entry:
            raise ValueError(f"{data}: the dataset {entry} has no json_path")
        located = {key: _locate(entry[key], folder) for key in ("json_path", "data_root") if entry.get(key)}
        specs.append(DatasetSpec(**{**entry, **located}))
    return Mixture(specs, **options)


def select_rows(strategy: str, num_rows: int, *, seed: Any = 0) -> np.ndarray:
    """Pick rows by a ``sampling_strategy``.

    Args:
        strategy: ``all``; ``first:N`` and ``end:N``, the first and last N rows; ``first2:N``, ``first3:N`` and
            ``first4:N``, the second, third and fourth block of N; ``random:N``, N rows drawn by the seed. ``N`` may
            be ``P%`` of the rows, rounded up.
        num_rows: rows that there are.
        seed: of ``random``.

    Returns:
        Row numbers, increasing; fewer than N where the rows run out.

    Raises:
        ValueError: if the strategy is not of this form.
    """
    if strategy == "all":
        return np.arange(num_rows)
    match = _STRATEGY.fullmatch(strategy)
    if not match or (not match[3] and "." in match[2]) or (match[3] and Fraction(match[2]) > 100):
        raise ValueError(
            f"sampling_strategy is {strategy!r}; use all, first:N, first2:N, first3:N, first4:N, end:N or random:N, "
            "where N is a number of rows or a percentage such as 25%"
        )
    count = math.ceil(Fraction(match[2]) * num_rows / 100) if match[3] else int(match[2])
    if match[1] == "random":
        return np.sort(np.random.default_rng(seed).permutation(num_rows)[:count])
    if match[1] == "end":
        return np.arange(max(0, num_rows - count), num_rows)
    block = int(match[1][5:] or 1) - 1
    return np.arange(num_rows)[block * count : (block + 1) * count]


def check_reader(name: str | None) -> None:
    """Check that a reader of videos is known and installed; ``None`` and ``img`` need none.

    Raises:
        ValueError: if it is not known.
        ImportError: if it is not installed.
    """
    if name in (None, "img"):
        return
    package = getattr(READERS.get(name), "name", None)
    if package is not None and find_spec(package) is None:
        raise ImportError(f"the video reader {name} needs the package {package}; run `pip install 'hico[{package}]'`")


def _open(spec: DatasetSpec) -> _Dataset:
    if spec.media_type not in (None, *MODALITIES):
        raise ValueError(f"media_type is {spec.media_type!r}; use one of {', '.join(MODALITIES)}")
    check_reader(spec.video_read_type)
    files = [Shard(path) if path.endswith(".tar") else RowFile(path) for path in _expand_path(spec.json_path)]
    return _Dataset(spec, files, np.cumsum([0, *map(len, files)]))


def _expand_path(path: str) -> list[str]:
    """Return the files that a path with ``*`` and ``{000..012}`` stands for, sorted."""
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", path):
        low, high = braces.groups()
        numbers = (str(number).zfill(len(low)) for number in range(int(low), int(high) + 1))
        return [file for number in numbers for file in _expand_path(path.replace(braces[0], number))]
    found = sorted(glob.glob(path)) if re.search(r"[*?\[]", path) else [path]
    missing = [file for file in found if not Path(file).is_file()]
    if missing or not found:
        raise FileNotFoundError(f"the mixture names {missing[0] if missing else path}, but there is no such file")
    return found


def _locate(name: str, folder: Path) -> str:
    beside = folder / name
    try:
        return str(beside) if _expand_path(str(beside)) else name
    except FileNotFoundError:
        return str(beside) if beside.is_dir() else name


def _seconds(record: Record) -> float:
    clips = [media.end - media.start for media in record.media if media.start is not None and media.end is not None]
    return sum(clips) if clips else math.nan if record.duration is None else record.duration
