"""Settings of the training: the clients', the student's, and what joins them."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Field

from feddistill.aggregation.attacks import ATTACKS, Attack
from feddistill.aggregation.rules import RULES, MeanProbs, Rule
from feddistill.config.models import ModelConfig
from feddistill.errors import ConfigError
from feddistill.settings_model import Setting, named


class TrainingConfig(Setting):
    """AdamW by ``transformers.Trainer``."""

    epochs: float = Field(default=2.0, gt=0)
    batch_size: int = Field(default=16, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    """Batches summed into one step."""
    learning_rate: float = Field(default=1e-4, gt=0)
    head_learning_rate: float | None = Field(default=None, gt=0)
    """For a head that starts from random weights; ``null`` for ``learning_rate``."""
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_ratio: float = Field(default=0.06, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay a step of an exponential average of the weights, which the training ends with; the first steps
    decay faster. 0: the last weights."""


class Codistillation(Setting):
    """From the second round on, clients digest the last teacher together with their private texts."""

    enabled: bool = True
    epochs: float = Field(default=1.0, gt=0)
    """Passes over private and proxy texts together, in each later round."""
    examples: int | None = Field(default=None, ge=1)
    """Proxy texts (``causal_lm``: blocks) digested in a round, drawn at random; ``null`` for all of them."""
    target: Literal["hard", "soft"] = "hard"
    """The teacher's first choice, or its whole distribution (``causal_lm``: the default)."""
    head_learning_rate: float | None = Field(default=None, gt=0)
    """As in ``training``, for the later rounds, when the head is no longer random."""


class ClientsConfig(Setting):
    """The clients: their specialist models and how these learn."""

    models: tuple[ModelConfig, ...] = Field(default=(ModelConfig(),), min_length=1)
    """One for all, or several that are dealt out to the clients in turn."""
    training: TrainingConfig = TrainingConfig()
    """Of the first round, on private texts alone."""
    codistillation: Codistillation = Codistillation()
    eval_batch_size: int = Field(default=128, ge=1)
    """Texts (blocks) a forward pass when answering and evaluating."""
    per_round: int | None = Field(default=None, ge=1)
    """Clients that are asked in a round, drawn anew each time; ``null`` for all of them."""
    evaluate: bool = True
    """Whether a simulation evaluates the clients' models: a fifth of its time. ``local_only`` needs it."""


class PayloadConfig(Setting):
    """How answers are compressed for the wire (``docs/payload.md``)."""

    codec: Literal["dense", "topk", "threshold", "sampled"] = "dense"
    """``dense``: a byte for each of up to 256 classes (default of classification). ``topk``: ids and bytes of
    the ``k`` likeliest (default of ``causal_lm``).
    ``threshold``: of these, those of at least ``epsilon``. ``sampled``: ``samples`` random ids, for means."""
    k: int = Field(default=16, ge=1, le=4096)
    """Entries a row of the ``topk`` codec, and at most of ``threshold``."""
    epsilon: float = Field(default=0.001, gt=0, lt=1)
    """Of ``threshold``: what is less likely joins the tail; rounded as probabilities are."""
    samples: int = Field(default=50, ge=1, le=255)
    """Of ``sampled``: ids drawn for each row, with replacement."""
    compression: Literal["none", "zstd"] = "none"
    """``zstd`` needs the package zstandard."""
    shard_mib: float = Field(default=8, gt=0, le=32)
    """MiB of answers, before compression, that travel in one message; longer ones are cut."""


if TYPE_CHECKING:
    AnyRule = Rule
    AnyAttack = Attack
else:  # one of those in the table, told apart by its kind
    AnyRule = Annotated[
        Union[tuple(RULES.values())],  # noqa: UP007  X | Y takes no tuple
        Field(discriminator="kind"),
        BeforeValidator(named),
    ]
    AnyAttack = Annotated[
        Union[tuple(ATTACKS.values())],  # noqa: UP007  likewise
        Field(discriminator="kind"),
        BeforeValidator(named),
    ]


