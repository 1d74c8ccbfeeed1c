"""Clients whose model is only asked: a function, or an endpoint that is served here."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import language_fixtures
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from feddistill import config as configuration
from feddistill import report
from feddistill.client.client import ClientGroup
from feddistill.config import digest, parse
from feddistill.config.models import CallableModel, EndpointModel
from feddistill.engines.remote import RemoteClient
from feddistill.errors import ConfigError, ModelError
from feddistill.federation.protocol import Instruction
from feddistill.progress import NoProgress
from feddistill.runs import experiment, plan
from feddistill.server.rounds import request
from feddistill.store.run_directory import RunDirectory
from feddistill.tasks.query_only import endpoint
from feddistill.tasks.query_only.endpoint import Endpoint
from feddistill.tasks.query_only.function import Function, classes, function
from feddistill.tasks.query_only.learners import TRIAL_TOKENS
from feddistill.tasks.query_only.predictions import fitted, ranked
from feddistill.tasks.session import Session

TOP = 64


class Speaker:
    """The tiny model as a service: the likeliest tokens, by id."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.asked = []
        self.strength = None

    def predict(self, ids, top):
        """Of each token of ``ids``: what should come next."""
        if self.strength is not None and len(self.asked) >= self.strength:
            raise ConnectionError("tired")
        self.asked.append(list(ids))
        with torch.inference_mode():
            found = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1).topk(top)
        return found.indices, found.values

    def __call__(self, blocks):
        said = (self.predict(block, TOP) for block in blocks)
        return [(ids[:-1], log_probs[:-1]) for ids, log_probs in said]


@pytest.fixture
def speaker(tiny_causal, tmp_path, monkeypatch):
    """Importable as ``private_model:speak``."""
    made = Speaker(tiny_causal)
    (tmp_path / "private_model.py").write_text("speak = None\nnumber = 3\n\n\ndef guess(texts): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "private_model", raising=False)
    import private_model

    monkeypatch.setattr(private_model, "speak", made)
    yield made
    sys.modules.pop("private_model", None)


class Server:
    """Completions in the manner of OpenAI's; ``faults`` are what it does before it works."""

    def __init__(self, speaker, *, ids=True, echo=True, faults=()):
        outer, self.requests, faults = self, [], list(faults)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, self.headers.get("Authorization"), body))
                status, text = faults.pop(0) if faults else (200, json.dumps(outer.reply(body)))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args): ...

        self.speaker, self.ids, self.echo = speaker, ids, echo
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def reply(self, body):
        choices = [
            {"index": index, "logprobs": {"top_logprobs": self.rows(prompt, body["logprobs"], body["echo"])}}
            for index, prompt in enumerate(body["prompt"])
        ]
        return {"choices": choices[::-1]}  # servers need not keep the order

    def rows(self, prompt, top, echo):
        ids, log_probs = self.speaker.predict(prompt, top)
        rows = [
            {self.name(i): v for i, v in zip(row.tolist(), values.tolist(), strict=True)}
            for row, values in zip(ids, log_probs, strict=True)
        ]
        return [None, *rows] if echo and self.echo else rows[-1:]

    def name(self, number):
        return f"token_id:{number}" if self.ids else self.speaker.tokenizer.decode([number])


