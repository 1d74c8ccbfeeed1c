"""Settings of the data: where texts come from, how they are divided."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from feddistill.config import presets
from feddistill.errors import ConfigError
from feddistill.settings_model import Setting


class EmbeddedSource(Setting):
    """A text set that is part of the package."""

    kind: Literal["embedded"] = "embedded"
    name: Literal["wordnet_topics", "sotu_eras"] = "wordnet_topics"


class Columns(Setting):
    """Which column of a table is what."""

    text_column: str = "text"
    label_column: str | None = "label"
    """``null`` for texts without labels."""
    source_column: str | None = None
    """Where each text is from; what ``partition: {kind: by_source}`` divides by."""
    prompt_column: str | None = None
    """Column with the prompt before each text (``causal_lm``); see ``language.completion_only``."""
    question_column: str | None = None
    """Column with the question about each text, which is the passage (``question_answering``)."""
    answers_column: str = "answers"
    """Column with the answers (``question_answering``) in SQuAD's form, ``{text: [...], answer_start:
    [...]}``."""

    @model_validator(mode="after")
    def _one_before(self) -> Self:
        if self.prompt_column is not None and self.question_column is not None:
            raise ConfigError("prompt_column and question_column stand both before a text: name one")
        return self


class FileSource(Columns):
    """Local files: csv, tsv, jsonl, json, parquet, or txt (a text a line)."""

    kind: Literal["files"] = "files"
    path: Path
    """A file, or a folder of files of one format (read in the order of their names)."""


class HubSource(Columns):
    """A data set of the Hugging Face hub by name, or a local folder in the same layout."""

    kind: Literal["hub"] = "hub"
    name: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    """A commit of the data set; without one, the hub's newest."""


class PresetSource(Setting):
    """A benchmark by name (``docs/evaluation.md``): where it is and what its columns mean is known."""

    kind: Literal["preset"] = "preset"
    name: str
    split: str = "train"
    """As the hub calls it. Labels of ``test`` splits may be hidden: their texts can be a public set."""
    path: Path | None = None
    """A local folder in the hub's layout; ``null`` for the hub."""
    revision: str | None = None
    """A commit of the data set; without one, the hub's newest."""

    @model_validator(mode="after")
    def _exists(self) -> Self:
        preset = presets.find(self.name)
        if preset.kind not in ("classification", "language", "question_answering"):
            raise ConfigError(f"{self.name} has no texts to learn classes, language or answers from")
        if self.split not in preset.splits:
            raise ConfigError(f"{self.name} has no split {self.split!r}; it has {', '.join(preset.splits)}")
        return self


Source = Annotated[EmbeddedSource | FileSource | HubSource | PresetSource, Field(discriminator="kind")]


class Part(Setting):
    """One part of the data: from a source of its own, or carved from ``data.source``."""

    source: Source | None = None
    """``null`` takes the part from ``data.source``."""
    size: int | None = Field(default=None, ge=1)
    """Examples, drawn at random; ``null`` for all of an own source, or for all that the others leave of
    ``data.source``."""


class ProxyPart(Part):
    """The public texts that every client answers and the student learns from."""

    labelled: int = Field(default=0, ge=0)
    """How many of them the server has labels for; the others' are thrown away as they are read."""


class IidPartition(Setting):
    """Every client draws from the same pool."""

    kind: Literal["iid"] = "iid"
    clients: int = Field(default=4, ge=1)


class DirichletPartition(Setting):
    """Label skew: each class is divided over the clients by a Dirichlet draw.

    Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019.
    """

    kind: Literal["dirichlet"] = "dirichlet"
    clients: int = Field(default=4, ge=1)
    alpha: float = Field(default=0.3, gt=0)
    """Small is skewed: 0.1 leaves a client one or two classes, 100 is nearly IID."""
    min_examples: int = Field(default=50, ge=1)
    """Draw again until every client has this many."""


class BySourcePartition(Setting):
    """A client for each value of the source column: a domain, an era, a hospital."""

    kind: Literal["by_source"] = "by_source"


class QuantityPartition(Setting):
    """The same mixture of classes, sizes from a Dirichlet draw."""

    kind: Literal["quantity"] = "quantity"
    clients: int = Field(default=4, ge=1)
    alpha: float = Field(default=0.5, gt=0)
    min_examples: int = Field(default=50, ge=1)
    """Draw again until every client has this many."""


class GivenPartition(Setting):
    """Each client has files of its own; ``data.source`` is then not divided among clients."""

    kind: Literal["given"] = "given"
    sources: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")], Source] = Field(min_length=1)
    """Source by client name."""


class RemotePartition(Setting):
    """Each client reads its own texts, where it is; the server has none of them (``docs/deployment.md``)."""

    kind: Literal["remote"] = "remote"
    names: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")], ...] = Field(min_length=1)
    """Who takes part."""
    keys: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = Field(default_factory=dict)
    """Public key by name (``feddistill keys``), of all clients or of none: what a client sends must then be
    signed by it."""


Partition = Annotated[
    IidPartition
    | DirichletPartition
    | BySourcePartition
    | QuantityPartition
    | GivenPartition
    | RemotePartition,
    Field(discriminator="kind"),
]


class DataConfig(Setting):
    """Private, proxy, validation and test texts."""

    source: Source | None = EmbeddedSource()
    """Where every part comes from that names no source of its own."""
    labels: tuple[str, ...] | None = Field(default=None, min_length=2)
    """The classes in order; ``null`` for those of ``data.source``, or without one of the test set, sorted.
    Of ``causal_lm``: topics or the like, if there are any, which ``dirichlet`` divides by."""
    private: Part = Part()
    proxy: ProxyPart = ProxyPart()
    validation: Part = Part()
    test: Part = Part()
    partition: Partition = DirichletPartition()
    exclude_clients: tuple[str, ...] = ()
    """Clients to exclude, e.g. ``client-2``. The others keep the texts they would have had."""
    histogram_epsilon: float | None = Field(default=None, gt=0)
    """Laplace noise of scale ``1/epsilon`` on the class counts that clients report; ``null`` for none.
    In a simulation the noise is drawn from the run's seed, which the server knows: it shows the effect on
    the result and protects nobody."""
