"""From the records of the methods to ``result.json``: a stable interface, and rows for a report."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from feddistill import data
from feddistill.aggregation.attacks import attackers
from feddistill.aggregation.rules import ASSUMED
from feddistill.config import Config, digest, stored_task
from feddistill.config.methods import FEDERATED, LOCAL_ONLY
from feddistill.config.tasks import TASKS, Metrics, Task
from feddistill.store.records import BaselineRecord, FederationRecord, RoundRecord, StepRecord, Traffic
from feddistill.store.run_directory import Json
from feddistill.types import Cost, Splits

Rounds = Sequence[RoundRecord]


@dataclass(frozen=True, slots=True)
class Records:
    """The records of all methods of a run."""

    federation: FederationRecord
    baselines: Mapping[str, BaselineRecord]

    @classmethod
    def read(cls, found: Mapping[str, Json]) -> "Records":
        """The records as the methods wrote them, by name of the method."""
        others = {name: record for name, record in found.items() if name != FEDERATED}
        (federation,) = (record for name, record in found.items() if name == FEDERATED)
        return cls(
            FederationRecord.from_json(federation),
            {name: BaselineRecord.from_json(record) for name, record in others.items()},
        )

    @property
    def first_clients(self) -> Mapping[str, StepRecord]:
        """The clients of the first round."""
        return self.federation.rounds[0].specialists


def summarise(
    config: Config,
    splits: Splits,
    non_iid: float | None,
    found: Mapping[str, Json],
    environment: Json,
    recipe: int,
) -> Json:
    """The content of ``result.json``. Metrics are those of the test set, selection is on validation."""
    task, records = TASKS[config.task], Records.read(found)
    federation = records.federation
    rounds = federation.rounds
    student = _best(task, [entry.trained_student for entry in rounds])
    phases = _phases(records)
    answers = sum(upload.bytes for entry in rounds for upload in entry.uploads.values())
    rows = federation.positions * sum(len(entry.uploads) for entry in rounds)
    uplink = sum(sum(entry.traffic.uplink.values()) for entry in rounds) + federation.description_bytes
    uploads_of_weights = (
        min(config.clients.per_round or len(splits.private), len(splits.private)) * config.rounds
    )
    return {
        "status": "complete",
        "task": stored_task(config),
        "name": config.name,
        "seed": config.seed,
        "rounds": config.rounds,
        "config_digest": digest(config),
        "recipe": recipe,
        "heterogeneity": {"non_iid": None if non_iid is None else round(non_iid, 6)},
        "metrics": _metrics(records, task, student),
        "selected_round": next(entry.round for entry in rounds if entry.student == student),
        "student_weights": student.weights,
        "ledger": federation.ledger,
        "by_round": by_round(records, task),
        "bytes": {
            "uplink": uplink,
            "downlink": sum(sum(entry.traffic.downlink.values()) for entry in rounds),
            "proxy": len(splits.private) * proxy_bytes(splits),
            "descriptions": federation.description_bytes,
            "by_round": [entry.traffic.as_json() for entry in rounds],
            "baselines": {name: _traffic(record).as_json() for name, record in records.baselines.items()},
            "fedavg_uplink_same_rounds": federation.student_bytes * uploads_of_weights,
            "lora_uplink_same_rounds": federation.lora_bytes * uploads_of_weights,
            "a_row": round(answers / max(rows, 1), 3),
        },
        "flops": {name: phase.flops for name, phase in phases.items()},
        "flops_shared": _shared(records),
        "seconds": {
            "total": round(sum(phase.seconds for phase in phases.values()), 3),
            **{name: round(phase.seconds, 3) for name, phase in phases.items()},
        },
        "peak_memory_bytes": max(int(phase.peak_memory_bytes) for phase in phases.values()),
        "teacher": [{"round": entry.round, **entry.teacher.diagnostics} for entry in rounds],
        "trust": trust(config, [private.name for private in splits.private]),
        "duplicates": _by_number(rounds, lambda entry: entry.teacher.duplicates),
        "projection": _by_number(rounds, _projections),
        "refused": _by_number(rounds, lambda entry: entry.refused),
        "missing": _by_number(rounds, lambda entry: entry.missing),
        "collapsed": _by_number(rounds, lambda entry: entry.teacher.collapsed),
        "environment": environment,
    }


def _metrics(records: Records, task: Task, student: StepRecord) -> Json:
    """Metrics of the student, of the clients, and of each baseline."""
    metrics: Json = {"student": student.on_test}
    rounds = records.federation.rounds
    first, last = ([s.test for s in rounds[at].specialists.values() if s.test] for at in (0, -1))
    if first and last:  # remote clients have no test set
        metrics |= {"clients": {"before": _spread(first, task), "after": _spread(last, task)}}
    for name, record in records.baselines.items():
        if record.rounds is not None:
            metrics |= {name: _best(task, record.rounds).on_test}
            continue
        chosen = {client: _best(task, steps) for client, steps in (record.clients or {}).items()}
        metrics |= {
            name: {
                **_spread([step.on_test for step in chosen.values()], task),
                "best": _best(task, list(chosen.values())).on_test,
                "clients": {client: step.on_test for client, step in chosen.items()},
            }
        }
    return metrics


def _best(task: Task, steps: Sequence[StepRecord]) -> StepRecord:
    """The first of the steps that are best on validation."""
    best, *others = steps
    for step in others:
        if task.better(step.on_validation, best.on_validation):
            best = step
    return best


def _by_number(rounds: Rounds, value: Callable[[RoundRecord], Any]) -> Json:
    """A value of each round, by its number, if there is any."""
    return {str(entry.round): value(entry) for entry in rounds if value(entry)}


def _projections(entry: RoundRecord) -> Json:
    """How the answers of clients with another tokenizer than the student's were projected."""
    return {
        name: upload.projection for name, upload in entry.uploads.items() if upload.projection is not None
    }


