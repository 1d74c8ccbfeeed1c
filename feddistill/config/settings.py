"""All settings of a run, and the checks of settings against each other.

A run stores them with every default filled in. Nothing else in the package reads settings from files or from
the environment.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from feddistill.aggregation.attacks import attackers
from feddistill.config.data import DataConfig, RemotePartition
from feddistill.config.methods import (
    METHODS,
    Baseline,
    FedAvgConfig,
    FedFedConfig,
    FedLoraConfig,
    FedMdConfig,
)
from feddistill.config.models import ModelConfig
from feddistill.config.tasks import TASKS, Task, TaskName, tasks_with
from feddistill.config.training import (
    AggregationConfig,
    ClientsConfig,
    DistillConfig,
    LanguageConfig,
    PayloadConfig,
    QuestionAnsweringConfig,
    SimulateConfig,
    StudentConfig,
)
from feddistill.errors import ConfigError
from feddistill.settings_model import Setting

QUICKSTART = Path(__file__).with_name("quickstart.yaml")
"""The configuration of the embedded default; ``examples/quickstart.yaml`` is a link to it."""


class Config(Setting):
    """All settings that a run's outcome depends on."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """Names the default output directory."""
    task: TaskName = "classification"
    """``classification``, ``causal_lm`` or ``masked_lm`` (``docs/language_models.md``), or
    ``question_answering`` (``docs/question_answering.md``)."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    rounds: int = Field(default=3, ge=1, le=10_000)
    threads: int | None = Field(default=None, ge=1)
    """Torch's threads; ``null`` for torch's default. Results are equal for equal numbers of threads."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of passes; weights stay float32. ``auto``: bf16 if the processor supports it."""
    data: DataConfig = DataConfig()
    clients: ClientsConfig = ClientsConfig()
    payload: PayloadConfig = PayloadConfig()
    aggregation: AggregationConfig = AggregationConfig()
    student: StudentConfig = StudentConfig()
    distill: DistillConfig = DistillConfig()
    language: LanguageConfig = LanguageConfig()
    question_answering: QuestionAnsweringConfig = QuestionAnsweringConfig()
    simulate: SimulateConfig = SimulateConfig()
    baselines: tuple[Baseline, ...] = ()
    """Methods to compare the student with in the same run."""
    fedavg: FedAvgConfig = FedAvgConfig()
    fedmd: FedMdConfig = FedMdConfig()
    fedlora: FedLoraConfig = FedLoraConfig()
    fedfed: FedFedConfig = FedFedConfig()
    keep_checkpoints: Literal["none", "last", "all"] = "last"
    """Weights that stay on disk when the run is complete: the last round's, all, or none, not even the
    student's (for studies, which need only the metrics)."""

    _old_names: bool = PrivateAttr(default=False)
    """True for a run that was started before settings were renamed: see ``config.renamed``."""
    _stored: dict[str, Any] | None = PrivateAttr(default=None)
    """The settings of a stored run, which may lack newer ones; ``None``: a configuration of this version."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_task(cls, value: Any) -> Any:
        task = TASKS.get(str(value.get("task"))) if isinstance(value, dict) else None
        return value if task is None else _filled(value, dict(task.defaults))

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        task = TASKS[self.task]
        self._check_partition()
        self._check_payload()
        self._check_task(task)
        self._check_baselines()
        self._check_labels(task)
        if self.student.model.lora is not None:
            raise ConfigError(
                "student.model.lora is for clients: the student is exported whole (baselines: [fedlora] "
                "averages adapters of it)"
            )
        if self.student.model.trains_adapter:
            raise ConfigError(
                "student.model.source.adapter = train is for clients: the student is exported whole; "
                "adapter: merge starts from the merged weights"
            )
        self._check_query_only(task)
        return self

    def _check_partition(self) -> None:
        clients = getattr(self.data.partition, "clients", None)
        if clients is not None:
            names = [f"client-{index}" for index in range(clients)]
            present = [name for name in names if name not in self.data.exclude_clients]
            if not present:
                raise ConfigError("data.exclude_clients names every client")
            self._check_clients(len(present))
            attackers(self.simulate.attack, present)
        if isinstance(self.data.partition, RemotePartition):
            self._check_remote(self.data.partition)

    def _check_clients(self, clients: int) -> None:
        """Check the settings that depend on the number of clients in a round."""
        sampled = self.clients.per_round
        if sampled is not None and sampled > clients:
            raise ConfigError(f"clients.per_round = {sampled}, but there are {clients} clients")
        self.aggregation.check(sampled or clients)

    def _check_remote(self, partition: RemotePartition) -> None:
        """Check that nothing needs the private texts at the server."""
        names, keys = partition.names, partition.keys
        if keys and set(keys) != set(names):
            odd = ", ".join(sorted(set(keys) ^ set(names)))
            raise ConfigError(f"data.partition.keys must name just those of data.partition.names: {odd}")
        self._check_clients(len([name for name in names if name not in self.data.exclude_clients]))
        private = [name for name in self.baselines if not METHODS[name].remote]
        if private:
            raise ConfigError(
                f"baselines: {', '.join(private)} would need the private texts, which are at the clients"
            )
        if self.simulate.attack:
            raise ConfigError("simulate.attack needs the clients in one process, not remote")
        if self.data.histogram_epsilon is not None:
            raise ConfigError(
                "data.histogram_epsilon is for simulations: its noise comes from the run's public seed and "
                "protects nothing with remote clients"
            )
        if len(set(names)) < len(names):
            raise ConfigError("data.partition.names names a client twice")

    def _check_payload(self) -> None:
        rule = self.aggregation.rule
        if self.payload.codec == "sampled" and rule.kind != "mean_probs":
            raise ConfigError(
                "payload.codec = 'sampled' is unbiased in the mean alone: "
                f"aggregation.rule must be mean_probs, not {rule.kind}"
            )

    def _check_task(self, task: Task) -> None:
        """Check that the task allows the settings."""
        if not task.dense:
            self._check_not_dense()
        models = {f"clients.models.{i}": model for i, model in enumerate(self.clients.models)}
        for name, model in {**models, "student.model": self.student.model}.items():
            if model.frozen_cache_mb and not task.frozen_cache:
                raise ConfigError(f"{name}.frozen_cache_mb is not for task = {self.task}")
        for name, why in task.fixed.items():
            value, default = _setting(self, name)
            if value != default:
                raise ConfigError(f"{name} {why}")

    def _check_not_dense(self) -> None:
        """Refuse what works with predictions over a few classes alone."""
        rule = self.aggregation.rule
        refused = {
            f"aggregation.rule = {rule.kind}": rule.of_classes,
            f"aggregation.rule.weights = {rule.weighting()}": "class_counts" in rule.needs(),
            "payload.codec = dense": self.payload.codec == "dense",
            f"distill.temperature = {self.distill.temperature:g}": self.distill.temperature != 1,
            "distill.kind = mae": self.distill.kind == "mae",
            "simulate.attack": bool(self.simulate.attack),
            "data.histogram_epsilon": self.data.histogram_epsilon is not None,
        }
        for setting, is_set in refused.items():
            if is_set:
                raise ConfigError(f"{setting} is for {tasks_with(dense=True)}, not for task = {self.task}")

    def _check_baselines(self) -> None:
        for name in self.baselines:
            tasks = METHODS[name].tasks
            if tasks is not None and self.task not in tasks:
                raise ConfigError(
                    f"baselines: {name} is for {' and '.join(sorted(tasks))}, not for task = {self.task}"
                )
        if "local_only" in self.baselines and not self.clients.evaluate:
            raise ConfigError("baselines: local_only needs clients.evaluate, which is false")
        if len(set(self.baselines)) < len(self.baselines):
            raise ConfigError(f"baselines names one twice: {', '.join(self.baselines)}")

    def _check_labels(self, task: Task) -> None:
        rule = self.aggregation.rule
        if task.labels == "tokens":
            if self.data.proxy.labelled:
                labelled = tasks_with(labels="class")
                raise ConfigError(f"data.proxy.labelled is for {labelled}, not for task = {self.task}")
        elif "labels" in rule.needs() and not self.data.proxy.labelled:
            what = rule.kind if rule.weighting() == "uniform" else f"{rule.kind}, weights: {rule.weighting()}"
            raise ConfigError(
                f"aggregation.rule = {what} needs labelled proxy texts, but data.proxy.labelled is 0"
            )

    def _check_query_only(self, task: Task) -> None:
        """Check that query-only models are clients' and are never trained."""
        if self.student.model.query_only:
            kind = self.student.model.source.kind
            raise ConfigError(f"student.model.source.kind = {kind} is for clients: the student is trained")
        for index, model in enumerate(self.clients.models):
            if model.query_only:
                self._check_query_only_client(task, model, f"clients.models.{index}")

    def _check_query_only_client(self, task: Task, model: ModelConfig, name: str) -> None:
        for baseline in self.baselines:
            if METHODS[baseline].trains_clients:
                raise ConfigError(
                    f"baselines: {baseline} trains the clients' models, but {name} is query-only"
                )
        kind = model.source.kind
        if not task.query_only_sources:
            raise ConfigError(f"{name}.source.kind = {kind} is not for task = {self.task}")
        if kind not in task.query_only_sources:
            others = [other for other, entry in TASKS.items() if kind in entry.query_only_sources]
            raise ConfigError(f"{name}.source.kind = {kind} is for task = {' or '.join(others)}")
        if task.query_only_tokenizer and getattr(model.source, "tokenizer", None) is None:
            raise ConfigError(f"{name}.source.tokenizer is missing: its blocks are token ids")


def _setting(config: Config, name: str) -> tuple[Any, Any]:
    """The value and the default of the setting with this dotted name."""
    group: Any = config
    *path, last = name.split(".")
    for part in path:
        group = getattr(group, part)
    return getattr(group, last), type(group).model_fields[last].default


def _filled(given: Any, defaults: dict[str, Any]) -> Any:
    """``given`` with the defaults of what it does not name; anything but a mapping is left to the checks."""
    if not isinstance(given, dict):
        return given
    missing = {key: value for key, value in defaults.items() if key not in given}
    inner = {k: _filled(v, defaults[k]) for k, v in given.items() if isinstance(defaults.get(k), dict)}
    return {**given, **missing, **inner}
