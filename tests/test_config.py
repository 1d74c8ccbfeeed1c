"""The configuration: what is written comes back, what is wrong is named as it was written."""

import pytest
import yaml

from feddistill.aggregation.attacks import ATTACKS
from feddistill.aggregation.rules import RULES
from feddistill.config import digest, dump, load, parse
from feddistill.errors import ConfigError


def test_the_quickstart_survives_a_round_trip():
    config = load()
    assert parse(yaml.safe_load(dump(config))) == config


def test_every_default_is_written_out():
    written = yaml.safe_load(dump(load()))
    assert written["distill"]["temperature"] == load().distill.temperature
    assert written["clients"]["models"][0]["freeze_layers"] == 4


def test_the_digest_sees_every_setting():
    assert digest(load()) == digest(load())
    assert digest(load()) != digest(load(None, ("distill.temperature=3",)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.temprature=4", "distill.temprature is not a setting; did you mean distill.temperature?"),
        ("distill.temperature=-1", "distill.temperature: input should be greater than 0, got -1"),
        ("rounds=many", "rounds: input should be a valid integer"),
        (
            "aggregation.rule=medain",
            "aggregation.rule.kind = 'medain' does not exist; did you mean 'median'?",
        ),
        ("aggregation.rule.trim=1", "aggregation.rule.trim is not a setting"),
        (
            "aggregation.rule={kind: trimmed_mean, trim: 2}",
            "aggregation.rule.trim = 2 discards all 4 clients",
        ),
        ("clients.evaluate=false", "baselines: local_only needs clients.evaluate, which is false"),
        ("aggregation.quorum=5", "aggregation.quorum = 5 exceeds the 4 clients"),
        (
            "aggregation.nnm_byzantine=2",
            "aggregation.nnm_byzantine = 2 must be fewer than half of the 4 clients",
        ),
        (
            "aggregation.rule={kind: krum, byzantine: 1}",
            "aggregation.rule.byzantine = 1 needs at least 5 clients, there are 4",
        ),
        ("aggregation.rule={kind: median, weights: size}", "aggregation.rule.weights is not a setting"),
        (
            "aggregation.rule={kind: expguard, base: {kind: trimmed_mean, trim: 2}}",
            "aggregation.rule.trim = 2 discards all 4 clients",
        ),
        ("aggregation.rule={kind: expguard, base: vote}", "aggregation.rule.base.kind = 'vote'"),
        ("simulate.attack=secondbest", "did you mean 'second_best'?"),
        ("simulate.attack={kind: ipm, clients: 4}", "all 4 clients attack; at least one has to be honest"),
        ("simulate.attack={kind: ipm, clients: [client-7]}", "there is no client 'client-7'"),
        ("clients.models.0.hed=auto", "did you mean clients.models.0.head?"),
        ("clients.models.3.head=auto", "clients.models.3: needs an index from 0 to 0, got '3'"),
        ("data.source={kind: files}", "data.source.path is missing"),
        ("data.partition.alpha=.inf", "data.partition.alpha"),
        ("data.partition={kind: given, sources: {a b: {kind: embedded}}}", "data.partition.sources.a b"),
        ("name=../up", "name: string should match pattern"),
        ("baselines=[public_only, public_only]", "baselines names one twice"),
        ("rounds", "--set takes KEY=VALUE, got 'rounds'"),
        ("rounds.deep=1", "rounds is 3, not a group of settings"),
        ("nonsense=1", "nonsense is not a setting"),
    ],
)
def test_a_wrong_setting_is_named_as_it_was_written(override, message):
    with pytest.raises(ConfigError) as caught:
        load(None, (override,))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_draws_want_the_mean_of_probabilities():
    assert load(None, ("payload.codec=sampled",)).payload.samples == 50
    with pytest.raises(ConfigError, match=r"aggregation\.rule must be mean_probs, not median"):
        load(None, ("payload.codec=sampled", "aggregation.rule=median"))


def test_a_rule_can_be_named_alone():
    assert load(None, ("aggregation.rule=median",)).aggregation.rule.kind == "median"


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ("min_ce", "min_ce"),
        ("{kind: mean_probs, weights: validation}", "mean_probs, weights: validation"),
        ("{kind: mean_logits, weights: verified}", "mean_logits, weights: verified"),
    ],
)
def test_a_rule_that_needs_labels_is_refused_without(rule, what):
    with pytest.raises(ConfigError) as caught:
        load(None, (f"aggregation.rule={rule}", "data.proxy.labelled=0"))
    assert str(caught.value) == (
        f"aggregation.rule = {what} needs labelled proxy texts, but data.proxy.labelled is 0"
    )


@pytest.mark.parametrize("kind", RULES)
def test_every_rule_can_be_named_and_comes_back(kind):
    config = load(None, (f"aggregation.rule={kind}", "data.partition.clients=5"))
    assert config.aggregation.rule.kind == kind
    assert parse(yaml.safe_load(dump(config))) == config


@pytest.mark.parametrize("kind", ATTACKS)
def test_every_attack_can_be_named_and_comes_back(kind):
    config = load(None, (f"simulate.attack={kind}",))
    assert config.simulate.attack[0].kind == kind
    assert parse(yaml.safe_load(dump(config))) == config


def test_one_attack_or_several():
    one = load(None, ("simulate.attack=hips",)).simulate.attack
    several = load(None, ("simulate.attack=[hips, {kind: alie, clients: [client-3]}]",)).simulate.attack
    assert [attack.kind for attack in one] == ["hips"]
    assert [attack.kind for attack in several] == ["hips", "alie"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*absent.yaml: No such file"):
        load(tmp_path / "absent.yaml")


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2\n", "\x00"])
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load(path)
