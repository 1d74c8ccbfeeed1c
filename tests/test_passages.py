"""Questions on passages: characters and tokens, what is said of either, the spans that are found."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import question_fixtures as made
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedTokenizerFast

from feddistill.config.training import DistillConfig
from feddistill.errors import ModelError
from feddistill.modelio.padding import padded
from feddistill.modelio.passages import NOWHERE, likeliest, windows
from feddistill.tasks.question_answering import of_characters
from feddistill.training.losses import Batch, QuestionLoss
from feddistill.training.spans import (
    SpanExamples,
    concatenate,
    token_labels,
    token_log_probs,
    with_hard_targets,
)
from feddistill.types import NO_LABEL
from feddistill_kernels import TopK

ROWS = made.rows(40, seed=3)
PASSAGE = "東京 is  big.\tCafé Noë: 🎈🎈 costs 1,024 ¥; naïve readers—few—pay."
KINDS = ("byte-level", "wordpiece", "unigram", "metaspace")


@cache
def tokenizer_of(kind):
    texts = [PASSAGE, *(row["context"] for row in ROWS), *(row["question"] for row in ROWS)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    if kind == "byte-level":
        made_ = Tokenizer(models.BPE())
        made_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made_.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    elif kind == "wordpiece":
        made_ = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made_.normalizer = normalizers.BertNormalizer()
        made_.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    else:
        made_ = Tokenizer(models.Unigram())
        made_.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, unk_token="[UNK]", show_progress=False
        )
        if kind == "metaspace":
            made_ = Tokenizer(models.BPE(unk_token="[UNK]"))
            made_.pre_tokenizer = pre_tokenizers.Metaspace()
            trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    made_.train_from_iterator(texts, trainer)
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    fast = PreTrainedTokenizerFast(tokenizer_object=made_, **named)
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return fast


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return tokenizer_of(request.param)


def words(passage):
    """Spans of all words, as white space divides them."""
    found, at = [], 0
    for word in passage.split():
        at = passage.index(word, at)
        found.append((at, at + len(word)))
        at += len(word)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passage", [PASSAGE, *(row["context"] for row in ROWS[:3])])
def test_any_words_of_a_passage_are_found_again_by_their_tokens(kind, passage):
    tokenizer = tokenizer_of(kind)
    (window,) = windows(tokenizer, "Who?", passage, 256, "m")
    assert window.passage.sum() > 5
    for begin, _ in words(passage):
        for _, end in words(passage):
            if begin < end:
                first, last = window.first(np.array([begin]))[0], window.last(np.array([end - 1]))[0]
                assert window.starts[first] <= begin < window.ends[first]
                assert window.starts[last] < end <= window.ends[last]
                if kind != "metaspace":  # whose tokens may go on behind a word
                    assert passage[window.starts[first] : window.ends[last]] == passage[begin:end]


def test_every_character_of_a_word_belongs_to_a_token_that_holds_it(tokenizer):
    (window,) = windows(tokenizer, "Who?", PASSAGE, 256, "m")
    for place, letter in enumerate(PASSAGE):
        first, last = window.first(np.array([place]))[0], window.last(np.array([place]))[0]
        if not letter.isspace():
            assert window.starts[first] <= place < window.ends[first]
            assert window.starts[last] <= place < window.ends[last]
    assert window.first(np.array([len(PASSAGE), -1])).tolist() == [NOWHERE, NOWHERE]
    assert window.last(np.array([len(PASSAGE), -1])).tolist() == [NOWHERE, NOWHERE]


def test_pages_cover_the_passage_and_overlap(tokenizer):
    passage = " ".join(row["context"] for row in ROWS[:10])
    found = windows(tokenizer, "Where did Hugo go?", passage, 48, "m", overlap=6)
    assert len(found) > 3
    for window in found:
        assert len(window) <= 48
        assert set(window.types) == {0, 1}
    read = [{int(at) for at in window.starts[window.passage]} for window in found]
    (whole,) = windows(tokenizer, "Where did Hugo go?", passage, 10_000, "m")
    assert set.union(*read) == {int(at) for at in whole.starts[whole.passage]}
    for one, other in pairwise(read):
        assert one & other


def test_what_is_not_read_is_nowhere(tokenizer):
    passage = " ".join(row["context"] for row in ROWS[:10])
    window = windows(tokenizer, "Who?", passage, 40, "m")[0]
    end = int(window.ends.max())
    assert window.first(np.array([end + 5, len(passage) - 1])).tolist() == [NOWHERE, NOWHERE]
    labels = token_labels([window, window, window], [((0, 4),), ((0, len(passage)),), None])
    assert labels[0].tolist() == [window.first(np.array([0]))[0], window.last(np.array([3]))[0]]
    assert (labels[1:] == NO_LABEL).all()


def test_the_likeliest_span_is_the_best_of_all(tokenizer):
    (window,) = windows(tokenizer, "Who?", PASSAGE, 256, "m")
    random = torch.Generator().manual_seed(0)
    for longest in (1, 3, 100):
        start, end = torch.randn(2, len(window), generator=random)
        best = max(
            (float(start[i]) + float(end[j]), i, j)
            for i in range(len(window))
            for j in range(i, min(i + longest, len(window)))
            if window.passage[i] and window.passage[j]
        )
        assert likeliest(start, end, window, longest) == pytest.approx(best, abs=1e-6)


def drawn(found, seed=0):
    """Logits of windows as a model gives them."""
    random = torch.Generator().manual_seed(seed)
    return [
        (2 * torch.randn(2, len(window), generator=random)).masked_fill(
            ~torch.from_numpy(window.choices), -torch.inf
        )
        for window in found
    ]


@pytest.mark.parametrize("unanswerable", [False, True])
def test_what_is_said_of_characters_says_the_same_of_ones_own_tokens(tokenizer, unanswerable):
    found = [
        windows(tokenizer, row["question"], row["context"], 128, "m", unanswerable=unanswerable)[0]
        for row in ROWS[:6]
    ]
    logits = drawn(found)
    said = of_characters(found, logits, 120, 200)
    assert len(said) == 12
    total = said.log_probs.double().exp().sum(1) + said.log_tail.double().exp()
    torch.testing.assert_close(total, torch.ones(12, dtype=torch.double), rtol=0, atol=1e-6)
    assert bool(((said.ids == 0) & (said.log_probs > -torch.inf)).any(1).all()) == unanswerable
    for number, (window, both) in enumerate(zip(found, logits, strict=True)):
        mine = token_log_probs(said[2 * number : 2 * number + 2], window).double().exp()
        wanted = both.double().softmax(-1)
        # Bytes of one character are several tokens: what is said of them is said of the first or the last.
        for side, edges in enumerate((window.starts, window.ends)):
            places = np.unique(edges[window.passage])
            for place in places:
                same = torch.from_numpy((edges == place) & window.passage)
                assert float(mine[side][same].sum()) == pytest.approx(
                    float(wanted[side][same].sum()), abs=1e-6
                )


def test_a_row_is_about_the_characters_at_the_edges():
    tokenizer = tokenizer_of("wordpiece")
    (window,) = windows(tokenizer, "What?", "a blue hat", 64, "m", unanswerable=True)
    logits = torch.full((2, len(window)), -torch.inf)
    at = np.flatnonzero(window.passage)
    logits[:, at] = 0.0
    logits[0, at[0]], logits[1, at[-1]] = 3.0, 3.0
    logits[0, window.no_answer] = logits[1, window.no_answer] = 1.0
    said = of_characters([window], [logits], 3, 11)
    assert said.ids[:, 0].tolist() == [1, 10]  # the first character, and the tenth
    assert said.ids[:, 1].tolist() == [0, 0]
    share = torch.exp(logits[0] - logits[0].logsumexp(0))
    assert float(said.log_probs[0, 0].exp()) == pytest.approx(float(share[at[0]]), abs=1e-6)


def test_two_tokenizers_mean_the_same_words():
    """What one model is sure of, another is told."""
    for sender, receiver in [(a, b) for a in KINDS for b in KINDS if a != b]:
        theirs, ours = tokenizer_of(sender), tokenizer_of(receiver)
        for row in ROWS[:4]:
            (window,) = windows(theirs, row["question"], row["context"], 128, "m")
            (mine,) = windows(ours, row["question"], row["context"], 128, "m")
            start = row["answers"]["answer_start"][0]
            span = (start, start + len(row["answers"]["text"][0]))
            logits = torch.zeros(2, len(window)).masked_fill(~torch.from_numpy(window.choices), -torch.inf)
            (first, last) = token_labels([window], [(span,)])[0].tolist()
            logits[0, first] = logits[1, last] = 12.0
            told = token_log_probs(of_characters([window], [logits], 16, 200), mine)
            meant = (int(window.starts[first]), int(window.ends[last]))  # the span, and what its tokens add
            assert told.argmax(1).tolist() == token_labels([mine], [(meant,)])[0].tolist()
            words = row["context"][meant[0] : meant[1]]
            assert row["answers"]["text"][0] in words
            assert len(words) <= len(row["answers"]["text"][0]) + 1
            assert (told.exp().amax(1) > 0.98).all()


def test_what_has_no_place_may_be_anywhere():
    tokenizer = tokenizer_of("wordpiece")
    window = windows(tokenizer, "Who?", " ".join(row["context"] for row in ROWS[:10]), 40, "m")[0]
    beyond = int(window.ends.max()) + 50
    rows = TopK(
        torch.tensor([[1, beyond], [4, beyond]], dtype=torch.int32),
        torch.tensor([[0.5, 0.3], [0.6, 0.4]]).log(),
        torch.tensor([0.2, 0.0]).log(),
        2000,
    )
    said = token_log_probs(rows, window).exp()
    count = int(window.choices.sum())
    first = int(window.first(np.array([0]))[0])
    assert float(said[0, first]) == pytest.approx(0.5 + 0.5 / count, abs=1e-6)
    assert float(said.sum(1).min()) == pytest.approx(1, abs=1e-5)
    assert float(said[0][~torch.from_numpy(window.choices)].max()) == 0
    nobody = TopK(rows.ids, torch.full((2, 2), -torch.inf), torch.zeros(2), 2000)
    assert token_log_probs(nobody, window).exp()[0, first] == pytest.approx(1 / count, abs=1e-6)


@pytest.fixture(scope="module")
def batch():
    """Five questions of several lengths: taught and labelled, one of them, neither, and one that is cut."""
    tokenizer = tokenizer_of("wordpiece")
    found = [windows(tokenizer, r["question"], r["context"], 96, "m", unanswerable=True)[0] for r in ROWS[:5]]
    found[4] = windows(tokenizer, "Who?", ROWS[4]["context"], 32, "m", unanswerable=True)[0]
    spans = []
    for row in ROWS[:5]:
        start = row["answers"]["answer_start"][0]
        spans.append(((start, start + len(row["answers"]["text"][0])),))
    labels = token_labels(found, [spans[0], None, (), None, None])
    teacher = of_characters(found[:3], drawn(found[:3], seed=1), 8, 200)
    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForQuestionAnswering(BertConfig(vocab_size=len(tokenizer), **still, **made.SMALL))
    return found, labels, teacher, model


def inputs_of(found):
    length = padded(max(map(len, found)))
    ids, mask = torch.zeros(len(found), length, dtype=torch.long), torch.zeros(len(found), length)
    for at, window in enumerate(found):
        ids[at, : len(window)], mask[at, : len(window)] = torch.tensor(window.ids), 1
    return Batch(ids, mask.long(), torch.arange(len(found)))


def log_probs_of(model, window):
    said = model(
        input_ids=torch.tensor([window.ids]),
        attention_mask=torch.ones(1, len(window), dtype=torch.long),
        token_type_ids=torch.tensor([window.types]),
    )
    chosen = torch.from_numpy(window.choices)
    return [x[0].masked_fill(~chosen, -1e30).log_softmax(0) for x in (said.start_logits, said.end_logits)]


@pytest.mark.parametrize("kd_weight", [0.3, 1.0])
def test_the_loss_is_the_mean_over_edges_of_what_the_formula_says(batch, kd_weight):
    found, labels, teacher, model = batch
    taught = torch.tensor([0, 1, 2, -1, -1])
    examples = SpanExamples(found, labels, teacher, taught)
    loss = QuestionLoss(examples, DistillConfig(temperature=1.0, kd_weight=kd_weight), types=True)
    model.zero_grad()
    inputs = inputs_of(found)
    terms = loss(inputs)
    ours = terms.total(model, inputs)
    ours.backward()
    mine = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    total = 0.0
    for row, window in enumerate(found):
        for side, log_q in enumerate(log_probs_of(model, window)):
            label = int(labels[row, side])
            weight = 0.0 if taught[row] < 0 else (kd_weight if label != NO_LABEL else 1.0)
            if weight:
                p = token_log_probs(teacher[2 * row : 2 * row + 2], window)[side].exp()
                keep = p > 0
                total = total + weight * (p[keep] * (p[keep].log() - log_q[keep])).sum()
            if label != NO_LABEL:
                total = total - (1 - weight) * log_q[label]
    assert terms.count == 2 * 3 + int((labels[3:] != NO_LABEL).sum())
    wanted = total
    wanted.backward()
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tvd", "skew_forward_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_that_can_be_no_edge_have_no_part_in_any_loss(batch, kind, temperature):
    found, labels, teacher, model = batch
    examples = SpanExamples(found, labels, teacher, torch.tensor([0, 1, 2, -1, -1]))
    settings = DistillConfig(kind=kind, temperature=temperature)
    loss = QuestionLoss(examples, settings, types=True)
    model.zero_grad()
    one = loss(inputs_of(found)).total(model, inputs_of(found))
    one.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads)
    narrow = inputs_of(found)
    ids, mask = (functional.pad(x, (0, 16)) for x in (narrow.input_ids, narrow.attention_mask))
    wider = Batch(ids, mask, narrow.rows)  # padding changes nothing
    plain_loss = QuestionLoss(examples, settings, types=False)
    padded, plain = (plain_loss(x).total(model, x) for x in (wider, narrow))
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-6)


def test_questions_of_which_nothing_is_known_cost_nothing(batch):
    found, _, _, model = batch
    nothing = SpanExamples(found, torch.full((5, 2), NO_LABEL))
    terms = QuestionLoss(nothing, None, types=True)(inputs_of(found))
    loss = terms.total(model, inputs_of(found))
    assert terms.count == 0
    assert loss.item() == 0
    loss.backward()


def test_a_hard_teacher_is_its_first_choice(batch):
    found, labels, teacher, _ = batch
    taught = torch.tensor([0, 1, 2, -1, -1])
    made_ = with_hard_targets(SpanExamples(found, labels, teacher, taught))
    assert made_.teacher is None
    for row in range(3):
        said = token_log_probs(teacher[2 * row : 2 * row + 2], found[row])
        assert made_.labels[row].tolist() == said.argmax(1).tolist()
    assert torch.equal(made_.labels[3:], labels[3:])


def test_own_questions_and_taught_ones_are_one_lesson(batch):
    found, labels, teacher, _ = batch
    own = SpanExamples(found[:2], labels[:2])
    both = concatenate(own, SpanExamples(found[2:], labels[2:], teacher, torch.tensor([2, 0, 1])))
    assert both.teacher_rows.tolist() == [-1, -1, 2, 0, 1]
    assert len(both.tokens) == len(both.labels) == 5
    assert both.tokens[2] == found[2].ids


def test_what_cannot_be_read_is_refused():
    tokenizer = tokenizer_of("wordpiece")
    with pytest.raises(ModelError, match=r"m reads 32 tokens; a question of .* leaves no room"):
        windows(tokenizer, "who left what " * 10, "a hat", 32, "m")
    with pytest.raises(ModelError, match="makes no tokens of the passage"):
        windows(tokenizer, "who?", "  \n", 32, "m")
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bare = PreTrainedTokenizerFast(tokenizer_object=copy, pad_token="[PAD]")
    bare.backend_tokenizer.post_processor = None
    with pytest.raises(ModelError, match="no cls token, which stands for"):
        windows(bare, "who?", "a hat", 32, "m", unanswerable=True)
