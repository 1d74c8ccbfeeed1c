"""Answers of clients with other tokenizers: spans, maps, projection, baselines."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from feddistill import alignment
from feddistill.alignment import Vocabulary, check_alignable, map_vocabulary, project, spans
from feddistill.alignment.baselines import align, edit_distances
from feddistill.config.data import EmbeddedSource
from feddistill.data.sources import read
from feddistill.errors import ModelError
from feddistill_kernels import TopK, topk_compress

TEXT = "The 1234 utterly naïve foxes (and 漢字 kanji) cost 56.78 euros — 😀👍🏽!\n\nWhy?  Because."


@pytest.fixture(scope="module")
def corpus():
    return read(EmbeddedSource(), "texts").texts[:400]


def byte_level(corpus, size, *, digits=False, bos=None):
    t = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level]) if digits else level
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<end>"] + ([bos] if bos else [])
    t.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
        ),
    )
    if bos:
        t.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<end>", bos_token=bos)


@pytest.fixture(scope="module")
def kinds(corpus):
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.train_from_iterator(
        corpus,
        trainers.UnigramTrainer(
            vocab_size=500, special_tokens=["<unk>", "<end>"], unk_token="<unk>", show_progress=False
        ),
    )
    fallback = Tokenizer(models.BPE(byte_fallback=True))
    fallback.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    fallback.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=700, special_tokens=["<end>"], show_progress=False)
    )
    fallback.add_tokens([])
    vocabulary = fallback.get_vocab()
    vocabulary |= {name: len(vocabulary) + n for n, name in enumerate(bytes_)}
    state = json.loads(fallback.to_str())
    state["model"]["vocab"] = vocabulary
    fallback = Tokenizer.from_str(json.dumps(state))
    word = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    word.normalizer = normalizers.BertNormalizer()
    word.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    word.train_from_iterator(
        corpus,
        trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]", "<end>"], show_progress=False),
    )
    return {
        "bytes": Vocabulary(byte_level(corpus, 700)),
        "digits": Vocabulary(byte_level(corpus, 420, digits=True, bos="<s>")),
        "unigram": Vocabulary(
            PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="<end>", unk_token="<unk>")
        ),
        "fallback": Vocabulary(PreTrainedTokenizerFast(tokenizer_object=fallback, eos_token="<end>")),
        "words": Vocabulary(
            PreTrainedTokenizerFast(tokenizer_object=word, eos_token="<end>", unk_token="[UNK]")
        ),
    }


@pytest.fixture(scope="module")
def maps(kinds):
    return {(a, b): map_vocabulary(kinds[a], kinds[b]) for a in kinds for b in kinds}


def answers(tokens, vocabulary, k=16, seed=0):
    """A row about each token: something random, with the text's own token likely."""
    made = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(tokens), vocabulary, generator=made)
    logits[torch.arange(len(tokens)), torch.from_numpy(tokens.ids.astype(np.int64))] += 8
    return topk_compress(logits.log_softmax(-1), k)


LOSSLESS = ("bytes", "digits", "fallback")
ALL = (*LOSSLESS, "unigram", "words")


@pytest.mark.parametrize("kind", LOSSLESS)
def test_spans_of_what_loses_nothing_tile_the_text(kinds, kind):
    got = spans(kinds[kind], TEXT)
    raw, inner = TEXT.encode(), ~got.added
    assert b"".join(raw[a:b] for a, b in zip(got.starts[inner], got.ends[inner], strict=True)) == raw
    joined = b"".join(kinds[kind].tokens[i] for i in got.ids[inner])
    assert joined.removeprefix(b" ") == raw
    assert got.faithful[inner].all()
    assert got.added.sum() == (kind == "digits")
    assert (got.starts == got.ends)[got.added].all()


