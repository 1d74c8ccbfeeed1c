"""What is refused before a federation is bothered."""

import socket

import pytest

from feddistill.engines.flower.launch import Link, _reach
from feddistill.errors import ConfigError


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1", "--superlink 127.0.0.1 is not HOST:PORT"),
        ("localhost:99999", "is not HOST:PORT"),
        ("link.example.org:9092", "is on a network and needs --root-certificates"),
    ],
)
def test_an_address_that_cannot_be_one_is_refused(address, message):
    with pytest.raises(ConfigError, match=message):
        _reach(Link(address))


def test_an_address_where_nothing_answers_is_refused_and_any_other_is_not():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"--superlink {address}: nothing answers there"):
            _reach(Link(address))
        server.listen()
        _reach(Link(address))