class AggregationConfig(Setting):
    """How the server makes one teacher of many answers."""

    rule: AnyRule = MeanProbs()
    sharpen: float = Field(default=1.0, gt=0)
    """``q ~ q**sharpen`` after the rule (enhanced ERA): 1 leaves the teacher as it is."""
    nnm_byzantine: int | None = Field(default=None, ge=0)
    """Nearest-neighbour mixing before the rule: each client becomes the mean of the logits of those nearest
    to it, all but so many (Allouah et al., AISTATS 2023). ``null`` does not mix."""
    quorum: int | None = Field(default=None, ge=1)
    """Valid answers a round needs; ``null`` for every client."""

    def check(self, clients: int) -> None:
        """Raise ``ConfigError`` where so few clients are too few, or so few of them as make a quorum."""
        self.fits(clients)
        if self.quorum is None:
            return
        if self.quorum > clients:
            raise ConfigError(f"aggregation.quorum = {self.quorum} exceeds the {clients} clients")
        try:
            self.fits(self.quorum)
        except ConfigError as error:
            raise ConfigError(f"aggregation.quorum = {self.quorum} is too few: {error}") from None

    def fits(self, clients: int) -> None:
        """Raise ``ConfigError`` where no teacher can be made of the answers of so few clients."""
        self.rule.check(clients)
        if self.nnm_byzantine is not None and 2 * self.nnm_byzantine >= clients:
            raise ConfigError(
                f"aggregation.nnm_byzantine = {self.nnm_byzantine} must be fewer than half of the "
                f"{clients} clients"
            )


def _several(value: Any) -> Any:
    """One attack, or a list of them."""
    return value if isinstance(value, list | tuple) else [value]


class LanguageConfig(Setting):
    """Of the tasks ``causal_lm`` and ``masked_lm``."""

    completion_only: bool = False
    """True to learn, answer and evaluate the tokens of the completion alone, not those of the prompt."""
    position_stride: int = Field(default=1, ge=1)
    """Answer every n-th of these tokens of the proxy texts; the others have their labels alone."""
    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    """Of ``masked_lm``, the share of the tokens that are hidden."""
    alignment: Literal["spans", "mined"] = "spans"
    """How what is said in other tokens is said in the student's: by the bytes that tokens stand for, or, to
    compare with, by edit distances as FedMKT does."""


class QuestionAnsweringConfig(Setting):
    """Settings of the task ``question_answering``."""

    allow_no_answer: bool = False
    """Whether a question may have no answer in its passage, as in SQuAD 2.0. Tokenizers need a cls token."""
    max_answer_tokens: int = Field(default=30, ge=1)
    """Tokens of the longest answer that a model is asked for when it is evaluated."""


class SimulateConfig(Setting):
    """What goes wrong on purpose, to see what comes of it. Everything else runs as it would for real."""

    attack: Annotated[tuple[AnyAttack, ...], BeforeValidator(_several)] = ()
    """Clients that lie, ``{kind: second_best, clients: 2}``, or a list of such groups."""


class DistillConfig(Setting):
    """The student's loss, ``kd_weight * T**2 * D(teacher, student) + (1 - kd_weight) * CE(labels)``."""

    kind: Literal["forward_kl", "reverse_kl", "jsd", "tvd", "skew_forward_kl", "skew_reverse_kl", "mae"] = (
        "forward_kl"
    )
    """``mae``: mean absolute difference of centred logits, without a temperature (FedMD)."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """Of ``jsd``: 0 is forward, 1 reverse KL."""
    temperature: float = Field(default=2.0, gt=0)
    """Of ``causal_lm`` 1, as answers are compressed at that."""
    kd_weight: float = Field(default=0.5, ge=0, le=1)
    """Weight of the divergence where a proxy text has a label; where it has none the weight is 1. In
    ``causal_lm`` the next token is the label."""
    teacher_history: int = Field(default=0, ge=0)
    """Earlier rounds' teachers that the student learns from besides the newest, in as many steps."""
    rollback: bool = True
    """Go back to the best student after a round that made it worse on validation."""


class StudentConfig(Setting):
    """The student: its model, and how it learns in each round."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    later_head_learning_rate: float | None = Field(default=None, gt=0)
    """``head_learning_rate`` of the later rounds, when the head is no longer random."""