@pytest.mark.parametrize("kind", LOSSLESS)
@given(text=st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text_goes_round(kinds, kind, text):
    got = spans(kinds[kind], text)
    raw, inner = text.encode(), ~got.added
    assert b"".join(raw[a:b] for a, b in zip(got.starts[inner], got.ends[inner], strict=True)) == raw


@pytest.mark.parametrize("kind", ["unigram", "words"])
@given(text=st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_spans_of_lossy_tokenizers_are_in_order_and_in_the_text(kinds, kind, text):
    got = spans(kinds[kind], text)
    assert (got.starts <= got.ends).all()
    assert (np.diff(got.ends) >= 0).all()
    assert got.ends.max(initial=0) <= len(text.encode())


def test_words_cover_what_they_read(kinds):
    got = spans(kinds["words"], "The (the) the")
    assert [bytes(got.text[a:b]) for a, b in zip(got.starts, got.ends, strict=True)] == (
        [b"The", b"(", b"the", b")", b"the"]
    )
    assert got.faithful.tolist() == [False, True, True, True, True]
    assert got.bare.tolist() == [True, False, True, True, False]


@pytest.mark.parametrize("kind", ALL)
def test_same_tokenizer_leaves_rows_as_they_are(kinds, kind):
    got = spans(kinds[kind], TEXT)
    rows = answers(got, len(kinds[kind]))
    found = project(rows, got, got, map_vocabulary(kinds[kind], kinds[kind]))
    assert torch.equal(found.rows.ids, rows.ids)
    assert torch.equal(found.rows.log_probs, rows.log_probs)
    assert torch.equal(found.rows.log_tail, rows.log_tail)
    assert found.coverage.tolist() == [1.0] * len(got)


@pytest.mark.parametrize("client", ALL)
@pytest.mark.parametrize("student", ALL)
def test_no_mass_is_made_or_lost(kinds, maps, client, student):
    theirs, ours = spans(kinds[client], TEXT), spans(kinds[student], TEXT)
    rows = answers(theirs, len(kinds[client]))
    mapped = maps[client, student]
    found = project(rows, theirs, ours, mapped, threshold=0.0)
    mass = found.rows.log_probs.double().exp().sum(1) + found.rows.log_tail.double().exp()
    assert torch.allclose(mass, torch.ones_like(mass), atol=1e-5)
    assert len(found.rows) == found.answered.sum() > len(ours) / 3
    ordered = found.rows.ids.sort(1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all()
    assert found.coverage.min() >= 0
    assert found.coverage.max() <= 1
    some = project(rows, theirs, ours, mapped, threshold=0.9)
    assert (some.answered == (found.answered & (found.coverage >= 0.9))).all()
    assert len(some.rows) == some.answered.sum()


@given(
    text=st.text(max_size=30) | st.text(" \n\ttheT(é漢", max_size=30),
    client=st.sampled_from(ALL), student=st.sampled_from(ALL), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_text_keeps_its_mass(kinds, maps, text, client, student, seed):
    theirs, ours = spans(kinds[client], text), spans(kinds[student], text)
    rng, size, k = np.random.default_rng(seed), len(kinds[client]), 12
    ids = np.array([rng.choice(size, k, replace=False) for _ in theirs.ids], np.int32).reshape(-1, k)
    ids[:, 0] = np.where((ids == theirs.ids[:, None]).any(1), ids[:, 0], theirs.ids)
    probs = rng.dirichlet(np.full(k + 1, 0.3), len(ids)).reshape(-1, k + 1) + 1e-12
    probs = torch.from_numpy(probs / probs.sum(1, keepdims=True)).log()
    rows = TopK(torch.from_numpy(ids), probs[:, :-1], probs[:, -1], size)
    found = project(rows, theirs, ours, maps[client, student], threshold=0.0)
    mass = found.rows.log_probs.double().exp().sum(1) + found.rows.log_tail.double().exp()
    assert torch.allclose(mass, torch.ones_like(mass), rtol=0, atol=1e-6)
    assert len(found.rows) == found.answered.sum() <= len(ours)
    ordered = found.rows.ids.sort(1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all()


def letters(*pieces, begin=None, end=None):
    """A byte-level tokenizer of single bytes and these pieces, each with all that it is merged from."""
    ids = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for piece in pieces:
        for n in range(1, len(piece)):
            if piece[: n + 1] not in ids:
                ids[piece[: n + 1]] = len(ids)
                merges.append((piece[:n], piece[n]))
    t = Tokenizer(models.BPE(ids, merges))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    around = [name for name in (begin, end) if name]
    t.add_special_tokens(around)
    if around:
        t.post_processor = processors.TemplateProcessing(
            single=[*([begin] if begin else []), "$A", *([end] if end else [])],
            special_tokens=[(name, t.token_to_id(name)) for name in around],
        )
    return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=t, bos_token=begin, eos_token=end))


def rows_of(vocabulary, *rows):
    """Rows from ``{bytes or id: probability}``."""
    ids = torch.tensor([[vocabulary.by_bytes.get(t, t) for t in row] for row in rows], dtype=torch.int32)
    probs = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64)
    return TopK(ids, probs.log(), (1 - probs.sum(1)).log(), len(vocabulary))


def said(found, row, vocabulary, text):
    where = found.rows.ids[row].tolist().index(vocabulary.by_bytes.get(text, text))
    return math.exp(found.rows.log_probs[row, where])


def test_chain_rule_of_two_tokens_to_one():
    client, student = letters("ab"), letters("abcd")
    theirs, ours = spans(client, "abcd"), spans(student, "abcd")
    assert (len(theirs), len(ours)) == (3, 1)
    rows = rows_of(client, {b"ab": 0.5, b"x": 0.3}, {b"c": 0.6, b"y": 0.2}, {b"d": 0.9, b"z": 0.05})
    found = project(rows, theirs, ours, map_vocabulary(client, student), k=5)
    assert said(found, 0, student, b"abcd") == pytest.approx(0.5 * 0.6 * 0.9)
    assert said(found, 0, student, b"abc") == pytest.approx(0.5 * 0.6 * 0.05)  # "abcz" begins with it
    assert said(found, 0, student, b"ab") == pytest.approx(0.5 * 0.2)
    assert said(found, 0, student, b"x") == pytest.approx(0.3)


def test_inner_pieces_of_one_token_are_conditioned_on_what_agrees():
    client, student = letters("abcd", "abx"), letters("ab", "cd")
    theirs, ours = spans(client, "abcd"), spans(student, "abcd")
    assert (len(theirs), len(ours)) == (1, 2)
    rows = rows_of(client, {b"abcd": 0.6, b"abx": 0.2, b"ab": 0.06, b"a": 0.04, b"q": 0.05})
    found = project(rows, theirs, ours, map_vocabulary(client, student))
    norm = 0.6 + 0.2 + 0.06 + 0.04 + 0.05  # all but "q"; the tail may agree
    assert said(found, 0, student, b"ab") == pytest.approx(0.6 + 0.2 + 0.06)
    assert said(found, 1, student, b"cd") == pytest.approx(0.6 / norm)
    assert said(found, 1, student, b"x") == pytest.approx(0.2 / norm)
    assert found.coverage[1] == pytest.approx((0.8 / norm) / 0.95)


def test_an_end_goes_to_the_end_of_another_name():
    client, student = letters("ab", end="</s>"), letters("abc", end="<end>")
    theirs, ours = spans(client, "abc"), spans(student, "abc")
    assert (len(theirs), len(ours)) == (3, 2)
    stop, end = client.eos_id, student.eos_id
    assert (theirs.ids[-1], ours.ids[-1]) == (stop, end)
    rows = rows_of(client, {b"ab": 0.7, stop: 0.2}, {b"c": 0.5, stop: 0.3}, {stop: 0.9, b"a": 0.05})
    found = project(rows, theirs, ours, map_vocabulary(client, student), k=4)
    assert found.answered.all()
    assert said(found, 0, student, b"abc") == pytest.approx(0.7 * 0.5)
    assert said(found, 0, student, b"ab") == pytest.approx(0.7 * 0.3)  # "ab", and then the end
    assert said(found, 0, student, end) == pytest.approx(0.2)
    assert said(found, 1, student, end) == pytest.approx(0.9)
    assert said(found, 1, student, b"a") == pytest.approx(0.05)


@pytest.mark.parametrize(("their_begin", "our_begin"), [("<s>", None), (None, "<b>"), ("<s>", "<b>")])
def test_a_token_at_the_start_changes_no_other_row(their_begin, our_begin):
    wanted = None
    said_of = {b"ab": 0.5, b"x": 0.3}, {b"c": 0.6, b"y": 0.2}
    for first, second in ((None, None), (their_begin, our_begin)):
        client, student = letters("ab", begin=first), letters("abc", begin=second)
        theirs, ours = spans(client, "abc"), spans(student, "abc")
        about = np.flatnonzero(~theirs.added)
        mapped = map_vocabulary(client, student)
        found = project(rows_of(client, *said_of), theirs, ours, mapped, predicted=about, k=4)
        assert found.answered.tolist() == [*([False] if second else []), True]
        got = {text: said(found, 0, student, text) for text in (b"abc", b"ab", b"x")}
        wanted = wanted or got
        assert got == pytest.approx(wanted)
    assert wanted[b"abc"] == pytest.approx(0.5 * 0.6)


def word_pieces():
    t = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "b": 2, "c": 3, "##b": 4}, unk_token="[UNK]"))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=t, unk_token="[UNK]"))


