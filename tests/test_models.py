"""Models: from a folder, a package or nothing; cut, frozen, saved; what cannot be had is named."""

import pytest
import torch

from feddistill import models
from feddistill.config.models import HubModel, ModelConfig, PackageModel, ScratchModel
from feddistill.errors import ModelError

CLASSES = 5
SCRATCH = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64},
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    },
}


def scratch(tiny_model, architecture, **changes):
    tokenizer = HubModel(name=str(tiny_model))
    source = ScratchModel(architecture=architecture, settings=SCRATCH[architecture], tokenizer=tokenizer)
    return ModelConfig(source=source, **{"max_tokens": 16, **changes})


def logits(specialist):
    tokens = specialist.encode(("a small animal", "a large wooden building by the sea"))
    longest = max(map(len, tokens))
    ids = torch.tensor([t + [specialist.pad_id] * (longest - len(t)) for t in tokens])
    mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in tokens])
    specialist.model.eval()
    return specialist.model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("head", ["auto", "mean_pool"])
@pytest.mark.parametrize("architecture", SCRATCH)
def test_architectures_answer_after_being_cut(tiny_model, architecture, head):
    config = scratch(tiny_model, architecture, head=head, layers=(0, 2), freeze_embeddings=True)
    specialist = models.build(config, CLASSES, 0, "student.model")
    assert logits(specialist).shape == (2, CLASSES)
    heads = models.head_parameters(specialist.model)
    assert heads
    assert all(p.requires_grad for n, p in specialist.model.named_parameters() if n in heads)


@pytest.mark.parametrize("max_tokens", [16, 64])  # eager attention, and torch's own
@pytest.mark.parametrize(
    ("architecture", "own"),
    [
        ("bert", {}),
        ("distilbert", {"dropout": 0.5, "attention_dropout": 0.5}),
        ("gpt2", {}),
        ("llama", {"attention_dropout": 0.5}),  # a number, not a module
    ],
)
def test_dropout_is_that_of_the_setting(tiny_model, architecture, own, max_tokens):
    sizes = {**SCRATCH[architecture], **own}
    for dropout, same in ((None, False), (0.0, True), (0.3, False)):
        config = scratch(tiny_model, architecture, dropout=dropout, max_tokens=max_tokens)
        config = config.model_copy(update={"source": config.source.model_copy(update={"settings": sizes})})
        model = models.build(config, CLASSES, 0, "m").model
        model.train()
        ids = torch.arange(5, 13)[None]
        first, second = (model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for _ in range(2))
        assert torch.equal(first, second) == same
        if dropout is not None:
            assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {dropout}


def test_padding_changes_no_answer(tiny_model):
    specialist = models.build(scratch(tiny_model, "bert"), CLASSES, 0, "m")
    alone = specialist.encode(("a small animal",))[0]
    specialist.model.eval()
    short = specialist.model(
        input_ids=torch.tensor([alone]), attention_mask=torch.ones(1, len(alone), dtype=torch.long)
    )
    torch.testing.assert_close(short.logits, logits(specialist)[:1])


def test_the_seed_decides_the_head_and_disturbs_nobody(tiny_model):
    config = ModelConfig(source=HubModel(name=str(tiny_model)), max_tokens=16)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one, same, other = (models.build(config, CLASSES, seed, "m").model for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)


def test_frozen_parts_get_no_gradient_and_the_rest_does(tiny_model):
    config = scratch(tiny_model, "bert", freeze_embeddings=True, freeze_layers=1)
    specialist = models.build(config, CLASSES, 0, "m")
    logits(specialist).sum().backward()
    moved = {n for n, p in specialist.model.named_parameters() if p.grad is not None}
    assert not any("embeddings" in n or "layer.0." in n for n in moved)
    assert any("layer.1." in n for n in moved)
    assert "head.weight" in moved


def test_weights_come_back(tiny_model, tmp_path):
    config = scratch(tiny_model, "bert")
    one, other = models.build(config, CLASSES, 0, "m"), models.build(config, CLASSES, 1, "m")
    models.save(one.model, tmp_path / "w.safetensors")
    models.restore(other.model, tmp_path / "w.safetensors")
    assert torch.equal(logits(one), logits(other))


def test_weights_of_another_model_are_refused(tiny_model, tmp_path):
    models.save(models.build(scratch(tiny_model, "gpt2"), CLASSES, 0, "m").model, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"w\.safetensors does not hold this model's weights"):
        models.restore(
            models.build(scratch(tiny_model, "bert"), CLASSES, 0, "m").model, tmp_path / "w.safetensors"
        )


def test_what_cannot_be_had_is_named(tiny_model):
    tokenizer = HubModel(name=str(tiny_model))

    def refused(source, message, **more):
        with pytest.raises(ModelError, match=message):
            models.build(
                ModelConfig(source=source, **{"max_tokens": 16, **more}), CLASSES, 0, "student.model"
            )

    refused(
        PackageModel(package="no_such_package"),
        r"student\.model\.source: package 'no_such_package' is not installed",
    )
    refused(PackageModel(path="no/folder"), r"has no folder 'no/folder'")
    refused(
        HubModel(name="no-such/model"),
        r"student\.model\.source: cannot load a tokenizer from 'no-such/model'",
    )
    refused(
        ScratchModel(architecture="brt", tokenizer=tokenizer), r"architecture = 'brt' .* did you mean 'bert'"
    )
    refused(
        ScratchModel(architecture="bert", settings={"hiden_size": 3}, tokenizer=tokenizer),
        r"source\.settings\.hiden_size is not a setting of bert; did you mean 'hidden_size'",
    )
    refused(tokenizer, r"student\.model\.layers names layer 6; the model has layers 0 to 1", layers=(0, 6))
    refused(tokenizer, r"freeze_layers = 3, but the model has 2 layers", freeze_layers=3)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 100}
    refused(
        ScratchModel(architecture="bert", settings=small, tokenizer=tokenizer),
        r"student\.model: the model cannot read 16 tokens of its tokenizer: index out of range",
    )
    odd = {"hidden_size": 100, "num_attention_heads": 3}
    refused(
        ScratchModel(architecture="bert", settings=odd, tokenizer=tokenizer),
        r"student\.model\.source\.settings: .*multiple of the number of attention heads",
    )
    refused(PackageModel(package="no.such"), r"package 'no\.such' is not installed")
    refused(tokenizer, r"max_tokens = 65, but the model reads at most 64", max_tokens=65)
