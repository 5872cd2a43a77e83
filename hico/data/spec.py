"""Entries of mixtures: which files, and which rows of them."""

import glob
import math
import re
from dataclasses import dataclass, field, fields
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hico.data.fields import check_keys, check_types
from hico.data.yaml_files import read_yaml
from hico.video_io import READERS

_STRATEGY = re.compile(r"(first[234]?|end|random):(\d+(?:\.\d+)?)(%?)")


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One entry of a mixture file."""

    json_path: str
    """A ``.json``, ``.jsonl``, ``.tar`` or ``.parquet`` file, or a folder that `datasets` saved; ``*`` and
    ``{000..012}`` stand for several. For ``objective: text`` also ``.txt`` and ``.md``, a document each."""
    data_root: str = ""
    """Folder that the rows' file names are relative to."""
    sampling_strategy: str = "all"
    """Which rows to take, see `select_rows`."""
    repeat: int = 1
    """How often to take every one of them in an epoch."""
    other_keys: list[str] = field(default_factory=list)
    """Keys of rows that are notes to others; any other unknown key is an error."""
    media_type: Literal["video", "image", "text"] | None = None
    """Rows with other media are an error; they decide for themselves if omitted."""
    video_read_type: str | None = None
    """How videos are opened: a reader of `hico.video_io`, or ``img`` for folders of frames, which need none."""
    folder_fps: float | None = None
    """Frames per second of folders of frames; 1 if omitted."""
    name: str | None = None
    """How logs call it; the file's name if omitted."""
    text_key: str = "text"
    """For ``objective: text``: where a row has its text; ``a.b`` is the key ``b`` in the mapping of key ``a``."""
    domain_key: str | None = None
    """For ``objective: text``: where a row says its domain, in the same form; a dataset is one domain if omitted."""

    @property
    def video_settings(self) -> dict[str, Any]:
        """What it says about videos, in the words of `hico.video_io.read_video`."""
        reader = None if self.video_read_type == "img" else self.video_read_type
        settings = {"reader": reader, "folder_fps": self.folder_fps}
        return {key: value for key, value in settings.items() if value is not None}


def read_specs(data: str | list) -> list[DatasetSpec]:
    """Read the entries of a mixture file, or those of a list.

    A ``json_path`` or ``data_root`` is looked for beside the mixture file, then from the working directory.

    Raises:
        ValueError: if an entry has an unknown key; the message names the nearest one.
        FileNotFoundError: if there is no such file.
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
        except ValueError as error:
            raise ValueError(f"{data}: {error}") from error
        if "json_path" not in entry:
            raise ValueError(f"{data}: the dataset {entry} has no json_path")
        located = {key: _locate(entry[key], folder) for key in ("json_path", "data_root") if entry.get(key)}
        specs.append(DatasetSpec(**{**entry, **located}))
    return specs


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


def expand_path(path: str) -> list[str]:
    """Return the files that a path with ``*`` and ``{000..012}`` stands for, sorted."""
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", path):
        low, high = braces.groups()
        numbers = (str(number).zfill(len(low)) for number in range(int(low), int(high) + 1))
        return [file for number in numbers for file in expand_path(path.replace(braces[0], number))]
    found = sorted(glob.glob(path)) if re.search(r"[*?\[]", path) else [path]
    missing = [file for file in found if not Path(file).is_file() and not list(Path(file).glob("*.json"))]
    if missing or not found:
        raise FileNotFoundError(f"the mixture names {missing[0] if missing else path}, but there is no such file")
    return found


def _locate(name: str, folder: Path) -> str:
    beside = folder / name
    try:
        return str(beside) if expand_path(str(beside)) else name
    except FileNotFoundError:
        return str(beside) if beside.is_dir() else name
