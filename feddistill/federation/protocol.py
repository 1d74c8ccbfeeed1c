"""What travels between the server and a client, and what an engine has to provide."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from feddistill.store.run_directory import Json

Kind = Literal["describe", "publish", "digest", "train", "answer", "average"]

PART = 16 << 20
"""Bytes of a file that travel in one message at the most; Flower carries 64 MB safely."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """What the server asks of a client.

    ``describe``: what it says of itself, and whether it fits. ``publish``: here are the proxy texts.
    ``digest``: here is the last teacher. ``train``: train on private texts. ``answer``: what does the model
    say to the proxy texts? ``average``, of federated averaging: train these weights on private texts. All of
    them may be asked again: what is done is not done twice.
    """

    kind: Kind
    run: str
    """Id of the run: clients keep their state by it."""
    round: int
    content: Json = field(default_factory=dict)
    """Plain values, what JSON can say."""
    blobs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """What comes back."""

    client: str
    content: Json = field(default_factory=dict)
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    error: str | None = None
    """Why there is nothing else: the type of what went wrong, never its text, which could hold private
    data."""

    def bytes(self) -> int:
        """Of the blobs."""
        return sum(map(len, self.blobs.values()))


class Transport(Protocol):
    """How tasks reach clients."""

    shares_run: bool
    """Whether clients write into the server's own run directory, as they do in one process."""

    def clients(self, wanted: Sequence[str], wait: float) -> Sequence[str]:
        """Those of ``wanted`` that can be asked now; waits up to ``wait`` seconds for all of them."""
        ...

    def ask(self, instruction: Instruction, clients: Sequence[str], timeout: float) -> Iterator[Reply]:
        """Send ``instruction`` to each client and yield replies one at a time, as they come.

        A client that fails yields a reply with ``error``; one that is silent for ``timeout`` seconds yields
        nothing. Replies may come twice.
        """
        ...

    def tidy(self, number: int) -> None:
        """Delete client weights in the server's run directory that no round after ``number`` starts from."""
        ...


class OfflineTransport:
    """Of a run that is decided again: its clients were elsewhere, and are not asked."""

    shares_run = False

    def clients(self, wanted: Sequence[str], wait: float) -> Sequence[str]:
        """See ``Transport``."""
        return ()

    def ask(self, instruction: Instruction, clients: Sequence[str], timeout: float) -> Iterator[Reply]:
        """See ``Transport``."""
        return iter(())

    def tidy(self, number: int) -> None:
        """See ``Transport``."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long the server bears with clients. Seconds."""

    connect: float = 600.0
    """For clients to connect, in all the attempts at one task."""
    reply: float = 3600.0
    """For one reply: a training, or the answers to all proxy texts."""
    attempts: int = 3
    """How often a client is asked that is silent or fails."""


def parts_of(size: int) -> int:
    """In how many messages a file of ``size`` bytes travels."""
    return max(1, -(-size // PART))
