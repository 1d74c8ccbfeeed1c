"""Benchmarks from folders in the hub's layout, against scikit-learn, SQuAD's formula and sums by hand."""

import json
import math
import re
import string
from collections import Counter
from functools import cache
from importlib.util import find_spec

import hub_fixtures as hub
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from feddistill import benchmarks, metrics
from feddistill.benchmarks import generation, likelihood
from feddistill.cli import main
from feddistill.config import parse, presets
from feddistill.config.presets import PRESETS
from feddistill.data import benchmark
from feddistill.data.sources import read
from feddistill.errors import ConfigError, DataError
from feddistill.runs import trained_models


@pytest.fixture(scope="session")
def glue(tmp_path_factory):
    return hub.glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def classifiers(tiny_model, tmp_path_factory):
    """Folders of classifiers with random weights, by what they classify."""
    from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification

    found = {}
    for name in ("glue/sst2", "glue/mnli"):
        folder = tmp_path_factory.mktemp("classifier")
        labels = PRESETS[name].labels[::-1]  # another order than the benchmark's: names decide
        torch.manual_seed(1)
        config = AutoConfig.from_pretrained(
            tiny_model, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)}
        )
        BertForSequenceClassification(config).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.model_max_length = 64
        tokenizer.save_pretrained(folder)
        found[name] = folder
    return found


