"""YAML files that people write: recipes and mixtures."""

import os
import re
from pathlib import Path
from typing import Any

import yaml


class YamlLoader(yaml.SafeLoader):
    """YAML 1.1 with the floats and truth values of YAML 1.2: ``1e-5`` is a number, ``save_strategy: no`` a word.

    A key that stands twice in a mapping is an error.
    """

    def construct_mapping(self, node, deep=False):
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if key.value in [before.value for before in keys[:number]]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
        return super().construct_mapping(node, deep=deep)


_BOOL = "tag:yaml.org,2002:bool"
YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
YamlLoader.add_implicit_resolver(_BOOL, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> Any:
    """Read a YAML file, with ``${NAME}`` in its texts taken from the environment.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not YAML, or a variable is not set.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe or mixture file {path}")
    return _expand(parse_yaml(path.read_bytes(), str(path)), path)


def parse_yaml(text: str | bytes, what: str) -> Any:
    """Parse YAML; ``what`` says in the ``ValueError`` for what is none where it comes from."""
    try:
        return yaml.load(text, Loader=YamlLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not YAML: {error}") from error


def _expand(value: Any, path: Path) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, path) for item in value]
    if isinstance(value, str):
        value = os.path.expandvars(value)
        if unset := re.search(r"\$\{(\w+)\}", value):
            raise ValueError(f"{path} uses ${{{unset.group(1)}}}, which is not set; export it or write the path")
    return value
