"""The configuration of a run: YAML, checked, with every default filled in."""

from feddistill.config.load import (
    as_stored,
    differs,
    digest,
    dump,
    load,
    load_stored,
    one_line,
    override,
    parse,
    parse_stored,
    stored_task,
    texts,
    untied,
)
from feddistill.config.settings import QUICKSTART, Config

__all__ = [
    "QUICKSTART",
    "Config",
    "as_stored",
    "differs",
    "digest",
    "dump",
    "load",
    "load_stored",
    "one_line",
    "override",
    "parse",
    "parse_stored",
    "stored_task",
    "texts",
    "untied",
]