def evaluate(*arguments):
    done = CliRunner().invoke(main, ["evaluate", *map(str, arguments), "--json"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return json.loads(done.stdout) if done.exit_code == 0 else (done.exit_code, done.stderr)


@pytest.mark.parametrize(
    ("name", "rows", "text"),
    [
        ("glue/sst2", hub.reviews(40, 1), "{sentence}"),
        ("glue/mnli", hub.pairs(24, 4), "premise: {premise}\nhypothesis: {hypothesis}"),
        ("glue/mnli_mismatched", hub.pairs(18, 5), "premise: {premise}\nhypothesis: {hypothesis}"),
    ],
)
def test_classifiers_get_the_figures_of_scikit_learn(classifiers, glue, name, rows, text):
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
    from transformers import pipeline

    folder = classifiers[name.removesuffix("_mismatched")]
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    labels = PRESETS[name].labels
    guess = [labels.index(one["label"]) for one in classify([text.format(**row) for row in rows])]
    right = [row["label"] for row in rows]
    found = evaluate(folder, "--benchmark", name, "--path", glue)
    assert found["examples"] == len(rows)
    assert found["accuracy"] == pytest.approx(accuracy_score(right, guess), abs=1e-6)
    assert found["macro_f1"] == pytest.approx(f1_score(right, guess, average="macro"), abs=1e-6)
    assert found["mcc"] == pytest.approx(matthews_corrcoef(right, guess), abs=1e-6)
    assert "hidden" in found["note"]
    assert found["split"].startswith("validation")


def test_f1_of_one_class_is_scikit_learns():
    from sklearn.metrics import f1_score

    preset = PRESETS["glue/mrpc"]
    random = np.random.default_rng(0)
    scores, right = random.normal(size=(50, 2)).astype(np.float32), random.integers(0, 2, 50)
    log_probs = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    named = [preset.labels[label] for label in right]
    # A student may have its classes in another order.
    found = benchmarks.classification.figures(preset, log_probs[:, ::-1], named, preset.labels[::-1])
    assert found["f1"] == pytest.approx(f1_score(right, scores.argmax(1)), abs=1e-6)


def official(given, golds, version):
    """SQuAD's scripts, written down again from their text: v1.1 (2016) and v2.0 (2018)."""

    def normal(text):
        text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    def compute_f1(gold, answer):
        gold_toks, pred_toks = normal(gold).split(), normal(answer).split()
        common = Counter(gold_toks) & Counter(pred_toks)
        num_same = sum(common.values())
        if version == 2 and (len(gold_toks) == 0 or len(pred_toks) == 0):
            return int(gold_toks == pred_toks)
        if num_same == 0:
            return 0
        precision, recall = num_same / len(pred_toks), num_same / len(gold_toks)
        return (2 * precision * recall) / (precision + recall)

    exact = total = 0
    for answer, of in zip(given, golds, strict=True):
        if version == 2:
            of = [gold for gold in of if normal(gold)] or [""]
        exact += max(int(normal(gold) == normal(answer)) for gold in of)
        total += max(compute_f1(gold, answer) for gold in of)
    return 100 * exact / len(given), 100 * total / len(given)


@pytest.mark.parametrize("version", [1, 2])
def test_spans_are_measured_by_the_official_formula(version):
    draw = np.random.default_rng(version)
    words = ["the", "a", "Paris", "paris,", "Eiffel's", "tower", "330", "metres.", "an", "old-new", "()", ""]

    def text():
        return " ".join(draw.choice(words, draw.integers(0, 5)))

    given = [text() for _ in range(300)]
    golds = [[text() for _ in range(draw.integers(2 - version, 4))] or [] for _ in given]
    golds = [of or ["the tower"] if version == 1 else of for of in golds]
    exact, f1 = official(given, golds, version)
    found = metrics.squad(given, golds, no_answer=version == 2)
    assert 1 < exact < 99 > f1 > 1
    assert found["exact_match"] == pytest.approx(exact, abs=1e-6)
    assert found["f1"] == pytest.approx(f1, abs=1e-6)


def test_figures_of_squad_by_hand():
    given = ["Paris", "the company of Eiffel", "330 feet", ""]
    golds = [golds for _, _, golds in hub.SQUAD]
    found = metrics.squad(given, golds, no_answer=True)
    # exact: Paris, no answer. F1: 1, 2·(1/3·1/3)/(1/3+1/3) as "eiffels" is another word, 1/2, 1.
    assert found["exact_match"] == 50
    assert found["f1"] == pytest.approx(100 * (1 + 1 / 3 + 1 / 2 + 1) / 4, abs=1e-5)
    assert found["no_answer_f1"] == 100
    assert found["has_answer_exact_match"] == pytest.approx(100 / 3, abs=1e-5)


@pytest.mark.parametrize("version", [1, 2])
def test_what_a_language_model_writes_is_an_answer(tiny_causal, tmp_path, version, monkeypatch):
    folder = hub.squad(tmp_path, version)
    golds = [golds for _, _, golds in hub.SQUAD if golds or version == 2]
    said = ["Paris.", "Eiffel", "unanswerable", "Unanswerable!"][: len(golds)]
    asked = []

    def generate(student, prompts, **settings):
        asked.extend(student.tokenizer.decode(prompt) for prompt in prompts)
        return said

    monkeypatch.setattr("feddistill.benchmarks.run.generate", generate)
    monkeypatch.setattr("feddistill.benchmarks.run.ANSWER_TOKENS", 4)  # the model reads 64 in all
    found = evaluate(tiny_causal, "--benchmark", "squad_v2" if version == 2 else "squad", "--path", folder)
    given = [text if version == 1 or "answerable" not in text else "" for text in said]
    assert (found["exact_match"], found["f1"]) == pytest.approx(official(given, golds, version), abs=1e-5)
    assert all("Where" in asked[0] and one.rstrip().endswith("Answer:") for one in asked)


@cache
def plain(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def by_hand(folder, tokens, context, first=1):
    """``-log p`` of the tokens from ``first`` on, from the last ``context`` tokens before, one at a time."""
    model, nats = plain(folder), []
    with torch.no_grad():
        for place in range(first, len(tokens)):
            seen = tokens[max(0, place - context(place)) : place]
            nats.append(-model(torch.tensor([seen])).logits[0, -1].log_softmax(-1)[tokens[place]].item())
    return nats


@pytest.mark.parametrize(("window", "stride"), [(64, None), (12, 5)])
def test_perplexity_is_what_a_hand_computation_gives(tiny_causal, tmp_path, window, stride):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    read_as = [
        " = First =\nThe cat (a small one) sat on 1,024 mats.\n== More ==\nIt slept.\n",
        " = Second =\nA well-known dog\n",
    ]
    stride = stride or window // 2

    def context(place):
        """Tokens that are seen before the one at ``place``: windows end at ``window + n·stride``."""
        end = window
        while end <= place:
            end += stride
        end = min(end, len(tokens))
        return place - max(0, end - window)

    nats = []
    for text in read_as:
        tokens = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        nats += by_hand(tiny_causal, tokens, context)
    found = evaluate(
        tiny_causal, "--benchmark", "wikitext-2", "--path", hub.wikitext(tmp_path),
        "--window", window, "--stride", stride,
    )  # fmt: skip
    size = len("".join(read_as).encode())
    pages = ["".join(hub.WIKI[1:8]), "".join(hub.WIKI[8:])]
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    assert (found["documents"], found["bytes"], found["tokens"]) == (2, size, len(nats))
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)
    assert found["word_perplexity"] == pytest.approx(math.exp(sum(nats) / words), rel=1e-4)


def test_labels_are_scored_by_the_likelihood_of_their_names(tiny_causal, glue):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    guess = []
    rows = hub.reviews(40, 1)[:6]
    for row in rows:
        prompt = f"{row['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:"
        sums = []
        for answer in (" negative", " positive"):
            before, tokens = (tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
            sums.append(-sum(by_hand(tiny_causal, tokens, lambda place: place, len(before))))
        guess.append(int(sums[1] > sums[0]))
    found = evaluate(tiny_causal, "--benchmark", "glue/sst2", "--path", glue, "--limit", 6)
    right = [row["label"] for row in rows]
    assert found["examples"] == 6
    assert found["accuracy"] == pytest.approx(np.mean(np.array(guess) == right), abs=1e-6)


def test_batches_change_no_likelihood(tiny_causal):
    student = trained_models.load(tiny_causal)
    texts = ["a b", "a longer text with more words in it", "one", "and a third text"]
    asked = [likelihood.continuation(student, text, " and so on") for text in texts]
    together = likelihood.log_likelihoods(student, asked)
    alone = [likelihood.log_likelihoods(student, [one])[0] for one in asked]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_the_likelier_choice_is_the_answer(tiny_causal, tmp_path):
    student = trained_models.load(tiny_causal)
    sums = [
        likelihood.log_likelihoods(student, [likelihood.continuation(student, context, f" {text}")])[0]
        for context, texts in (
            ("The cat sat because", ("it was tired.", "it rained.")),
            ("It rained therefore", ("we sang.", "we got wet.")),
        )
        for text in texts
    ]
    right = [sums[0] > sums[1], sums[3] > sums[2]]
    found = evaluate(tiny_causal, "--benchmark", "superglue/copa", "--path", hub.copa(tmp_path))
    assert found["accuracy"] == pytest.approx(np.mean(right))


def test_greedy_text_is_that_of_one_prompt_at_a_time_and_ends_where_it_should(tiny_causal):
    student = trained_models.load(tiny_causal)
    texts = ["a film", "the music of a scene and an ending", "b"]
    prompts = [likelihood.encode(student, text) for text in texts]
    found = generation.generate(student, prompts, new_tokens=8)
    for ids, text in zip(prompts, found, strict=True):
        whole = list(ids)
        for _ in range(8):
            with torch.no_grad():
                following = int(student.model(torch.tensor([whole])).logits[0, -1].argmax())
            if following == student.tokenizer.eos_token_id:
                break
            whole.append(following)
        assert text == student.tokenizer.decode(whole[len(ids) :], skip_special_tokens=True).strip()
    mark = next(text for text in found if len(text) > 3)[2:4]
    assert all(mark not in text for text in generation.generate(student, prompts, new_tokens=8, stop=[mark]))


def test_a_long_prompt_loses_the_end_of_its_passage_and_nothing_else(tiny_causal):
    student = trained_models.load(tiny_causal)
    row = {"title": "T", "context": hub.PASSAGE * 5, "question": "Where is it?"}
    preset = PRESETS["squad"]
    text = generation.fitted(student, preset.prompt, row, "context", 60)
    assert len(likelihood.encode(student, text)) <= 60
    assert text.startswith("Title: T\n\nBackground: The")
    assert text.endswith("\n\nQuestion: Where is it?\n\nAnswer:")


@pytest.mark.skipif(find_spec("rouge_score") is None or find_spec("sacrebleu") is None, reason="extra eval")
def test_summaries_are_measured_by_their_packages(tiny_causal, tmp_path, monkeypatch):
    given = ["a tower stands in Paris", "tall towers"]
    monkeypatch.setattr("feddistill.benchmarks.run.generate", lambda *_, **__: given)
    monkeypatch.setattr("feddistill.benchmarks.run.SUMMARY_TOKENS", 20)
    found = evaluate(tiny_causal, "--benchmark", "cnn_dailymail", "--path", hub.news(tmp_path))
    # ROUGE-1 by hand, stemmed: all five words; of "the tower is tall" two of four.
    assert found["rouge1"] == pytest.approx((1 + 2 * (1 * 0.5) / 1.5) / 2, abs=1e-6)
    assert 0 < found["bleu"] < 100
    assert "tok:13a" in found["bleu_signature"]


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if p.kind == "classification"])
def test_presets_say_all_of_themselves(name):
    preset = PRESETS[name]
    assert preset.measured in preset.splits
    assert preset.measured not in preset.hidden
    assert len(preset.answers) == len(preset.labels) >= 2
    assert preset.positive is None or preset.positive in preset.labels
    row = {column: f"<{column}>" for column in preset.columns}
    assert all(f"<{column}>" in preset.prompt.format(**row) for column in preset.columns)
    assert all(f"<{column}>" in preset.text.format(**row) for column in preset.columns)


def source(name, path, **changes):
    raw = {"kind": "preset", "name": name, "path": str(path), **changes}
    return parse({"data": {"source": raw}}).data.source


def test_a_preset_is_a_source_of_texts(glue, tmp_path):
    table = read(source("glue/mnli", glue, split="validation_matched"), "data.source")
    row = hub.pairs(24, 4)[0]
    assert table.texts[0] == f"premise: {row['premise']}\nhypothesis: {row['hypothesis']}"
    assert table.labels[0] == ("entailment", "neutral", "contradiction")[row["label"]]
    plain = read(source("wikitext-2", hub.wikitext(tmp_path), split="test"), "data.source")
    assert plain.texts[1] == " = Second =\nA well-known dog\n"
    assert plain.labels is None


def test_hidden_labels_can_be_public_texts_and_nothing_more(glue):
    hidden = source("glue/sst2", glue, split="test")
    assert read(hidden, "data.proxy.source").labels is None
    from feddistill.data import labelled

    with pytest.raises(DataError, match="labels of glue/sst2's test split are hidden; take validation"):
        labelled(hidden, ("negative", "positive"), "data.test")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("glue/sst3", "did you mean 'glue/sst2'?"),
        ("glue/stsb", "glue/stsb is a regression"),
        ("superglue/record", "not supported"),
        ("zzz", "there are glue/sst2,"),
    ],
)
def test_unknown_benchmarks_are_refused_by_name(name, line):
    with pytest.raises(ConfigError, match=re.escape(line)):
        presets.find(name)
    with pytest.raises(ConfigError, match=re.escape(line)):
        source(name, "x")


