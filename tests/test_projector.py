"""The projector: the published numbers and its shape."""

import pytest
import torch
from helpers import GoldenCase, golden_cases

from hico.ops.merging import merge_tokens
from hico.projector import MLPProjector

CONNECTORS = [case for case in golden_cases("B") if "target_tokens" in case.config]
PROJECTIONS = [
    (case, index)
    for case in golden_cases("F")
    for index in range(len(case.config.get("items", [])))
    if f"item{index}.projected" in case.entry["tensors"]
]


def projector_from(case: GoldenCase) -> MLPProjector:
    """Load the case's two layers, whatever stands before their numbers 0 and 2."""
    weights = {f"mlp.{'.'.join(name.split('.')[-2:])}": tensor for name, tensor in case.weights.items()}
    (hidden, width), (out, _) = weights["mlp.0.weight"].shape, weights["mlp.2.weight"].shape
    projector = MLPProjector(width, out, hidden_features=hidden)
    projector.load_state_dict(weights)
    return projector


@pytest.mark.golden
@pytest.mark.parametrize("case", CONNECTORS, ids=lambda case: case.name)
def test_projected_tokens_match_the_published_connector(case):
    case.assert_close(projector_from(case)(case["merged"]), "tokens")


@pytest.mark.golden
@pytest.mark.parametrize(
    "case", [c for c in golden_cases("B") if "constant.tokens" in c.entry["tensors"]], ids=lambda case: case.name
)
def test_constant_tokens_pass_the_whole_connector_unchanged(case):
    features, expected = case["constant.features"], case["constant.tokens"]
    merged = merge_tokens(features.reshape(1, -1, features.shape[-1]), num_keep=expected.shape[1], num_heads=1)
    case.assert_close(projector_from(case)(merged), expected)


@pytest.mark.golden
@pytest.mark.parametrize(("case", "index"), PROJECTIONS, ids=[f"{case.name}-{index}" for case, index in PROJECTIONS])
def test_projected_grids_match_the_published_projector(case, index):
    case.assert_close(projector_from(case)(case[f"item{index}.features"]), f"item{index}.projected")


def test_the_hidden_width_is_the_output_width_unless_given():
    assert MLPProjector(4, 6).mlp[0].out_features == 6
    assert MLPProjector(4, 6, hidden_features=9).mlp[0].out_features == 9
    assert MLPProjector(4, 6)(torch.randn(2, 3, 4)).shape == (2, 3, 6)
