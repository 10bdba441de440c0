"""What tests of judges share: a rubric of two criteria, and a server."""

from collections.abc import Iterator

import pytest

from dft.judging.rubric import Criterion, Rubric
from tests.judging.protocol import ProtocolServer


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch) -> None:
    """A proxy that the user's shell names isn't asked for servers of this machine."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[ProtocolServer]:
    """A server of the protocol whose replies the test decides."""
    with ProtocolServer() as server:
        yield server


@pytest.fixture
def rubric() -> Rubric:
    """Two criteria, of which the first weighs three times as much."""
    scale = ("awful", "bad", "fair", "good", "perfect")
    return Rubric((Criterion("right", 3.0, "Is it right?", scale), Criterion("brief", 1.0, "Is it brief?", scale)))