@pytest.mark.parametrize("space", [" ", "\n", "  ", "\t "])
def test_words_say_the_white_space_of_the_text(space):
    client, student = word_pieces(), letters()
    theirs, ours = spans(client, f"a{space}b"), spans(student, f"a{space}b")
    assert (len(theirs), len(ours)) == (2, 2 + len(space))
    rows = rows_of(client, {b" a": 0.7, b" c": 0.2}, {b" b": 0.6, b" c": 0.3})
    found = project(rows, theirs, ours, map_vocabulary(client, student), k=3)
    assert found.answered.all()
    assert said(found, 0, student, b"a") == pytest.approx(0.7)
    for place, letter in enumerate(space, 1):  # whatever word comes, its white space comes first
        assert said(found, place, student, letter.encode()) == pytest.approx(0.9)
    assert said(found, len(space) + 1, student, b"b") == pytest.approx(0.6)
    assert said(found, len(space) + 1, student, b"c") == pytest.approx(0.3)


def test_white_space_and_a_letter_make_a_word():
    client, student = letters(), word_pieces()
    theirs, ours = spans(client, "a b"), spans(student, "a b")
    rows = rows_of(client, {b"a": 0.9, b"x": 0.05}, {b" ": 0.8, b"b": 0.1}, {b"b": 0.6, b"c": 0.3})
    found = project(rows, theirs, ours, map_vocabulary(client, student), k=4)
    assert said(found, 0, student, b" a") == pytest.approx(0.9)
    assert said(found, 1, student, b" b") == pytest.approx(0.8 * 0.6)
    assert said(found, 1, student, b" c") == pytest.approx(0.8 * 0.3)
    assert said(found, 1, student, b"b") == pytest.approx(0.1)