def test_splits_and_kinds_are_checked_with_the_settings():
    with pytest.raises(ConfigError, match="glue/mnli has no split 'validation'; it has train, validation_m"):
        source("glue/mnli", "x", split="validation")
    with pytest.raises(ConfigError, match="cnn_dailymail has no texts to train on"):
        source("cnn_dailymail", "x")


def test_mistakes_of_an_evaluation_are_one_line(classifiers, tiny_causal, glue, tmp_path):
    folder = classifiers["glue/sst2"]

    def line(*arguments):
        status, text = evaluate(*arguments)
        assert status == 2
        assert len(text.strip().splitlines()) == 1, text
        return text

    offline = line(folder, "--benchmark", "glue/sst2")
    assert "cannot load data set 'nyu-mll/glue'" in offline
    assert "--path" in offline
    assert "has positive, negative" in line(folder, "--benchmark", "glue/mnli", "--path", glue)
    assert "needs a model for causal_lm" in line(folder, "--benchmark", "wikitext-2", "--path", glue)
    assert "no such folder" in line(folder, "--benchmark", "glue/sst2", "--path", tmp_path / "gone")
    assert "is not a run" in line(tmp_path, "--benchmark", "glue/sst2", "--path", glue)
    assert "exclude each other" in line(folder, "--benchmark", "glue/sst2", "--tasks", "a")
    assert "--path needs --benchmark" in line(folder, "--path", glue)
    assert "window" in line(folder, "--benchmark", "glue/sst2", "--path", glue, "--window", 8)
    wiki = hub.wikitext(tmp_path / "wiki")
    assert "reads 2 to 64" in line(tiny_causal, "--benchmark", "wikitext-2", "--path", wiki, "--window", 65)
    assert "less than the window" in line(
        tiny_causal, "--benchmark", "wikitext-2", "--path", wiki, "--window", 8, "--stride", 8
    )
    assert "causal language model" in line(folder, "--tasks", "hellaswag")
    other = hub.write(tmp_path / "other", {"sst2": {"validation": [{"text": "a", "label": 0}]}})
    assert "has no column 'sentence'" in line(folder, "--benchmark", "glue/sst2", "--path", other)
    odd = hub.write(tmp_path / "odd", {"sst2": {"validation": [{"sentence": "a", "label": 7}]}})
    assert "row 0 has label 7" in line(folder, "--benchmark", "glue/sst2", "--path", odd)


