"""Documents: files of plain text, and rows with a text, of several domains."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from hico.data.rowfiles import RowFiles
from hico.data.spec import DatasetSpec, expand_path, read_specs, select_rows
from hico.data.tables import open_rows

_OF_MEDIA = ("data_root", "media_type", "video_read_type", "folder_fps", "other_keys")


@dataclass(frozen=True)
class Document:
    """A text and the domain that it belongs to."""

    text: str
    domain: str


class Documents:
    """The documents of one entry of a mixture.

    Args:
        spec: the entry.
        seed: of a ``random:`` strategy.
        sampling_strategy: applied after the entry's own.

    Raises:
        ValueError: if the entry says something about media, or of keys, which may be any.
    """

    def __init__(self, spec: DatasetSpec, *, seed: Any = 0, sampling_strategy: str = "all"):
        taken = [field.name for field in fields(spec) if getattr(spec, field.name) not in (None, "", [])]
        if media := [key for key in _OF_MEDIA if key in taken]:
            raise ValueError(f"{spec.json_path}: text has no use for {', '.join(media)}; leave it out")
        self.spec = spec
        self.files: list[RowFiles] = [open_rows(path) for path in expand_path(spec.json_path)]
        self._offsets = np.cumsum([0, *map(len, self.files)])
        rows = np.arange(self._offsets[-1])
        for turn, strategy in enumerate((spec.sampling_strategy, sampling_strategy)):
            rows = rows[select_rows(strategy, len(rows), seed=(seed, turn))]
        self.rows = np.repeat(rows, spec.repeat)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Document:
        """Return a document.

        Raises:
            ValueError: if the row cannot be read, or has no text; the message says where it is.
        """
        file, row = self.place(index)
        content = file[row]
        text = _at(content, self.spec.text_key)
        if not isinstance(text, str) or not text.strip():
            found = f"{self.spec.text_key!r} is empty" if text == "" or isinstance(text, str) else f"keys {[*content]}"
            raise ValueError(
                f"the document at {file.where(row)} has no text ({found}); name the key that holds it with text_key, "
                "remove the row, or set on_bad_sample: skip to leave such rows out"
            )
        domain = self.name if self.spec.domain_key is None else _at(content, self.spec.domain_key)
        if domain is None:
            raise ValueError(
                f"the document at {file.where(row)} has no domain under {self.spec.domain_key!r} (keys {[*content]}); "
                "name another domain_key, or none"
            )
        return Document(text, str(domain))

    def place(self, index: int) -> tuple[RowFiles, int]:
        """Return the file of a document, and the number of its row there."""
        row = int(self.rows[index])
        which = int(np.searchsorted(self._offsets, row, side="right")) - 1
        return self.files[which], row - int(self._offsets[which])

    def key(self, indices: Sequence[int]) -> list[str]:
        """Say what some documents are read from: digests of files, numbers of rows, keys."""
        places = (self.place(index) for index in indices)
        rows = [f"{file.sha256}:{row}" for file, row in places]
        return [self.spec.text_key, self.spec.domain_key or f"={self.name}", *rows]

    @property
    def name(self) -> str:
        return self.spec.name or Path(self.spec.json_path).stem


class TextCorpus:
    """Documents of all entries of a mixture file.

    Args:
        data: the mixture file, or the list of its datasets.
        seed: of ``random:`` strategies.
        sampling_strategy: applied to every dataset after its own.

    Raises:
        ValueError: if an entry has an unknown key, two would be one domain unsaid, or no document is taken.
        FileNotFoundError: if there is no such file.
    """

    def __init__(self, data: str | list, *, seed: int = 42, sampling_strategy: str = "all"):
        self.seed = seed
        self.packing: dict[str, Any] = {}
        """How they are tokenized and packed, for the manifest."""
        options = {"sampling_strategy": sampling_strategy}
        self.datasets = [Documents(spec, seed=(seed, n), **options) for n, spec in enumerate(read_specs(data))]
        unnamed = [dataset.name for dataset in self.datasets if not (dataset.spec.name or dataset.spec.domain_key)]
        if twice := sorted({name for name in unnamed if unnamed.count(name) > 1}):
            raise ValueError(
                f"several datasets of {data} would be the domain {twice[0]!r}, after the names of their files, and so "
                "share its tokens; give each a name (the same one, if they are one domain)"
            )
        if not sum(map(len, self.datasets)):
            raise ValueError(f"{data} takes no document; change json_path or sampling_strategy")

    def manifest(self) -> list[dict[str, Any]]:
        """Describe what is trained on; see `hico.data.mixture.Mixture.manifest`."""
        return [
            {
                "name": dataset.name,
                "sha256": [file.sha256 for file in dataset.files],
                "sampling_strategy": dataset.spec.sampling_strategy,
                "repeat": dataset.spec.repeat,
                "rows_taken": len(dataset),
                "text_key": dataset.spec.text_key,
                "domain_key": dataset.spec.domain_key,
                **self.packing,
            }
            for dataset in self.datasets
        ]


def _at(row: Any, path: str) -> Any:
    """Return what lies under ``a.b`` in a row; None if nothing does."""
    for key in path.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row
