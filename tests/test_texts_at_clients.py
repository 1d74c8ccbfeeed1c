"""Texts that only the clients have; rounds in which only some of them are asked."""

import json
import shutil

import pytest
from elsewhere_fixtures import NAMES, Elsewhere, decided, institutions, run

from feddistill import payload
from feddistill.config import parse
from feddistill.errors import ConfigError, FeddistillError
from feddistill.federation.protocol import Instruction
from feddistill.runs import experiment, rerun


@pytest.fixture(scope="module")
def config(new_tiny_settings):
    return parse(new_tiny_settings() | {"baselines": [], "aggregation": {"quorum": 2}})


@pytest.fixture(scope="module")
def apart(config):
    raw = config.model_dump(mode="json")
    raw["data"]["partition"] = {"kind": "remote", "names": list(NAMES)}
    raw["aggregation"] = {"rule": {"kind": "mean_probs", "weights": "class_counts"}}
    return parse(raw)


@pytest.fixture(scope="module")
def done(config, apart, tmp_path_factory):
    """A run with everybody: the server's folder, and the institutions' files."""
    folder = tmp_path_factory.mktemp("apart")
    files = institutions(config, folder / "institutions")
    result = run(apart, folder / "run", Elsewhere(folder / "state", files))
    return {"folder": folder, "run": folder / "run", "files": files, "result": result}


class TestTextsAtClients:
    """The server has nobody's texts."""

    @pytest.fixture
    def files(self, config, tmp_path):
        return institutions(config, tmp_path / "institutions")

    def test_teachers_are_those_of_one_process(self, apart, done, tmp_path):
        raw, result = apart.model_dump(mode="json"), done["result"]
        sources = {
            name: {"kind": "files", "path": str(f.parent / "private.jsonl")}
            for name, f in done["files"].items()
        }
        raw["data"]["partition"] = {"kind": "given", "sources": sources}
        there = experiment.run(parse(raw), tmp_path / "given")
        for number in (1, 2):
            name = f"rounds/{number:03d}/teacher.safetensors"
            assert (done["run"] / name).read_bytes() == (tmp_path / "given" / name).read_bytes()
        assert result["metrics"]["student"] == there["metrics"]["student"]
        assert "clients" not in result["metrics"]
        assert result["heterogeneity"] == {"non_iid": None}

    def test_no_private_text_is_at_the_server(self, done):
        texts = [
            json.loads(line)["text"].encode()
            for file in done["files"].values()
            for line in (file.parent / "private.jsonl").read_text().splitlines()
        ]
        for path in done["run"].rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert not any(text in content for text in texts if len(text) > 20)

    def test_the_page_of_a_run_says_what_is_not_known(self, done):
        from feddistill import report

        page = report.write(done["run"]).read_text()
        assert "known only to the clients" in page

    def test_decided_again_without_a_client_or_its_texts(self, done, tmp_path):
        gone = done["folder"].rename(tmp_path / "gone")
        copied = shutil.copytree(gone / "run", tmp_path / "run")
        try:
            made = rerun.aggregate(copied, tmp_path / "again", ("aggregation.rule=median",))
            assert len(made) == 2
            rerun.distill(copied, tmp_path / "other", ("distill.temperature=1",))
        finally:
            gone.rename(done["folder"])

    def test_a_model_of_ones_own_a_late_answer_and_one_that_never_came(self, apart, files, tmp_path):
        apart = parse(apart.model_dump(mode="json") | {"aggregation": {"quorum": 2}})
        layers = "model: " + json.dumps(apart.clients.models[0].model_dump(mode="json") | {"layers": [0]})
        files["client-1"].write_text(files["client-1"].read_text() + layers + "\n")
        transport = Elsewhere(tmp_path / "state", files)
        transport.fault = lambda task, name: [] if (task.round, name) == (2, "client-2") else None
        run(apart, tmp_path / "run", transport)
        sizes = {
            name: next((tmp_path / "state" / name).rglob("alone/001/*.safetensors")).stat().st_size
            for name in NAMES
        }
        assert sizes["client-1"] < sizes["client-0"] == sizes["client-2"], "a model of its own"
        shutil.rmtree(tmp_path / "institutions")
        (first, second) = rerun.aggregate(tmp_path / "run", tmp_path / "again", ())
        assert [len(first["uploads"]), len(second["uploads"])] == [3, 2]
        # It answers after all, by whatever way.
        spec = payload.parse_spec((tmp_path / "run/rounds/002/spec.json").read_bytes())
        other = tmp_path / "run/rounds/002/payloads/client-1.safetensors"
        answers, _ = payload.read(other.read_bytes())
        content = payload.encode(answers, spec, "client-2")
        (tmp_path / "late.safetensors").write_bytes(content)
        (tmp_path / "late.json").write_bytes(payload.seal(content, spec, "client-2"))
        made = rerun.aggregate(
            tmp_path / "run", tmp_path / "merged", (), late=[tmp_path / "late.safetensors"]
        )
        assert [len(made[0]["uploads"]), len(made[1]["uploads"])] == [3, 3]
        with pytest.raises(ConfigError, match="its remote clients were trained on teachers that include"):
            rerun.forget(tmp_path / "run", tmp_path / "without", ["client-0"])

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("source: {kind: files, path: nothing.csv}", "DataError"),
            ("sauce: {}", "ConfigError"),
            ("- 1", "ConfigError"),
            ("source: {kind: files, path: private.jsonl, label_column: null}", "DataError"),
        ],
    )
    def test_what_is_wrong_at_an_institution_is_its_own_to_read(self, text, error, apart, files, tmp_path):
        files["client-0"].write_text(text)
        client = Elsewhere(tmp_path / "state", files).own["client-0"]
        settings = experiment.resolve(apart)
        from feddistill.config import digest

        task = Instruction(
            "describe",
            digest(settings)[:16],
            0,
            {"config": settings.model_dump(mode="json"), "labels": ["a", "b"], "execution": "0" * 16},
        )
        with pytest.raises(FeddistillError) as caught:
            client.handle(task)
        assert type(caught.value).__name__ == error

    def test_it_needs_an_engine(self, apart, tmp_path):
        with pytest.raises(ConfigError, match="--engine flower"):
            experiment.run(apart, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"baselines": ["centralized"]}, "centralized would need the private texts"),
            ({"simulate": {"attack": {"kind": "second_best"}}}, "simulate.attack"),
        ],
    )
    def test_what_needs_the_texts_is_refused(self, change, message, apart):
        with pytest.raises(ConfigError, match=message):
            parse(apart.model_dump(mode="json") | change)


