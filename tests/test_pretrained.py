"""Weights from GGUF files and PEFT adapters: trained, merged, exported; or refused in one line."""

import json
import re

import gguf_fixtures
import pytest
import torch
from language_fixtures import settings
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from feddistill import models, release
from feddistill.config import parse
from feddistill.config.models import HubModel, ModelConfig
from feddistill.errors import ConfigError, ModelError
from feddistill.models import adapters, causal
from feddistill.models.pretrained import pretrained
from feddistill.runs import experiment, trained_models

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
IDS = torch.arange(5, 25).reshape(2, 10)


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory):
    return gguf_fixtures.write(tmp_path_factory.mktemp("gguf") / "model")


@pytest.fixture(scope="module")
def base(gguf_folder, tmp_path_factory):
    """The model of the GGUF file, as ``save_pretrained`` leaves it."""
    folder = tmp_path_factory.mktemp("base") / "model"
    model = pretrained(HubModel(name=str(gguf_folder), gguf=gguf_fixtures.NAME), AutoModelForCausalLM, "m")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf_folder, gguf_file=gguf_fixtures.NAME).save_pretrained(folder)
    return folder


def save_adapter(model, folder, **more):
    """An adapter of ``model`` that changes it, as peft leaves it."""
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, **more))
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(base)
    return save_adapter(model, tmp_path_factory.mktemp("adapter") / "model", target_modules=["q_proj"])


def logits(model):
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits


def test_a_gguf_file_and_adapters_are_trained_and_exported(gguf_folder, adapter, tmp_path):
    plain = {
        "source": {"kind": "hub", "name": str(gguf_folder), "gguf": gguf_fixtures.NAME},
        "max_tokens": 32,
    }
    clients = [
        plain,
        {**plain, "lora": {"rank": 2}},
        {"source": {"kind": "hub", "name": str(adapter)}, "max_tokens": 32},
        {"source": {"kind": "hub", "name": str(adapter), "adapter": "train"}, "max_tokens": 32},
    ]
    config = parse(settings("gguf", clients, plain, sizes=(8, 3, 2, 2)))
    out = tmp_path / "run"
    assert experiment.run(config, out)["status"] == "complete"
    folder = release.export(out, tmp_path / "student")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(reloaded), logits(trained_models.of_run(out).model), atol=1e-5, rtol=0)
    start = causal.build(ModelConfig(**plain), 0, "m").model
    assert not torch.allclose(logits(reloaded), logits(start), atol=1e-3)


def test_an_adapter_is_merged_or_trained_on(base, adapter):
    wanted = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    unchanged = logits(AutoModelForCausalLM.from_pretrained(base))
    assert not torch.allclose(wanted, unchanged, atol=1e-2)

    merged = pretrained(HubModel(name=str(adapter)), AutoModelForCausalLM, "m")
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-5, atol=1e-5)
    assert all(p.requires_grad for p in merged.parameters())
    assert not any("lora" in name for name, _ in merged.named_parameters())

    going_on = pretrained(HubModel(name=str(adapter), adapter="train"), AutoModelForCausalLM, "m")
    torch.testing.assert_close(logits(going_on), wanted, rtol=1e-5, atol=1e-5)
    trained = {name for name, p in going_on.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_the_head_of_a_classifiers_adapter_is_its_own(tiny_model, tmp_path):
    config = BertConfig.from_pretrained(tiny_model, num_labels=3)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    folder = save_adapter(model, tmp_path / "adapter", task_type="SEQ_CLS", target_modules=["query"])
    head = model.classifier.modules_to_save["default"].weight
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    source = {"kind": "hub", "name": str(folder)}
    built = models.build(ModelConfig(source=source, head="auto", max_tokens=16), 3, 0, "m")
    assert torch.equal(built.model.classifier.weight, head)
    with pytest.raises(ModelError, match=r"m\.source: the adapter '.*' does not fit BertModel: "):
        models.build(ModelConfig(source=source, head="mean_pool", max_tokens=16), 3, 0, "m")


def test_what_cannot_be_loaded_or_trained_is_one_line(base, adapter, gguf_folder, tmp_path, monkeypatch):
    def refused(match, **source):
        with pytest.raises(ModelError, match=match) as caught:
            causal.build(ModelConfig(source={"kind": "hub", **source}, max_tokens=16), 0, "m")
        assert "\n" not in str(caught.value)

    refused(r"m\.source: cannot load .*other\.gguf", name=str(gguf_folder), gguf="other.gguf")
    refused(r"m\.source\.adapter = train, but '.*' has no PEFT adapter", name=str(base), adapter="train")

    def changed(file, **values):
        text = json.loads((adapter / "adapter_config.json").read_text())
        folder = tmp_path / file
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(text | values))
        (folder / "adapter_model.safetensors").write_bytes(
            (adapter / "adapter_model.safetensors").read_bytes()
        )
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        return str(folder)

    refused(
        r"m\.source: cannot load '/no/such', the base model of the adapter",
        name=changed("a", base_model_name_or_path="/no/such"),
    )
    refused(r"does not name its base model", name=changed("b", base_model_name_or_path=None))
    refused(
        r"does not fit LlamaForCausalLM: .*lora_A", name=changed("c", target_modules=["q_proj", "v_proj"])
    )
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", quantised)
    refused(r"has quantised weights \(gptq\), which cannot be trained", name=str(base))


def quantised(*_, **__):
    model = torch.nn.Linear(1, 1)
    model.is_quantized, model.quantization_method = True, "gptq"
    return model


def test_a_model_with_nothing_to_train_is_refused_before_the_first_step(base):
    model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
    with pytest.raises(ModelError, match=re.escape("m: no parameter is trained: all are frozen")):
        adapters.check_trains(model, "m")


def test_an_adapter_is_trained_by_clients_alone(adapter):
    source = {"kind": "hub", "name": str(adapter), "adapter": "train"}
    with pytest.raises(ConfigError, match=r"student\.model\.source\.adapter = train is for clients"):
        parse({"student": {"model": {"source": source}}})
    with pytest.raises(ConfigError, match="lora adds new adapters"):
        parse({"clients": {"models": [{"source": source, "lora": {"rank": 2}}]}})


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_added_for_new_tokens(tied, base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=tied)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows, tokens = model.config.vocab_size, len(tokenizer)
    tokenizer.add_tokens(["<new-1>", "<new-2>", "<new-3>"])
    folder = tmp_path / "more"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    source = {"source": {"kind": "hub", "name": str(folder)}, "max_tokens": 32}
    with pytest.raises(
        ModelError, match=rf"^m: its tokenizer has {tokens + 3} tokens, .* {rows} rows; resize_emb"
    ):
        causal.build(ModelConfig(**source), 0, "m")
    own = {**source, "resize_embeddings": True}
    built = causal.build(ModelConfig(**own), 0, "m").model
    torch.testing.assert_close(logits(built)[..., :rows], logits(model), rtol=1e-4, atol=1e-5)
    assert torch.equal(
        logits(built), logits(causal.build(ModelConfig(**own), 0, "m").model)
    )  # the same rows again

    out = tmp_path / "run"
    experiment.run(parse(settings("resized", [own], own, sizes=(6, 2, 2, 2), rounds=1)), out)
    release.export(out, tmp_path / "student")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert reloaded.get_input_embeddings().weight.shape[0] == tokens + 3
    torch.testing.assert_close(logits(reloaded), logits(trained_models.of_run(out).model), atol=1e-5, rtol=0)
