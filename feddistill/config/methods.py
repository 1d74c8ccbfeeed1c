"""The methods, one entry each: reports, plots, ``plan``, the command line and tests derive from them.

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
    """Settings of the baselines ``fedavg`` and ``feddf``: clients train the student's architecture."""

    epochs: float | None = Field(default=None, gt=0)
    """Epochs of each client in each round; ``null`` for ``clients.training.epochs``."""
    proximal: float = Field(default=0.0, ge=0)
    """FedProx: the weight ``mu`` of ``mu / 2 |w - w_0|^2``, ``w_0`` the weights at the start of the round."""


class FedMdConfig(Setting):
    """Settings of the baseline ``fedmd``."""

    digest_epochs: float = Field(default=1.0, gt=0)
    """Epochs over the proxy texts with the consensus, in each round."""
    revisit_epochs: float = Field(default=1.0, gt=0)
    """Epochs over the private texts, in each round."""


class FedLoraConfig(Setting):
    """Settings of the baseline ``fedlora``."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    """Adapters are scaled by ``alpha / rank``."""


class FedFedConfig(Setting):
    """Settings of the baseline ``fedfed``."""

    share: float = Field(default=0.3, gt=0, le=1)
    """Share of each private text's tokens, the most sensitive ones, that all clients receive."""
    noise: float = Field(default=0.1, ge=0, le=1)
    """Share of the sent tokens that are replaced by random ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method: a module with ``run(session)`` and ``plan(session, learners, student)``."""

    module: str
    """Dotted name of its module."""
    label: str
    """Name in tables, reports and model cards."""
    tasks: frozenset[str] | None = CLASSIFICATION
    """Tasks that the method supports; ``None`` for all."""
    style: Mapping[str, Any] | None = None
    """Keywords of ``Axes.plot`` for its curve; ``None`` for methods without one (``model_per_client``)."""
    model_per_client: bool = False
    """True if it yields one model per client; tables then have a row for the mean and one for the best."""
    trains_clients: bool = False
    """True if it trains the clients' own models, which excludes query-only models."""
    needs_labels: bool = False
    """True if it needs proxy texts with labels."""
    package: str | None = None
    """An optional package that it needs."""
    extra: str | None = None
    """The extra of feddistill that installs the package."""
    remote: bool = False
    """True if it works with remote clients, without the private texts at the server."""
    settings: type[Setting] | None = None
    """Class of its settings, which are the field of ``Config`` with the method's name."""
    plan: str = "plan"
    """Name of the module's function that yields the jobs whose costs ``feddistill plan`` adds up."""


MODULES = "feddistill.methods"
FEDERATED = "feddistill"
"""Name of the method itself in records and results; every other entry is a baseline."""
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
        needs_labels=True,
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
        package="peft",
        extra="lora",
        settings=FedLoraConfig,
    ),
    "fedmkt": Method(
        module=f"{MODULES}.fedmkt",
        label="FedMKT (min-CE)",
        style={"color": "#000000", "marker": "*", "linestyle": ":"},
        needs_labels=True,
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
"""By the name in ``baselines``, in the order of tables."""


def baselines() -> tuple[str, ...]:
    """Names that the setting ``baselines`` accepts."""
    return tuple(name for name in METHODS if name != FEDERATED)


def row_labels() -> dict[str, str]:
    """Labels of the rows of a table of metrics, by the row's key, in order."""
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
