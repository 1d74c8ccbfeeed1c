"""Messages between the server and a client, and the interface of an engine."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from feddistill.store.run_directory import Json

Kind = Literal["describe", "publish", "digest", "train", "answer", "average"]

PART = 16 << 20
"""Largest part of a file in one message, in bytes; Flower carries 64 MB safely."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """A request of the server to a client.

    ``describe``: send the description, format version and digests. ``publish``: store the proxy texts.
    ``digest``: store the last teacher. ``train``: train on the private texts. ``answer``: predict on the
    proxy texts. ``average`` (FedAvg): train these weights on the private texts. All of them may be repeated:
    work that is done is not done again.
    """

    kind: Kind
    run: str
    """Id of the run, by which clients keep their state."""
    round: int
    content: Json = field(default_factory=dict)
    """Values that JSON can represent."""
    blobs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply of a client."""

    client: str
    content: Json = field(default_factory=dict)
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    error: str | None = None
    """Type of the error if there is one; never its text, which could hold private data."""

    def bytes(self) -> int:
        """Size of the blobs."""
        return sum(map(len, self.blobs.values()))


class Transport(Protocol):
    """Carries instructions to clients and replies back."""

    def clients(self, wanted: Sequence[str], wait: float) -> Sequence[str]:
        """The clients of ``wanted`` that are connected; waits up to ``wait`` seconds for all of them."""
        ...

    def ask(self, instruction: Instruction, clients: Sequence[str], timeout: float) -> Iterator[Reply]:
        """Send ``instruction`` to each client and yield replies one at a time, as they come.

        A client that fails yields a reply with ``error``; one without a reply in ``timeout`` seconds yields
        nothing. A reply may come twice.
        """
        ...

    def tidy(self, number: int) -> None:
        """Delete client weights in the server's run directory that no round after ``number`` starts from."""
        ...


class OfflineTransport:
    """No clients: for a run that is derived from the stored answers of remote clients."""

    def clients(self, wanted: Sequence[str], wait: float) -> Sequence[str]:
        """None."""
        return ()

    def ask(self, instruction: Instruction, clients: Sequence[str], timeout: float) -> Iterator[Reply]:
        """Nothing."""
        return iter(())

    def tidy(self, number: int) -> None:
        """Nothing to delete."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Time limits and repetitions of requests; times in seconds."""

    connect: float = 600.0
    """For clients to connect, over all attempts at one instruction."""
    reply: float = 3600.0
    """For one reply, e.g. after a training or a pass over all proxy texts."""
    attempts: int = 3
    """Attempts at a client that fails or does not reply."""


def parts_of(size: int) -> int:
    """Number of messages for a file of ``size`` bytes."""
    return max(1, -(-size // PART))