@pytest.fixture
def serve(speaker, monkeypatch):
    monkeypatch.setattr(endpoint, "PAUSE", 0.01)
    servers = []

    def start(**more):
        servers.append(Server(speaker, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def settings(folder, source, **changes):
    own = {"source": {"kind": "hub", "name": str(folder)}, "max_tokens": 48}
    models = [own, {"source": source, "max_tokens": 48}]
    return language_fixtures.settings(
        "boxes", models, {**own, "layers": [0]}, sizes=(8, 4, 2, 2), batch=4, **changes
    )


def called(folder):
    return {
        "kind": "callable",
        "name": "private_model:speak",
        "tokenizer": {"kind": "hub", "name": str(folder)},
    }


def served(folder, url, **more):
    hub = {"kind": "hub", "name": str(folder)}
    return {"kind": "endpoint", "url": url, "model": "m", "tokenizer": hub, "top": TOP, **more}


def answers(folder, source, out, model):
    """What the first two architectures answer in the first round, before any training."""
    config = parse(settings(folder, source))
    session = Session(config, experiment.check(config), RunDirectory.create(out, ""), NoProgress())
    spec, learner = request(session, 1, quorum=4, previous=""), ClientGroup(session).learner(model)
    found = learner.compressed(spec, 0, 3, spec.positions)
    session.run.close()
    return found


def written(folder):
    return [path.read_text(errors="ignore") for path in folder.rglob("*") if path.is_file()]


def assert_the_same(found, wanted):
    """But for rounding to bytes, and for ids that are as likely: batches of other sizes round otherwise."""
    assert (found.ids != wanted.ids).any(1).mean() < 0.005
    for name in ("codes", "tail"):
        apart = np.abs(getattr(found, name).astype(int) - getattr(wanted, name).astype(int))
        assert apart.max() <= 1
        assert apart.mean() < 0.01


def test_a_function_answers_as_the_model_behind_it(speaker, tiny_causal, tmp_path):
    source = called(tiny_causal)
    found, wanted = (answers(tiny_causal, source, tmp_path / f"r{m}", m) for m in (1, 0))
    assert_the_same(found, wanted)


@pytest.mark.parametrize("ids", [True, False])
def test_an_endpoint_answers_as_the_model_behind_it(ids, serve, tiny_causal, tmp_path, monkeypatch):
    monkeypatch.setenv("PRIVATE_KEY", "secret")
    server = serve(ids=ids, faults=[(503, "busy"), (429, "wait")])
    source = served(tiny_causal, server.url, key_variable="PRIVATE_KEY")
    found, wanted = (answers(tiny_causal, source, tmp_path / f"r{m}", m) for m in (1, 0))
    if ids:
        assert_the_same(found, wanted)
    else:  # parts of characters have no text: what they have is left to all others
        tokenizer = server.speaker.tokenizer
        spelled = [tokenizer.decode([number]) for number in range(len(tokenizer))]
        other = 0
        for row, whole in zip(found.ids, wanted.ids, strict=True):
            kept = [number for number in whole if "\N{REPLACEMENT CHARACTER}" not in spelled[number]]
            other += row[: min(len(kept), 6)].tolist() != kept[:6]
        assert other < 0.005 * len(found.ids), "those as likely as others"
    assert {(path, key) for path, key, _ in server.requests} == {("/v1/completions", "Bearer secret")}
    assert "secret" not in "".join(written(tmp_path))


def test_an_endpoint_without_echo_is_asked_for_each_token(serve, speaker, tiny_causal):
    block = speaker.tokenizer("a list of words to go on with")["input_ids"]
    tokenizer, boxes = speaker.tokenizer, []
    for echo in (True, False):
        server = serve(echo=echo)
        source = EndpointModel.model_validate(served(tiny_causal, server.url, echo=echo))
        boxes.append(Endpoint(source, tokenizer, "m").query([block, block[:3]], 16))
    for (one, other), size in zip(zip(*boxes, strict=True), (len(block) - 1, 2), strict=True):
        assert len(one) == len(other) == size
        assert torch.equal(one.ids, other.ids)
        torch.testing.assert_close(one.log_probs, other.log_probs, atol=1e-4, rtol=0)


def test_ids_beyond_the_tokenizer_leave_their_mass_to_the_rest(serve, speaker, tiny_causal):
    size = len(speaker.tokenizer)
    row = json.dumps({"token_id:5": -0.7, f"token_id:{size + 3}": -0.9})
    server = serve(faults=[(200, f'{{"choices": [{{"logprobs": {{"top_logprobs": [null, {row}]}}}}]}}')])
    source = EndpointModel.model_validate(served(tiny_causal, server.url))
    (found,) = Endpoint(source, speaker.tokenizer, "m").query([[3, 4]], 2)
    assert found.ids[0, 0] == 5
    assert found.log_probs[0, 0] == pytest.approx(-0.7)
    assert found.expand().exp()[0, 6] == pytest.approx((1 - np.exp(-0.7)) / (size - 1), rel=1e-4)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ([(500, "out of memory")] * 4, r"answers 500: out of memory \(4 tries\)"),
        ([(404, "no such model m")], "answers 404: no such model m$"),
        ([(200, "<html>")], "is not JSON"),
        ([(200, "[]")], "has no choices"),
        ([(200, '{"choices": []}')], "1 prompts, but 0 choices"),
        ([(200, '{"choices": [{"text": "a"}]}')], "no logprobs.top_logprobs"),
        (
            [(200, '{"choices": [{"logprobs": {"top_logprobs": [null, {"token_id:5": null}, {}]}}]}')],
            "log-probability of 'token_id:5' is None",
        ),
        ([(200, '{"choices": [{"logprobs": {"top_logprobs": [{"a": -1}]}}]}')], "set echo: false"),
        ([(200, '{"choices": [{"logprobs": {"top_logprobs": [null, {}, null]}}]}')], "without log-prob"),
        (
            [(200, '{"choices": [{"logprobs": {"top_logprobs": [null, {"token_id:5": 3}, {}]}}]}')],
            "log-probability of 'token_id:5' is 3",
        ),
        (
            [(200, '{"choices": [{"logprobs": {"top_logprobs": [null, {"token_id:5": NaN}, {}]}}]}')],
            "log-probability of 'token_id:5' is nan",
        ),
        (
            [(200, '{"choices": [{"logprobs": {"top_logprobs": [null, {"token_id:99999": 0.9}, {}]}}]}')],
            "log-probability of 'token_id:99999' is 0.9",
        ),
        (
            [(200, f'{{"choices": [{{"logprobs": {{"top_logprobs": [null, {{"a": {10**400}}}, {{}}]}}}}]}}')],
            "log-probability of 'a' is 10000",
        ),
        (
            [
                (
                    200,
                    '{"choices": [{"logprobs": {"top_logprobs": [null, {"token_id:999": 0, "a": -1}, {}]}}]}',
                )
            ],
            "add up to 1.368",
        ),
        (
            [
                (
                    200,
                    '{"choices": [{"logprobs": {"top_logprobs": [null, {"a": -0.1, "b": -1}, {}]}}]}',
                )
            ],
            "add up to 1.27",
        ),
        (
            [(200, '{"choices": [{"index": 3, "logprobs": {"top_logprobs": [null, {}]}}]}')],
            r"the index \[3\]",
        ),
        (
            [(200, '{"usage": {"prompt_tokens": 99}, "choices": [{"logprobs": {"top_logprobs": []}}]}')],
            r"usage\.prompt_tokens = 99, but \d+ tokens were sent",
        ),
        (
            [
                (
                    200,
                    '{"choices": [{"logprobs": {"tokens": ["token_id:7"], "top_logprobs": [null, {}, {}]}}]}',
                )
            ],
            r"logprobs\.tokens\[0\] is 'token_id:7', sent was id",
        ),
        (
            [(200, '{"choices": [{"logprobs": {"top_logprobs": [null, {}, {}, {}, {}, {}, {}]}}]}')],
            r"comes back with 7, of which one was to be new",
        ),
    ],
)
def test_what_is_wrong_with_an_endpoint_is_said(fault, words, serve, speaker, tiny_causal):
    server = serve(faults=fault)
    source = EndpointModel.model_validate(served(tiny_causal, server.url))
    with pytest.raises(ModelError, match=words) as caught:
        Endpoint(source, speaker.tokenizer, "clients.models.1").query([[1, 2, 3]], 4)
    assert str(caught.value).startswith(f"clients.models.1 ({server.url})")


