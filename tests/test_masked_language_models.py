"""Masked language models: what is hidden, what is learned, a run of two architectures."""

import math
import re
from dataclasses import replace

import language_fixtures
import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM

from feddistill import release, report
from feddistill.client.client import ClientGroup
from feddistill.config import parse
from feddistill.config.models import ModelConfig
from feddistill.config.training import DistillConfig
from feddistill.errors import ConfigError, ModelError
from feddistill.modelio.outputs import masked_states
from feddistill.modelio.packing import pack
from feddistill.models import causal
from feddistill.progress import NoProgress
from feddistill.runs import experiment
from feddistill.server.rounds import request
from feddistill.store.run_directory import RunDirectory
from feddistill.tasks.session import Session
from feddistill.training import losses
from feddistill.training.blocks import Masking, examples_of
from feddistill.training.losses import Batch, MaskedLoss
from feddistill_kernels import topk_compress

TOKENIZER = {"kind": "trained", "vocab_size": 300, "mask": True}


def scratch(architecture, tokenizer=TOKENIZER, **settings):
    source = {"kind": "scratch", "architecture": architecture, "settings": settings, "tokenizer": tokenizer}
    return {"source": source, "max_tokens": 48}


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
BERT = scratch("bert", max_position_embeddings=48, **SMALL)
ROBERTA = scratch("roberta", max_position_embeddings=64, **SMALL)
DISTILBERT = scratch("distilbert", dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=48)
MODERN = scratch("modernbert", max_position_embeddings=48, **SMALL)
ELECTRA = scratch("electra", embedding_size=32, max_position_embeddings=48, **SMALL)


def settings(**changes):
    student, changes = {**BERT, "layers": [0]}, {"baselines": ["public_only", "fedavg"], **changes}
    return language_fixtures.settings(
        "tiny-mlm", [BERT, DISTILBERT], student, task="masked_lm", sizes=(12, 6, 3, 4), **changes
    )


@pytest.mark.parametrize(
    "config", [BERT, ROBERTA, DISTILBERT, MODERN, ELECTRA], ids=lambda c: c["source"]["architecture"]
)
def test_hidden_tokens_are_predicted_as_the_whole_model_predicts_them(config):
    built = causal.build(ModelConfig.model_validate(config), 0, "m", ["some text to learn"] * 9, masked=True)
    model = built.model.eval()
    ids = torch.randint(3, 200, (3, 16))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    places = torch.tensor([0, 5, 17, 24, 40, 47])
    with torch.inference_mode():
        whole = model(input_ids=ids, attention_mask=mask).logits.flatten(0, 1)[places]
        states = masked_states(model, ids, mask, places)
        head = model.get_output_embeddings()
        torch.testing.assert_close(head(states), whole, rtol=1e-4, atol=1e-5)
        again = model(input_ids=ids, attention_mask=mask).logits.flatten(0, 1)[places]
    assert torch.equal(again, whole), "the model is as it was"


def test_a_model_that_does_not_look_ahead_is_refused():
    config = ModelConfig.model_validate(scratch("gpt2", n_embd=32, n_layer=1, n_head=2, n_positions=48))
    with pytest.raises(ModelError):
        causal.build(config, 0, "clients.models.0", ["some text"] * 3, masked=True)
    settings_ = {**BERT["source"]["settings"], "is_decoder": True}
    decoder = {**BERT, "source": {**BERT["source"], "settings": settings_}}
    with pytest.raises(causal.LooksBackError, match="BertForMaskedLM does not see what follows"):
        causal.build(
            ModelConfig.model_validate(decoder), 0, "clients.models.0", ["some text"] * 3, masked=True
        )


def test_a_masked_model_that_changes_its_logits_is_refused():
    built = causal.build(ModelConfig.model_validate(BERT), 0, "m", ["some text"] * 3, masked=True)

    def capped(module, given, output):
        output.logits = 20 * (output.logits / 20).tanh()

    built.model.register_forward_hook(capped)
    with pytest.raises(ModelError, match="m: the logits of BertForMaskedLM are not the product"):
        causal._is_masked(built.model, len(built.tokenizer), "m")


def test_a_tokenizer_without_a_mask_is_refused():
    plain = scratch("bert", {"kind": "trained", "vocab_size": 300}, **SMALL)
    with pytest.raises(ModelError, match=r"student\.model: its tokenizer has no mask token"):
        causal.build(ModelConfig.model_validate(plain), 0, "student.model", ["some text"] * 3, masked=True)


@pytest.fixture
def model():
    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(vocab_size=37, max_position_embeddings=16, **still, **SMALL))


