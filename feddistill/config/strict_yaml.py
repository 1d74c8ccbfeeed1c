"""Read YAML of which no part is dropped: a key that stands twice in a mapping is an error."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from feddistill.errors import ConfigError

MERGE = "tag:yaml.org,2002:merge"
"""The tag of ``<<``, whose keys a mapping may set again."""


def read(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ConfigError: It cannot be read, is not YAML, or a mapping has a key twice.
    """
    try:
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def parse(text: str | bytes, name: str) -> Any:
    """The value of a YAML document; ``name`` is its name in errors.

    Raises:
        ConfigError: As ``read``.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_keys(loader, node, "", name, set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date with month 99
        raise ConfigError(f"{name} is not YAML: {' '.join(str(error).split())}") from None


def _check_keys(loader: yaml.SafeLoader, node: Node, path: str, name: str, seen: set[int]) -> None:
    """Raise ``ConfigError`` for a key that stands twice in a mapping at or below ``node``."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, SequenceNode):
        for index, value in enumerate(node.value):
            _check_keys(loader, value, f"{path}.{index}" if path else str(index), name, seen)
    elif isinstance(node, MappingNode):
        lines: dict[Any, int] = {}
        for key_node, value in node.value:
            if key_node.tag == MERGE:
                _check_keys(loader, value, path, name, seen)
                continue
            key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            written = key_node.value if isinstance(key_node, ScalarNode) else key
            dotted = f"{path}.{written}" if path else str(written)
            if not isinstance(key, Hashable):
                raise ConstructorError(None, None, "found unhashable key", key_node.start_mark)
            if key in lines:
                where = "line" if lines[key] == line else f"lines {lines[key]} and"
                raise ConfigError(f"{name}: {dotted} stands twice, in {where} {line}")
            lines[key] = line
            _check_keys(loader, value, dotted, name, seen)
