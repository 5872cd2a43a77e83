"""Mixtures: rows of several datasets, as they are trained on."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from hico.data.pairs import parse_pair
from hico.data.records import Record, parse_row
from hico.data.rowfiles import RowFiles, Source, exists, size_of
from hico.data.spec import DatasetSpec, check_reader, expand_path, read_specs, select_rows
from hico.data.survey import MODALITIES, Survey, key_of, survey
from hico.data.tables import open_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Dataset:
    spec: DatasetSpec
    files: list[RowFiles]
    surveys: list[Survey]
    offsets: np.ndarray
    """Number of the first row of every file, and at last the number of rows."""
    preferences: bool

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
        parse = parse_pair if self.preferences else parse_row
        return parse(file[index], file, index, root=self.spec.data_root, other_keys=self.spec.other_keys)

    def files_of(self, row: int) -> Iterator[list[Source]]:
        """Yield the file of every video and image of a row, or the frames."""
        which, index = self.place(row)
        return self.surveys[which].files_of(index, self.spec.data_root)

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
        preferences: whether rows have two answers each; plain rows are malformed then, and these are otherwise.

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
        preferences: bool = False,
    ):
        self.preferences = preferences
        self.datasets = [_open(spec, preferences) for spec in specs]
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

    @property
    def names(self) -> list[str]:
        """How logs call the datasets; two of them may share a name."""
        return [dataset.name for dataset in self.datasets]

    def raw_row(self, index: int) -> dict[str, Any]:
        """Return a row as its file has it, with keys that a `Record` does not hold."""
        dataset, row = self.rows[index].tolist()
        which, place = self.datasets[dataset].place(row)
        return self.datasets[dataset].files[which][place]

    def files_of(self, index: int) -> Iterator[list[Source]]:
        """Yield the file of every video and image of a row, or the frames that it names, without reading it."""
        dataset, row = self.rows[index].tolist()
        return self.datasets[dataset].files_of(row)

    def sources(self, index: int) -> Iterator[Source]:
        """Yield the files that a row names, without reading it."""
        return chain.from_iterable(self.files_of(index))

    def spec(self, index: int) -> DatasetSpec:
        """Return the dataset that a row belongs to."""
        return self.datasets[int(self.rows[index, 0])].spec

    def manifest(self) -> list[dict[str, Any]]:
        """Say which rows of which files every dataset takes; digests tell files, wherever they lie."""
        return [
            {
                "name": dataset.name,
                "sha256": [file.sha256 for file in dataset.files],
                "sampling_strategy": dataset.spec.sampling_strategy,
                "repeat": dataset.spec.repeat,
                "rows_taken": len(rows),
                **dataset.spec.video_settings,
            }
            for dataset, rows in zip(self.datasets, self.taken, strict=True)
        ]

    def split(self, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Split the row numbers into training and held-out ones, by the videos and images that rows name.

        A file is held out if the digest of its name (without folders) and size is below ``fraction``, whatever the
        seed, the other rows and the stage: so no row of a held-out video is trained on anywhere. A row with any such
        file is held out; rows of text go by their text. A video that is named frame by frame goes by the folder of
        the first one, as if that were named, or by this frame where ``data_root`` itself is the folder.

        Raises:
            ValueError: if no row is held out, or all are.
        """
        shares: dict[tuple[Source, bool], float] = {}
        lowest = np.empty(len(self))
        for index in range(len(self)):
            videos = [(files[0], len(files) > 1) for files in self.files_of(index)]
            for source, is_frame in videos:
                if (source, is_frame) not in shares:
                    path = PurePath(getattr(source, "name", source))
                    folder = path.parent
                    by_folder = is_frame and folder.name and folder != PurePath(self.spec(index).data_root)
                    named = f"{folder.name}:-1" if by_folder else f"{path.name}:{size_of(source)}"
                    shares[source, is_frame] = key_of(named) / 2**64
            lowest[index] = min((shares[video] for video in videos), default=self.facts["text_key"][index] / 2**64)
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
    """Open a mixture file, or the list of its datasets; see `read_specs`, and `Mixture` for the options."""
    return Mixture(read_specs(data), **options)


def _open(spec: DatasetSpec, preferences: bool) -> _Dataset:
    if (spec.text_key, spec.domain_key) != ("text", None):
        raise ValueError(f"{spec.json_path}: text_key and domain_key are for objective: text; leave them out")
    check_reader(spec.video_read_type)
    files = [open_rows(path) for path in expand_path(spec.json_path)]
    surveys = [survey(file, spec.other_keys, preferences=preferences) for file in files]
    return _Dataset(spec, files, surveys, np.cumsum([0, *map(len, files)]), preferences)


def _complain(malformed: list[str], on_bad_sample: str) -> None:
    some = "; ".join(malformed[:3]) + ("; ..." if len(malformed) > 3 else "")
    if on_bad_sample != "skip":
        count = f"{len(malformed)} malformed rows: " if len(malformed) > 1 else ""
        raise ValueError(f"{count}{some}")
    logger.warning("left out %d malformed row(s) of the mixture: %s", len(malformed), some)
