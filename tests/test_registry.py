"""The registry: lazy, and clear about what it does not know."""

import pytest

from hico.registry import COMPRESSORS, Registry


def test_unknown_name_lists_known_names_and_the_nearest_one():
    with pytest.raises(
        ValueError, match=r"unknown compressor 'token_marge'; did you mean 'token_merge'\? Known: .*pooling"
    ):
        COMPRESSORS.get("token_marge")


def test_a_name_is_never_taken_twice():
    registry = Registry("part", {"a": "json:JSONDecoder"})
    with pytest.raises(ValueError, match="'a' is already registered"):
        registry.register("a", dict)


def test_own_entries_are_built_with_their_settings():
    registry = Registry("part", {})
    registry.register("pair", dict)
    assert registry.build({"name": "pair", "left": 1}, right=2) == {"left": 1, "right": 2}


def test_a_setting_that_the_class_does_not_take_is_named():
    registry = Registry("part", {"decoder": "json:JSONDecoder"})
    with pytest.raises(ValueError, match=r"part 'decoder' cannot be built from .*'width': 3.*"):
        registry.build({"name": "decoder", "width": 3})
