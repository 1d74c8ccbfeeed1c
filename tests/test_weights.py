"""Who counts how much."""

import numpy as np
import pytest
import torch
from answers_fixtures import combine, honest_answers, labels_of

from feddistill.aggregation.answers import RoundContext
from feddistill.aggregation.attacks import AttackContext, LeastLikely, SecondBest
from feddistill.aggregation.client_weights import CAP, FLOOR, by_validation, mixture_weights, verified
from feddistill.aggregation.rules import MeanProbs
from feddistill.aggregation.teacher import weigh
from feddistill.types import ClientDescription


def weights_of(kind, group, answers):
    known = RoundContext(descriptions=tuple(group))
    return weigh(kind, [lambda start, stop, a=a: a[start:stop] for a in answers], len(answers[0]), known)


def test_class_counts_let_the_client_speak_that_knows_the_class():
    answers = [torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.1, 0.2, 0.7]]).log()]
    group = [ClientDescription("a", 10, (10.0, 0.0, 0.0)), ClientDescription("b", 30, (0.0, 30.0, 0.0))]
    weights = weights_of("class_counts", group, answers)
    answer = combine(answers, MeanProbs(weights="class_counts"), weights).exp()
    expected = torch.tensor([[0.7, 0.2, 0.4]])  # the third class nobody has: both speak alike
    torch.testing.assert_close(answer, expected / expected.sum())


def test_a_class_whose_only_holder_is_gone_is_everybodys():
    answers = [torch.tensor([[0.7, 0.2, 0.1]]).log()]
    weights = weights_of("class_counts", [ClientDescription("a", None, (10.0, 0.0, 0.0))], answers)
    answer = combine(answers, MeanProbs(weights="class_counts"), weights)
    torch.testing.assert_close(answer.exp(), torch.tensor([[0.7, 0.2, 0.1]]))


def test_weights_by_size():
    group, answers = [ClientDescription("a", 10), ClientDescription("b", 30)], honest_answers(2)
    assert weights_of("size", group, answers).values.tolist() == [10.0, 30.0]
    assert weights_of("size", group, answers).mean_shares() == (0.25, 0.75)
    assert weights_of("uniform", group, answers) is None


def test_who_is_hardly_better_than_chance_has_no_weight():
    weights = by_validation(np.array([0.9, 0.25, 0.31]), 4)
    assert weights.values.tolist() == pytest.approx([0.9, 0.0, 0.31])
    assert by_validation(np.array([0.1, 0.2]), 4) is None  # nobody is: all alike


def test_confidence_weights_are_an_attack_vector():
    """What the documents warn of: whoever is sure owns the text."""
    honest = honest_answers()
    lie = LeastLikely()(AttackContext(honest[0], honest))
    answers = [lie, *honest[1:]]
    sure = weigh("confidence", [lambda start, stop, a=a: a[start:stop] for a in answers], 24, RoundContext())
    assert sure.mean_shares()[0] > 1.5 / 7


@pytest.mark.parametrize("attack", [SecondBest(), LeastLikely()], ids=lambda attack: attack.kind)
def test_verified_weights_silence_liars(attack):
    torch.manual_seed(0)
    labels = torch.randint(11, (200,))
    truth = 3 * torch.nn.functional.one_hot(labels, 11)
    honest = [(truth + torch.randn(200, 11)).log_softmax(-1) for _ in range(10)]
    lie = attack(AttackContext(honest[0], honest))
    answers = [*[lie] * 4, *honest[4:]]
    known = RoundContext(labels=torch.where(torch.arange(200) < 100, labels, -1))
    read = [lambda start, stop, a=a: a[start:stop] for a in answers]
    weights = weigh("verified", read, 200, known)
    assert max(weights.mean_shares()[:4]) == pytest.approx(FLOOR / 10, abs=1e-4)
    assert max(weights.mean_shares()) <= CAP / 10 + 1e-6
    teacher = combine(answers, MeanProbs(weights="verified"), weights, context=known)
    plain = combine(answers, MeanProbs(), context=known)
    right = [(t.argmax(-1) == labels)[100:].float().mean() for t in (teacher, plain)]
    assert right[0] > 0.9
    assert right[0] >= right[1]


def test_mixture_weights_are_the_best_within_their_bounds():
    random = np.random.default_rng(0)
    likelihood = random.dirichlet(np.ones(6), 80).T
    w = mixture_weights(likelihood, 0.02, 0.5)
    assert w.sum() == pytest.approx(1.0)
    assert (w >= 0.02 - 1e-9).all()
    assert (w <= 0.5 + 1e-9).all()

    def gain(weights):
        return np.log(weights @ likelihood).sum()

    for _ in range(200):
        other = w + 1e-3 * random.normal(size=6)
        other = np.clip(other, 0.02, 0.5)
        other /= other.sum()
        if ((other >= 0.02) & (other <= 0.5)).all():
            assert gain(other) <= gain(w) + 1e-4


def test_a_labelled_text_is_weighted_by_the_other_folds():
    """One client guesses every label of one fold and nothing else: it gains by them nowhere but elsewhere."""
    rows = np.arange(100)
    fold = rows % 5 == 0
    honest = np.log(np.full(100, 0.2))
    guesses = np.log(np.where(fold, 1.0, 1e-6))
    weights = verified(np.stack([honest, honest, honest, guesses]), rows, np.zeros(100, int)).values
    assert weights[3, 0] == pytest.approx(FLOOR / 4, abs=1e-3)
    assert weights[3, 1] > 2 * weights[3, 0]


def test_each_domain_has_weights_of_its_own():
    rows, domains = np.arange(80), np.repeat([0, 1], 50)
    good, bad = np.log(0.9), np.log(0.05)
    truth = np.array([np.where(domains[:80] == 0, good, bad), np.where(domains[:80] == 0, bad, good)])
    weights = verified(truth, rows, domains).values
    assert weights[0, 0] > 0.9
    assert weights[1, 99] > 0.9


def test_claims_have_to_be_shown():
    """Two clients claim a class; the one that is wrong about everything has it no more."""
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    right = (4 * torch.nn.functional.one_hot(labels, 3)).float().log_softmax(-1)
    wrong = (4 * torch.nn.functional.one_hot((labels + 1) % 3, 3)).float().log_softmax(-1)
    group = tuple(ClientDescription(name, None, (20.0, 20.0, 20.0)) for name in "abcd")
    answers = [right, right, right, wrong]
    known = RoundContext(descriptions=group, labels=labels)
    read = [lambda start, stop, a=a: a[start:stop] for a in answers]
    shares = weigh("verified_counts", read, 60, known).mean_shares()
    assert shares[3] == pytest.approx(FLOOR / 4, abs=1e-3)


def test_labels_of_every_other_text_are_enough():
    answers = honest_answers()
    read = [lambda start, stop, a=a: a[start:stop] for a in answers]
    shares = weigh("verified", read, 24, RoundContext(labels=labels_of())).mean_shares()
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)