@pytest.fixture(scope="module")
def some(new_tiny_settings):
    raw = new_tiny_settings() | {"baselines": [], "rounds": 3, "aggregation": {"quorum": 2}}
    raw["clients"] |= {"per_round": 2, "training": {**raw["clients"]["training"], "epochs": 3}}
    return parse(raw)


@pytest.fixture(scope="module")
def local(some, tmp_path_factory):
    """The run in one process."""
    out = tmp_path_factory.mktemp("some") / "run"
    experiment.run(some, out)
    return out


class TestPartialParticipation:
    """Two of three clients in each round, drawn anew."""

    def test_engines_agree(self, some, local, tmp_path):
        result = run(some, tmp_path / "run", Elsewhere(tmp_path / "state"))
        assert decided(tmp_path / "run") == decided(local)
        asked = [set(row["uplink"]) for row in result["bytes"]["by_round"]]
        assert all(len(names) == 2 for names in asked)
        assert set.union(*asked) == set(NAMES)
        assert len(set(map(frozenset, asked))) > 1
        assert result["missing"] == {}

    def test_a_resumed_run_goes_on_with_the_same(self, some, local, tmp_path):
        transport = Elsewhere(tmp_path / "state")

        def die(task, name):
            if task.kind == "answer" and task.round == 3:
                raise KeyboardInterrupt

        transport.fault = die
        with pytest.raises(KeyboardInterrupt):
            run(some, tmp_path / "run", transport)
        run(some, tmp_path / "run", Elsewhere(tmp_path / "state"), resume=True)
        assert decided(tmp_path / "run") == decided(local)

    def test_who_is_asked_late_begins_as_the_others_did(self, local):
        steps = {}
        for record in sorted((local / "records").rglob("client-*.json")):
            if "payloads" not in str(record):
                trained = json.loads(record.read_text())["content"]["trained"]
                steps.setdefault(record.stem, []).append((str(record.parent), trained["steps"]))
        late = {name: found for name, found in steps.items() if not found[0][0].endswith("alone/001")}
        (found,) = late.values()  # one of three, as two are asked in each round
        assert found[0][1] > 2 * found[1][1] > 0

    def test_more_than_there_are_is_refused(self, some):
        with pytest.raises(ConfigError, match=r"clients\.per_round = 9, but there are 3 clients"):
            parse(some.model_dump(mode="json") | {"clients": {"per_round": 9}})
