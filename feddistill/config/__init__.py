"""The configuration of a run: YAML, checked, with every default filled in.

``load`` reads a file and ``--set`` overrides; the result, written beside every run, holds all there is
to know about it. Nothing else in the package reads files or the environment for settings.
"""

import hashlib
import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from feddistill.attacks import liars
from feddistill.config.data import AtClientsPartition, DataConfig, FileSource
from feddistill.config.training import (
    AggregationConfig,
    ClientsConfig,
    DistillConfig,
    FedAvgConfig,
    FedFedConfig,
    FedLoraConfig,
    FedMdConfig,
    LanguageConfig,
    PayloadConfig,
    ReadingConfig,
    SimulateConfig,
    StudentConfig,
)
from feddistill.errors import ConfigError
from feddistill.setting import Setting

__all__ = ["QUICKSTART", "Config", "digest", "dump", "load"]

QUICKSTART = Path(__file__).with_name("quickstart.yaml")
"""The configuration of the embedded default; ``examples/quickstart.yaml`` is a link to it."""

Baseline = Literal[
    "public_only",
    "local_only",
    "centralized",
    "centralized_distillation",
    "fedavg",
    "feddf",
    "fedlora",
    "fedmd",
    "fedmkt",
    "fedfed",
]


AT_CLIENTS = ("fedavg", "public_only")
"""Baselines that can be where the server has nobody's private texts."""

TRAINS_CLIENTS = ("fedmd", "fedmkt", "centralized_distillation")
"""Baselines that train the clients' own models, as black boxes cannot be."""

LANGUAGE = ("causal_lm", "masked_lm")
"""Tasks whose classes are tokens."""

COMPRESSED = (*LANGUAGE, "reading")
"""Tasks whose answers are too long to be dense."""

OF_COMPRESSED = ("public_only", "local_only", "centralized", "fedavg")
"""Baselines that can be where the task is one of those."""

DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    task: {
        "payload": {"codec": "topk"},
        "distill": {"temperature": 1.0},
        "clients": {"codistillation": {"target": "soft"}},
    }
    for task in COMPRESSED
}
"""By task, defaults that are not the fields' own."""


class Config(Setting):
    """Everything that decides a run's outcome."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """Names the default output directory."""
    task: Literal["classification", "causal_lm", "masked_lm", "reading"] = "classification"
    """What is learned: a text's class, each next token, tokens that are hidden (``docs/language_models.md``),
    or where the answer to a question stands in a passage (``docs/reading.md``)."""
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
    reading: ReadingConfig = ReadingConfig()
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
            present = [name for name in names if name not in self.data.absent]
            if not present:
                raise ConfigError("data.absent names every client")
            self._fits_clients(len(present))
            liars(self.simulate.attack, present)
        if isinstance(self.data.partition, AtClientsPartition):
            self._fits_texts_at_clients(self.data.partition)
        rule = self.aggregation.rule
        if self.payload.codec == "sampled" and rule.kind != "mean_probs":
            raise ConfigError(
                "payload.codec = 'sampled' is unbiased in the mean alone: "
                f"aggregation.rule must be mean_probs, not {rule.kind}"
            )
        if self.task in COMPRESSED:
            self._fits_compressed()
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
        wrong |= {f"baselines: {name}": name not in OF_COMPRESSED for name in self.baselines}
        for what, is_wrong in wrong.items():
            if is_wrong:
                raise ConfigError(f"{what} is for classification, not for task = {self.task}")
        if self.task == "reading":
            cached = {f"clients.models.{i}": model for i, model in enumerate(self.clients.models)}
            for name, model in {**cached, "student.model": self.student.model}.items():
                if model.frozen_cache_mb:
                    raise ConfigError(f"{name}.frozen_cache_mb is not for task = reading")

    def _fits_language(self) -> None:
        """Labels there are always: the tokens."""
        if self.data.proxy.labelled:
            raise ConfigError(f"data.proxy.labelled is for classification, not for task = {self.task}")
        if self.task == "masked_lm" and self.language.step != 1:
            raise ConfigError(
                "language.step is for task = causal_lm; of masked_lm, language.masked says how many"
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
                if baseline in TRAINS_CLIENTS:
                    raise ConfigError(
                        f"baselines: {baseline} trains the clients' models, but {name} is only asked"
                    )
            if self.task in ("masked_lm", "reading"):
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

    def _fits_texts_at_clients(self, partition: AtClientsPartition) -> None:
        """The server has nobody's private texts."""
        names, keys = partition.names, partition.keys
        if keys and set(keys) != set(names):
            odd = ", ".join(sorted(set(keys) ^ set(names)))
            raise ConfigError(f"data.partition.keys must name just those of data.partition.names: {odd}")
        self._fits_clients(len([name for name in names if name not in self.data.absent]))
        private = [name for name in self.baselines if name not in AT_CLIENTS]
        if private:
            raise ConfigError(
                f"baselines: {', '.join(private)} would need the private texts, which are at the clients"
            )
        if self.simulate.attack:
            raise ConfigError("simulate.attack needs the clients in one process, not at_clients")
        if self.data.histogram_epsilon is not None:
            raise ConfigError("data.histogram_epsilon draws its noise from the run's seed: no protection")
        if len(set(names)) < len(names):
            raise ConfigError("data.partition.names names a client twice")


