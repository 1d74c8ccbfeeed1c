"""The server's part between payloads and teacher: chunks, bytes, compressed answers, diagnostics."""

import pytest
import torch
from answers_fixtures import CLASSES, CLIENTS, TEXTS, combine, honest_answers, kept, labels_of, unequal

from feddistill.aggregation.answers import RoundContext
from feddistill.aggregation.attacks import AttackContext, FreeRider
from feddistill.aggregation.diagnostics import diagnose
from feddistill.aggregation.rules import RULES, MeanProbs
from feddistill.aggregation.teacher import aggregate, weigh
from feddistill.types import UNLABELLED
from feddistill_kernels import TopK


def readers(answers):
    return [lambda start, stop, a=a: a[start:stop] for a in answers]


@pytest.fixture
def honest():
    return honest_answers()


def codes_of(answers):
    return [(-12 * a).round().clamp(0, 255).to(torch.uint8) for a in answers]


@pytest.mark.parametrize("clients", [CLIENTS, CLIENTS - 1])
def test_the_median_of_bytes_is_that_of_whole_numbers(clients, honest):
    codes = codes_of(honest[:clients])
    ordered = torch.stack(codes).int().sort(0).values
    middle = (ordered[(clients - 1) // 2] + ordered[clients // 2]).double() / -24
    teacher = combine(codes, RULES["median"]())
    assert torch.equal(teacher, middle.log_softmax(-1).float())


def test_bytes_stand_for_log_probabilities(honest):
    codes = codes_of(honest)
    opened = [(c.double() / -12).log_softmax(-1).float() for c in codes]
    for rule in (MeanProbs(), RULES["geometric_median"]()):
        assert torch.equal(combine(codes, rule), combine(opened, rule))


def test_sharpening_is_a_power(honest):
    plain, sharp = combine(honest, MeanProbs()), combine(honest, MeanProbs(), sharpen=3.0)
    powered = plain.exp() ** 3
    torch.testing.assert_close(sharp.exp(), powered / powered.sum(-1, keepdim=True))


@pytest.mark.parametrize("name", ["mean_probs", "vote", "min_ce"])
def test_sharpening_compressed_answers_is_the_same_power(name, honest):
    compressed = kept(honest, 4)
    rule = RULES[name]()
    opened = combine([answer.expand() for answer in compressed], rule, sharpen=2.0)
    teacher = combine(compressed, rule, sharpen=2.0)
    there = opened.gather(1, teacher.ids.long())
    if name == "mean_probs":  # it is cut to k entries before, and its tail is even
        even = combine(compressed, rule).expand()
        there = (2 * even).log_softmax(-1).gather(1, teacher.ids.long())
    torch.testing.assert_close(teacher.log_probs.exp(), there.exp())


def test_a_teacher_has_as_many_entries_as_it_is_asked_for(honest):
    assert combine(kept(honest, 4), MeanProbs()).ids.shape == (TEXTS, 4)
    assert combine(kept(honest, 4), MeanProbs(), k=2).ids.shape == (TEXTS, 2)
    assert combine(kept(honest, 4), RULES["vote"](), k=2).ids.shape == (TEXTS, 2)


def test_clients_may_keep_different_numbers_of_entries(honest):
    mixed = [*kept(honest[:3], 3), *kept(honest[3:], 6)]
    for rule in (RULES["median"](), RULES["vote"]()):
        opened = combine([answer.expand() for answer in mixed], rule)
        teacher = combine(mixed, rule)
        torch.testing.assert_close(teacher.log_probs, opened.gather(1, teacher.ids.long()))


def test_diagnostics_of_rows_that_keep_different_numbers_of_entries(honest):
    answers = unequal(kept(honest, 4))
    opened = [answer.expand() for answer in answers]
    assert diagnosed(answers, opened[0], labels_of()) == diagnosed(opened, opened[0], labels_of())


def test_compressed_and_open_answers_do_not_mix(honest):
    with pytest.raises(ValueError, match="some clients answer compressed"):
        combine([*honest[:3], *kept(honest[3:])], MeanProbs())


def test_vocabularies_must_agree(honest):
    with pytest.raises(ValueError, match=r"different vocabularies: \[10, 11\]"):
        combine([honest[0], honest[1][:, 1:]], MeanProbs())


def test_a_missing_id_counts_as_its_clients_own_tail():
    """One liar of eleven that alone names an id does not own it."""
    honest = TopK(torch.tensor([[0, 1]]).int(), torch.tensor([[-0.2, -2.0]]), torch.tensor([-3.0]), 1000)
    attacker = TopK(torch.tensor([[7, 8]]).int(), torch.tensor([[-0.01, -6.0]]), torch.tensor([-6.0]), 1000)
    everyone = [honest] * 10
    median = combine([*everyone, attacker], RULES["median"](), k=2).expand().exp()
    mean = combine([*everyone, attacker], MeanProbs(), k=2).expand().exp()
    assert median[0, 7] < 1e-4
    assert mean[0, 7] < 1 / 11


def test_the_mass_tells_of_consensus(honest):
    def mass(answers):
        return aggregate(readers(answers), TEXTS, RULES["median"]()).mass

    agreeing = mass([honest[0]] * CLIENTS)
    assert agreeing == pytest.approx(1.0, abs=1e-5)
    assert mass(honest) < 0.9
    assert mass(kept(honest, 4)) < 0.9
    assert mass(kept([honest[0]] * CLIENTS, 4)) == pytest.approx(1.0, abs=1e-5)


def diagnosed(answers, teacher, labels, names=None):
    names = names or [f"client-{index}" for index in range(len(answers))]
    shares = [1 / len(answers)] * len(answers)
    return diagnose(names, readers(answers), lambda start, stop: teacher[start:stop], labels, 1.0, shares)


@pytest.mark.parametrize("k", [None, 4])
def test_diagnostics_see_a_client_that_has_collapsed(honest, k):
    collapsed = torch.full((TEXTS, CLASSES), -30.0)
    collapsed[:, 2] = 0.0
    clients, teacher = [honest[0], collapsed], honest[0]
    labels = teacher.argmax(-1).clone()
    labels[0] = UNLABELLED
    if k is not None:
        clients, teacher = kept(clients, k), kept([teacher], k)[0]
    found = diagnosed(clients, teacher, labels, ["fine", "stuck"])
    assert found.collapsed == ("stuck",)
    assert found.teacher_accuracy == 1.0
    assert found.teacher_cross_entropy == pytest.approx(-float(honest[0].amax(-1)[1:].mean()), abs=1e-4)
    assert found.agreement["fine"] == 1.0
    assert found.effective_classes["stuck"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("k", [None, 4])
def test_diagnostics_name_who_sends_what_another_sends(honest, k):
    copied = FreeRider(noise=0.01)(AttackContext(honest[0], honest, teacher=honest[3]))
    answers = [copied, *honest[1:]]
    if k is not None:
        answers = kept(answers, k)
    found = diagnosed(answers, combine(answers, MeanProbs()), labels_of())
    assert found.duplicates == (("client-0", "client-3"),)


def test_honest_clients_are_no_duplicates(honest):
    assert diagnosed(honest, honest[0], labels_of()).duplicates == ()


def test_without_labels_there_is_no_accuracy(honest):
    found = diagnosed(honest, honest[0], torch.full((TEXTS,), UNLABELLED))
    assert (found.teacher_accuracy, found.teacher_cross_entropy) == (None, None)


@pytest.mark.parametrize("kind", ["validation", "confidence", "verified"])
def test_weights_of_compressed_answers_are_those_of_what_they_stand_for(kind, honest):
    known = RoundContext(labels=labels_of())
    compressed = kept(honest, CLASSES)
    a = weigh(kind, readers(compressed), TEXTS, known)
    b = weigh(kind, readers([answer.expand() for answer in compressed]), TEXTS, known)
    torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-5)
    rule = MeanProbs(weights=kind)
    left = combine(compressed, rule, a).expand()
    torch.testing.assert_close(left, combine(honest, rule, b), rtol=1e-3, atol=1e-4)
