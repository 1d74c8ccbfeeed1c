"""The configuration of a run: YAML, checked, with every default filled in.

``load`` reads a file and ``--set`` overrides; the result, written beside every run, holds all there is
to know about it. Nothing else in the package reads files or the environment for settings.
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
from feddistill.config.tasks import COMPRESSED, DEFAULTS, LANGUAGE
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
    """Everything that decides a run's outcome."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """Names the default output directory."""
    task: Literal["classification", "causal_lm", "masked_lm", "question_answering"] = "classification"
    """What is learned: a text's class, each next token, tokens that are hidden (``docs/language_models.md``),
    or where the answer to a question stands in a passage (``docs/question_answering.md``)."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    rounds: int = Field(default=3, ge=1, le=10_000)
    threads: int | None = Field(default=None, ge=1)
    """Torch's threads; ``null`` for its own choice. Results are equal for equal numbers."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of forward and backward passes; weights stay float32. ``auto``: bf16 where the processor has it."""
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
    """What the student is compared with in the same run."""
    fedavg: FedAvgConfig = FedAvgConfig()
    fedmd: FedMdConfig = FedMdConfig()
    fedlora: FedLoraConfig = FedLoraConfig()
    fedfed: FedFedConfig = FedFedConfig()
    keep_checkpoints: Literal["none", "last", "all"] = "last"
    """Whether the specialists of earlier rounds stay on disk. ``none``: nobody's weights do once the run is
    complete, the student's neither, as where a study wants figures alone."""

    _old_names: bool = PrivateAttr(default=False)
    """Of a run that was started before settings were renamed: see ``config.renamed``."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_task(cls, value: Any) -> Any:
        if isinstance(value, dict) and (defaults := DEFAULTS.get(str(value.get("task")))):
            return _filled(value, defaults)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        clients = getattr(self.data.partition, "clients", None)
        if clients is not None:
            names = [f"client-{index}" for index in range(clients)]
            present = [name for name in names if name not in self.data.exclude_clients]
            if not present:
                raise ConfigError("data.exclude_clients names every client")
            self._fits_clients(len(present))
            attackers(self.simulate.attack, present)
        if isinstance(self.data.partition, RemotePartition):
            self._fits_remote(self.data.partition)
        rule = self.aggregation.rule
        if self.payload.codec == "sampled" and rule.kind != "mean_probs":
            raise ConfigError(
                "payload.codec = 'sampled' is unbiased in the mean alone: "
                f"aggregation.rule must be mean_probs, not {rule.kind}"
            )
        if self.task in COMPRESSED:
            self._fits_compressed()
        for name in self.baselines:
            tasks = METHODS[name].tasks
            if tasks is not None and self.task not in tasks:
                raise ConfigError(
                    f"baselines: {name} is for {' and '.join(sorted(tasks))}, not for task = {self.task}"
                )
        if self.task in LANGUAGE:
            self._fits_language()
        elif "labels" in rule.needs() and not self.data.proxy.labelled:
            what = rule.kind if rule.weighting() == "uniform" else f"{rule.kind}, weights: {rule.weighting()}"
            raise ConfigError(
                f"aggregation.rule = {what} needs labelled proxy texts, but data.proxy.labelled is 0"
            )
        if self.student.model.lora is not None:
            raise ConfigError(
                "student.model.lora is for clients: the student is exported whole (baselines: [fedlora] "
                "averages adapters of it)"
            )
        self._fits_black_boxes()
        if "local_only" in self.baselines and not self.clients.evaluate:
            raise ConfigError("baselines: local_only needs clients.evaluate, which is false")
        if len(set(self.baselines)) < len(self.baselines):
            raise ConfigError(f"baselines names one twice: {', '.join(self.baselines)}")
        return self

    def _fits_compressed(self) -> None:
        """What is of classes cannot be asked for."""
        rule = self.aggregation.rule
        wrong = {
            f"aggregation.rule = {rule.kind}": rule.of_classes,
            f"aggregation.rule.weights = {rule.weighting()}": "class_counts" in rule.needs(),
            "payload.codec = dense": self.payload.codec == "dense",
            f"distill.temperature = {self.distill.temperature:g}": self.distill.temperature != 1,
            "distill.kind = mae": self.distill.kind == "mae",
            "simulate.attack": bool(self.simulate.attack),
            "data.histogram_epsilon": self.data.histogram_epsilon is not None,
        }
        for what, is_wrong in wrong.items():
            if is_wrong:
                raise ConfigError(f"{what} is for classification, not for task = {self.task}")
        if self.task == "question_answering":
            cached = {f"clients.models.{i}": model for i, model in enumerate(self.clients.models)}
            for name, model in {**cached, "student.model": self.student.model}.items():
                if model.frozen_cache_mb:
                    raise ConfigError(f"{name}.frozen_cache_mb is not for task = question_answering")

    def _fits_language(self) -> None:
        """Labels there are always: the tokens."""
        if self.data.proxy.labelled:
            raise ConfigError(f"data.proxy.labelled is for classification, not for task = {self.task}")
        if self.task == "masked_lm" and self.language.position_stride != 1:
            raise ConfigError(
                "language.position_stride is for task = causal_lm; masked_lm has language.mask_probability"
            )
        if self.task == "masked_lm" and self.language.alignment != "spans":
            raise ConfigError("language.alignment is for task = causal_lm; masked models share a tokenizer")

    def _fits_black_boxes(self) -> None:
        """What is only asked cannot be trained."""
        if self.student.model.black_box:
            kind = self.student.model.source.kind
            raise ConfigError(f"student.model.source.kind = {kind} is for clients: the student is trained")
        for index, model in enumerate(self.clients.models):
            if not model.black_box:
                continue
            name = f"clients.models.{index}"
            for baseline in self.baselines:
                if METHODS[baseline].trains_clients:
                    raise ConfigError(
                        f"baselines: {baseline} trains the clients' models, but {name} is only asked"
                    )
            if self.task in ("masked_lm", "question_answering"):
                raise ConfigError(f"{name}.source.kind = {model.source.kind} is not for task = {self.task}")
            if self.task == "classification" and model.source.kind == "endpoint":
                raise ConfigError(f"{name}.source.kind = endpoint is for task = causal_lm")
            if self.task == "causal_lm" and getattr(model.source, "tokenizer", None) is None:
                raise ConfigError(f"{name}.source.tokenizer is missing: its blocks are token ids")

    def _fits_clients(self, clients: int) -> None:
        """A rule sees those that are asked in a round."""
        asked = self.clients.per_round
        if asked is not None and asked > clients:
            raise ConfigError(f"clients.per_round = {asked}, but there are {clients} clients")
        self.aggregation.check(asked or clients)

    def _fits_remote(self, partition: RemotePartition) -> None:
        """The server has nobody's private texts."""
        names, keys = partition.names, partition.keys
        if keys and set(keys) != set(names):
            odd = ", ".join(sorted(set(keys) ^ set(names)))
            raise ConfigError(f"data.partition.keys must name just those of data.partition.names: {odd}")
        self._fits_clients(len([name for name in names if name not in self.data.exclude_clients]))
        private = [name for name in self.baselines if not METHODS[name].remote]
        if private:
            raise ConfigError(
                f"baselines: {', '.join(private)} would need the private texts, which are at the clients"
            )
        if self.simulate.attack:
            raise ConfigError("simulate.attack needs the clients in one process, not remote")
        if self.data.histogram_epsilon is not None:
            raise ConfigError("data.histogram_epsilon draws its noise from the run's seed: no protection")
        if len(set(names)) < len(names):
            raise ConfigError("data.partition.names names a client twice")


def _filled(given: Any, defaults: dict[str, Any]) -> Any:
    """``given``, with what it does not name; what is no mapping is left for others to complain of."""
    if not isinstance(given, dict):
        return given
    missing = {key: value for key, value in defaults.items() if key not in given}
    inner = {k: _filled(v, defaults[k]) for k, v in given.items() if isinstance(defaults.get(k), dict)}
    return {**given, **missing, **inner}
