"""Say what a conversion did."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from hico.convert.plan import Plan
from hico.shards import TensorInfo


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Args:
        source: where the checkpoint came from, and what it is.
        target: where it went.
        plan: what became of every tensor.
        ignored: keys of the configuration that change nothing, and why.
        unknown: keys of the configuration that nobody knows, with their values.
        notes: what else a user should know.
    """

    source: str
    target: Path
    plan: Plan
    ignored: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Return a table of what became of what; numbered layers share a row."""
        rows = _collapse((move.name, move.target, move.info) for move in self.plan.moves)
        rows += _collapse((drop.name, f"not used: {drop.reason}", drop.info) for drop in self.plan.drops)
        rows += [(key, f"not used: {reason}", "") for key, reason in self.ignored.items()]
        rows += [(key, f"not known, no effect: {value!r}", "") for key, value in self.unknown.items()]
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        lines = [f"{name:{widths[0]}}  {fate:{widths[1]}}  {facts}".rstrip() for name, fate, facts in rows]
        total = sum(move.info.nbytes for move in self.plan.moves)
        end = f"{self.source} -> {self.target}: {len(self.plan.moves)} tensors, {total / 1e9:.2f} GB"
        return "\n".join([*lines, *self.notes, end])


def _collapse(tensors: Iterable[tuple[str, str, TensorInfo]]) -> list[tuple[str, str, str]]:
    groups: dict[tuple[str, str], list[tuple[str, str, TensorInfo]]] = {}
    for name, fate, info in tensors:
        groups.setdefault((_numberless(name), _numberless(fate)), []).append((name, fate, info))
    return [
        (_with_range(group, 0), _with_range(group, 1), _facts([info for _, _, info in group]))
        for group in groups.values()
    ]


def _numberless(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def _with_range(group: list[tuple[str, str, TensorInfo]], column: int) -> str:
    """Write the first number of the names as the range, or the list, of what it is in the group."""
    names = [entry[column] for entry in group]
    numbers = sorted({int(match[1]) for name in names if (match := re.search(r"\.(\d+)\.", name))})
    if len(numbers) < 2:
        return names[0]
    is_range = numbers[-1] - numbers[0] == len(numbers) - 1
    text = f"{numbers[0]}-{numbers[-1]}" if is_range else ",".join(map(str, numbers))
    return re.sub(r"\.\d+\.", f".{text}.", names[0], count=1)


def _facts(infos: list[TensorInfo]) -> str:
    shapes, dtypes = {info.shape for info in infos}, sorted({info.dtype for info in infos})
    shape = str(list(infos[0].shape)) if len(shapes) == 1 else "various shapes"
    return f"{len(infos)} x {shape} {' '.join(dtypes)}"
