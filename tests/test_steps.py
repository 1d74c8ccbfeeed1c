"""An optimiser step has one gradient, however its examples are divided into batches."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForQuestionAnswering, GPT2Config, GPT2LMHeadModel

from feddistill.accounting import FlopMeter
from feddistill.config.training import DistillConfig, TrainingConfig
from feddistill.modelio.packing import pack
from feddistill.modelio.padding import pad
from feddistill.modelio.passages import QAWindow
from feddistill.models.specialist import MeanPoolClassifier
from feddistill.training import TextLoss, TrainingExamples, fit
from feddistill.training.blocks import Masking, examples_of
from feddistill.training.losses import Batch, BlockLoss, MaskedLoss, QuestionLoss
from feddistill.training.spans import NO_TEACHER, SpanExamples
from feddistill.training.trainer import ExampleTrainer
from feddistill.types import NO_LABEL
from feddistill_kernels import topk_compress

V, CLASSES = 41, 3
LENGTHS = (3, 14, 5, 9, 4, 12, 7, 6)
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **STILL}
DISTILL = DistillConfig(temperature=2.0, kd_weight=0.3)


def bert(kind):
    torch.manual_seed(0)
    return kind(BertConfig(**SMALL, intermediate_size=32, max_position_embeddings=16))


def texts(distill):
    tokens = [torch.randint(5, V, (length,)).tolist() for length in LENGTHS]
    labels = torch.tensor([0, NO_LABEL, 2, NO_LABEL, 1, 0, NO_LABEL, 2])
    teacher = torch.randn(len(tokens), CLASSES).log_softmax(-1)
    mask = torch.tensor([True, True, False, False, True, False, True, False])  # the fourth has neither
    examples = (
        TrainingExamples(tokens, labels, teacher, mask) if distill else TrainingExamples(tokens, labels)
    )
    torch.manual_seed(0)
    encoder = bert(BertForMaskedLM).bert
    return examples, TextLoss(examples, distill), MeanPoolClassifier(encoder, 16, CLASSES, dropout=0.0)


def fedmd(distill):
    return texts(DISTILL.model_copy(update={"kind": "mae"}) if distill else None)


def blocks(masked, distill):
    parts = pack([torch.randint(5, V, (length,)).tolist() for length in (40, 11)], end=2, length=8)
    rows = torch.arange(1, parts.rows - 9, 3)  # the last block has none
    teacher = topk_compress(torch.randn(len(rows), V), 4) if distill else None
    examples = examples_of(parts, teacher, rows if distill else None)
    if masked:
        loss = MaskedLoss(examples, distill, V, False, Masking(1, 0.4), seed=5)
        return examples, loss, bert(BertForMaskedLM)
    torch.manual_seed(0)
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    gpt2 = GPT2Config(vocab_size=V, n_positions=16, n_embd=16, n_layer=1, n_head=2, **still)
    return examples, BlockLoss(examples, distill, V, False), GPT2LMHeadModel(gpt2)


def questions(distill):
    edges = [np.arange(length) for length in LENGTHS]
    windows = [QAWindow(torch.randint(5, V, (len(e),)).tolist(), [0] * len(e), e, e + 1) for e in edges]
    labels = torch.full((len(windows), 2), NO_LABEL)
    labels[:5] = torch.tensor([1, 2])
    labels[5:] = torch.tensor([NO_LABEL, 0])  # of some an answer's end alone
    pairs = torch.tensor([0, NO_TEACHER, 1, NO_TEACHER, 2, 3, NO_TEACHER, NO_TEACHER])
    teacher = topk_compress(torch.randn(8, V), 3)
    examples = SpanExamples(windows, labels, teacher, pairs) if distill else SpanExamples(windows, labels)
    return examples, QuestionLoss(examples, distill, types=True), bert(BertForQuestionAnswering)


TASKS = {
    "texts": texts,
    "fedmd": fedmd,
    "causal": partial(blocks, False),
    "masked": partial(blocks, True),
    "questions": questions,
}


def gradients(task, distill, batch_size, accumulation, proximal=0.0):
    """The gradient of one optimiser step over all examples, the logged loss, and the examples."""
    torch.manual_seed(1)
    examples, loss, model = TASKS[task](distill)
    found = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: found.update({name: p.grad.clone()})
        )
    trained = fit(
        model,
        examples,
        TrainingConfig(batch_size=batch_size, gradient_accumulation=accumulation),
        loss=loss,
        seed=0,
        bf16=False,
        pad_id=0,
        head=set(),
        meter=FlopMeter(model),
        steps=1,
        proximal=proximal,
    )
    return torch.cat([grad.double().flatten() for _, grad in sorted(found.items())]), trained.loss, examples


@pytest.mark.parametrize("distill", [None, DISTILL], ids=["labels", "distilled"])
@pytest.mark.parametrize("task", TASKS)
def test_a_step_does_not_depend_on_its_batches(task, distill):
    whole, loss, examples = gradients(task, distill, 64, 1)
    for batch_size in (len(examples.tokens) - 1, 2, 1):
        accumulation = -(-len(examples.tokens) // batch_size)
        parts, mean, _ = gradients(task, distill, batch_size, accumulation)
        assert float((parts - whole).norm() / whole.norm()) < 1e-6
        assert mean == pytest.approx(loss, rel=1e-6)


def test_the_proximal_term_is_added_once_a_step(monkeypatch):
    def apart(trainer):
        return [weight.detach() - 0.1 for weight in trainer._trained()]

    monkeypatch.setattr(ExampleTrainer, "start", property(apart, lambda *_: None), raising=False)
    whole, parts = (gradients("texts", None, size, 8 // size, proximal=3.0)[0] for size in (8, 2))
    assert float((parts - whole).norm() / whole.norm()) < 1e-6
    assert float((whole - gradients("texts", None, 8, 1)[0]).abs().median()) == pytest.approx(0.3, rel=1e-4)


def test_a_step_without_a_term_has_a_gradient_of_zero():
    def nothing(distill):
        examples, _, model = blocks(True, distill)
        return examples, MaskedLoss(examples, distill, V, False, Masking(1, 0.0), seed=5), model

    TASKS["nothing"] = nothing
    try:
        found, loss, _ = gradients("nothing", None, 2, 2)
    finally:
        del TASKS["nothing"]
    assert loss == 0
    assert float(found.abs().max()) == 0


@pytest.mark.parametrize("task", TASKS)
def test_terms_are_what_has_a_label_or_a_teacher(task):
    torch.manual_seed(1)
    examples, loss, _ = TASKS[task](DISTILL)
    if task in ("causal", "masked"):
        labels = torch.full_like(examples.labels, NO_LABEL)
        labels[:3] = examples.labels[:3]
        loss.examples = replace(examples, labels=labels)
    rows = torch.arange(len(examples.tokens))
    batch = Batch(*pad(examples.tokens, 0), rows)
    terms = {loss(replace(batch, step=step)).count for step in range(20)}
    taught = {"texts": 7, "fedmd": 7, "causal": 17, "questions": 14}
    if task == "masked":  # in some steps a block's masks are those that the teacher predicts
        assert max(terms) > 3
    else:
        assert terms == {taught[task]}
