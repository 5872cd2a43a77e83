"""Mixtures: which rows of which files are trained on."""

import glob
import hashlib
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from hico.data.fields import check_keys, check_ranges, check_types
from hico.data.records import Record, parse_row
from hico.data.rowfiles import RowFiles, Source, exists, size_of
from hico.data.survey import MODALITIES, Survey, key_of, survey
from hico.data.tables import open_rows
from hico.data.yaml_files import read_yaml
from hico.video_io import READERS

logger = logging.getLogger(__name__)

_STRATEGY = re.compile(r"(first[234]?|end|random):(\d+(?:\.\d+)?)(%?)")


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One entry of a mixture file."""

    json_path: str
    """A ``.json``, ``.jsonl``, ``.tar`` or ``.parquet`` file, or a folder that `datasets` saved; ``*`` and
    ``{000..012}`` stand for several."""
    data_root: str = ""
    """Folder that the rows' file names are relative to."""
    sampling_strategy: str = "all"
    """Which rows to take, see `select_rows`."""
    repeat: int = 1
    """How often to take every one of them in an epoch."""
    other_keys: list[str] = field(default_factory=list)
    """Keys of rows that are notes to others; any other unknown key is an error."""
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
    files: list[RowFiles]
    surveys: list[Survey]
    offsets: np.ndarray
    """Number of the first row of every file, and at last the number of rows."""

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def name(self) -> str:
        return self.spec.name or Path(self.spec.json_path).stem

    def place(self, row: int) -> tuple[int, int]:
        """Return the file of a row, and its number there."""
        which = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return which, row - int(self.offsets[which])

    def record(self, row: int) -> Record:
        which, index = self.place(row)
        file = self.files[which]
        return parse_row(file[index], file, index, root=self.spec.data_root, other_keys=self.spec.other_keys)

    def sources(self, row: int) -> Iterator[Source]:
        """Yield the files that a row names."""
        which, index = self.place(row)
        return self.surveys[which].sources(index, self.spec.data_root)

    def facts(self) -> np.ndarray:
        """Return what is known of every row."""
        return np.concatenate([known.rows for known in self.surveys])

    def malformed(self, facts: np.ndarray) -> dict[int, str]:
        """Return the rows that cannot be used, and why."""
        found = {
            int(offset) + row: reason
            for offset, known in zip(self.offsets, self.surveys, strict=False)
            for row, reason in known.reasons.items()
        }
        if (wanted := self.spec.media_type) is not None:
            others = ~np.isin(facts["modality"], [MODALITIES.index(wanted), MODALITIES.index("text")])
            for row in np.flatnonzero(others).tolist():
                which, index = self.place(row)
                found[row] = (
                    f"malformed row at {self.files[which].where(index)}: it has {MODALITIES[facts['modality'][row]]}, "
                    f"but {self.name} is of media_type {wanted!r}; leave media_type out to let rows decide"
                )
        return found


