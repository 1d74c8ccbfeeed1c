"""The context of a run: settings, data, run directory, progress display, transport to the clients."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from feddistill.accounting import Work
from feddistill.config import Config
from feddistill.config.tasks import TASKS, Task
from feddistill.federation.protocol import RetryPolicy, Transport
from feddistill.models.frozen import States
from feddistill.progress import Progress
from feddistill.seeds import generator
from feddistill.store.run_directory import RunDirectory
from feddistill.tasks.query import ProxyQuery, query_of
from feddistill.tasks.step_cache import StepCache
from feddistill.types import Cost, Splits


@dataclass(frozen=True, slots=True)
class Average:
    """Outcome of a round of federated averaging."""

    weights: Mapping[str, Tensor]
    uplink: int
    """Bytes of all clients' weights as they were sent."""
    downlink: int
    cost: Cost
    """Total over the clients."""
    missing: list[str]
    """Clients without a reply."""


class Averager(Protocol):
    """Lets remote clients train given weights, and averages the results."""

    def __call__(self, session: "Session", number: int, weights: Mapping[str, Tensor]) -> Average:
        """Run round ``number``.

        Raises:
            RoundError: Too few clients have replied.
        """
        ...


@dataclass(frozen=True, slots=True)
class Engine:
    """How the server reaches the clients."""

    transport: Transport | None = None
    """``None``: all clients are in this process."""
    name: str = "local"
    """Stored in the run and required to resume it: each engine keeps clients' state elsewhere."""
    retry_policy: RetryPolicy = field(default_factory=RetryPolicy)
    averager: Averager | None = None
    """Used by ``fedavg`` with remote clients; ``None``: averaging is simulated in this process."""


@dataclass(frozen=True)
class Session:
    """What a method works with."""

    config: Config
    splits: Splits
    run: RunDirectory
    progress: Progress
    engine: Engine = field(default_factory=Engine)
    connect: Callable[["Session"], Transport] | None = None
    """Makes the transport to clients in this process, if the engine has no transport."""
    step_cache: StepCache | None = None
    """Training steps shared with other runs of a study."""

    @cached_property
    def frozen(self) -> dict[str, States]:
        """Cached hidden states of frozen layers, by the layers' fingerprint."""
        return {} if self.step_cache is None else self.step_cache.frozen

    @cached_property
    def work(self) -> Work:
        """Operations of all models so far."""
        return Work()

    @cached_property
    def learners(self) -> dict[tuple[str, str], Any]:
        """The models that were built, by the setting's name and its value: methods share them in turn."""
        return {}

    def transport(self) -> Transport:
        """The transport of the engine, or one to clients in this process."""
        if self.engine.transport is not None:
            return self.engine.transport
        assert self.connect is not None, "a session without a transport runs no federation"
        return self.connect(self)

    @property
    def bf16(self) -> bool:
        """True if forward and backward passes run in bfloat16."""
        return self.config.precision == "bf16"

    @property
    def task(self) -> Task:
        """The entry of the run's task."""
        return TASKS[self.config.task]

    @cached_property
    def query(self) -> ProxyQuery:
        """What is predicted of the proxy texts."""
        return query_of(self.config, self.splits)

    def round_clients(self, number: int) -> tuple[str, ...]:
        """The clients of a round, in their order."""
        names = tuple(private.name for private in self.splits.private)
        count = self.config.clients.per_round
        if count is None or count >= len(names):
            return names
        drawn = generator(self.config.seed, "clients", number).permutation(len(names))[:count]
        return tuple(names[place] for place in sorted(drawn))