def test_an_endpoint_that_is_not_there_and_a_key_that_is_missing(speaker, tiny_causal, monkeypatch):
    monkeypatch.setattr(endpoint, "PAUSE", 0.01)
    source = EndpointModel.model_validate(served(tiny_causal, "http://127.0.0.1:9/v1"))
    with pytest.raises(ModelError, match=r"cannot be reached: .*4 tries"):
        Endpoint(source, speaker.tokenizer, "m").query([[1, 2]], 4)
    nowhere = source.model_copy(update={"url": "http://[::1/v1"})
    with pytest.raises(ModelError, match="cannot be reached"):
        Endpoint(nowhere, speaker.tokenizer, "m").query([[1, 2]], 4)
    secret = source.model_copy(update={"key_variable": "NOT_SET_ANYWHERE"})
    with pytest.raises(ModelError, match="NOT_SET_ANYWHERE is not set"):
        Endpoint(secret, speaker.tokenizer, "m")


def test_a_run_asks_everything_once_also_when_the_model_goes_away_meanwhile(speaker, tiny_causal, tmp_path):
    config = parse(settings(tiny_causal, called(tiny_causal), baselines=["local_only"]))
    speaker.strength = 12
    with pytest.raises(ModelError, match=r"clients.models.1 \(private_model:speak\): .*tired"):
        experiment.run(config, tmp_path / "run")
    assert len(speaker.asked) == 12
    speaker.strength = None
    result = experiment.run(config, tmp_path / "run", resume=True)
    blocks = [block for block in map(tuple, speaker.asked) if len(block) > black_box_trial(config)]
    assert len(blocks) > 20
    lost = len(blocks) - len(set(blocks))
    assert lost < config.clients.eval_batch_size, (
        "what was said is kept: the batch that failed is asked again"
    )
    assert result["metrics"]["local_only"]
    assert "bits/byte" in report.write(tmp_path / "run").read_text()


