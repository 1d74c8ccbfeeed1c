"""What a method works with: settings, data, run directory, progress, the transport to the clients."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from torch import Tensor

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
    """What a round of federated averaging came to."""

    weights: Mapping[str, Tensor]
    uplink: int
    """Bytes of all clients' weights as they travelled."""
    downlink: int
    cost: Cost
    """Of all clients together."""
    missing: list[str]
    """Clients that sent nothing."""


class Averager(Protocol):
    """Has clients elsewhere train some weights, and averages them."""

    def __call__(self, session: "Session", number: int, weights: Mapping[str, Tensor]) -> Average:
        """Round ``number``.

        Raises:
            RoundError: Too few clients have answered.
        """
        ...


@dataclass(frozen=True, slots=True)
class Engine:
    """What carries the federation."""

    transport: Transport | None = None
    """``None``: all clients work in this process."""
    name: str = "local"
    """What a run is resumed with: each engine keeps the clients' state in another place."""
    retry_policy: RetryPolicy = field(default_factory=RetryPolicy)
    averager: Averager | None = None
    """What ``fedavg`` goes through where clients are elsewhere; ``None``: it is simulated in this process."""


@dataclass(frozen=True)
class Session:
    """What a method works with: settings, data, where to write, what to show."""

    config: Config
    splits: Splits
    run: RunDirectory
    progress: Progress
    engine: Engine = field(default_factory=Engine)
    connect: Callable[["Session"], Transport] | None = None
    """Makes the transport to clients in this process; not needed where the engine has a transport."""
    step_cache: StepCache | None = None
    """Steps that it has in common with other runs of a study."""

    @cached_property
    def frozen(self) -> dict[str, States]:
        """What frozen layers made of the texts so far, by the layers' fingerprint."""
        return {} if self.step_cache is None else self.step_cache.frozen

    def transport(self) -> Transport:
        """What carries the messages of a federation."""
        if self.engine.transport is not None:
            return self.engine.transport
        assert self.connect is not None, "a session without a transport runs no federation"
        return self.connect(self)

    @property
    def bf16(self) -> bool:
        """Whether passes run in bfloat16."""
        return self.config.precision == "bf16"

    @property
    def task(self) -> Task:
        """What figures there are, and which decides."""
        return TASKS[self.config.task]

    @cached_property
    def query(self) -> ProxyQuery:
        """What the proxy texts ask."""
        return query_of(self.config, self.splits)

    def asked(self, number: int) -> tuple[str, ...]:
        """The clients that are asked in a round, in their order."""
        names = tuple(private.name for private in self.splits.private)
        count = self.config.clients.per_round
        if count is None or count >= len(names):
            return names
        drawn = generator(self.config.seed, "clients", number).permutation(len(names))[:count]
        return tuple(names[place] for place in sorted(drawn))
