"""What every rule promises. A rule added to RULES is tested here without a new line."""

import itertools

import numpy as np
import pytest
import torch

from feddistill.aggregation import aggregate, client_weights, diagnose
from feddistill.errors import ConfigError
from feddistill.rules import RULES, MeanLogits, MeanProbs, TrimmedMean
from feddistill.types import UNLABELLED, ClientDescription

CLIENTS, TEXTS, CLASSES = 7, 5, 11


@pytest.fixture(params=RULES.values(), ids=RULES.keys())
def rule(request):
    return request.param()


@pytest.fixture
def honest():
    torch.manual_seed(0)
    return list(torch.randn(CLIENTS, TEXTS, CLASSES).log_softmax(-1))


def combine(clients, rule, weights=None, sharpen=1.0):
    answerers = [lambda start, stop, a=a: a[start:stop] for a in clients]
    return aggregate(answerers, len(clients[0]), rule, weights, sharpen)[0]


def test_is_a_distribution(rule, honest):
    torch.testing.assert_close(combine(honest, rule).exp().sum(-1), torch.ones(TEXTS))


def test_unanimity(rule, honest):
    torch.testing.assert_close(combine([honest[0]] * CLIENTS, rule), honest[0])


def test_order_of_clients_is_irrelevant(rule, honest):
    torch.testing.assert_close(combine(honest[::-1], rule), combine(honest, rule))


def test_liars_up_to_the_promise_stay_inside_the_honest_range(rule, honest):
    liars = rule.tolerates(CLIENTS)
    attacked = [torch.full_like(a, -1e6) if i < liars else a for i, a in enumerate(honest)]
    answer, truth = rule(attacked), torch.stack(honest[liars:])
    if liars:
        assert (answer >= truth.amin(0)).all()
        assert (answer <= truth.amax(0)).all()


def test_one_liar_moves_the_mean_of_probabilities_by_its_share(honest):
    liar = torch.full_like(honest[0], -40.0)
    liar[:, 3] = 0.0
    before, after = combine(honest, MeanProbs()), combine([liar, *honest[1:]], MeanProbs())
    moved = 0.5 * (before.exp() - after.exp()).abs().sum(-1)
    assert (moved <= 1 / CLIENTS + 1e-6).all()


def test_chunks_change_nothing(rule, honest, monkeypatch):
    whole = combine(honest, rule)
    monkeypatch.setattr("feddistill.aggregation.CHUNK", 2)
    torch.testing.assert_close(combine(honest, rule), whole)


@pytest.mark.parametrize("kind", [MeanProbs, MeanLogits])
def test_means_are_numpys(kind, honest):
    weights = torch.rand(CLIENTS)
    stack, w = torch.stack(honest).double().numpy(), (weights / weights.sum()).double().numpy()
    if kind is MeanProbs:
        truth = np.einsum("c,cnv->nv", w, np.exp(stack))
    else:
        truth = np.exp(np.einsum("c,cnv->nv", w, stack))
    truth /= truth.sum(-1, keepdims=True)
    np.testing.assert_allclose(combine(honest, kind(), weights).exp().numpy(), truth, rtol=1e-5)


def test_class_counts_let_the_client_speak_that_knows_the_class():
    knows_a = torch.tensor([[0.7, 0.2, 0.1]]).log()
    knows_b = torch.tensor([[0.1, 0.2, 0.7]]).log()
    crew = [ClientDescription("a", 10, (10.0, 0.0, 0.0)), ClientDescription("b", 30, (0.0, 30.0, 0.0))]
    weights = client_weights("class_counts", crew, 3)
    answer = combine([knows_a, knows_b], MeanProbs(weights="class_counts"), weights).exp()
    expected = torch.tensor([[0.7, 0.2, 0.4]])  # the third class nobody has: both speak alike
    torch.testing.assert_close(answer, expected / expected.sum())


def test_a_class_whose_only_holder_is_gone_is_everybodys():
    weights = client_weights("class_counts", [ClientDescription("a", None, (10.0, 0.0, 0.0))], 3)
    answer = combine([torch.tensor([[0.7, 0.2, 0.1]]).log()], MeanProbs(weights="class_counts"), weights)
    torch.testing.assert_close(answer.exp(), torch.tensor([[0.7, 0.2, 0.1]]))


def test_weights_by_size():
    crew = [ClientDescription("a", 10), ClientDescription("b", 30)]
    assert client_weights("size", crew, 3).tolist() == [10.0, 30.0]
    assert client_weights("uniform", crew, 3) is None


def test_sharpening_is_a_power(honest):
    plain, sharp = combine(honest, MeanProbs()), combine(honest, MeanProbs(), sharpen=3.0)
    powered = plain.exp() ** 3
    torch.testing.assert_close(sharp.exp(), powered / powered.sum(-1, keepdim=True))


def test_trimming_everybody_is_refused(honest):
    with pytest.raises(ConfigError, match=r"trim = 4 discards all 7 clients; it can be at most 3"):
        combine(honest, TrimmedMean(trim=4))


def test_the_median_lies_in_the_middle(honest):
    rule = RULES["median"]()
    for some in itertools.islice(itertools.combinations(honest, 4), 5):
        middle = torch.quantile(torch.stack(some).double(), 0.5, dim=0)
        torch.testing.assert_close(rule(list(some)).double(), middle)


def test_diagnostics_see_a_client_that_has_collapsed(honest):
    collapsed = torch.full((TEXTS, CLASSES), -30.0)
    collapsed[:, 2] = 0.0
    clients = [honest[0], collapsed]
    teacher = honest[0]
    labels = teacher.argmax(-1).clone()
    labels[0] = UNLABELLED
    answerers = [lambda start, stop, a=a: a[start:stop] for a in clients]
    found = diagnose(["fine", "stuck"], answerers, teacher, labels, 1.0)
    assert found.collapsed == ("stuck",)
    assert found.teacher_accuracy == 1.0
    assert found.agreement["fine"] == 1.0
