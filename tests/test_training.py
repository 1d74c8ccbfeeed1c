"""Training: the loss is the formula, a batch's rows stay with their examples, a seed decides the outcome."""

import pytest
import torch
from torch.nn import functional

from feddistill import models
from feddistill.accounting import FlopMeter
from feddistill.config.models import HubModel, ModelConfig
from feddistill.config.training import DistillConfig, TrainingConfig
from feddistill.modelio.inference import answer
from feddistill.modelio.padding import pad
from feddistill.training import TextLoss, TrainingExamples, example_loss, fit, steps_of
from feddistill.types import NO_LABEL

ROWS, CLASSES = 6, 4


def textbook(logits, labels, teacher, taught, config):
    """Row by row in float64, as the docstring has it."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(labels)):
        z, q = logits[row].double(), (teacher[row].double() / config.temperature).softmax(-1)
        kd = config.temperature**2 * (q * (q.log() - (z / config.temperature).log_softmax(-1))).sum()
        labelled = labels[row] != NO_LABEL
        ce = -z.log_softmax(-1)[labels[row]] if labelled else 0.0
        weight = 0.0 if not taught[row] else (config.kd_weight if labelled else 1.0)
        total = total + weight * kd + (1 - weight) * ce
    return total


@pytest.mark.parametrize("kd_weight", [0.0, 0.3, 1.0])
def test_the_loss_is_the_formula(kd_weight):
    torch.manual_seed(0)
    config = DistillConfig(temperature=2.0, kd_weight=kd_weight)
    logits = torch.randn(ROWS, CLASSES, dtype=torch.float64, requires_grad=True)
    single = logits.detach().float().requires_grad_()
    teacher = torch.randn(ROWS, CLASSES).log_softmax(-1)
    labels = torch.tensor([0, NO_LABEL, 2, 3, NO_LABEL, 1])
    taught = torch.tensor([True, True, False, True, True, False])
    truth = textbook(logits, labels, teacher, taught, config)
    got = example_loss(single, labels, teacher, taught, config)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)
    truth.backward()
    got.backward()
    torch.testing.assert_close(single.grad.double(), logits.grad, rtol=1e-4, atol=1e-6)


def test_without_a_teacher_the_loss_is_cross_entropy():
    logits, labels = torch.randn(ROWS, CLASSES), torch.arange(ROWS) % CLASSES
    torch.testing.assert_close(
        example_loss(logits, labels, None, None, None),
        functional.cross_entropy(logits, labels, reduction="sum"),
    )


@pytest.fixture
def specialist(tiny_model):
    config = ModelConfig(source=HubModel(name=str(tiny_model)), max_tokens=16)
    return models.build(config, CLASSES, 0, "m")


TEXTS = tuple(
    f"{noun} that {verb}"
    for noun in ("a bird", "a stone", "the city", "food")
    for verb in ("moves", "is old", "sings")
)
LABELS = torch.arange(len(TEXTS)) // 3


def train(specialist, examples, seed=0, ema=0.0, distill=None, **more):
    config = TrainingConfig(epochs=1, batch_size=4, learning_rate=1e-3, head_learning_rate=1e-2, ema=ema)
    return fit(
        specialist.model,
        examples,
        config,
        loss=TextLoss(examples, distill),
        seed=seed,
        bf16=False,
        pad_id=specialist.pad_id,
        head=models.head_parameters(specialist.model),
        meter=FlopMeter(specialist.model),
        **more,
    )


def answers(specialist, batch_size=5):
    return answer(
        specialist.model,
        specialist.encode(TEXTS),
        CLASSES,
        pad_id=specialist.pad_id,
        batch_size=batch_size,
        bf16=False,
        meter=FlopMeter(specialist.model),
    )


def test_a_model_learns_its_labels(specialist):
    train(specialist, TrainingExamples(specialist.encode(TEXTS), LABELS), steps=60)
    assert (answers(specialist).argmax(-1) == LABELS).float().mean() > 0.9


def test_a_model_learns_its_teacher_and_each_text_its_own_row(specialist):
    nothing = torch.full((len(TEXTS),), NO_LABEL)
    teacher = (8.0 * functional.one_hot(LABELS, CLASSES)).log_softmax(-1)
    examples = TrainingExamples(specialist.encode(TEXTS), nothing, teacher)
    train(specialist, examples, steps=60, distill=DistillConfig(temperature=1.0))
    assert (answers(specialist).argmax(-1) == LABELS).float().mean() > 0.9


def test_the_seed_decides_the_outcome(tiny_model):
    def outcome(seed):
        config = ModelConfig(source=HubModel(name=str(tiny_model)), max_tokens=16)
        built = models.build(config, CLASSES, 0, "m")
        train(built, TrainingExamples(built.encode(TEXTS), LABELS), seed=seed)
        return answers(built)

    assert torch.equal(outcome(3), outcome(3))
    assert not torch.equal(outcome(3), outcome(4))


def test_a_training_can_end_with_the_average_of_its_weights(tiny_model):
    """Of steps from equal weights with equal batches; the decays are those of the formula."""

    def weights(steps, ema=0.0):
        config = ModelConfig(source=HubModel(name=str(tiny_model)), max_tokens=16, freeze_embeddings=True)
        specialist = models.build(config, CLASSES, 0, "m")
        specialist.model.eval()  # no dropout: steps do not depend on how many come after
        constant = {"schedule": "constant_with_warmup", "warmup_ratio": 0.0}
        settings = TrainingConfig(batch_size=4, learning_rate=1e-3, ema=ema, **constant)
        examples = TrainingExamples(specialist.encode(TEXTS), LABELS)
        fit(
            specialist.model,
            examples,
            settings,
            loss=TextLoss(examples, None),
            seed=0,
            bf16=False,
            pad_id=specialist.pad_id,
            head=set(),
            meter=FlopMeter(specialist.model),
            steps=steps,
        )
        return {name: p.detach().clone() for name, p in specialist.model.named_parameters()}

    config = ModelConfig(source=HubModel(name=str(tiny_model)), max_tokens=16)
    mean = dict(models.build(config, CLASSES, 0, "m").model.named_parameters())
    for step in range(1, 4):  # the decay is 2 / 11, then 0.25
        decay, last = min(0.25, (1 + step) / (10 + step)), weights(step)
        mean = {name: decay * mean[name] + (1 - decay) * p for name, p in last.items()}
    found = weights(3, ema=0.25)
    for name, p in found.items():
        torch.testing.assert_close(p, mean[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(p, last[name], atol=1e-5) for name, p in found.items())
    assert torch.equal(
        found["encoder.embeddings.word_embeddings.weight"], last["encoder.embeddings.word_embeddings.weight"]
    )


def test_answers_do_not_depend_on_the_batch(specialist):
    whole, alone = answers(specialist), answers(specialist, batch_size=1)
    torch.testing.assert_close(whole, alone)
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(len(TEXTS)))


def test_steps_are_counted_as_the_epochs_say():
    assert steps_of(TrainingConfig(epochs=2, batch_size=16), 33) == 6
    assert steps_of(TrainingConfig(epochs=0.01, batch_size=16), 33) == 1
    assert steps_of(TrainingConfig(epochs=1, batch_size=16, gradient_accumulation=2), 64) == 2


def test_every_step_is_told(specialist):
    seen = []
    train(
        specialist,
        TrainingExamples(specialist.encode(TEXTS), LABELS),
        steps=5,
        on_step=lambda *a: seen.append(a),
    )
    assert seen == [(i, 5) for i in range(1, 6)]


def test_batches_are_padded_to_a_multiple_of_four():
    ids, mask = pad([[1, 2, 3], [4] * 9], pad_id=0)
    assert ids.shape == mask.shape == (2, 12)
    assert mask.sum(1).tolist() == [3, 9]


@pytest.mark.parametrize(("max_tokens", "kind"), [(16, "eager"), (48, "sdpa")])
def test_operations_are_those_of_the_matrices(tiny_model, max_tokens, kind):
    config = ModelConfig(source=HubModel(name=str(tiny_model)), max_tokens=max_tokens)
    model = models.build(config, CLASSES, 0, "m").model
    assert model.encoder.config._attn_implementation == kind
    meter = FlopMeter(model)
    meter.add(2, 8, training=False)
    hidden, inner, layers = 32, 64, 2
    matrices = layers * (4 * hidden * hidden + 2 * hidden * inner)
    attention = layers * 2 * 8 * hidden
    # the head reads one pooled vector a text; the pooler that the encoder brings along is counted too
    expected = 2 * 2 * (8 * (matrices + attention) + hidden * CLASSES)
    assert expected <= meter.flops <= expected + 2 * 2 * hidden * hidden
    forward = meter.flops
    meter.add(2, 8, training=True)
    assert 2.5 * forward < meter.flops - forward < 3.1 * forward