def trust(config: Config, names: list[str]) -> Json:
    """What the aggregation assumes of the clients ``names``, and what it does not hold against."""
    rule, lying = config.aggregation.rule, attackers(config.simulate.attack, names)
    warnings = []
    if rule.weighting() == "confidence":
        warnings.append("Weights by confidence are an attack vector: whoever is sure of everything leads.")
    if rule.weighting() in ("size", "class_counts"):
        warnings.append("Sizes and class counts are what clients say of themselves; nobody checks them.")
    honest = [name for name in config.baselines if name != "fedmkt"]
    if lying and honest:
        warnings.append(f"Clients lie in their answers alone: those of {', '.join(honest)} do not lie.")
    return {
        "rule": rule.kind,
        "clients": len(names),
        "tolerates": rule.tolerates(len(names)),
        "assumed": ASSUMED,
        "warnings": warnings,
        "simulated_attacks": {name: attack.kind for name, attack in lying.items()},
    }


def _traffic(record: BaselineRecord) -> Traffic:
    """Bytes that a baseline sends in all rounds, all clients together."""
    if record.clients is not None:
        sent = [record.bytes] * max(len(steps) for steps in record.clients.values())
    else:
        sent = [step.bytes for step in record.rounds or [] if step.bytes is not None]
    return Traffic(uplink=sum(one.uplink for one in sent), downlink=sum(one.downlink for one in sent))


def by_round(records: Records, task: Task) -> list[Json]:
    """The deciding metric after each round or segment of every method, which the report plots."""
    rows: list[Json] = []

    def add(series: str, number: int, step: StepRecord) -> None:
        rows.append(
            {
                "series": series,
                "round": number,
                f"test_{task.decides}": step.on_test[task.decides],
                f"validation_{task.decides}": step.on_validation[task.decides],
            }
        )

    for entry in records.federation.rounds:
        add("student", entry.round, entry.trained_student)
        for client, step in entry.specialists.items():
            if step.test is not None:
                add(f"client {client}", entry.round, step)
    for name, record in records.baselines.items():
        for number, step in enumerate(record.rounds or [], 1):
            add(name, number, step)
        for client, steps in (record.clients or {}).items():
            for number, step in enumerate(steps, 1):
                add(f"{name} {client}", number, step)
    return rows


def proxy_bytes(splits: Splits) -> int:
    """Bytes of the proxy set as each client downloads it, once: JSON lines of id and text."""
    return sum(map(len, data.lines(splits.proxy)))


def _spread(metrics: Sequence[Metrics], task: Task) -> Json:
    return {
        "mean": {name: round(fmean(m[name] for m in metrics), 6) for name in task.metrics},
        "std": {name: round(pstdev([m[name] for m in metrics]), 6) for name in task.metrics},
    }


def _shared(records: Records) -> dict[str, int]:
    """Operations that a baseline has in common with the federation, whose phases count them."""
    shared: dict[str, int] = {}
    for name, record in records.baselines.items():
        if name == LOCAL_ONLY:
            first = {client: steps[0] for client, steps in (record.clients or {}).items()}
            common = (
                step.training.flops for client, step in first.items() if client in records.first_clients
            )
            shared |= {f"baseline_{name}": sum(common)}
    return shared


def _phases(records: Records) -> dict[str, Cost]:
    """Costs by phase; a step that two methods have in common is counted once."""
    phases: defaultdict[str, Cost] = defaultdict(Cost)

    def pay(phase: str, cost: Cost) -> None:
        phases[phase] += cost

    def add(phase: str, step: StepRecord) -> None:
        for what, cost in step.costs.items():
            pay("evaluate" if what == "evaluate" else phase, cost)

    for entry in records.federation.rounds:
        for step in entry.specialists.values():
            add("clients_train", step)
        for upload in entry.uploads.values():
            pay("clients_answer", upload.cost)
        pay("server_aggregate", entry.teacher.cost)
        add("server_train", entry.trained_student)
    for name, record in records.baselines.items():
        for step in record.rounds or []:
            add(f"baseline_{name}", step)
        for client, steps in (record.clients or {}).items():
            # A client alone: its first segment is the federation's own first round, if it was in that.
            counted = name == LOCAL_ONLY and client in records.first_clients
            for step in steps[1:] if counted else steps:
                add(f"baseline_{name}", step)
    return dict(phases)
