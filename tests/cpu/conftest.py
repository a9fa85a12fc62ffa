"""What the tests of this room share."""

import socket

import pytest


@pytest.fixture
def free_port() -> int:
    """A TCP port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
