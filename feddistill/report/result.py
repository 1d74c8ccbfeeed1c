"""``result.json`` as typed values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from pydantic import TypeAdapter

from feddistill.config.tasks import Task, task_named
from feddistill.store.records import ClientTraffic, Metrics, Traffic


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a curve: the deciding metric of a series after one round."""

    series: str
    round: int
    test: float
    validation: float


@dataclass(frozen=True, slots=True)
class Bytes:
    """What travelled, all clients and rounds together."""

    uplink: int
    downlink: int
    proxy: int
    descriptions: int
    by_round: list[ClientTraffic]
    baselines: Mapping[str, Traffic]
    fedavg_uplink_same_rounds: int
    lora_uplink_same_rounds: int
    a_row: float


@dataclass(frozen=True, slots=True)
class Result:
    """The part of a result that reports show; other fields are ignored."""

    name: str
    seed: int
    rounds: int
    metrics: Mapping[str, Any]
    by_round: list[Mapping[str, Any]]
    bytes: Bytes
    flops: Mapping[str, int]
    seconds: Mapping[str, float]
    peak_memory_bytes: int
    environment: Mapping[str, Any]
    task: str = "classification"
    """Results from before there were several tasks have no name of one."""
    recipe: int = 1
    """The number of the recipe of training, which older results do not have."""
    flops_shared: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read the content of a ``result.json``."""
        return TypeAdapter(cls).validate_python(content)

    @property
    def judged_by(self) -> Task:
        """The entry of the task."""
        return task_named(self.task)

    @property
    def student(self) -> Metrics:
        """Metrics of the student on the test set."""
        (metrics,) = (of for name, of in self.metrics.items() if name == "student")
        found: Metrics = metrics
        return found

    @property
    def clients(self) -> Mapping[str, Metrics]:
        """Mean metrics of the clients ``before`` and ``after`` the federation, if they were evaluated."""
        return {
            when: spread.get("mean")
            for name, of in self.metrics.items()
            if name == "clients"
            for when, spread in of.items()
        }

    @property
    def points(self) -> list[Point]:
        """All points of all curves."""
        name = self.judged_by.decides

        def point(series: str, round: int, **values: float) -> Point:
            return Point(series, round, values[f"test_{name}"], values[f"validation_{name}"])

        return [point(**row) for row in self.by_round]

    @property
    def total_seconds(self) -> float:
        """Seconds of work in all phases."""
        return self.seconds["total"]

    def curve(self, series: str) -> list[Point]:
        """The points of one curve."""
        return [point for point in self.points if point.series == series]
