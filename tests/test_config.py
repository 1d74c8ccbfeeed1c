"""The configuration: what is written comes back, what is wrong is named as it was written."""

import pytest
import yaml

from feddistill.aggregation.attacks import ATTACKS
from feddistill.aggregation.rules import RULES
from feddistill.config import digest, dump, institution, load, load_stored, parse, strict_yaml
from feddistill.errors import ConfigError
from feddistill.runs import study


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rounds: 1\nname: a\nrounds: 2", r"f: rounds stands twice, in lines 1 and 3"),
        ("a:\n  b: [{c: 1,\n c: 2}]", r"f: a\.b\.0\.c stands twice, in lines 2 and 3"),
        ("{a: 1, a: 1}", r"f: a stands twice, in line 1"),
        ("yes: 1\ntrue: 2", r"f: true stands twice, in lines 1 and 2"),
        ("a: {<<: {b: 1,\n b: 2}}", r"f: a\.b stands twice, in lines 1 and 2"),
    ],
)
def test_a_key_that_stands_twice_is_named_with_both_lines(text, message):
    with pytest.raises(ConfigError, match=message):
        strict_yaml.parse(text, "f")


def test_every_file_of_settings_is_read_so(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text("name: a\nquestion: b\nname: c\n")
    for reader in (load, load_stored, institution.load, study.load):
        with pytest.raises(ConfigError, match=r"f\.yaml: name stands twice, in lines 1 and 3"):
            reader(path)
    with pytest.raises(ConfigError, match="--set data: the value: size stands twice"):
        load(None, ("data={size: 1, size: 2}",))
    path.write_text("name: a\nsettings: {rounds: 1, distill.kind: kl, distill: {kind: mae}}")
    with pytest.raises(ConfigError, match=r"distill\.kind stands twice, with dots and nested"):
        study.load(path)


def test_merged_keys_may_be_set_again():
    text = "x: &x {a: 1, b: 1}\ny: {<<: *x, a: 2}\nz: [*x, {a: 1}, {a: 2}]\n1: 1\n'1': 1"
    assert strict_yaml.parse(text, "f") == yaml.safe_load(text)
    assert strict_yaml.parse("a: é".encode("utf-16"), "f") == strict_yaml.parse("\ufeffa: é", "f")


def test_a_tilde_is_the_home_directory_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = {
        "source": {"kind": "files", "path": "~/d.csv"},
        "proxy": {"source": {"kind": "hub", "name": "~/d"}},
        "test": {"source": {"kind": "preset", "name": "ag_news", "path": "~/p"}},
    }
    model = {"source": {"kind": "hub", "name": "~/m"}}
    config = parse({"data": data, "student": {"model": model}})
    assert config.data.source.path == tmp_path / "d.csv"
    assert config.data.proxy.source.name == str(tmp_path / "d")
    assert config.data.test.source.path == tmp_path / "p"
    assert config.student.model.source.name == str(tmp_path / "m")
    (tmp_path / "i.yaml").write_text("source: {kind: files, path: ~/d.csv}\nkey: ~/k\n")
    client = institution.load(tmp_path / "i.yaml")
    assert (client.source.path, client.key) == (tmp_path / "d.csv", tmp_path / "k")
    (tmp_path / "c.yaml").write_text("rounds: 1")
    (tmp_path / "s.yaml").write_text("name: s\nbase: ~/c.yaml\nseeds: [0]")
    assert study.load(tmp_path / "s.yaml").base == tmp_path / "c.yaml"
