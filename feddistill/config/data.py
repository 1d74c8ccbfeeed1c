"""Settings of the data: sources of texts, sizes of the sets, partition among clients."""

from typing import Annotated, Literal, Self

from pydantic import Field, StrictInt, field_validator, model_validator

from feddistill.config import presets
from feddistill.errors import ConfigError
from feddistill.settings_model import LocalPath, PathOrName, Setting


class EmbeddedSource(Setting):
    """A text set that ships with the package."""

    kind: Literal["embedded"] = "embedded"
    name: Literal["wordnet_topics", "sotu_eras"] = "wordnet_topics"


class Columns(Setting):
    """Names of the columns of a table; ``a.b[0]`` is inside a nested column."""

    text_column: str = "text"
    label_column: str | None = "label"
    """``null`` for texts without labels."""
    source_column: str | None = None
    """Origin of each text (a domain, an era, a hospital), for ``partition: {kind: by_source}``."""
    prompt_column: str | None = None
    """Column with the prompt before each text (``causal_lm``, ``masked_lm``); see
    ``language.completion_only``."""
    messages_column: str | None = None
    """Column with conversations instead of texts (language models): lists of ``{role, content}``, which the
    student's chat template writes as text; see ``language.chat_template``."""
    prompt_separator: str = ""
    """Text between prompt and text, as part of the prompt: ``" "``, ``"\\n"``."""
    pair_column: str | None = None
    """Column with the second text of each example (``classification``). Models read the two as their
    tokenizer pairs them, with token types if they have them; of a pair that is too long, the longer text is
    cut. Query-only models get one text with a line break between the two."""
    question_column: str | None = None
    """Column with the question about each text, which is then the passage (``question_answering``)."""
    answers_column: str = "answers"
    """Column with the answers (``question_answering``) in SQuAD's form, ``{text: [...], answer_start:
    [...]}``."""
    no_label: StrictInt | Literal[False] | str | None = None
    """The label of texts without a label, beside missing ones: ``-1``, ``unknown``; ``false`` if every value
    is a class, also -1. ``null``: -1 is an error, unless the column is a ``ClassLabel`` of ``datasets``, in
    which it means none."""

    @model_validator(mode="after")
    def _one_before(self) -> Self:
        given = [key for key in ("prompt_column", "question_column", "pair_column") if getattr(self, key)]
        if len(given) > 1:
            raise ConfigError(f"set {' or '.join(given)}, not both")
        if self.prompt_separator and self.prompt_column is None:
            raise ConfigError("prompt_separator needs prompt_column")
        return self

    @model_validator(mode="after")
    def _messages_alone(self) -> Self:
        others = {"text_column": "text", "prompt_column": None, "question_column": None, "pair_column": None}
        beside = [name for name, default in others.items() if getattr(self, name) != default]
        if self.messages_column is not None and beside:
            raise ConfigError(f"set messages_column or {beside[0]}, not both")
        return self


class FileSource(Columns):
    """Local files: csv, tsv, jsonl, json, parquet, or txt (one text per line); text files also as ``.gz``."""

    kind: Literal["files"] = "files"
    path: LocalPath
    """A file, or a folder of files of one format, read in the order of their names."""
    encoding: str | None = None
    """Encoding of text files by Python's name: ``latin-1``, ``shift_jis``. ``null``: UTF-8, or UTF-16 or
    UTF-32 if a byte order mark says so."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """Character between the columns of csv and tsv; ``null`` for a comma (csv) or a tab (tsv)."""
    quoting: Literal["standard", "none"] | None = None
    """``standard``: fields of csv and tsv may stand in quotation marks; ``none``: marks are text. ``null``:
    ``none`` if tabs separate the columns, else ``standard``."""

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, encoding: str | None) -> str | None:
        try:
            if encoding is not None:
                b"-".decode(encoding)
        except UnicodeError:  # one byte is no character of it
            pass
        except (LookupError, ValueError):
            raise ConfigError(f"encoding = {encoding!r} is no encoding of texts that Python knows") from None
        return encoding

    @field_validator("delimiter")
    @classmethod
    def _separates(cls, delimiter: str | None) -> str | None:
        if delimiter is not None and delimiter in '"\r\n\ufeff':
            raise ConfigError(f"delimiter = {delimiter!r} cannot separate columns")
        return delimiter


class HubSource(Columns):
    """A data set of the Hugging Face hub by name, or a local folder in the same layout."""

    kind: Literal["hub"] = "hub"
    name: PathOrName
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    """A commit of the data set; ``null`` for the newest."""


class PresetSource(Setting):
    """A benchmark by name (``docs/evaluation.md``), with known location and columns."""

    kind: Literal["preset"] = "preset"
    name: str
    split: str = "train"
    """Name on the hub. A ``test`` split may have no labels; its texts can still be the proxy set."""
    path: LocalPath | None = None
    """A local folder in the hub's layout; ``null`` to load from the hub."""
    revision: str | None = None
    """A commit of the data set; ``null`` for the newest."""

    @model_validator(mode="after")
    def _exists(self) -> Self:
        preset = presets.find(self.name)
        if preset.kind not in ("classification", "language", "question_answering"):
            raise ConfigError(f"{self.name} has no texts to train on")
        if self.split not in preset.splits:
            raise ConfigError(f"{self.name} has no split {self.split!r}; it has {', '.join(preset.splits)}")
        return self


