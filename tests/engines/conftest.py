from pathlib import Path

import pytest
from federation import Federation


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A run of seconds: three clients, two rounds, one layer."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text((Path(__file__).parent / "tiny.yaml").read_text())
    return path


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    names = ["client-0", "client-1", "client-2"]
    with Federation(tmp_path_factory.mktemp("federation") / "deployed", names) as made:
        yield made
