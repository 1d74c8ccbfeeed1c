"""Settings of clients, payload, aggregation, distillation, student and simulated attacks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Field, field_validator

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
    """Batches per optimiser step."""
    learning_rate: float = Field(default=1e-4, gt=0)
    head_learning_rate: float | None = Field(default=None, gt=0)
    """For a head with random weights; ``null`` for ``learning_rate``."""
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_ratio: float = Field(default=0.06, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay per step of an exponential moving average of the weights, which the training ends with; smaller
    in the first steps. 0: the last weights."""


class Codistillation(Setting):
    """From the second round on, clients learn from the last teacher and their private texts together."""

    enabled: bool = True
    epochs: float = Field(default=1.0, gt=0)
    """Epochs over private and proxy texts together, in each later round."""
    examples: int | None = Field(default=None, ge=1)
    """Proxy texts (``causal_lm``: blocks) in a round, drawn at random; ``null`` for all."""
    target: Literal["hard", "soft"] = "hard"
    """The teacher's likeliest class, or its whole distribution (default of all tasks but classification)."""
    head_learning_rate: float | None = Field(default=None, gt=0)
    """As in ``training``, for later rounds, when the head is trained already."""


class ClientsConfig(Setting):
    """The clients: their specialist models and the training of these."""

    models: tuple[ModelConfig, ...] = Field(default=(ModelConfig(),), min_length=1)
    """One for all clients, or several that are assigned to the clients in turn."""
    training: TrainingConfig = TrainingConfig()
    """In the first round, on private texts alone."""
    codistillation: Codistillation = Codistillation()
    eval_batch_size: int = Field(default=128, ge=1)
    """Texts (blocks) per forward pass in prediction and evaluation."""
    per_round: int | None = Field(default=None, ge=1)
    """Clients per round, drawn anew each time; ``null`` for all."""
    evaluate: bool = True
    """True to evaluate the clients' models in a simulation: a fifth of its time. ``local_only`` needs it."""


class PayloadConfig(Setting):
    """Compression of predictions for the upload (``docs/payload.md``)."""

    codec: Literal["dense", "topk", "threshold", "sampled"] = "dense"
    """``dense``: one byte for each of up to 256 classes (default of classification). ``topk``: ids and bytes
    of the ``k`` likeliest (default of other tasks). ``threshold``: of these, those of at least ``epsilon``.
    ``sampled``: ``samples`` random ids, for the rule ``mean_probs``."""
    k: int = Field(default=16, ge=1, le=4096)
    """Entries per row of the codec ``topk``, and at most of ``threshold``."""
    epsilon: float = Field(default=0.001, gt=0, lt=1)
    """For ``threshold``: less likely ids join the tail; rounded as probabilities are."""
    samples: int = Field(default=50, ge=1, le=255)
    """For ``sampled``: ids drawn for each row, with replacement."""
    compression: Literal["none", "zstd"] = "none"
    """``zstd`` needs the package zstandard."""
    shard_mib: float = Field(default=8, gt=0, le=32)
    """MiB of predictions, before compression, per message; longer uploads are split."""


if TYPE_CHECKING:
    AnyRule = Rule
    AnyAttack = Attack
else:  # a union of the classes in the table, discriminated by kind
    AnyRule = Annotated[
        Union[tuple(RULES.values())],  # noqa: UP007  X | Y takes no tuple
        Field(discriminator="kind"),
        BeforeValidator(named),
    ]
    AnyAttack = Annotated[
        Union[tuple(ATTACKS.values())],  # noqa: UP007  as above
        Field(discriminator="kind"),
        BeforeValidator(named),
    ]


class AggregationConfig(Setting):
    """How the server aggregates predictions into one teacher."""

    rule: AnyRule = MeanProbs()
    sharpen: float = Field(default=1.0, gt=0)
    """``q ~ q**sharpen`` after the rule (enhanced ERA): 1 leaves the teacher as it is."""
    nnm_byzantine: int | None = Field(default=None, ge=0)
    """Nearest-neighbour mixing before the rule, for this many Byzantine clients: each client's logits are
    replaced by the mean of those nearest to it, all clients but this many (Allouah et al., AISTATS 2023).
    ``null``: no mixing."""
    quorum: int | None = Field(default=None, ge=1)
    """Valid uploads that a round needs; ``null`` for all clients."""

    def check(self, clients: int) -> None:
        """Check that so many clients, and a quorum of them, suffice; else raise ``ConfigError``."""
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
        """Check that the predictions of so many clients can be aggregated; else raise ``ConfigError``."""
        self.rule.check(clients)
        if self.nnm_byzantine is not None and 2 * self.nnm_byzantine >= clients:
            raise ConfigError(
                f"aggregation.nnm_byzantine = {self.nnm_byzantine} must be fewer than half of the "
                f"{clients} clients"
            )


