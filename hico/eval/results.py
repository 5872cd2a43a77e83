"""Results as JSON lines: written one by one, taken up again after a stop, never mixed with those of other settings."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class ResultsFile:
    """A file of results that belong to one set of settings.

    The first line holds the settings and notes, every other line a result. A line that was cut short by a kill is
    dropped when the file is opened again.

    Args:
        path: of the file; it and its folder are made where they are missing.
        settings: all that decides the results, as JSON has it. They are written down in full, so that the line is the
            card of the evaluation.
        key: fields that tell a result from all others; one that lacks a field has None there.
        notes: what is worth knowing and decides nothing, such as paths and versions; those of the first run stay.

    Raises:
        ValueError: if the file holds results of other settings, or something else.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        *,
        key: Sequence[str],
        notes: Mapping[str, Any] | None = None,
    ):
        self.path, self._key = Path(path), tuple(key)
        self._results: dict[tuple, dict[str, Any]] = {}
        settings = json.loads(json.dumps(settings))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole, _, _ = (self.path.read_bytes() if self.path.exists() else b"").rpartition(b"\n")
        if not whole:
            self._write({"settings": settings, "notes": notes or {}}, mode="w")
            return
        try:
            first, *lines = map(json.loads, whole.decode().split("\n"))
            before = first["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no file of results; name another, or remove it") from error
        changed = [
            f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
            for name in {**before, **settings}
            if before.get(name) != settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.path} holds results of other settings ({'; '.join(changed)}); "
                "name another output, or put them back"
            )
        os.truncate(self.path, len(whole) + 1)
        self._results = {self._key_of(line): line for line in lines}

    def __contains__(self, key: tuple) -> bool:
        return key in self._results

    def __iter__(self):
        return iter(self._results.values())

    def add(self, result: Mapping[str, Any]) -> None:
        """Write a result down, so that it outlives the process."""
        self._results[self._key_of(result)] = dict(result)
        self._write(result, mode="a")

    def _key_of(self, result: Mapping[str, Any]) -> tuple:
        return tuple(result.get(name) for name in self._key)

    def _write(self, line: Mapping[str, Any], *, mode: str) -> None:
        with open(self.path, mode) as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
