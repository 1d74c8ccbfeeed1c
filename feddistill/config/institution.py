"""A client's own settings: its private texts, its model and its signing key."""

from pathlib import Path

from pydantic import ValidationError

from feddistill.config import one_line, strict_yaml
from feddistill.config.data import FileSource, Source
from feddistill.config.models import ModelConfig
from feddistill.errors import ConfigError
from feddistill.settings_model import LocalPath, Setting


class Institution(Setting):
    """Settings that a client's SuperNode reads from a local file and never sends."""

    source: Source
    """The private texts, with their labels."""
    model: ModelConfig | None = None
    """The specialist; ``null`` for this client's model in the server's configuration."""
    key: LocalPath | None = None
    """The private key that signs uploads (``feddistill keys``), if the server requires signatures."""


def load(path: Path) -> Institution:
    """Read an institution's file; paths in it are relative to its folder.

    Raises:
        ConfigError: It cannot be read, or a setting is unknown, missing or out of range.
    """
    raw = strict_yaml.read(path)
    try:
        settings = Institution.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {one_line(error, raw)}") from None
    if isinstance(settings.source, FileSource):
        source = settings.source.model_copy(update={"path": path.parent / settings.source.path})
        settings = settings.model_copy(update={"source": source})
    if settings.key is not None:
        settings = settings.model_copy(update={"key": path.parent / settings.key})
    return settings