Source = Annotated[EmbeddedSource | FileSource | HubSource | PresetSource, Field(discriminator="kind")]


class Part(Setting):
    """One set of texts: from its own source, or drawn from ``data.source``."""

    source: Source | None = None
    """``null`` to draw from ``data.source``."""
    size: int | None = Field(default=None, ge=1)
    """Examples, drawn at random; ``null`` for all of its own source, or for all of ``data.source`` that the
    other sets leave."""


class ProxyPart(Part):
    """The public texts that every client predicts and the student learns from."""

    labelled: Annotated[int, Field(ge=0)] | Literal["all"] = 0
    """Number of proxy texts whose labels (or answers) the server has; other labels are dropped when the data
    are read. ``all``: as the source has them, in which some rows may have none."""


class IidPartition(Setting):
    """Every client has a random share of the pool."""

    kind: Literal["iid"] = "iid"
    clients: int = Field(default=4, ge=1)


class DirichletPartition(Setting):
    """Label skew: each class is divided among the clients by a Dirichlet draw.

    Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019.
    """

    kind: Literal["dirichlet"] = "dirichlet"
    clients: int = Field(default=4, ge=1)
    alpha: float = Field(default=0.3, gt=0)
    """Smaller is more skewed: 0.1 leaves a client one or two classes, 100 is nearly IID."""
    min_examples: int = Field(default=50, ge=1)
    """Draw again until every client has this many examples."""


class BySourcePartition(Setting):
    """One client for each value of the source column: a domain, an era, a hospital."""

    kind: Literal["by_source"] = "by_source"


class QuantityPartition(Setting):
    """Quantity skew: sizes from a Dirichlet draw, with the same distribution of classes."""

    kind: Literal["quantity"] = "quantity"
    clients: int = Field(default=4, ge=1)
    alpha: float = Field(default=0.5, gt=0)
    min_examples: int = Field(default=50, ge=1)
    """Draw again until every client has this many examples."""


class GivenPartition(Setting):
    """Each client has its own source; ``data.source`` is not divided among clients."""

    kind: Literal["given"] = "given"
    sources: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")], Source] = Field(min_length=1)
    """Source by client name."""


class RemotePartition(Setting):
    """Each client reads its own texts on its own machine; the server has none (``docs/deployment.md``)."""

    kind: Literal["remote"] = "remote"
    names: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")], ...] = Field(min_length=1)
    """Names of the clients."""
    keys: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = Field(default_factory=dict)
    """Public key by name (``feddistill keys``), for all clients or for none. With keys, uploads must be
    signed."""


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
    """Source of every set without its own source."""
    labels: tuple[str, ...] | None = Field(default=None, min_length=2)
    """The classes in order; ``null`` for those of ``data.source`` (without one, of the test set), sorted.
    For ``causal_lm``: optional topics, by which ``dirichlet`` divides the texts."""
    private: Part = Part()
    proxy: ProxyPart = ProxyPart()
    validation: Part = Part()
    test: Part = Part()
    partition: Partition = DirichletPartition()
    exclude_clients: tuple[str, ...] = ()
    """Clients to exclude, e.g. ``client-2``. The others keep the texts they would have had."""
    histogram_epsilon: float | None = Field(default=None, gt=0)
    """Laplace noise of scale ``1/epsilon`` on the class counts that clients report; ``null`` for no noise.
    For simulations: the noise comes from the run's seed, which the server knows, so that it shows the effect
    on the result but gives no privacy."""