def _several(value: Any) -> Any:
    """One attack, or a list of them."""
    return value if isinstance(value, list | tuple) else [value]


TextStart = Literal["auto", "bos", "eos", "none"]


class LanguageConfig(Setting):
    """Settings of the tasks ``causal_lm`` and ``masked_lm``."""

    text_start: TextStart = "auto"
    """What a text begins with, in training, evaluation and the exported tokenizer. ``bos``: the tokenizer's
    bos (or cls) token, also at the beginning of each block. ``eos``: the token that ends the text before.
    ``none``: nothing; a text's first token is not predicted. ``auto``: the token that the tokenizer itself
    puts before a text; if it puts none, ``bos`` for a model from scratch whose tokenizer has a bos token of
    its own, else ``eos``."""
    completion_only: bool = False
    """True to train on, predict and evaluate the completion's tokens alone, not the prompt's."""
    position_stride: int = Field(default=1, ge=1)
    """Predict every n-th of these tokens of the proxy texts; the others have their labels alone."""
    chat_template: str | None = None
    """Jinja template that writes the conversations of ``messages_column`` as text, or the path of a file with
    it; ``null`` for that of the student's tokenizer. With ``completion_only`` the assistant's turns are the
    completions. The exported tokenizer has the template."""
    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    """For ``masked_lm``: the share of tokens that are masked."""
    alignment: Literal["spans", "mined"] = "spans"
    """How predictions over another tokenizer's tokens are projected to the student's: by the byte spans of
    tokens or, for comparison, by edit distances as in FedMKT."""

    @field_validator("chat_template")
    @classmethod
    def _read(cls, template: str | None) -> str | None:
        """Replace a path by the file's text, which the run stores and sends to clients."""
        if template is None or "{" in template:
            return template
        try:
            return Path(template).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise ConfigError(f"language.chat_template: cannot read {template!r}: {reason}") from None


class QuestionAnsweringConfig(Setting):
    """Settings of the task ``question_answering``."""

    allow_no_answer: bool = False
    """True if a question may have no answer in its passage (SQuAD 2.0). Tokenizers need a cls token."""
    max_answer_tokens: int = Field(default=30, ge=1)
    """Longest answer, in tokens, in evaluation."""


class SimulateConfig(Setting):
    """Simulated attacks. Everything else runs as without them."""

    attack: Annotated[tuple[AnyAttack, ...], BeforeValidator(_several)] = ()
    """Byzantine clients, ``{kind: second_best, clients: 2}``, or a list of such groups."""


class DistillConfig(Setting):
    """The student's loss, ``kd_weight * T**2 * D(teacher, student) + (1 - kd_weight) * CE(labels)``."""

    kind: Literal["forward_kl", "reverse_kl", "jsd", "tvd", "skew_forward_kl", "skew_reverse_kl", "mae"] = (
        "forward_kl"
    )
    """``mae``: mean absolute difference of centred logits, without a temperature (FedMD)."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """For ``jsd``: 0 is forward, 1 reverse KL."""
    temperature: float = Field(default=2.0, gt=0)
    """1 for all tasks but classification, because predictions are compressed at temperature 1."""
    kd_weight: float = Field(default=0.5, ge=0, le=1)
    """Weight of the divergence for proxy texts with a label; for those without the weight is 1. In
    ``causal_lm`` the next token is the label."""
    teacher_history: int = Field(default=0, ge=0)
    """Number of earlier rounds' teachers that the student also learns from, in the same number of steps."""
    rollback: bool = True
    """True to go back to the best student after a round that made it worse on validation."""


class StudentConfig(Setting):
    """The student: its model and its training."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    later_head_learning_rate: float | None = Field(default=None, gt=0)
    """``head_learning_rate`` in later rounds, when the head is trained already."""
