"""What every rule promises. A rule added to RULES is tested here without a new line."""

import itertools

import numpy as np
import pytest
import torch
from answers_fixtures import (
    CLASSES,
    CLIENTS,
    TEXTS,
    combine,
    honest_answers,
    kept,
    labels_of,
    total_variation,
    unequal,
)

from feddistill.aggregation.answers import RoundContext, abstentions, answered
from feddistill.aggregation.attacks import AttackContext, LeastLikely, SecondBest
from feddistill.aggregation.rules import RULES, MeanProbs
from feddistill.aggregation.rules.block import dense
from feddistill.aggregation.rules.distance import Cronus, Krum, MultiKrum
from feddistill.aggregation.rules.means import Era, MeanLogits, PriorCorrected, floored
from feddistill.aggregation.rules.order import MeanAroundMedian, TrimmedMean
from feddistill.aggregation.rules.remembered import ExpGuard
from feddistill.aggregation.teacher import aggregate
from feddistill.errors import ConfigError
from feddistill.types import ClientDescription
from feddistill_kernels import TopK, aggregate_topk, topk_compress


@pytest.fixture(params=RULES.values(), ids=RULES.keys())
def rule(request):
    return request.param()


@pytest.fixture
def honest():
    return honest_answers()


@pytest.mark.parametrize("mix", [None, 2])
def test_is_a_distribution(rule, honest, mix):
    torch.testing.assert_close(combine(honest, rule, mix=mix).exp().sum(-1), torch.ones(TEXTS))
    sparse = combine(kept(honest, 4), rule, mix=mix)
    torch.testing.assert_close(sparse.log_probs.exp().sum(-1) + sparse.log_tail.exp(), torch.ones(TEXTS))
    assert (sparse.ids.sort(-1).values.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("mix", [None, 2])
def test_order_of_clients_is_irrelevant(rule, honest, mix):
    shuffled = [honest[i] for i in (3, 1, 6, 0, 5, 2, 4)]
    torch.testing.assert_close(combine(shuffled, rule, mix=mix), combine(honest, rule, mix=mix))


def test_a_constant_added_to_a_row_of_logits_changes_nothing(rule, honest):
    shifted = [(a + 100 * torch.randn(TEXTS, 1)).log_softmax(-1) for a in honest]
    torch.testing.assert_close(combine(shifted, rule), combine(honest, rule), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mix", [None, 2])
def test_clients_that_agree_get_back_what_they_said(rule, honest, mix):
    answer = combine([honest[0]] * CLIENTS, rule, mix=mix)
    if rule.unanimous:
        torch.testing.assert_close(answer, honest[0])
    else:  # sharper or flatter, but in the same order
        assert (answer.argmax(-1) == honest[0].argmax(-1)).all()


@pytest.mark.parametrize("mix", [None, 2])
@pytest.mark.parametrize("k", [CLASSES, 4])
def test_compressed_answers_are_the_dense_ones_that_they_stand_for(rule, honest, mix, k):
    compressed = kept(honest, k)
    opened = combine([answer.expand() for answer in compressed], rule, mix=mix)
    teacher = combine(compressed, rule, mix=mix)
    there = opened.gather(1, teacher.ids.long())
    torch.testing.assert_close(teacher.log_probs, there, rtol=1e-4, atol=1e-5)
    if k == CLASSES:
        torch.testing.assert_close(teacher.expand(), combine(honest, rule, mix=mix), rtol=1e-4, atol=1e-5)


def test_rows_may_keep_different_numbers_of_entries(rule, honest):
    answers = unequal(kept(honest, 4))
    teacher = combine(answers, rule)
    opened = combine([answer.expand() for answer in answers], rule)
    torch.testing.assert_close(teacher.log_probs, opened.gather(1, teacher.ids.long()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mix", [None, 2])
def test_chunks_change_nothing(rule, honest, mix, monkeypatch):
    whole, compressed = combine(honest, rule, mix=mix), combine(kept(honest, 4), rule, mix=mix)
    monkeypatch.setattr("feddistill.aggregation.answers.CHUNK", 3 * CLIENTS * CLASSES)
    torch.testing.assert_close(combine(honest, rule, mix=mix), whole)
    torch.testing.assert_close(combine(kept(honest, 4), rule, mix=mix).expand(), compressed.expand())


@pytest.mark.parametrize("mix", [None, 2])
def test_the_same_bytes_for_any_number_of_threads(rule, mix):
    honest = honest_answers(texts=1000)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            sparse = combine(kept(honest, 4), rule, mix=mix)
            parts = (combine(honest, rule, mix=mix), sparse.ids, sparse.log_probs, sparse.log_tail)
            found.append([part.numpy().tobytes() for part in parts])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", sorted(k for k, rule in RULES.items() if not rule.of_classes))
def test_who_has_no_opinion_is_not_there(kind):
    """Rows that some have no opinion on are those of the others alone; where too few are left, nobody's."""
    torch.manual_seed(1)
    rule = RULES[kind].model_validate({"kind": kind})
    clients = [topk_compress(torch.randn(9, 50), 4) for _ in range(6)]
    everyone = rows_by(rule, clients)
    nothing = abstentions(9, 4, 50)
    fewer = [*clients]
    fewer[0] = TopK(
        *(
            torch.cat([getattr(nothing, f)[:3], getattr(clients[0], f)[3:]])
            for f in ("ids", "log_probs", "log_tail")
        ),
        50,
    )
    found = rows_by(rule, fewer)
    if "whole" not in rule.needs():
        wanted = rows_by(rule, clients[1:])
        assert torch.allclose(found.expand()[:3], wanted.expand()[:3], atol=1e-5)
        assert torch.allclose(found.expand()[3:], everyone.expand()[3:], atol=1e-5)
    assert torch.allclose(found.expand().exp().sum(-1), torch.ones(9), atol=1e-4)
    alone = rows_by(rule, [clients[0], *[nothing] * 5])
    enough = True
    try:
        rule.check(1)
    except ConfigError:
        enough = False
    if "whole" not in rule.needs():
        assert answered(alone).all() == enough
    assert not answered(rows_by(rule, [nothing] * 6)).any()


def rows_by(rule, clients):
    labels = torch.randint(0, 50, (9,), generator=torch.Generator().manual_seed(2))
    known = RoundContext(names=tuple("abcdef"[: len(clients)]), labels=labels)
    answerers = [lambda a, b, c=client: c[a:b] for client in clients]
    return aggregate(answerers, 9, rule, context=known, k=4).teacher


@pytest.mark.parametrize("attack", [LeastLikely(), SecondBest()], ids=lambda attack: attack.kind)
def test_liars_up_to_the_promise_do_not_own_the_result(rule, attack):
    honest = honest_answers(spread=0.3)
    attackers = rule.tolerates(CLIENTS)
    lie = attack(AttackContext(honest[0], honest[attackers:]))
    teacher = combine([lie] * attackers + honest[attackers:], rule)
    mean = torch.stack(honest[attackers:]).exp().mean(0).log()
    farthest = torch.stack([total_variation(answer, mean) for answer in honest[attackers:]]).amax(0)
    if attackers:
        assert total_variation(teacher, mean).mean() <= farthest.mean()


def test_liars_up_to_the_promise_stay_inside_the_honest_range(rule, honest):
    attackers = rule.tolerates(CLIENTS) if rule.in_range else 0
    for lie in (-1e6, 0.0):
        attacked = [torch.full_like(a, lie) if i < attackers else a for i, a in enumerate(honest)]
        answer, truth = rule.combine(dense(attacked), None), torch.stack(honest[attackers:])
        if attackers:
            assert (answer >= truth.amin(0)).all()
            assert (answer <= truth.amax(0)).all()


def test_which_rules_promise_what():
    """A rule that loses a promise loses it here, in sight."""
    made = {name: rule() for name, rule in RULES.items()}
    assert {name for name, rule in made.items() if rule.in_range} == {"median", "trimmed_mean"}
    assert {name for name, rule in made.items() if not rule.unanimous} == {
        "era",
        "enhanced_era",
        "vote",
        "prior_corrected",
        "stacked",
    }
    assert {name for name, rule in made.items() if rule.tolerates(7)} == {
        "median",
        "trimmed_mean",
        "mean_around_median",
        "geometric_median",
        "krum",
        "multi_krum",
        "cronus",
        "expguard",
    }
    assert {name for name, rule in made.items() if rule.secure_sums} == {
        "mean_probs",
        "mean_logits",
        "era",
        "enhanced_era",
        "vote",
    }


@pytest.mark.parametrize("attackers", [1, 2, 3])
def test_attackers_move_the_mean_of_probabilities_by_their_share(honest, attackers):
    lie = torch.full_like(honest[0], -40.0)
    lie[:, 3] = 0.0
    before, after = combine(honest, MeanProbs()), combine([lie] * attackers + honest[attackers:], MeanProbs())
    assert (total_variation(before, after) <= attackers / CLIENTS + 1e-6).all()


def test_the_floor_bounds_a_veto(honest):
    veto = honest[0].clone()
    veto[:, 3] = -1e4
    bounded = combine([veto, *honest[1:]], MeanLogits(floor=10.0))
    without = combine([honest[0], *honest[1:]], MeanLogits(floor=10.0))
    assert ((bounded - without)[:, 3] >= -10.0 / CLIENTS - 0.1).all()


@pytest.mark.parametrize("kind", [MeanProbs, MeanLogits])
def test_means_are_numpys(kind, honest):
    from feddistill.aggregation.client_weights import Weights

    weights = torch.rand(CLIENTS)
    stack, w = torch.stack(honest).double().numpy(), (weights / weights.sum()).double().numpy()
    if kind is MeanProbs:
        truth = np.einsum("c,cnv->nv", w, np.exp(stack))
    else:
        truth = np.exp(np.einsum("c,cnv->nv", w, stack))
    truth /= truth.sum(-1, keepdims=True)
    found = combine(honest, kind(), Weights(weights))
    np.testing.assert_allclose(found.exp().numpy(), truth, rtol=1e-5)


def test_order_statistics_are_numpys(honest):
    stack = np.sort(torch.stack(honest).double().numpy(), 0)
    for rule, truth in (
        (RULES["median"](), np.median(stack, 0)),
        (TrimmedMean(trim=2), stack[2:-2].mean(0)),
    ):
        np.testing.assert_allclose(rule.combine(dense(honest), None).numpy(), truth, rtol=1e-5)


def test_the_median_lies_in_the_middle(honest):
    for some in itertools.islice(itertools.combinations(honest, 4), 5):
        middle = torch.quantile(torch.stack(some).double(), 0.5, dim=0)
        torch.testing.assert_close(RULES["median"]().combine(dense(some), None).double(), middle)


def test_the_geometric_median_is_nearest_to_all(honest):
    """By its definition, against NumPy in float64: no step in any direction is nearer."""
    roots = np.exp(torch.stack(honest).double().numpy() / 2)
    y = RULES["geometric_median"]().combine(dense(honest), None).double().numpy()
    median = np.exp(y / 2)

    def far(point):
        return np.linalg.norm(roots - point, axis=-1).sum(0)

    random = np.random.default_rng(0)
    for _ in range(20):
        step = random.normal(size=median.shape)
        step *= 1e-3 / np.linalg.norm(step, axis=-1, keepdims=True)
        assert (far(median) <= far(median + step) + 1e-6).all()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(Krum(byzantine=2), {"byzantine": 2}), (MultiKrum(byzantine=2, keep=3), {"byzantine": 2, "keep": 3})],
)
def test_krum_over_chunks_is_the_kernels_over_the_whole(ours, theirs, honest, monkeypatch):
    monkeypatch.setattr("feddistill.aggregation.answers.CHUNK", 5 * CLIENTS * CLASSES)
    compressed = kept(honest, 5)
    whole = aggregate_topk(compressed, "krum", **theirs)
    torch.testing.assert_close(combine(compressed, ours).expand(), aggregated(whole, 5))


@pytest.mark.parametrize("kind", ["median", "geometric_median"])
def test_mixing_over_chunks_is_the_kernels_over_the_whole(kind, honest, monkeypatch):
    monkeypatch.setattr("feddistill.aggregation.answers.CHUNK", 5 * CLIENTS * CLASSES)
    compressed = kept(honest, 5)
    whole = aggregate_topk(compressed, kind, mix=2)
    torch.testing.assert_close(
        combine(compressed, RULES[kind](), mix=2).expand(), aggregated(whole, 5), rtol=1e-4, atol=1e-4
    )


def aggregated(whole, k):
    """A teacher of all entries, cut to ``k`` as ours is."""
    return topk_compress(whole.expand(), k).expand()


byzfl_rules = {
    "median": (RULES["median"](), "Median", {}),
    "trimmed_mean": (TrimmedMean(trim=2), "TrMean", {"f": 2}),
    "krum": (Krum(byzantine=2), "Krum", {"f": 2}),
    "multi_krum": (MultiKrum(byzantine=2), "MultiKrum", {"f": 2}),
}


@pytest.mark.parametrize("name", byzfl_rules)
@pytest.mark.parametrize("mix", [None, 2])
def test_is_byzfls(name, mix, honest):
    """Of rows centred as ours are: logits are defined up to a constant."""
    byzfl = pytest.importorskip("byzfl", reason="the rules' peer, pip install byzfl")
    rule, theirs, settings = byzfl_rules[name]
    centred = torch.stack([(a - a.mean(-1, keepdim=True)).flatten() for a in honest])
    plain = torch.stack([a.flatten() for a in honest])
    if mix is not None:
        mixed = torch.as_tensor(byzfl.NNM(f=mix)(centred)).reshape(CLIENTS, TEXTS, CLASSES)
        answers = [m.log_softmax(-1) for m in mixed]
        centred = torch.stack([(a - a.mean(-1, keepdim=True)).flatten() for a in answers])
        plain = torch.stack([a.flatten() for a in answers])
    points = centred if "krum" in name else plain
    truth = torch.as_tensor(getattr(byzfl, theirs)(**settings)(points)).reshape(TEXTS, CLASSES)
    torch.testing.assert_close(combine(honest, rule, mix=mix), truth.log_softmax(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (TrimmedMean(trim=4), r"trim = 4 discards all 7 clients; it can be at most 3"),
        (MeanAroundMedian(keep=8), r"keep = 8 exceeds the 7 clients"),
        (Krum(byzantine=3), r"byzantine = 3 needs at least 9 clients, there are 7; it can be at most 2"),
        (MultiKrum(byzantine=2, keep=6), r"keep = 6 exceeds the 5 of 7 clients that .*byzantine = 2 leaves"),
        (Cronus(byzantine=4), r"byzantine = 4 must be fewer than half of the 7 clients"),
        (ExpGuard(base=TrimmedMean(trim=4)), r"trim = 4 discards all 7 clients"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_too_few_clients_are_refused(rule, message):
    with pytest.raises(ConfigError, match=message):
        rule.check(CLIENTS)


def test_the_least_cross_entropy_is_chosen_where_a_label_is_known(honest):
    labels = labels_of()
    teacher = combine(honest, RULES["min_ce"]())
    truth = torch.stack(honest)
    for row in range(TEXTS):
        if labels[row] >= 0:
            best = truth[:, row, labels[row]].argmax()
            torch.testing.assert_close(teacher[row], truth[best, row])
        else:
            torch.testing.assert_close(teacher[row], truth[:, row].exp().mean(0).log())


@pytest.mark.parametrize("k", [None, 4])
def test_a_student_that_knows_better_keeps_its_answer(honest, k):
    labels = labels_of()
    student = torch.full((TEXTS, CLASSES), -8.0)
    student[torch.arange(TEXTS), labels.clamp_min(0)] = 0.0
    student = student.log_softmax(-1)
    answers, own = (honest, student) if k is None else (kept(honest, k), kept([student], k)[0])
    known = RoundContext(labels=labels, student=lambda start, stop: own[start:stop])
    teacher = combine(answers, RULES["min_ce"](), context=known)
    some = labels >= 0
    found = teacher if k is None else teacher.expand()
    torch.testing.assert_close(found[some].argmax(-1), labels[some])
    wins = torch.stack(honest)[:, torch.arange(TEXTS), labels.clamp_min(0)].amax(0) < -0.01
    torch.testing.assert_close(found[some & wins].exp(), student[some & wins].exp(), rtol=1e-2, atol=1e-2)


def test_votes_are_counted_and_ties_split():
    a = torch.tensor([[0.6, 0.3, 0.1]]).log()
    b = torch.tensor([[0.45, 0.45, 0.1]]).log()
    torch.testing.assert_close(combine([a, b], RULES["vote"]()).exp(), torch.tensor([[0.75, 0.25, 0.0]]))


def test_who_is_unsure_abstains():
    sure = torch.tensor([[0.98, 0.01, 0.01], [1 / 3, 1 / 3, 1 / 3]]).log()
    unsure = torch.tensor([[0.3, 0.4, 0.3], [0.3, 0.4, 0.3]]).log()
    teacher = combine([sure, unsure], RULES["selective"]()).exp()
    torch.testing.assert_close(teacher[0], sure[0].exp())
    torch.testing.assert_close(teacher[1], (sure[1].exp() + unsure[1].exp()) / 2)  # nobody is: all speak


def test_what_a_client_rarely_saw_is_taken_back():
    """Two clients that differ only by their priors agree once these are taken back."""
    truth = torch.tensor([[0.5, 0.3, 0.2]])
    counts = [(79.0, 9.0, 9.0), (9.0, 79.0, 9.0)]
    answers = [(truth * (torch.tensor(c) + 1)).log().log_softmax(-1) for c in counts]
    known = RoundContext(descriptions=tuple(ClientDescription(str(i), None, c) for i, c in enumerate(counts)))
    rule = PriorCorrected(strength=1.0, weights="uniform")
    torch.testing.assert_close(combine(answers, rule, context=known).exp(), truth)


class TestStacked:
    """Fitted to labels: 300 texts in five classes, four honest clients, labels of 120 texts."""

    TEXTS, CLASSES, LABELLED = 300, 5, 120
    COUNTS = (10.0,) * 5

    def world(self, seed=0):
        random = torch.Generator().manual_seed(seed)
        truth = torch.randint(self.CLASSES, (self.TEXTS,), generator=random)
        answers = []
        for _ in range(6):
            scores = 1.5 * torch.randn(self.TEXTS, self.CLASSES, generator=random)
            scores[torch.arange(self.TEXTS), truth] += 2.5
            answers.append(scores.log_softmax(-1))
        labels = torch.where(torch.arange(self.TEXTS) < self.LABELLED, truth, -1)
        names = tuple("abcdef")
        known = RoundContext(names, tuple(ClientDescription(n, None, self.COUNTS) for n in names), labels)
        return answers, truth, known

    def right(self, teacher, truth):
        return (teacher.argmax(-1) == truth)[self.LABELLED :].float().mean().item()

    @pytest.mark.parametrize("attack", [SecondBest(), LeastLikely()], ids=lambda attack: attack.kind)
    def test_half_of_the_clients_may_lie_alike(self, attack):
        answers, truth, known = self.world()
        honest = self.right(combine(answers[3:], RULES["mean_probs"]()), truth)
        lies = [attack(AttackContext(own, answers[3:])) for own in answers[:3]]
        said = [*lies, *answers[3:]]
        assert self.right(combine(said, RULES["stacked"](), context=known), truth) > honest - 0.02
        assert self.right(combine(said, RULES["mean_probs"]()), truth) < honest - 0.1

    def test_a_liars_own_knowledge_is_used(self):
        """Everybody swaps the two best: what is second is right."""
        answers, truth, known = self.world()
        swapped = []
        for own in answers:
            best = own.topk(2, dim=-1)
            swapped.append(own.scatter(-1, best.indices, best.values.flip(-1)))
        assert self.right(combine(swapped, RULES["mean_probs"]()), truth) < 0.6
        assert self.right(combine(swapped, RULES["stacked"](), context=known), truth) > 0.75

    def test_it_is_the_least_of_a_penalised_cross_entropy(self):
        """The same fit by another optimiser, in torch."""
        answers, _, known = self.world()
        rule = RULES["stacked"](penalties=(2.0,), strength=0.0)
        stack = torch.stack(answers).double()
        first = torch.zeros_like(stack).scatter_(-1, stack.argmax(-1, keepdim=True), 1.0)
        here = known.labels >= 0
        w, u, b = (torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (6, 6, self.CLASSES))
        optimiser = torch.optim.LBFGS(
            [w, u, b], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
        )

        def scores():
            return torch.einsum("c,cnv->nv", w + 1 / 6, stack) + torch.einsum("c,cnv->nv", u, first) + b

        def closure():
            optimiser.zero_grad()
            cost = torch.nn.functional.cross_entropy(scores()[here], known.labels[here], reduction="sum")
            cost = cost + 2.0 * sum(x.square().sum() for x in (w, u, b))
            cost.backward()
            return cost

        optimiser.step(closure)
        wanted = scores().detach().log_softmax(-1).float()
        torch.testing.assert_close(combine(answers, rule, context=known), wanted, atol=1e-4, rtol=1e-4)

    def test_clients_may_come_in_any_order(self):
        answers, _, known = self.world()
        order = [3, 1, 5, 0, 2, 4]
        moved = RoundContext(
            tuple(known.names[i] for i in order), tuple(known.descriptions[i] for i in order), known.labels
        )
        made = combine(answers, RULES["stacked"](), context=known)
        again = combine([answers[i] for i in order], RULES["stacked"](), context=moved)
        torch.testing.assert_close(made, again, atol=1e-5, rtol=1e-5)

    def test_a_few_labels_are_enough_to_go_on_and_none_to_begin(self):
        answers, truth, known = self.world()
        few = torch.where(torch.arange(self.TEXTS) < 4, truth, -1)
        for labels in (few, torch.full_like(few, -1), None):
            told = RoundContext(known.names, known.descriptions, labels)
            teacher = combine(answers, RULES["stacked"](), context=told)
            assert self.right(teacher, truth) > 0.9
            torch.testing.assert_close(teacher.exp().sum(-1), torch.ones(self.TEXTS))


def test_era_flattens_and_sharpens_by_its_temperature(honest):
    mean = torch.stack(honest).exp().mean(0)
    found = combine(honest, Era(temperature=0.1))
    torch.testing.assert_close(found, (mean / 0.1).log_softmax(-1))


def test_a_liar_loses_its_weight_over_rounds_and_is_forgiven(honest):
    rule, names = ExpGuard(eta=5.0, decay=0.9, amnesty=2), tuple("abcdefg")
    lie = LeastLikely()(AttackContext(honest[0], honest))
    memory, shares = {}, []
    for answers in ([lie, *honest[1:]],) * 3 + (honest,) * 8:
        answerers = [lambda start, stop, a=a: a[start:stop] for a in answers]
        made = aggregate(answerers, TEXTS, rule, context=RoundContext(names=names, memory=memory))
        memory = made.memory
        shares.append(made.weights[0])
    assert shares[0] < 0.05 > shares[1] > shares[2]
    assert memory["a"]["log_weight"] > -0.2 * 15  # what is past fades
    assert set(memory) == set(names)


def test_memory_is_kept_of_clients_that_stay_away(honest):
    known = RoundContext(names=tuple("abcdefg"), memory={"gone": {"log_weight": -3.0, "clean": 0.0}})
    answerers = [lambda start, stop, a=a: a[start:stop] for a in honest]
    made = aggregate(answerers, TEXTS, ExpGuard(), context=known)
    assert made.memory["gone"] == {"log_weight": -3.0, "clean": 0.0}


def test_who_lies_between_clean_rounds_is_not_forgiven(honest):
    lie = LeastLikely()(AttackContext(honest[0], honest))
    known = RoundContext(names=tuple("abcdefg"), memory={"a": {"log_weight": -3.0, "clean": 2.0}})
    answerers = [lambda start, stop, a=a: a[start:stop] for a in (lie, *honest[1:])]
    assert aggregate(answerers, TEXTS, ExpGuard(), context=known).memory["a"]["clean"] == 0


def test_krum_sums_the_distances_to_as_many_neighbours_as_documented(monkeypatch):
    """Four clients are close together, but each has only three neighbours there, and four count."""
    place = torch.tensor([0.0, 0.1, 0.2, 0.3, 10.0, 11.0, 12.0, 13.0, 14.0])
    squares = (place[:, None] - place).square()
    monkeypatch.setattr("feddistill.aggregation.rules.block.squared_distances", lambda blocks: squares)
    chosen, _ = Krum(byzantine=3).choose(lambda: iter(()), tuple("abcdefghi"), {})
    assert chosen.tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0]


def test_the_floor_holds_for_each_id_that_was_not_kept():
    kept_ids = torch.tensor([[0, 1]], dtype=torch.int32)
    answer = TopK(kept_ids, torch.tensor([[0.0, -torch.inf]]), torch.tensor([-torch.inf]), 100)
    assert floored(answer, 10.0).expand()[0, 1:].tolist() == pytest.approx([-10.0] * 99)
