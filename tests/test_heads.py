"""The head of a trained classifier is matched to the classes of the run by name."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from feddistill import models
from feddistill.config.models import ModelConfig
from feddistill.errors import ModelError

SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
ARCHITECTURES = {
    "bert": {**SIZE, "max_position_embeddings": 40},
    "roberta": {**SIZE, "max_position_embeddings": 40},
    "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 40},
    "llama": {**SIZE, "num_key_value_heads": 2, "max_position_embeddings": 40},
}
NAMES = {0: "sea", 1: "city", 2: "farm"}


@pytest.fixture
def classifier(tiny_model, tmp_path):
    """A fine-tuned classifier of an architecture, as ``save_pretrained`` leaves it."""

    def make(architecture, **names):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        torch.manual_seed(0)
        sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture], **sizes, **names)
        model = AutoModelForSequenceClassification.from_config(config).eval()
        folder = tmp_path / architecture
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return model, {"kind": "hub", "name": str(folder)}

    return make


def built(source, *labels):
    config = ModelConfig(source=source, head="auto", max_tokens=16)
    return models.build(config, len(labels), 0, "student.model", labels=labels).model.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_the_head_are_taken_by_name(classifier, architecture):
    saved, source = classifier(architecture, id2label=NAMES, label2id={v: k for k, v in NAMES.items()})
    ids = torch.arange(5, 15)[None]
    with torch.inference_mode():
        whole = saved(input_ids=ids).logits
        for labels in (("city", "farm", "sea"), ("Farm", "SEA", "city"), ("farm", "city")):
            found = built(source, *labels)
            rows = [list(NAMES.values()).index(label.lower()) for label in labels]
            torch.testing.assert_close(found(input_ids=ids).logits, whole[:, rows], rtol=1e-4, atol=1e-5)
            assert list(found.config.id2label.values()) == list(labels)


def test_names_in_label2id_alone_count(classifier):
    saved, source = classifier("bert", num_labels=3)
    path = Path(source["name"]) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"label2id": {"sea": 0, "city": 1, "farm": 2}}))
    assert torch.equal(
        built(source, "farm", "sea", "city").classifier.weight, saved.classifier.weight[[2, 0, 1]]
    )


def test_a_head_without_names_is_taken_in_order(classifier):
    saved, source = classifier("bert", num_labels=3)
    assert torch.equal(built(source, "x", "y", "z").classifier.weight, saved.classifier.weight)


def test_other_classes_are_named_with_both_lists(classifier):
    _, source = classifier("bert", id2label=NAMES, label2id={v: k for k, v in NAMES.items()})
    for labels in (("city", "farm", "lake"), ("city", "farm", "sea", "lake")):
        with pytest.raises(
            ModelError, match="the classes sea, city, farm, the data have city, farm,"
        ) as caught:
            built(source, *labels)
        assert "\n" not in str(caught.value)
