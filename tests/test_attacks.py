"""What every attack is: a distribution that a payload can hold, of what the liar sees."""

import json

import pytest
import torch
from answers_fixtures import CLASSES, TEXTS, honest_answers
from safetensors.torch import load_file

from feddistill import payload, report
from feddistill.aggregation.attacks import (
    ATTACKS,
    Alie,
    AttackContext,
    Hips,
    Ipm,
    LabelFlip,
    LeastLikely,
    PermutedRows,
    ReverseRank,
    SecondBest,
    Stale,
    Targeted,
    attackers,
    largest_z,
)
from feddistill.config import parse
from feddistill.errors import ConfigError
from feddistill.runs import experiment


@pytest.fixture(params=ATTACKS.values(), ids=ATTACKS.keys())
def attack(request):
    return request.param()


@pytest.fixture
def context():
    everyone = honest_answers()
    return AttackContext(own=everyone[0], honest=everyone[1:], seed=7, clients=7)


def test_is_a_distribution_that_a_payload_can_hold(attack, context):
    lie = attack(context)
    assert lie.shape == (TEXTS, CLASSES)
    assert lie.dtype == torch.float32
    assert lie.isfinite().all()
    torch.testing.assert_close(lie.exp().sum(-1), torch.ones(TEXTS))
    payload.quantise_dense(lie.numpy())


def test_is_the_same_again(attack, context):
    assert torch.equal(attack(context), attack(context))


def test_changes_nothing_that_it_sees(attack, context):
    before = [context.own.clone(), *(a.clone() for a in context.honest)]
    attack(context)
    assert all(torch.equal(a, b) for a, b in zip(before, [context.own, *context.honest], strict=True))


def test_says_where_it_is_from(attack):
    assert (
        any(char.isdigit() for char in type(attack).__doc__)
        or "Replay" in type(attack).__doc__
        or (isinstance(attack, PermutedRows))
    )


def test_choices_are_those_of_the_honest_mean(context):
    mean = context.mean()
    assert torch.equal(LeastLikely()(context).argmax(-1), mean.argmin(-1))
    assert torch.equal(SecondBest()(context).argmax(-1), mean.sort(-1).indices[:, -2])


def test_hides_in_plain_sight(context):
    """Every row is one that an honest client sent."""
    lie, stacked = Hips()(context), torch.stack(list(context.honest))
    assert (stacked == lie).all(-1).any(0).all()


def test_ranks_are_reversed(context):
    assert torch.equal(ReverseRank()(context).argsort(-1), context.own.argsort(-1).flip(-1))


def test_a_flipped_label_is_flipped_back(context):
    flipped = LabelFlip()(context)
    assert torch.equal(LabelFlip()(AttackContext(flipped, context.honest)), context.own)


def test_the_target_is_hit_and_nothing_else(context):
    source = int(context.mean().argmax(-1)[0])
    lie = Targeted(source=source, target=(source + 1) % CLASSES)(context)
    hit = context.mean().argmax(-1) == source
    assert (lie.argmax(-1)[hit] == (source + 1) % CLASSES).all()
    assert torch.equal(lie[~hit], context.own[~hit])
    with pytest.raises(ConfigError, match="must be below the 11 classes"):
        Targeted(target=11)(context)


def test_a_little_is_within_the_honest_spread(context):
    lie = Alie()(context)
    stacked = torch.stack(list(context.honest))
    shift = (lie - stacked.mean(0)).abs()
    assert (shift - shift.mean(-1, keepdim=True)).abs().max() < 3 * stacked.std(0).max()
    assert largest_z(50, 24) == pytest.approx(1.43, abs=0.01)  # the paper's example


def test_the_inner_product_with_the_honest_mean_is_negative(context):
    mean = torch.stack(list(context.honest)).mean(0)
    centred = mean - mean.mean(-1, keepdim=True)
    assert ((Ipm()(context) * centred).sum(-1) < 0).all()


def test_what_was_said_before_is_said_again(context):
    before = context.honest[2]
    assert torch.equal(Stale()(AttackContext(context.own, context.honest, before=before)), before)


def test_rows_are_permuted(context):
    lie = PermutedRows()(context)
    assert not torch.equal(lie, context.own)
    assert torch.equal(lie.sum(-1).sort().values, context.own.sum(-1).sort().values)


NAMES = ["a", "b", "c", "d"]


def test_named_clients_lie_and_then_the_first_that_are_left():
    taken = attackers([Ipm(clients=2), Hips(clients=("a",))], NAMES)
    assert {name: attack.kind for name, attack in taken.items()} == {"a": "hips", "b": "ipm", "c": "ipm"}


@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        ([Ipm(clients=("x",))], "there is no client 'x'; there are a, b, c, d"),
        ([Ipm(clients=("a",)), Hips(clients=("a",))], "a carries out two attacks"),
        ([Ipm(clients=5)], "5 clients are to carry out ipm, 4 are left"),
        ([Ipm(clients=4)], "all 4 clients attack; at least one has to be honest"),
    ],
)
def test_who_cannot_lie_is_named(attacks, message):
    with pytest.raises(ConfigError, match=message):
        attackers(attacks, NAMES)


def test_a_run_with_liars_says_so_and_resumes(tiny_settings, tmp_path):
    """They see the honest answers, in each round, and everything else is as without them."""
    settings = {
        **tiny_settings,
        "baselines": [],
        "aggregation": {"rule": {"kind": "expguard", "base": "median"}},
        "simulate": {"attack": [{"kind": "stale", "clients": ["client-2"]}]},
    }
    result = experiment.run(parse(settings), tmp_path / "run")
    assert result["trust"]["simulated_attacks"] == {"client-2": "stale"}
    assert "f < C/2" in result["trust"]["assumed"]
    payloads = [tmp_path / "run" / f"rounds/00{n}/payloads/client-2.safetensors" for n in (1, 2)]
    codes = [load_file(path) for path in payloads]
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])
    memory = [
        json.loads((tmp_path / "run" / f"records/rounds/00{n}/teacher.json").read_text())["content"]["memory"]
        for n in (1, 2)
    ]
    assert set(memory[0]) == {"client-0", "client-1", "client-2"}
    assert memory[0] != memory[1]
    page = report.write(tmp_path / "run").read_text()
    assert "client-2 was a simulated attacker: stale" in page
    assert "expguard tolerates 1 Byzantine of 3 clients" in page
