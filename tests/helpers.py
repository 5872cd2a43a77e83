"""Golden cases, synthetic videos and tiny models shared by the tests."""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file

GOLDEN = Path(os.environ.get("HICO_GOLDEN") or Path(__file__).parent / "golden")
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@dataclass(frozen=True)
class GoldenCase:
    """One entry of the manifest with its file."""

    name: str
    entry: dict

    @property
    def config(self) -> dict:
        return self.entry.get("config", {})

    @property
    def path(self) -> Path:
        return GOLDEN / self.entry["file"]

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the file but the weights."""
        return {k: v for k, v in load_file(self.path).items() if not k.startswith("weights.")}

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """The parameters, under the published names, from the case's own file or the one that it names."""
        path = GOLDEN / self.config["weights_file"] if "weights_file" in self.config else self.path
        return {k.removeprefix("weights."): v for k, v in load_file(path).items() if k.startswith("weights.")}

    @cached_property
    def facts(self) -> dict:
        """The content of a case kept as JSON; empty for a case of tensors."""
        return json.loads(self.path.read_text()) if self.path.suffix == ".json" else {}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def assert_close(self, actual: torch.Tensor, expected: torch.Tensor | str) -> None:
        """Compare within the manifest's tolerance; integers exactly."""
        expected = self[expected] if isinstance(expected, str) else expected
        tolerance = self.entry["tolerance"]
        exact = tolerance == "exact" or not expected.is_floating_point()
        bounds = {"rtol": 0, "atol": 0} if exact else {name: tolerance[name] for name in ("rtol", "atol")}
        torch.testing.assert_close(actual, expected, **bounds)


def golden_cases(group: str) -> list[GoldenCase]:
    """Return the cases of a group, named by the letter before the number ("A"), in the manifest's order."""
    manifest = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
    return [GoldenCase(name, entry) for name, entry in manifest.items() if name.startswith(group)]