def test_wikitext_pages_begin_at_headings_of_the_first_order():
    assert [page.splitlines()[0] for page in benchmark.pages(hub.WIKI)] == [" = First = ", " = Second = "]


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed")
def test_without_the_harness_the_extra_is_named(tiny_causal):
    status, line = evaluate(tiny_causal, "--tasks", "hellaswag")
    assert status == 2
    assert "pip install 'feddistill[eval]'" in line


@pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-evaluation-harness (extra eval) is not installed"
)
@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_the_harness_measures_a_task_of_ones_own(tiny_causal, tmp_path):
    rows = [
        {"question": f"{a} and {b}", "answer": i % 2}
        for i, (a, b) in enumerate(zip("abcd", "efgh", strict=True))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "small.yaml").write_text(
        "task: small\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}}: is that so?'\ndoc_to_target: answer\ndoc_to_choice: ['yes', 'no']\n"
        "metric_list: [{metric: acc}]\n"
    )
    found = evaluate(tiny_causal, "--tasks", "small", "--task-folder", tmp_path, "--limit", 3)
    student = trained_models.load(tiny_causal)
    right = []
    for row in rows[:3]:
        asked = [
            likelihood.continuation(student, f"{row['question']}: is that so?", f" {a}")
            for a in ("yes", "no")
        ]
        right.append(int(likelihood.log_likelihoods(student, asked).argmax()) == row["answer"])
    assert found["results"]["small"]["acc,none"] == pytest.approx(np.mean(right))
    status, line = evaluate(tiny_causal, "--tasks", "smal", "--task-folder", tmp_path)
    assert status == 2
    assert "no task 'smal'" in line