def black_box_trial(config):
    """The longest block of the trial before a run."""
    return min(TRIAL_TOKENS, config.student.model.max_tokens)


def test_a_box_with_another_tokenizer_is_projected(speaker, tiny_causal, tmp_path):
    student = {"kind": "scratch", "architecture": "gpt2", "tokenizer": {"kind": "trained", "vocab_size": 300}}
    small = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 48}
    changed = settings(tiny_causal, called(tiny_causal))
    changed["student"]["model"] = {"source": {**student, "settings": small}, "max_tokens": 48}
    changed["rounds"] = 1
    result = experiment.run(parse(changed), tmp_path / "run")
    assert all(share > 0.5 for share in result["teacher"][0]["answered"].values())


def test_a_function_of_texts_is_a_classifier(tiny_settings, tmp_path, monkeypatch):
    (tmp_path / "classifier_of_mine.py").write_text(
        "import numpy as np\n\n\n"
        "def guess(texts):\n"
        "    logits = np.array([[len(t) % (c + 2) for c in range(10)] for t in texts], float)\n"
        "    return logits - np.log(np.exp(logits).sum(1, keepdims=True))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    box = {"source": {"kind": "callable", "name": "classifier_of_mine:guess"}}
    clients = {**tiny_settings["clients"], "models": [*tiny_settings["clients"]["models"], box]}
    baselines = ["local_only", "fedavg"]
    config = parse({**tiny_settings, "rounds": 1, "clients": clients, "baselines": baselines})
    costs = plan.plan(config)
    assert costs["flops"]["clients_train"] > 0
    result = experiment.run(config, tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    said, splits = run.done("alone/001/client-1", verify=False), experiment.stored_splits(config, run)
    run.close()
    import classifier_of_mine

    right = classifier_of_mine.guess(splits.test.texts).argmax(1) == splits.test.labels
    assert said["test"]["accuracy"] == pytest.approx(right.mean())
    assert result["status"] == "complete"
    with pytest.raises(ModelError, match="2 texts and 10 classes"):
        classes(lambda texts: [[0.0]], ["a", "b"], 10, "m")
    with pytest.raises(ModelError, match="add up to 10; log-probabilities are required"):
        classes(lambda texts: [[0.0] * 10], ["a"], 10, "m")
    with pytest.raises(ModelError, match="the function failed: division by zero"):
        classes(lambda texts: 1 / 0, ["a"], 10, "m")


@pytest.mark.parametrize(
    ("ids", "log_probs", "words"),
    [
        ([[1, 2]], [[-1.0, float("nan")]], "not log-probabilities: nan"),
        ([[1, 2]], [[-1.0, 0.5]], "not log-probabilities: 0.5"),
        ([[1, 10]], [[-1.0, -2.0]], "id 10 is not one of its tokenizer's 10"),
        ([[-1, 2]], [[-1.0, -2.0]], "id -1"),
        ([[2, 2]], [[-1.0, -2.0]], "names an id twice"),
        ([[1, 2]], [[-0.1, -0.2]], "add up to 1.72"),
        ([[1, 2]], [[-0.1]], r"must both be \[n, k\]"),
        ([1, 2], [-1, -2], r"must both be \[n, k\]"),
        ([["a"]], [[-1.0]], "is no array"),
    ],
)
def test_what_is_no_distribution_is_refused(ids, log_probs, words):
    with pytest.raises(ModelError, match=f"^m: .*{words}"):
        ranked(ids, log_probs, 10, "m")


def test_rows_are_put_in_order_and_filled_up_with_what_the_others_have():
    nothing = -np.inf
    given = np.log(
        [[0.1, 0.6, 0.0], [0.2, 0.3, 0.5]], where=[[1, 1, 0], [1, 1, 1]], out=np.full((2, 3), nothing)
    )
    rows = ranked([[3, 1, 0], [0, 4, 2]], given, 6, "m", 5)
    assert rows.ids[0].tolist()[:2] == [1, 3]
    assert rows.ids[1].tolist()[:3] == [2, 4, 0]
    assert all(len(set(row)) == 5 for row in rows.ids.tolist())
    whole = rows.expand().exp()
    assert whole[0].tolist() == pytest.approx([0.075, 0.6, 0.075, 0.1, 0.075, 0.075], abs=1e-6)
    assert whole[1].tolist()[:5] == pytest.approx([0.2, 0, 0.5, 0, 0.3], abs=1e-6)
    narrow = fitted(rows, 1)
    assert narrow.ids.tolist() == [[1], [2]]
    assert narrow.log_tail.exp().tolist() == pytest.approx([0.4, 0.5], abs=1e-6)
    silent = ranked([[3, 1]], [[nothing, nothing]], 6, "m")
    assert (silent.log_probs == nothing).all()
    assert silent.log_tail.tolist() == [0.0]
    low = ranked([[3]], [[-20.0]], 6, "m", 3)
    assert low.log_probs.diff(dim=1).max() <= 0, "an entry may be less likely than the others"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda blocks: [], "2 blocks, but 0 answers"),
        (lambda blocks: [1, 2], r"must be \(ids, log_probs\)"),
        (lambda blocks: [([[1]], [[-1.0]])] * 2, "has 2 to predict, but the answer has 1 rows"),
        (lambda blocks: blocks.missing, "the function failed"),
    ],
)
def test_what_is_wrong_with_a_function_is_said(call, words):
    with pytest.raises(ModelError, match=words):
        Function(call, 10, "m").query([[1, 2, 3], [1, 2, 3]], 4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module_here:f", "No module named"),
        ("private_model:missing", "no attribute"),
        ("private_model:number", "is int, not callable"),
    ],
)
def test_a_function_that_cannot_be_had_is_named(name, words, speaker):
    with pytest.raises(ModelError, match=f"clients.models.0.source.name = '{name}'.*{words}"):
        function(CallableModel(name=name), "clients.models.0")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student.model.source": {"kind": "callable", "name": "a:b"}}, "student.model.source.kind = call"),
        ({"baselines": ["fedmd"]}, "baselines: fedmd trains the clients' models, but clients.models.0"),
        ({"clients.models.0.layers": [0]}, "is query-only: layers"),
        ({"clients.models.0.source.name": "no colon"}, "clients.models.0.source.name"),
        ({"task": "causal_lm"}, "clients.models.0.source.tokenizer is missing"),
        (
            {
                "clients.models.0.source": {
                    "kind": "endpoint", "url": "http://x", "model": "m",
                    "tokenizer": {"kind": "trained", "vocab_size": 300},
                }
            },
            "endpoint is for task = causal_lm",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_of_a_black_box(changes, words):
    raw = {"clients": {"models": [{"source": {"kind": "callable", "name": "a:b"}}]}}
    for key, value in changes.items():
        configuration.override(raw, f"{key}={json.dumps(value)}")
    with pytest.raises(ConfigError, match=words):
        parse(raw)


def test_a_server_may_not_name_code_for_an_institution_to_call(speaker, tiny_causal, tmp_path):
    config = experiment.resolve(parse(settings(tiny_causal, called(tiny_causal))))
    content = {"config": config.model_dump(mode="json"), "labels": [], "execution": "0" * 16}
    task = Instruction("describe", digest(config)[:16], 0, content)
    with pytest.raises(ConfigError, match="named by the institution's own file"):
        RemoteClient("1790-1860", tmp_path).handle(task)


def test_an_institution_names_its_own_black_box(tmp_path):
    config = parse({"task": "causal_lm", "baselines": []})
    file = tmp_path / "own.yaml"
    box = {"source": {"kind": "callable", "name": "a:b", "tokenizer": {"kind": "trained"}}}
    file.write_text(json.dumps({"source": {"kind": "files", "path": "x.txt"}, "model": box}))
    own = RemoteClient("north", tmp_path, file)._with_own_model(config)
    assert own.clients.models[0].query_only
    del box["source"]["tokenizer"]
    file.write_text(json.dumps({"source": {"kind": "files", "path": "x.txt"}, "model": box}))
    with pytest.raises(ConfigError, match=r"own\.yaml: as clients\.models\.0 .*tokenizer is missing"):
        RemoteClient("north", tmp_path, file)._with_own_model(config)