class Mixture:
    """Rows of several datasets, parsed when asked for.

    Args:
        specs: the datasets.
        seed: of ``random:`` strategies.
        sampling_strategy: applied to every dataset after its own.
        check_files: look for every file that a row names.
        on_bad_sample: ``skip`` leaves malformed rows out, with one warning, instead of raising.

    Raises:
        ValueError: if rows are malformed (the message counts them, and gives file, line and reason of three), or no
            row is taken.
        FileNotFoundError: if files are missing; the message counts them and names the first three.
    """

    def __init__(
        self,
        specs: Sequence[DatasetSpec],
        *,
        seed: int = 42,
        sampling_strategy: str = "all",
        check_files: bool = True,
        on_bad_sample: str = "raise",
    ):
        self.seed = seed
        self.datasets = [_open(spec) for spec in specs]
        self.taken: list[np.ndarray] = []
        facts, malformed = [], []
        for number, dataset in enumerate(self.datasets):
            rows = np.arange(len(dataset))
            for turn, strategy in enumerate((dataset.spec.sampling_strategy, sampling_strategy)):
                rows = rows[select_rows(strategy, len(rows), seed=(seed, number, turn))]
            known = dataset.facts()
            bad = dataset.malformed(known)
            malformed += [bad[row] for row in np.intersect1d(rows, list(bad)).tolist()]
            rows = np.repeat(rows[~np.isin(rows, list(bad))], dataset.spec.repeat)
            self.taken.append(rows)
            facts.append(known[rows])
        if malformed:
            _complain(malformed, on_bad_sample)
        pairs = [
            np.stack([np.full(len(rows), number), rows], axis=1) for number, rows in enumerate(self.taken) if len(rows)
        ]
        if not pairs:
            names = ", ".join(f"{d.name} ({len(d)} rows, {d.spec.sampling_strategy})" for d in self.datasets)
            raise ValueError(f"the mixture takes no row of {names or 'no datasets'}; change sampling_strategy")
        self.rows = np.concatenate(pairs)
        self.facts = np.concatenate(facts)
        self.modality, self.text_bytes, self.seconds = (
            self.facts[name] for name in ("modality", "text_bytes", "seconds")
        )
        self.num_images, self.num_videos = self.facts["num_images"], self.facts["num_videos"]
        if check_files:
            self._check_files()

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int) -> Record:
        """Return a row of the mixture by its number."""
        dataset, row = self.rows[index].tolist()
        return self.datasets[dataset].record(row)

    def raw_row(self, index: int) -> dict[str, Any]:
        """Return a row as its file has it, with keys that a `Record` does not hold."""
        dataset, row = self.rows[index].tolist()
        which, place = self.datasets[dataset].place(row)
        return self.datasets[dataset].files[which][place]

    def sources(self, index: int) -> Iterator[Source]:
        """Yield the files that a row names, without reading it."""
        dataset, row = self.rows[index].tolist()
        return self.datasets[dataset].sources(row)

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
        """Split the row numbers into training and held-out ones, by the videos and images that rows name.

        A file is held out if the digest of its name (without folders) and size is below ``fraction``, whatever the
        seed, the other rows and the stage: so no row of a held-out video is trained on anywhere. A row with any such
        file is held out; rows of text go by their text.

        Raises:
            ValueError: if no row is held out, or all are.
        """
        shares: dict[Source, float] = {}
        lowest = np.empty(len(self))
        for index in range(len(self)):
            sources = list(self.sources(index))
            for source in sources:
                if source not in shares:
                    name = PurePath(getattr(source, "name", source)).name
                    shares[source] = key_of(f"{name}:{size_of(source)}") / 2**64
            lowest[index] = min((shares[source] for source in sources), default=self.facts["text_key"][index] / 2**64)
        held_out = lowest < fraction
        if held_out.all() or not held_out.any():
            raise ValueError(
                f"eval_fraction {fraction} holds out {held_out.sum()} of {len(self)} rows, since whole files are; "
                f"use one above {lowest.min():.3f} and up to {lowest.max():.3f}"
            )
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def _check_files(self) -> None:
        sources = {source: None for index in range(len(self)) for source in self.sources(index)}
        if missing := [str(source) for source in sources if not exists(source)]:
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
            check_ranges(entry, {"above 0": ["folder_fps"], "at least 1": ["repeat"]})
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
            be ``P%`` of the rows, rounded up; ``random`` takes more than 100% and then takes rows several times.
        num_rows: rows that there are.
        seed: of ``random``.

    Returns:
        Row numbers, never decreasing; fewer than N where the rows run out.

    Raises:
        ValueError: if the strategy is not of this form.
    """
    if strategy == "all":
        return np.arange(num_rows)
    match = _STRATEGY.fullmatch(strategy)
    if (
        not match
        or (not match[3] and "." in match[2])
        or (match[3] and match[1] != "random" and Fraction(match[2]) > 100)
    ):
        raise ValueError(
            f"sampling_strategy is {strategy!r}; use all, first:N, first2:N, first3:N, first4:N, end:N or random:N, "
            "where N is a number of rows or a percentage such as 25%"
        )
    count = math.ceil(Fraction(match[2]) * num_rows / 100) if match[3] else int(match[2])
    if match[1] == "random":
        times, rest = divmod(count, max(1, num_rows)) if match[3] else (0, count)
        drawn = np.random.default_rng(seed).permutation(num_rows)[:rest]
        return np.sort(np.concatenate([*[np.arange(num_rows)] * times, drawn]))
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
    files = [open_rows(path) for path in _expand_path(spec.json_path)]
    surveys = [survey(file, spec.other_keys) for file in files]
    return _Dataset(spec, files, surveys, np.cumsum([0, *map(len, files)]))


def _complain(malformed: list[str], on_bad_sample: str) -> None:
    some = "; ".join(malformed[:3]) + ("; ..." if len(malformed) > 3 else "")
    if on_bad_sample != "skip":
        count = f"{len(malformed)} malformed rows: " if len(malformed) > 1 else ""
        raise ValueError(f"{count}{some}")
    logger.warning("left out %d malformed row(s) of the mixture: %s", len(malformed), some)


def _expand_path(path: str) -> list[str]:
    """Return the files that a path with ``*`` and ``{000..012}`` stands for, sorted."""
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", path):
        low, high = braces.groups()
        numbers = (str(number).zfill(len(low)) for number in range(int(low), int(high) + 1))
        return [file for number in numbers for file in _expand_path(path.replace(braces[0], number))]
    found = sorted(glob.glob(path)) if re.search(r"[*?\[]", path) else [path]
    missing = [file for file in found if not Path(file).is_file() and not list(Path(file).glob("*.json"))]
    if missing or not found:
        raise FileNotFoundError(f"the mixture names {missing[0] if missing else path}, but there is no such file")
    return found


def _locate(name: str, folder: Path) -> str:
    beside = folder / name
    try:
        return str(beside) if _expand_path(str(beside)) else name
    except FileNotFoundError:
        return str(beside) if beside.is_dir() else name
