"""From what the methods found to ``result.json``: a stable interface, and tables for a report."""

from collections.abc import Mapping
from statistics import fmean, pstdev

from feddistill import data
from feddistill.aggregation.attacks import attackers
from feddistill.aggregation.rules import ASSUMED
from feddistill.config import Config, as_stored, digest
from feddistill.config.tasks import TASKS, Task
from feddistill.store.run_directory import Json
from feddistill.types import Splits


def summarise(
    config: Config, splits: Splits, non_iid: float | None, found: Mapping[str, Json], environment: Json
) -> Json:
    """Everything of a run in one object. Figures are of the test set; selection was on validation."""
    rounds, task = found["feddistill"]["rounds"], TASKS[config.task]
    best = task.best
    student = best(record["student"] for record in rounds)
    metrics: Json = {
        "student": student["test"],
    }
    first, last = ([s["test"] for s in rounds[at]["specialists"].values() if "test" in s] for at in (0, -1))
    if first and last:  # clients elsewhere have no test set
        metrics["clients"] = {"before": _spread(first, task), "after": _spread(last, task)}
    for name in baselines(found):
        if "rounds" in found[name]:
            metrics[name] = best(found[name]["rounds"])["test"]
            continue
        chosen = {client: best(records) for client, records in found[name]["clients"].items()}
        metrics[name] = {
            **_spread([record["test"] for record in chosen.values()], task),
            "best": best(chosen.values())["test"],
            "clients": {client: record["test"] for client, record in chosen.items()},
        }
    phases = _phases(found)
    proxy = len(splits.private) * proxy_bytes(splits)
    uplink = (
        sum(sum(r["bytes"]["uplink"].values()) for r in rounds) + found["feddistill"]["description_bytes"]
    )
    answers = sum(upload["bytes"] for r in rounds for upload in r["uploads"].values())
    rows = found["feddistill"]["positions"] * sum(len(r["uploads"]) for r in rounds)
    return {
        "status": "complete",
        "task": as_stored(config)["task"],
        "name": config.name,
        "seed": config.seed,
        "rounds": config.rounds,
        "config_digest": digest(config),
        "heterogeneity": {"non_iid": None if non_iid is None else round(non_iid, 6)},
        "metrics": metrics,
        "selected_round": next(r["round"] for r in rounds if r["student"] == student),
        "student_weights": student["weights"],
        "ledger": found["feddistill"]["ledger"],
        "by_round": by_round(found, task),
        "bytes": {
            "uplink": uplink,
            "downlink": sum(sum(r["bytes"]["downlink"].values()) for r in rounds),
            "proxy": proxy,
            "descriptions": found["feddistill"]["description_bytes"],
            "by_round": [r["bytes"] for r in rounds],
            "baselines": {name: _traffic(found[name]) for name in baselines(found)},
            "fedavg_uplink_same_rounds": found["feddistill"]["student_bytes"]
            * min(config.clients.per_round or len(splits.private), len(splits.private))
            * config.rounds,
            "lora_uplink_same_rounds": found["feddistill"]["lora_bytes"]
            * min(config.clients.per_round or len(splits.private), len(splits.private))
            * config.rounds,
            "a_row": round(answers / max(rows, 1), 3),
        },
        "flops": {name: phase["flops"] for name, phase in phases.items()},
        "flops_shared": _shared(found),
        "seconds": {
            "total": round(sum(phase["seconds"] for phase in phases.values()), 3),
            **{name: round(phase["seconds"], 3) for name, phase in phases.items()},
        },
        "peak_memory_bytes": max(int(phase["peak_memory_bytes"]) for phase in phases.values()),
        "teacher": [{"round": r["round"], **r["teacher"]["diagnostics"]} for r in rounds],
        "trust": trust(config, [private.name for private in splits.private]),
        "duplicates": {
            str(r["round"]): r["teacher"]["diagnostics"]["duplicates"]
            for r in rounds
            if r["teacher"]["diagnostics"]["duplicates"]
        },
        "projection": _projections(rounds),
        "refused": {str(r["round"]): r["refused"] for r in rounds if r["refused"]},
        "missing": {str(r["round"]): r["missing"] for r in rounds if r["missing"]},
        "collapsed": {
            str(r["round"]): r["teacher"]["diagnostics"]["collapsed"]
            for r in rounds
            if r["teacher"]["diagnostics"]["collapsed"]
        },
        "environment": environment,
    }