def load(path: Path | None = None, overrides: tuple[str, ...] = ()) -> Config:
    """Read ``path`` (``None``: the quickstart), apply ``a.b=value`` overrides, check.

    Raises:
        ConfigError: The file is not YAML, or a setting is unknown, missing or out of range. The message
            names it as the user wrote it.
    """
    source = path or QUICKSTART
    try:
        raw = yaml.safe_load(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {source}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: text that is no UTF-8, a date with month 99
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    raw = untied({} if raw is None else raw)
    if not isinstance(raw, dict):
        raise ConfigError(f"{source} must be a mapping of settings, got {type(raw).__name__}")
    for text in overrides:
        override(raw, text)
    return parse(raw)


def untied(raw: Any) -> Any:
    """Groups that YAML's aliases made one object, as several: an override of one must not change another."""
    if isinstance(raw, dict):
        return {key: untied(value) for key, value in raw.items()}
    return [untied(value) for value in raw] if isinstance(raw, list) else raw


def parse(raw: dict[str, Any]) -> Config:
    """Check a mapping of settings."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(one_line(error, raw)) from None


def texts(path: Path, columns: dict[str, str | None], name: str) -> FileSource:
    """Files of texts and which of their columns are read; ``name`` is what errors call it."""
    try:
        return FileSource.model_validate({"path": path, **columns})
    except ValidationError as error:
        raise ConfigError(f"{name}: {one_line(error, columns)}") from None


def dump(config: Config) -> str:
    """The configuration as YAML, every default filled in; ``load`` gives it back unchanged."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def digest(config: Config) -> str:
    """A hash of all settings."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def differs(given: Config, stored: Config) -> str | None:
    """The first setting in which ``given`` is not ``stored``, but for those that it leaves to the machine."""
    settled = {"threads": stored.threads, "precision": stored.precision}
    left = {key: value for key, value in settled.items() if getattr(given, key) in (None, "auto")}
    ours, theirs = given.model_copy(update=left).model_dump(mode="json"), stored.model_dump(mode="json")
    return None if ours == theirs else _first_difference(ours, theirs)


def _first_difference(a: object, b: object, path: str = "") -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            if a.get(key) != b.get(key):
                return _first_difference(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
    return path


def _filled(given: Any, defaults: dict[str, Any]) -> Any:
    """``given``, with what it does not name; what is no mapping is left for others to complain of."""
    if not isinstance(given, dict):
        return given
    missing = {key: value for key, value in defaults.items() if key not in given}
    inner = {k: _filled(v, defaults[k]) for k, v in given.items() if isinstance(defaults.get(k), dict)}
    return {**given, **missing, **inner}


def override(raw: dict[str, Any], text: str) -> None:
    """Set ``a.b.0.c`` in nested mappings and lists; groups left out of the file are made."""
    dotted, equals, value_text = text.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set takes KEY=VALUE, got {text!r}")
    try:
        value = yaml.safe_load(value_text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {dotted}: the value is not YAML: {' '.join(str(error).split())}") from None
    place: Any = raw
    *groups, last = dotted.split(".")
    for depth, key in enumerate(groups):
        here = ".".join(groups[: depth + 1])
        if isinstance(place, list):
            place = place[_index(place, key, here)]
        else:
            if isinstance(place.get(key), str):  # rule: median, with one of its settings on top
                place[key] = {"kind": place[key]}
            place = place.setdefault(key, {})
        if not isinstance(place, dict | list):
            raise ConfigError(f"--set {dotted}: {here} is {place!r}, not a group of settings")
    if isinstance(place, list):
        place[_index(place, last, dotted)] = value
    else:
        place[last] = value


def _index(place: list[Any], key: str, name: str) -> int:
    if not key.isdigit() or int(key) >= len(place):
        raise ConfigError(f"--set {name}: needs an index from 0 to {len(place) - 1}, got {key!r}")
    return int(key)


def one_line(error: ValidationError, raw: Any) -> str:
    """The first thing that is wrong, as the user wrote it."""
    first, *more = error.errors()
    path = _as_written(first["loc"], raw)
    match first["type"]:
        case "unknown_setting":
            context = first["ctx"]
            dotted = ".".join([*path, context["key"]])
            if context["near"]:
                text = f"{dotted} is not a setting; did you mean {'.'.join([*path, context['near']])}?"
            else:
                text = f"{dotted} is not a setting; {'.'.join(path) or 'there'} has: {context['known']}"
        case "value_error":  # ours, already naming the setting
            text = str(first["ctx"]["error"])
        case "union_tag_invalid":
            context = first["ctx"]
            known = [tag.strip("' ") for tag in context["expected_tags"].split(",")]
            near = get_close_matches(str(context["tag"]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
            text = f"{'.'.join([*path, 'kind'])} = {context['tag']!r} does not exist; {hint}"
        case "union_tag_not_found":
            text = f"{'.'.join(path)} has no kind; name it as well, as in {'.'.join([*path, 'kind'])}=…"
        case "missing":
            text = f"{'.'.join(path)} is missing"
        case _:
            reason = first["msg"][0].lower() + first["msg"][1:]
            text = f"{'.'.join(path)}: {reason}, got {first['input']!r}"
    return text + (f" (and {len(more)} more)" if more else "")


def _as_written(loc: tuple[int | str, ...], raw: Any) -> list[str]:
    """``loc`` without the union tags that pydantic adds and the user never wrote."""
    path: list[str] = []
    place = raw
    for position, key in enumerate(loc):
        inside = (isinstance(place, dict) and key in place) or (
            isinstance(place, list) and isinstance(key, int) and key < len(place)
        )
        if inside:
            place = place[key]
            path.append(str(key))
        elif position == len(loc) - 1 and not _is_tag(place, key):
            path.append(str(key))
    return path


def _is_tag(place: Any, key: int | str) -> bool:
    return isinstance(place, dict) and place.get("kind") == key