def test_a_beginning_only_one_has_shifts_nothing(kinds):
    theirs, ours = spans(kinds["bytes"], TEXT), spans(kinds["digits"], TEXT)
    rows = answers(theirs, len(kinds["bytes"]))
    found = project(
        rows[1:], theirs, ours, map_vocabulary(kinds["bytes"], kinds["digits"]),
        predicted=np.arange(1, len(theirs)), threshold=0.0,
    )  # fmt: skip
    assert not found.answered[:2].any()  # the beginning, and what nobody has been asked about


def test_maps_are_kept_and_damage_shows(kinds, tmp_path):
    client, student = kinds["bytes"], kinds["unigram"]
    made = map_vocabulary(client, student, tmp_path)
    (path,) = tmp_path.iterdir()
    again = map_vocabulary(client, student, tmp_path)
    assert (made.cache, again.cache) == ("built", "hit")
    assert np.array_equal(made.plain, again.plain)
    whole = path.read_bytes()
    for broken in (whole[:50], whole[:-4], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(broken)
        assert "damaged" in map_vocabulary(client, student, tmp_path).cache
        assert map_vocabulary(client, student, tmp_path).cache == "hit"
    map_vocabulary(student, client, tmp_path)
    path.write_bytes((tmp_path / f"{student.fingerprint}-{client.fingerprint}.safetensors").read_bytes())
    with pytest.raises(ModelError, match="not the map of these two tokenizers"):
        map_vocabulary(client, student, tmp_path)


def test_fingerprints_tell_tokenizers_apart(kinds, corpus):
    assert len({v.fingerprint for v in kinds.values()}) == len(kinds)
    again = Vocabulary(byte_level(corpus, 700))
    assert again.fingerprint == kinds["bytes"].fingerprint


def test_masked_models_do_not_answer_causal_students():
    with pytest.raises(ModelError, match="client-2: a masked language model sees what follows"):
        check_alignable("masked", "causal", True, "client-2")
    with pytest.raises(ModelError, match="needs the student's tokenizer"):
        check_alignable("masked", "masked", False, "client-2")
    check_alignable("causal", "causal", False, "client-2")


def plain_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def test_least_edit_distance_is_that_of_all_pairs(kinds):
    client, student = kinds["bytes"], kinds["digits"]
    some = [n for n, t in enumerate(client.tokens) if t is not None][::40]
    found = alignment.mined_map(client, student, some)
    known = [(n, t) for n, t in enumerate(student.tokens) if t is not None]
    for n in some:
        assert (
            found[n]
            == min(known, key=lambda other: (plain_distance(client.tokens[n], other[1]), other[0]))[0]
        )


@given(a=st.binary(max_size=9), b=st.binary(max_size=9))
@settings(max_examples=100, deadline=None)
def test_edit_distances(a, b):
    others = np.frombuffer(b, np.uint8).reshape(1, len(b))
    assert edit_distances(a, others).tolist() == [plain_distance(a, b)]


def test_alignment_by_edit_distance_is_monotone():
    path = align([b"ab", b"cd"], [b"abc", b"d"])
    assert path[0] == (0, 0)
    assert path[-1] == (1, 1)


def test_mined_projection_of_the_same_tokens_maps_rows(kinds):
    got = spans(kinds["bytes"], "utterly")
    rows = answers(got, len(kinds["bytes"]))
    mapped = alignment.mined_map(kinds["bytes"], kinds["bytes"])
    found = alignment.mined_project(rows, got, got, mapped, (kinds["bytes"], kinds["bytes"]))
    assert found.answered.all()
    assert torch.allclose(found.rows.expand().exp(), rows.expand().exp(), atol=1e-6)


def test_universal_distillation_compares_sorted_probabilities():
    student = torch.randn(5, 7, requires_grad=True)
    rows = topk_compress(torch.randn(5, 9).log_softmax(-1), 9)
    loss = alignment.uld_loss(student, rows)
    p = np.sort(student.detach().softmax(-1).numpy())[:, ::-1]
    q = np.sort(rows.expand().exp().numpy())[:, ::-1]
    wanted = np.abs(np.pad(p, ((0, 0), (0, 2))) - q).sum(1).mean()
    assert loss.item() == pytest.approx(wanted, abs=1e-5)
    loss.backward()
    assert student.grad.isfinite().all()


def test_what_does_not_fit_is_refused(kinds):
    client = kinds["bytes"]
    got, other = spans(client, "one two"), spans(client, "two")
    rows, mapped = answers(got, len(client)), map_vocabulary(client, client)
    with pytest.raises(ValueError, match="different texts"):
        project(rows, got, other, mapped)
    with pytest.raises(ValueError, match="threshold must be in"):
        project(rows, got, got, mapped, threshold=2)
    with pytest.raises(ValueError, match="two rows are about one token"):
        project(rows, got, got, mapped, predicted=np.zeros(len(rows), int))