def _projections(rounds: list[Json]) -> Json:
    """By round, of clients with another tokenizer than the student's: how their answers were projected."""
    found = {
        str(r["round"]): {name: u["projection"] for name, u in r["uploads"].items() if "projection" in u}
        for r in rounds
    }
    return {number: told for number, told in found.items() if told}


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


def baselines(found: Mapping[str, Json]) -> list[str]:
    """The methods that the student is compared with: all but the method itself."""
    return [name for name in found if name != "feddistill"]


def _traffic(found: Json) -> Json:
    """Bytes that a baseline sends in all rounds, all clients together."""
    sent = [record.get("bytes", {}) for record in found.get("rounds", ())]
    if "clients" in found:
        sent = [found.get("bytes", {})] * max(len(records) for records in found["clients"].values())
    return {way: sum(one.get(way, 0) for one in sent) for way in ("uplink", "downlink")}


def by_round(found: Mapping[str, Json], task: Task) -> list[Json]:
    """The figure that decides, after each round or segment of every method: what the report draws."""
    rows: list[Json] = []

    def add(series: str, number: int, record: Json) -> None:
        rows.append(
            {
                "series": series,
                "round": number,
                f"test_{task.decides}": record["test"][task.decides],
                f"validation_{task.decides}": record["validation"][task.decides],
            }
        )

    for entry in found["feddistill"]["rounds"]:
        add("student", entry["round"], entry["student"])
        for client, record in entry["specialists"].items():
            if "test" in record:
                add(f"client {client}", entry["round"], record)
    for name in baselines(found):
        for number, record in enumerate(found[name].get("rounds", []), 1):
            add(name, number, record)
        for client, records in found[name].get("clients", {}).items():
            for number, record in enumerate(records, 1):
                add(f"{name} {client}", number, record)
    return rows


def proxy_bytes(splits: Splits) -> int:
    """The proxy set as each client downloads it, once: JSON lines of id and text."""
    return sum(map(len, data.lines(splits.proxy)))


def _spread(figures: list[Json], task: Task) -> Json:
    return {
        "mean": {name: round(fmean(f[name] for f in figures), 6) for name in task.metrics},
        "std": {name: round(pstdev([f[name] for f in figures]), 6) for name in task.metrics},
    }


def _shared(found: Mapping[str, Json]) -> dict[str, int]:
    """By baseline, operations that it has in common with the federation, whose phases count them."""
    if "local_only" not in found:
        return {}
    began = found["feddistill"]["rounds"][0]["specialists"]
    first = {client: records[0] for client, records in found["local_only"]["clients"].items()}
    common = (record["costs"]["train"]["flops"] for client, record in first.items() if client in began)
    return {"baseline_local_only": sum(common)}


def _phases(found: Mapping[str, Json]) -> dict[str, Json]:
    """Costs added up by who pays and what for; what two have in common is counted once."""
    phases: dict[str, Json] = {}

    def add(phase: str, cost: Json) -> None:
        total = phases.setdefault(phase, {"seconds": 0.0, "flops": 0, "peak_memory_bytes": 0})
        total["seconds"] += cost["seconds"]
        total["flops"] += cost["flops"]
        total["peak_memory_bytes"] = max(total["peak_memory_bytes"], cost["peak_memory_bytes"])

    def add_training(phase: str, record: Json) -> None:
        for what, cost in record["costs"].items():
            add("evaluate" if what == "evaluate" else phase, cost)

    for entry in found["feddistill"]["rounds"]:
        for record in entry["specialists"].values():
            add_training("clients_train", record)
        for upload in entry["uploads"].values():
            add("clients_answer", upload["cost"])
        add("server_aggregate", entry["teacher"]["cost"])
        add_training("server_train", entry["student"])
    for name in baselines(found):
        for record in found[name].get("rounds", []):
            add_training(f"baseline_{name}", record)
        began = found["feddistill"]["rounds"][0]["specialists"]
        for client, records in found[name].get("clients", {}).items():
            # A client alone: its first segment is the federation's own first round, if it was asked in that.
            for record in records[1:] if name == "local_only" and client in began else records:
                add_training(f"baseline_{name}", record)
    return phases
