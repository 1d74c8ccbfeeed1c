"""The cache of frozen layers: the same answers and gradients, no dropout, operations counted as they run."""

import pytest
import torch
from test_models import CLASSES, SCRATCH, scratch

from feddistill import models
from feddistill.accounting import FlopMeter
from feddistill.config.models import ModelConfig
from feddistill.modelio.padding import pad
from feddistill.models import frozen
from feddistill.models.layers import frozen_depth

TEXTS = (
    "a small animal",
    "a large wooden building by the sea",
    "fish",
    "the act of singing a song to a child",
)
FREEZE = {"freeze_embeddings": True, "freeze_layers": 2}


def two(tiny_model, architecture, megabytes=64, **changes):
    """A model as it is, one that caches, its frozen layers and its cache."""
    config = scratch(tiny_model, architecture, **FREEZE, **changes)
    plain = models.build(config, CLASSES, 0, "m")
    caching = models.build(config, CLASSES, 0, "m")
    known = {}
    layers = models.remember_frozen(
        caching.model, config.model_copy(update={"frozen_cache_mb": megabytes}), "m", known
    )
    (states,) = known.values()
    for specialist in (plain, caching):
        specialist.model.eval()
    return plain, caching, layers, states


def logits(specialist, texts=TEXTS):
    ids, mask = pad(specialist.encode(texts), specialist.pad_id)
    return specialist.model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("head", ["auto", "mean_pool"])
@pytest.mark.parametrize("architecture", SCRATCH)
def test_the_answers_are_the_models_own(tiny_model, architecture, head):
    plain, caching, layers, states = two(tiny_model, architecture, head=head)
    with torch.inference_mode():
        torch.testing.assert_close(logits(caching), logits(plain), rtol=1e-5, atol=1e-6)
        assert layers.fill(caching.encode(TEXTS)) == 0
        for kept in states.kept.values():
            kept.neg_()  # it is the cache that is read
        assert not torch.allclose(logits(caching), logits(plain), rtol=1e-2)
        for kept in states.kept.values():
            kept.neg_()
        torch.testing.assert_close(logits(caching), logits(plain), rtol=1e-5, atol=1e-5)
    assert len(states.kept) == len(TEXTS)
    assert states.size == sum(kept.nbytes for kept in states.kept.values())


@pytest.mark.parametrize("architecture", SCRATCH)
def test_the_gradients_are_the_models_own(tiny_model, architecture):
    plain, caching, layers, _ = two(tiny_model, architecture)
    with torch.inference_mode():  # what is computed first for an evaluation is trained on later
        layers.fill(caching.encode(TEXTS))
    for specialist in (plain, caching):
        logits(specialist).square().sum().backward()
    for (name, own), (_, other) in zip(
        plain.model.named_parameters(), caching.model.named_parameters(), strict=True
    ):
        assert (own.grad is None) == (other.grad is None), name
        assert own.requires_grad or own.grad is None, name
        if own.grad is not None:
            torch.testing.assert_close(other.grad, own.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_frozen_layers_have_no_dropout_and_the_others_do(tiny_model):
    plain, caching, layers, _ = two(tiny_model, "bert")
    layers.fill(caching.encode(TEXTS))
    hidden = []
    for specialist in (plain, caching):
        specialist.model.train()
        encoder = specialist.model.encoder.encoder
        handle = encoder.layer[1].register_forward_hook(lambda *args: hidden.append(args[2]))
        first, second = logits(specialist), logits(specialist)
        assert not torch.equal(first, second)
        handle.remove()
    mask = pad(plain.encode(TEXTS), plain.pad_id)[1].bool()
    assert len(hidden) == 4
    for other in hidden[1:]:
        torch.testing.assert_close(other[mask], hidden[0][mask], rtol=1e-5, atol=1e-5)


def test_states_do_not_depend_on_other_texts(tiny_model):
    """A run that is resumed meets its texts in another order: not a bit may differ."""
    _, together, layers, states = two(tiny_model, "bert")
    texts = [f"{first} {second}" for first in TEXTS[0].split() for second in " ".join(TEXTS).split()]
    layers.fill(together.encode(tuple(texts)))
    _, apart, other_layers, others = two(tiny_model, "bert")
    for text in reversed(texts):
        other_layers.fill(apart.encode((text,)))
    assert states.kept.keys() == others.kept.keys()
    for key, kept in states.kept.items():
        assert torch.equal(kept, others.kept[key])


def test_what_has_room_does_not_depend_on_what_was_there(tiny_model):
    plain, caching, layers, states = two(tiny_model, "bert", megabytes=0)
    tokens = caching.encode(TEXTS)
    per_token = 4 * caching.model.encoder.config.hidden_size
    lengths = sorted(map(len, tokens))
    states.limit = per_token * (sum(lengths) - 1)
    assert layers.fill(tokens) == 1
    expected = {key: kept.clone() for key, kept in states.kept.items()}
    assert [kept.shape[0] for kept in expected.values()] == lengths[:-1]
    longest = max(tokens, key=len)
    states.kept.clear()
    states.size = 0
    assert layers.fill([longest]) == 0
    assert layers.fill(tokens) == 1
    assert states.kept.keys() == expected.keys()
    assert states.size == sum(kept.nbytes for kept in states.kept.values()) <= states.limit
    torch.testing.assert_close(logits(caching), logits(plain), rtol=1e-5, atol=1e-6)
    states.limit = per_token * len(longest)
    assert layers.fill([longest]) == 0  # in place of the others
    assert len(states.kept) == 1


@pytest.mark.parametrize("architecture", SCRATCH)
def test_operations_are_those_that_are_run(tiny_model, architecture):
    """The layers above in every pass, the frozen ones when they run: together the whole model."""
    config = scratch(tiny_model, architecture, **FREEZE, frozen_cache_mb=1)
    specialist = models.build(config, CLASSES, 0, "m")
    whole, meter = FlopMeter(specialist.model), FlopMeter(specialist.model)
    layers = models.remember_frozen(specialist.model, config, "m", {}, meter)
    tokens = specialist.encode((*TEXTS, TEXTS[0]))
    layers.fill(tokens)
    layers.fill(tokens)
    frozen_part = meter.flops // 2
    for rows, length in frozen.passes_over(tokens):
        assert rows % frozen.ROWS == 0
        whole.add(rows, length, training=False)
        meter.add(rows, length, training=False)
    assert sum(rows for rows, _ in frozen.passes_over(tokens)) == frozen.ROWS * len({*map(len, tokens)})
    assert meter.flops - 2 * frozen_part < whole.flops
    assert meter.flops - frozen_part == whole.flops
    before = meter.flops
    logits(specialist, ("a text that is not there",))
    ids, _ = pad(specialist.encode(("a text that is not there",)), 0)
    meter_, once = FlopMeter(specialist.model), meter.flops - before
    meter_.add(*ids.shape, training=False)
    assert 0 < once < meter_.flops


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
    assert frozen_depth(body, body.encoder.layer) == 0
    first.requires_grad_(False)
    assert frozen_depth(body, body.encoder.layer) == 2
    body.embeddings.requires_grad_(True)
    assert frozen_depth(body, body.encoder.layer) == 0


@pytest.mark.parametrize("freeze", [{}, {"freeze_embeddings": True}, {"freeze_layers": 1}])
def test_there_must_be_something_frozen(freeze):
    with pytest.raises(ValueError, match="frozen_cache_mb needs freeze_embeddings"):
        ModelConfig(frozen_cache_mb=1, **freeze)
