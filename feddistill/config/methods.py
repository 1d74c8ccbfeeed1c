"""The methods, one entry each: what reports, plots, ``plan``, the command line and the tests derive from.

A new baseline is one file in ``feddistill/methods/`` and one entry here. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from feddistill.settings_model import Setting

CLASSIFICATION = frozenset({"classification"})


class FedAvgConfig(Setting):
    """Of the baselines ``fedavg`` and ``feddf``, in which clients train the student's architecture."""

    epochs: float | None = Field(default=None, gt=0)
    """Of each client in each round; ``null`` for ``clients.training.epochs``."""
    proximal: float = Field(default=0.0, ge=0)
    """FedProx: weight of the squared distance from the round's first weights, halved."""


class FedMdConfig(Setting):
    """Of the baseline ``fedmd``."""

    digest_epochs: float = Field(default=1.0, gt=0)
    """Over the proxy texts, by the consensus, in each round."""
    revisit_epochs: float = Field(default=1.0, gt=0)
    """Over the private texts, in each round."""


class FedLoraConfig(Setting):
    """Of the baseline ``fedlora``."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    """Adapters are scaled by ``alpha / rank``."""


class FedFedConfig(Setting):
    """Of the baseline ``fedfed``."""

    share: float = Field(default=0.3, gt=0, le=1)
    """Of each private text's tokens, the most sensitive ones, that all clients are given."""
    noise: float = Field(default=0.1, ge=0, le=1)
    """Share of these that are replaced by random tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method: a module with ``run(session)`` and ``plan(session, learners, student)``."""

    module: str
    """Dotted name of the module."""
    label: str
    """In tables, reports and model cards."""
    tasks: frozenset[str] | None = CLASSIFICATION
    """Tasks that it supports; ``None`` for all."""
    style: Mapping[str, Any] | None = None
    """Of its curve, keywords of ``Axes.plot``; ``None`` if it has no curve: it yields one model a client."""
    model_per_client: bool = False
    """True if it yields one model a client: the table then has a mean and a best row."""
    trains_clients: bool = False
    """True if it trains the clients' own models, as query-only models cannot be."""
    remote: bool = False
    """True if it runs where the private texts are at remote clients."""
    settings: type[Setting] | None = None
    """Its group of settings, a field of ``Config`` under the method's name."""
    plan: str = "plan"
    """The function of the module that yields the jobs whose costs ``feddistill plan`` adds up."""


MODULES = "feddistill.methods"
FEDERATED = "feddistill"
"""The method itself, in records and results; every other entry is a baseline."""
LOCAL_ONLY = "local_only"
"""The baseline whose first segment is the first round of the clients."""

METHODS: dict[str, Method] = {
    FEDERATED: Method(
        module=f"{MODULES}.federated_distillation",
        label="student (feddistill)",
        tasks=None,
        style={"color": "#0072B2", "marker": "o", "linewidth": 2.5},
        remote=True,
    ),
    "public_only": Method(
        module=f"{MODULES}.public_only",
        label="public only, same steps",
        tasks=None,
        style={"color": "#D55E00", "marker": "s", "linestyle": "--"},
        remote=True,
    ),
    LOCAL_ONLY: Method(
        module=f"{MODULES}.local_only", label="each client alone", tasks=None, model_per_client=True
    ),
    "centralized": Method(
        module=f"{MODULES}.centralized",
        label="centralized, same steps",
        tasks=None,
        style={"color": "#009E73", "marker": "^", "linestyle": "-."},
    ),
    "centralized_distillation": Method(
        module=f"{MODULES}.centralized_distillation",
        label="centralized distillation",
        style={"color": "#009E73", "marker": "v", "linestyle": ":"},
        trains_clients=True,
    ),
    "fedavg": Method(
        module=f"{MODULES}.fedavg",
        label="FedAvg",
        tasks=None,
        style={"color": "#CC79A7", "marker": "D", "linestyle": "--"},
        remote=True,
        settings=FedAvgConfig,
    ),
    "feddf": Method(
        module=f"{MODULES}.feddf",
        label="FedDF",
        style={"color": "#E69F00", "marker": "P", "linestyle": "-."},
    ),
    "fedlora": Method(
        module=f"{MODULES}.fedlora",
        label="federated LoRA",
        style={"color": "#56B4E9", "marker": "X", "linestyle": "--"},
        settings=FedLoraConfig,
    ),
    "fedmkt": Method(
        module=f"{MODULES}.fedmkt",
        label="FedMKT (min-CE)",
        style={"color": "#000000", "marker": "*", "linestyle": ":"},
        trains_clients=True,
    ),
    "fedfed": Method(
        module=f"{MODULES}.fedfed",
        label="FedFed, for text",
        style={"color": "#999999", "marker": "<", "linestyle": "--"},
        settings=FedFedConfig,
    ),
    "fedmd": Method(
        module=f"{MODULES}.fedmd",
        label="FedMD, clients",
        model_per_client=True,
        trains_clients=True,
        settings=FedMdConfig,
    ),
}
"""By the name in ``baselines``, in the order of the tables."""


def baselines() -> tuple[str, ...]:
    """Names that ``baselines`` may hold."""
    return tuple(name for name in METHODS if name != FEDERATED)


def row_labels() -> dict[str, str]:
    """The rows of a table of metrics, in order: key of the row to its label."""
    labels = {
        "student": METHODS[FEDERATED].label,
        "clients_before": "clients, first round (mean)",
        "clients_after": "clients, last round (mean)",
    }
    for name in baselines():
        method = METHODS[name]
        if method.model_per_client:
            labels |= {f"{name}_{which}": f"{method.label} ({which})" for which in ("mean", "best")}
        else:
            labels[name] = method.label
    return labels


def _known(name: str) -> str:
    if name in baselines():
        return name
    near = get_close_matches(name, baselines(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(baselines())}"
    raise PydanticCustomError("unknown_name", "no such baseline; {hint}", {"hint": hint})


Baseline = Annotated[str, AfterValidator(_known)]
"""The name of an entry of ``METHODS`` other than the method itself."""
