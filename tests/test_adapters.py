"""Clients that train low-rank adapters: what they leave alone, what they learn, what is refused."""

import copy
import sys

import pytest
import torch
from language_fixtures import GPT2, LLAMA, tiny
from test_models import CLASSES, scratch

from feddistill import models
from feddistill.config import parse
from feddistill.config.models import ModelConfig
from feddistill.errors import ConfigError, ModelError
from feddistill.models import adapters, causal
from feddistill.progress import NoProgress
from feddistill.runs import experiment
from feddistill.store.run_directory import RunDirectory
from feddistill.tasks.choose import learner_of
from feddistill.tasks.session import Session

LORA = {"rank": 2, "alpha": 4}


def trained_once(config, splits, model, run):
    """What a client's model was and what it is after its private texts, by name; and which were to train."""
    session = Session(config, splits, run, NoProgress())
    learner = learner_of(session, model, "clients.models.0")
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    texts = splits.private[0]
    learner.fit(learner.examples(texts), config.clients.training, seed=0)
    after = {name: p.detach() for name, p in learner.model.named_parameters()}
    return before, after, {name for name, p in learner.model.named_parameters() if p.requires_grad}


@pytest.fixture(params=["classification", "causal_lm"])
def given(request, tiny_settings):
    raw = tiny_settings if request.param == "classification" else tiny()
    raw = copy.deepcopy(raw)
    raw["clients"]["models"] = [{**model, "lora": LORA} for model in raw["clients"]["models"]]
    return raw


def test_only_adapters_and_a_new_head_are_trained(given, tmp_path):
    config = experiment.resolve(parse(given))
    run = RunDirectory.create(tmp_path / "run", "")
    splits = experiment.check(config, build=False)
    before, after, trained = trained_once(config, splits, config.clients.models[0], run)
    run.close()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= trained
    assert any("lora_A" in name for name in trained)
    assert any("lora_B" in name for name in changed)
    others = {name for name in trained if "lora_" not in name}
    assert others == (set() if config.task == "causal_lm" else {"head.weight", "head.bias"})


def test_a_run_of_adapters_is_complete(given, tmp_path):
    given["baselines"] = []
    result = experiment.run(parse(given), tmp_path / "run")
    assert result["status"] == "complete"
    left = sorted(path.name for path in (tmp_path / "run/rounds/002/specialists").glob("*.safetensors"))
    assert len(left) == len(result["bytes"]["by_round"][0]["uplink"])  # a second round went on from the first


def test_frozen_layers_have_none_and_are_remembered(tiny_model):
    config = scratch(tiny_model, "bert", freeze_embeddings=True, freeze_layers=2, frozen_cache_mb=1)
    model = models.build(config, CLASSES, 0, "m").model
    adapters.add(model, 2, 4, "m", "m.lora", head=True, first=2)
    adapted = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted
    assert all("layer.2." in name for name in adapted)
    known = {}
    models.remember_frozen(model, config, "m", known)
    assert len(known) == 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("given", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_what_adapters_would_upload_is_what_they_train(given, tied):
    settings = {**given["source"]["settings"], "tie_word_embeddings": tied}
    config = ModelConfig(**{**given, "source": {**given["source"], "settings": settings}})
    for head in (False, True):
        model = causal.build(config, 0, "m", ("a text",)).model
        foretold = adapters.count(model, 4, head=head)
        adapters.add(model, 4, 8, "m", "m.lora", head=head)
        assert models.trained_count(model) == foretold
        assert foretold < 3000 or (head and not tied)


def test_an_adapter_that_is_new_changes_nothing():
    config = ModelConfig(**GPT2)
    plain, adapted = (causal.build(config, 0, "m", ("a text",)).model for _ in range(2))
    adapters.add(adapted, 2, 4, "m", "m.lora", head=False)
    ids = torch.arange(12).reshape(1, 12)
    for model in (plain, adapted):
        model.eval()
    assert torch.equal(plain(input_ids=ids).logits, adapted(input_ids=ids).logits)


def test_what_cannot_be_adapted_is_named(tiny_model, monkeypatch):
    config = scratch(tiny_model, "bert")
    with pytest.raises(ModelError, match=r"m has none of the projections that m\.lora adapts: query"):
        adapters.add(torch.nn.Linear(2, 2), 2, 4, "m", "m.lora", head=False)
    with pytest.raises(ModelError, match=r"m: m\.lora adapts nothing"):
        adapters.add(models.build(config, CLASSES, 0, "m").model, 2, 4, "m", "m.lora", head=True, first=3)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"m\.lora needs the package peft"):
        adapters.add(models.build(config, CLASSES, 0, "m").model, 2, 4, "m", "m.lora", head=True)


def test_the_student_is_trained_whole(tiny_settings):
    tiny_settings["student"]["model"]["lora"] = LORA
    with pytest.raises(ConfigError, match=r"student\.model\.lora is for clients"):
        parse(tiny_settings)


def test_a_run_that_cannot_adapt_writes_nothing(given, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"clients\.models\.0\.lora needs the package peft"):
        experiment.run(parse(given), tmp_path / "run")
    assert not (tmp_path / "run").exists()
