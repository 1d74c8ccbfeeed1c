"""What an institution keeps to itself: its texts and, if it wants, a model of its own."""

from pathlib import Path

import yaml
from pydantic import ValidationError

from feddistill.config import one_line
from feddistill.config.data import FileSource, Source
from feddistill.config.models import ModelConfig
from feddistill.errors import ConfigError
from feddistill.settings_model import Setting


class Institution(Setting):
    """The file that stands beside a client's SuperNode; it is read there and never travels."""

    source: Source
    """Where the private texts are, with their labels."""
    model: ModelConfig | None = None
    """The specialist; ``null`` for the one that the server's configuration gives this client."""
    key: Path | None = None
    """The private key that signs what is sent (``feddistill keys``), where the server asks for that."""


def load(path: Path) -> Institution:
    """Read an institution's file; paths in it are relative to where it stands.

    Raises:
        ConfigError: It cannot be read, or a setting is unknown, missing or out of range.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        found = Institution.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {one_line(error, raw)}") from None
    if isinstance(found.source, FileSource):
        source = found.source.model_copy(update={"path": path.parent / found.source.path})
        found = found.model_copy(update={"source": source})
    if found.key is not None:
        found = found.model_copy(update={"key": path.parent / found.key})
    return found