def batch(blocks, which, length=16):
    ids, mask = torch.zeros(len(which), length, dtype=torch.long), torch.zeros(len(which), length)
    for at, b in enumerate(which):
        ids[at, : len(blocks[b])] = torch.from_numpy(blocks[b])
        mask[at, : len(blocks[b])] = 1
    return Batch(ids, mask.long(), torch.tensor(list(which)))


def mean(loss, model, inputs):
    terms = loss(inputs)
    return terms.total(model, inputs) / terms.count


class Zeros:
    """A generator whose draws are all zero."""

    def random(self, size=None):
        return np.zeros(size) if size else 0.0

    def integers(self, high, size):
        return np.zeros(size, np.int64)


class Watching(torch.nn.Module):
    """A model that keeps what it has read."""

    def __init__(self, model):
        super().__init__()
        self.model, self.read = model, []

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, input_ids, attention_mask):
        self.read.append(input_ids.clone())
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def test_a_block_is_read_as_it_was_asked_and_otherwise(model):
    blocks = pack([list(range(5, 30)), [5, 6, 7, 8, 9]], end=2, length=10)
    asked = torch.tensor([1, 4, 12, 13])
    teacher = topk_compress(torch.randn(len(asked), 37), 37)
    given = examples_of(blocks, teacher, asked)
    loss = MaskedLoss(given, DistillConfig(temperature=1.0), 37, False, Masking(1, 0.5), seed=3)
    watching, as_asked = Watching(model), []
    for step in range(30):
        mean(loss, watching, replace(batch(blocks, range(len(blocks))), step=step))
        shown = watching.read.pop()
        as_asked.append(
            [(shown[b] == 1).nonzero()[:, 0].tolist() == w for b, w in ((0, [2, 5]), (1, [4, 5]))]
        )
    share = np.mean(as_asked, axis=0)
    assert (share > 0.2).all()
    assert (share < 0.8).all()


