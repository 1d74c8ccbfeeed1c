"""What frozen layers make of a text is computed once, and is what they would make of it each time."""

import pytest
import torch
from test_models import CLASSES, SCRATCH, scratch

from feddistill import models
from feddistill.config.models import ModelConfig
from feddistill.modelio.padding import pad
from feddistill.models import frozen

TEXTS = (
    "a small animal",
    "a large wooden building by the sea",
    "fish",
    "the act of singing a song to a child",
)
FREEZE = {"freeze_embeddings": True, "freeze_layers": 2}


def two(tiny_model, architecture, megabytes=64, **changes):
    """A model as it is, and one that remembers."""
    config = scratch(tiny_model, architecture, **FREEZE, **changes)
    plain = models.build(config, CLASSES, 0, "m")
    caching = models.build(config, CLASSES, 0, "m")
    known = {}
    models.remember_frozen(
        caching.model, config.model_copy(update={"frozen_cache_mb": megabytes}), "m", known
    )
    return plain, caching, known


def logits(specialist, texts=TEXTS):
    ids, mask = pad(specialist.encode(texts), specialist.pad_id)
    return specialist.model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("head", ["auto", "mean_pool"])
@pytest.mark.parametrize("architecture", SCRATCH)
def test_the_answers_are_the_models_own(tiny_model, architecture, head):
    plain, caching, known = two(tiny_model, architecture, head=head)
    for specialist in (plain, caching):
        specialist.model.eval()
    with torch.inference_mode():
        for _ in range(2):  # computed, and looked up
            torch.testing.assert_close(logits(caching), logits(plain), rtol=1e-5, atol=1e-6)
    (states,) = known.values()
    assert len(states.kept) == len(TEXTS)
    assert states.size == sum(kept.nbytes for kept in states.kept.values())


@pytest.mark.parametrize("architecture", SCRATCH)
def test_the_gradients_are_the_models_own(tiny_model, architecture):
    plain, caching, _ = two(tiny_model, architecture)
    with torch.inference_mode():
        logits(caching)  # what is met first while answering is trained upon
    for specialist in (plain, caching):
        specialist.model.eval()  # no dropout to tell them apart
        logits(specialist).square().sum().backward()
    for (name, own), (_, other) in zip(
        plain.model.named_parameters(), caching.model.named_parameters(), strict=True
    ):
        assert (own.grad is None) == (other.grad is None), name
        assert own.requires_grad or own.grad is None, name
        if own.grad is not None:
            torch.testing.assert_close(other.grad, own.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_dropout_of_the_frozen_part_is_off_and_the_mode_stays(tiny_model):
    _, caching, known = two(tiny_model, "bert")
    caching.model.train()
    logits(caching)
    assert caching.model.training
    assert all(module.training for module in caching.model.modules())
    (states,) = known.values()
    trained = dict(states.kept)
    states.kept.clear()
    caching.model.eval()
    logits(caching)
    for key, kept in states.kept.items():
        assert torch.equal(kept, trained[key])


def test_states_do_not_depend_on_the_batch(tiny_model):
    """A run that is resumed meets its texts in another order: not a bit may differ."""
    _, together, known = two(tiny_model, "bert")
    together.model.eval()
    logits(together)
    _, apart, others = two(tiny_model, "bert")
    apart.model.eval()
    for text in reversed(TEXTS):
        logits(apart, (text,))
    (states,), (other,) = known.values(), others.values()
    assert states.kept.keys() == other.kept.keys()
    for key, kept in states.kept.items():
        assert torch.equal(kept, other.kept[key])


def test_what_does_not_fit_is_computed_each_time(tiny_model):
    plain, caching, known = two(tiny_model, "bert", megabytes=0)
    for specialist in (plain, caching):
        specialist.model.eval()
    for _ in range(2):
        torch.testing.assert_close(logits(caching), logits(plain), rtol=1e-5, atol=1e-6)
    (states,) = known.values()
    assert not states.kept
    assert states.size == 0


def test_models_that_begin_alike_share_and_others_do_not(tiny_model):
    known = {}
    config = scratch(tiny_model, "bert", **FREEZE, frozen_cache_mb=1)
    for seed in (0, 0, 1):
        models.remember_frozen(models.build(config, CLASSES, seed, "m").model, config, "m", known)
    assert len(known) == 2


def test_a_model_that_is_trained_from_its_first_layer_remembers_nothing(tiny_model):
    config = scratch(tiny_model, "bert", **FREEZE, frozen_cache_mb=1)
    specialist = models.build(config, CLASSES, 0, "m")
    first = specialist.model.encoder.encoder.layer[0]
    first.attention.self.query.weight.requires_grad = True  # as an adapter's
    known = {}
    models.remember_frozen(specialist.model, config, "m", known)
    assert not known
    body = specialist.model.encoder
    assert frozen.depth(body, body.encoder.layer) == 0
    first.requires_grad_(False)
    assert frozen.depth(body, body.encoder.layer) == 2
    body.embeddings.requires_grad_(True)
    assert frozen.depth(body, body.encoder.layer) == 0


@pytest.mark.parametrize("freeze", [{}, {"freeze_embeddings": True}, {"freeze_layers": 1}])
def test_there_must_be_something_frozen(freeze):
    with pytest.raises(ValueError, match="frozen_cache_mb needs freeze_embeddings"):
        ModelConfig(frozen_cache_mb=1, **freeze)
