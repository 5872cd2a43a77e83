"""What becomes of every tensor of a checkpoint, decided before any of them is read."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hico.configuration_hico import HicoConfig
from hico.modeling_hico import HicoForConditionalGeneration
from hico.shards import CheckpointError, Shard, TensorInfo


@dataclass(frozen=True)
class Unused:
    """Says of a tensor that nothing needs it.

    Args:
        reason: why, as it should read after "not used: ".
    """

    reason: str


Rename = Callable[[str], "str | Unused | None"]
"""Name of a tensor -> its new name, or that it is not used, or None if it is not known."""


@dataclass(frozen=True)
class Move:
    """A tensor that is written under a new name."""

    shard: Path
    name: str
    target: str
    info: TensorInfo


@dataclass(frozen=True)
class Drop:
    """A tensor that is left behind.

    Args:
        same_as: the new name of the tensor that it must equal, if it is tied to one.
    """

    shard: Path
    name: str
    info: TensorInfo
    reason: str
    same_as: str | None = None


@dataclass(frozen=True)
class Expected:
    """The tensors of a model.

    Args:
        shapes: by name.
        tied: tensors that are others, and are not stored.
        unused: patterns of tensors that whole networks have and the model does not run.
    """

    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    unused: Sequence[str] = ()

    @classmethod
    def of(cls, config: HicoConfig) -> "Expected":
        """Ask a model without weights.

        Raises:
            ValueError: if there can be no such model.
        """
        try:
            with torch.device("meta"):
                model = HicoForConditionalGeneration(config)
        except (ValueError, ImportError):
            raise
        except Exception as error:  # settings that contradict each other make transformers fail in any way
            raise ValueError(f"no model can be built from this configuration: {error!r}") from error
        tied = dict(model.all_tied_weights_keys)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
        return cls(shapes, tied, tuple(model.model.encoder._keys_to_ignore_on_load_unexpected))

    def renamed(self, rename: Callable[[str], str | None]) -> "Expected":
        """Rename all tensors.

        Raises:
            ValueError: if one has no new name.
        """
        nameless = [name for name in self.shapes if rename(name) is None]
        if nameless:
            raise ValueError(
                f"the published layout has no place for {', '.join(nameless[:3])} ({len(nameless)} tensors)"
            )
        return Expected(
            {rename(name): shape for name, shape in self.shapes.items()},
            {rename(name): rename(other) for name, other in self.tied.items()},
        )


@dataclass(frozen=True)
class Plan:
    """What becomes of every tensor."""

    moves: list[Move]
    drops: list[Drop]


def make_plan(sources: Iterable[tuple[Shard, Rename]], expected: Expected) -> Plan:
    """Decide what becomes of every tensor.

    Args:
        sources: files, one open at a time, and how their tensors are renamed.
        expected: the tensors that are wanted.

    Raises:
        CheckpointError: if a tensor is left over, missing, doubled, or of another shape; the message counts and names
            them.
    """
    moves: dict[str, Move] = {}
    drops: list[Drop] = []
    left_over: list[str] = []
    for shard, rename in sources:
        for name, info in shard.tensors.items():
            target = rename(name)
            if isinstance(target, str) and target in expected.shapes:
                if target in moves:
                    raise CheckpointError(f"{shard.path}: {name!r} and {moves[target].name!r} both become {target!r}")
                _check_shape(shard, name, info, expected.shapes[target])
                moves[target] = Move(shard.path, name, target, info)
            elif reason := _why_unused(target, expected):
                drops.append(Drop(shard.path, name, info, reason, expected.tied.get(target)))
            else:
                left_over.append(name)
        del shard  # before the next one is opened
    missing = [name for name in expected.shapes if name not in moves]
    if left_over or missing:
        raise CheckpointError(
            "the weights do not fit the configuration: "
            + "; ".join(
                f"{len(names)} {kind}, such as {', '.join(names[:3])}"
                for kind, names in (("left over", left_over), ("missing", missing))
                if names
            )
        )
    return Plan(list(moves.values()), drops)


def _check_shape(shard: Shard, name: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"{shard.path}: {name!r} is {info.shape}, but by the configuration it is {shape}; "
            "check that the configuration belongs to the weights"
        )


def _why_unused(target: str | Unused | None, expected: Expected) -> str | None:
    if isinstance(target, Unused):
        return target.reason
    if target is None:
        return None
    if target in expected.tied:
        return f"tied to {expected.tied[target]}"
    if target.endswith("rotary_emb.inv_freq"):
        return "computed from the configuration"
    if any(re.search(pattern, target) for pattern in expected.unused):
        return "the encoder does not run it"
    return None