def test_what_nobody_was_asked_is_learned_from_the_text(model, monkeypatch):
    """All tokens are drawn, and hidden."""
    blocks = pack([list(range(5, 30))], end=2, length=10)
    monkeypatch.setattr(losses, "generator", lambda *names: Zeros())
    inputs = batch(blocks, range(len(blocks)))
    loss = MaskedLoss(examples_of(blocks), None, 37, False, Masking(1, 0.5), seed=0)
    ours = mean(loss, model, inputs)
    shown = inputs.input_ids.clone()
    at = [(r // 9, r % 9 + 1) for r in range(blocks.rows)]
    for b, place in at:
        shown[b, place] = 1
    p = model(input_ids=shown, attention_mask=inputs.attention_mask).logits.log_softmax(-1)
    dense = functional.nll_loss(
        torch.stack([p[b, place] for b, place in at]), torch.from_numpy(blocks.targets)
    )
    assert ours.item() == pytest.approx(dense.item(), rel=1e-5)


def test_where_all_is_asked_the_loss_is_exactly_that_of_dense_autograd(model, monkeypatch):
    blocks = pack([list(range(5, 30))], end=2, length=10)
    asked = torch.arange(0, blocks.rows, 3)
    teacher = topk_compress(torch.randn(len(asked), 37), 37)
    given = examples_of(blocks, teacher, asked)
    loss = MaskedLoss(
        given, DistillConfig(temperature=1.0, kd_weight=0.3), 37, False, Masking(1, 0.5), seed=0
    )
    monkeypatch.setattr(losses, "generator", lambda *names: Zeros())  # each as it was asked
    inputs = batch(blocks, range(len(blocks)))
    ours = mean(loss, model, inputs)
    ours.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    shown = inputs.input_ids.clone()
    at = [(int(r) // 9, int(r) % 9 + 1) for r in asked]
    for b, place in at:
        shown[b, place] = 1
    p = model(input_ids=shown, attention_mask=inputs.attention_mask).logits.log_softmax(-1)
    p = torch.stack([p[b, place] for b, place in at])
    q = teacher.expand()
    ce = functional.nll_loss(p, torch.from_numpy(blocks.targets)[asked], reduction="none")
    dense = (0.3 * (q.exp() * (q - p)).sum(-1) + 0.7 * ce).mean()
    dense.backward()
    assert ours.item() == pytest.approx(dense.item(), rel=1e-5)
    assert len(found) > 20
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_tokens_are_hidden_as_they_should_be(model):
    blocks = pack([torch.randint(5, 37, (3000,)).tolist()], end=2, length=16)
    given = examples_of(blocks)
    loss, watching = MaskedLoss(given, None, 37, False, Masking(1, 0.15), seed=1), Watching(model)
    hidden = other = total = 0
    for first in range(0, len(blocks) - 1, 20):
        which = list(range(first, min(first + 20, len(blocks) - 1)))
        inputs = batch(blocks, which)
        mean(loss, watching, inputs)
        shown, ids = watching.read.pop(), inputs.input_ids
        total += ids[:, 1:].numel()
        hidden += int((shown == 1).sum())
        other += int(((shown != ids) & (shown != 1)).sum())
        assert torch.equal(shown[:, 0], ids[:, 0]), "the first token of a block is of the one before"
    assert hidden / total == pytest.approx(0.15 * 0.8, abs=0.02)
    assert other / total == pytest.approx(0.15 * 0.1 * 35 / 37, abs=0.008)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("mlm") / "run"
    return {"out": out, "result": experiment.run(parse(settings()), out)}


def test_a_run_is_whole_and_can_be_evaluated_and_exported(finished, tmp_path, capsys):
    result, out = finished["result"], finished["out"]
    assert set(result["metrics"]) >= {"student", "clients", "public_only", "fedavg"}
    figures = result["metrics"]["student"]
    assert set(figures) == {"cross_entropy", "perplexity", "accuracy"}
    assert figures["perplexity"] == pytest.approx(math.exp(figures["cross_entropy"]), rel=1e-3)
    assert experiment.evaluate(out)["cross_entropy"] == figures["cross_entropy"]
    assert "nats/token" in report.write(out).read_text()
    folder = release.export(out, tmp_path / "student")
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = f"the people of {tokenizer.mask_token} states"
    with torch.inference_mode():
        logits = model(**tokenizer(text, return_tensors="pt")).logits
    assert logits.shape[-1] >= len(tokenizer)
    card = (folder / "README.md").read_text()
    assert "fill-mask" in card
    assert "A masked language model," in card
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
    exec(compile(code.replace('model="."', f"model={str(folder)!r}"), "card", "exec"), {})
    assert "The cat sat on the" in capsys.readouterr().out


def test_answers_are_about_hidden_tokens(finished, tmp_path):
    """The answer of a shard is the same whatever its neighbours are, and is that of the whole model."""
    config = parse(settings())
    session = Session(config, experiment.check(config), RunDirectory.create(tmp_path / "r", ""), NoProgress())
    learner, question = ClientGroup(session).learner(0), session.query
    spec = request(session, 1, quorum=4, previous="")
    whole = learner.compressed(spec, 0, 0, spec.positions)
    middle = learner.compressed(spec, 0, 3, 9)
    assert np.array_equal(whole.ids[3:9], middle.ids)
    share = spec.positions / int(question.blocks.loss_mask.sum())
    assert share == pytest.approx(0.15, abs=0.01)
    row = int(question.rows[0])
    block = row // (question.blocks.length - 1)
    tokens = torch.from_numpy(question.blocks[block].copy())
    mask = learner.specialist.reader.tokenizer.mask_token_id
    inside = [int(r) % 47 + 1 for r in question.rows if int(r) // 47 == block]
    tokens[inside] = mask
    with torch.inference_mode():
        logits = learner.model.eval()(input_ids=tokens[None]).logits[0, row % 47 + 1, :300]
    log_probs = logits.log_softmax(-1)[torch.from_numpy(whole.ids[0].astype(np.int64))]
    assert np.abs(-12 * log_probs.numpy() - whole.codes[0]).max() < 0.51
    assert log_probs[0] == pytest.approx(float(logits.log_softmax(-1).max()), abs=1 / 12)
    session.run.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"language": {"position_stride": 2}}, "language.position_stride is for task = causal_lm"),
        ({"language": {"alignment": "mined"}}, "language.alignment is for task = causal_lm"),
        (
            {"aggregation": {"rule": "era"}},
            "aggregation.rule = era is for classification, not for task = masked",
        ),
        ({"baselines": ["fedmd"]}, "baselines: fedmd is for classification, not for task = masked_lm"),
    ],
)
def test_what_is_of_other_tasks_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        parse(settings(**changes))


def test_a_client_with_another_tokenizer_is_refused(tmp_path):
    other = scratch("bert", {**TOKENIZER, "vocab_size": 320}, max_position_embeddings=48, **SMALL)
    changed = settings()
    changed["clients"] = {**changed["clients"], "models": [BERT, other]}
    with pytest.raises(ModelError, match=r"clients\.models\.1: .*needs the student's tokenizer"):
        experiment.run(parse(changed), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_length_that_batches_would_exceed_is_refused():
    short = {**BERT, "source": {**BERT["source"], "settings": {**SMALL, "max_position_embeddings": 45}}}
    config = ModelConfig.model_validate({**short, "max_tokens": 45})
    with pytest.raises(ModelError, match=r"m\.max_tokens = 45 is padded to 48.*take 44"):
        causal.build(config, 0, "m", ["some text"] * 3, masked=True)
