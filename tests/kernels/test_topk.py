"""``TopK`` and ``topk_compress``."""

import dataclasses
import math

import pytest
import torch
from kernels.pairs import pairwise

from feddistill_kernels import BackendError, TopK, available_backends, topk_compress

OPERATOR = "topk"
INF = math.inf


def ids_of(rows):
    return torch.tensor(rows, dtype=torch.int32)


@pytest.fixture
def kept():
    log_probs = torch.tensor([[0.5, 0.3], [0.25, 0.25]]).log()
    return TopK(ids_of([[4, 1], [0, 2]]), log_probs, torch.tensor([0.2, 0.5]).log(), vocab_size=6)


SIZES = [(1, 1, 1), (3, 7, 3), (3, 4099, 64), (4, 130, 130)]
HALVES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("n", "vocab", "k", "dtype", "temperature"),
    [(*size, *rest) for size, *rest in pairwise(SIZES, HALVES, [0.5, 1.0, 4.0])],
    ids=str,
)
def test_kept_and_tail_agree_with_the_oracle(n, vocab, k, dtype, temperature, backend, nan_filled_memory):
    agree_with_the_oracle(n, vocab, k, dtype, temperature, backend)


@pytest.mark.parametrize(("n", "vocab", "k"), SIZES)
def test_in_float64_the_reference_agrees_with_the_oracle(n, vocab, k, nan_filled_memory):
    agree_with_the_oracle(n, vocab, k, torch.float64, 0.5, "reference")


def agree_with_the_oracle(n, vocab, k, dtype, temperature, backend):
    logits = (4 * torch.randn(n, vocab)).to(dtype)
    a = (logits.double() / temperature).log_softmax(-1)
    got = topk_compress(logits, k, temperature=temperature, backend=backend)
    chosen = torch.zeros(n, vocab, dtype=torch.bool).scatter_(-1, got.ids.long(), True)
    assert (chosen.sum(-1) == k).all()
    assert (a.masked_fill(~chosen, INF).amin(-1) >= a.masked_fill(chosen, -INF).amax(-1)).all()
    rounding = 4 * torch.finfo(got.log_probs.dtype).eps * (1 + float(logits.abs().max()) / temperature)
    assert (got.log_probs - a.gather(-1, got.ids.long())).abs().max() <= rounding
    tail = a.masked_fill(chosen, -INF).logsumexp(-1)
    assert torch.equal(got.log_tail == -INF, tail == -INF)
    assert ((got.log_tail - tail)[tail > -INF].abs() <= 2 * rounding).all()


def test_of_equal_entries_the_lowest_id_is_kept(backend):
    logits = torch.tensor([[1.0, 3, 1, 3, 1, 0], [0.0, -0.0, 0, -0.0, 0, 0]]).repeat(1, 50)
    assert topk_compress(logits, 2, backend=backend).ids.tolist() == [[1, 3], [0, 1]]
    many = topk_compress(logits, 103, backend=backend).ids[0].tolist()
    assert many == sorted([*range(1, 300, 6), *range(3, 300, 6), 0, 2, 4])


def test_order_is_by_id_or_by_probability(backend):
    logits = torch.tensor([[0.0, 5, 3, 5, 4, 1]])
    assert topk_compress(logits, 4, backend=backend).ids.tolist() == [[1, 2, 3, 4]]
    assert topk_compress(logits, 4, id_order=False, backend=backend).ids.tolist() == [[1, 3, 4, 2]]


def test_a_tail_of_1e_12_is_exact(backend):
    logits = torch.tensor([[0.0, 0.0, -28.0, -28.0]])
    got = topk_compress(logits, 2, backend=backend)
    expected = logits.double().log_softmax(-1)[0, 2:].logsumexp(-1)
    assert float(got.log_tail[0]) == pytest.approx(float(expected), rel=1e-6)


def test_ruled_out_entries_may_be_kept_and_weigh_nothing(backend):
    got = topk_compress(torch.tensor([[1.0, -INF, -INF, 1.0]]), 3, backend=backend)
    assert got.ids.tolist() == [[0, 1, 3]]
    torch.testing.assert_close(got.log_probs.exp(), torch.tensor([[0.5, 0.0, 0.5]]))
    assert got.log_tail == -INF


def test_nan_stays_in_its_row(backend):
    logits = torch.randn(3, 9)
    logits[1, 4] = math.nan
    got = topk_compress(logits, 4, backend=backend)
    assert got.log_probs.isnan().any(-1).tolist() == [False, True, False]
    assert got.log_tail.isnan().tolist() == [False, True, False]
    assert all(len(set(row)) == 4 and set(row) <= set(range(9)) for row in got.ids.tolist())


def test_strided_rows_and_no_rows(backend):
    whole = torch.randn(8, 30)
    strided = topk_compress(whole[::2, ::3], 4, backend=backend)
    copied = topk_compress(whole[::2, ::3].contiguous(), 4, backend=backend)
    assert torch.equal(strided.ids, copied.ids)
    assert torch.equal(strided.log_probs, copied.log_probs)
    assert len(topk_compress(whole[:0], 4, backend=backend)) == 0


def test_no_gradient_flows(backend):
    got = topk_compress(torch.randn(2, 5, requires_grad=True), 2, backend=backend)
    assert not got.log_probs.requires_grad


@pytest.mark.parametrize("k", [1, 3, 6])
def test_expanding_gives_a_distribution_with_the_kept_entries(k, backend):
    logits = torch.randn(4, 6)
    got = topk_compress(logits, k, backend=backend)
    dense = got.expand()
    torch.testing.assert_close(dense.exp().sum(-1), torch.ones(4))
    torch.testing.assert_close(dense.gather(-1, got.ids.long()), got.log_probs)
    bare = got.expand(tail="none").exp()
    torch.testing.assert_close(bare.sum(-1), got.log_probs.exp().sum(-1))
    if k == 6:
        torch.testing.assert_close(dense, logits.log_softmax(-1))


def test_rows_are_taken_by_slice_index_and_mask(kept):
    assert len(kept) == 2
    assert kept[1:].ids.tolist() == [[0, 2]]
    assert kept[torch.tensor([1, 0])].ids.tolist() == [[0, 2], [4, 1]]
    assert kept[torch.tensor([True, False])].ids.tolist() == [[4, 1]]
    with pytest.raises(TypeError, match="a slice or a tensor of rows, got int"):
        kept[0]


def test_to_moves_all_and_converts_probabilities(kept):
    half = kept.to("cpu", dtype=torch.bfloat16)
    assert (half.ids.dtype, half.log_probs.dtype, half.log_tail.dtype) == (
        torch.int32,
        torch.bfloat16,
        torch.bfloat16,
    )
    assert kept.to("meta").log_tail.device.type == "meta"


def test_it_is_frozen(kept):
    with pytest.raises(dataclasses.FrozenInstanceError):
        kept.vocab_size = 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(2, 2)}, "ids must be int32, got torch.float32"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, "ids must be int32, got torch.int64"),
        (
            {"log_probs": torch.zeros(2, 3)},
            r"log_probs has shape \[2, 3\] but ids bound \[N, K\] to \[2, 2\]",
        ),
        ({"log_probs": torch.zeros(2, 2, dtype=torch.int32)}, "log_probs must be floating point"),
        ({"log_tail": torch.zeros(2, 1)}, r"log_tail must have shape \[N\], got \[2, 1\]"),
        ({"log_tail": torch.zeros(3)}, "log_tail has 3 rows, ids has 2"),
        ({"log_tail": torch.zeros(2, device="meta")}, "log_tail is on meta"),
        ({"vocab_size": 1}, r"keeps 2 entries a row; it must be in \[1, 1\]"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message, kept):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(kept, **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"k must be in \[1, 5\], the vocabulary, got 0"),
        ({"k": 6}, r"k must be in \[1, 5\], the vocabulary, got 6"),
        ({"k": 2, "temperature": -1.0}, "temperature must be positive and finite, got -1.0"),
        ({"logits": torch.zeros(5), "k": 1}, r"logits must have shape \[N, V\], got \[5\]"),
        pytest.param(
            {"logits": torch.full((2, 5), -INF), "k": 1},
            "logits row 0 is all -inf",
            marks=pytest.mark.cpu("to look at rows would be a host sync: such a row gives NaN"),
        ),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        topk_compress(**{"logits": torch.zeros(3, 5), "backend": "reference", **arguments})


def test_an_unknown_tail_is_refused(kept):
    with pytest.raises(ValueError, match="unknown tail 'zero'; choose from uniform, none"):
        kept.expand(tail="zero")


@pytest.mark.parametrize(("n", "k"), [(3, 1), (1, 60), (3, 60), (1, 200)])
def test_rows_of_many_blocks(n, k, backend):
    """More columns than Triton sorts at once, in parts where rows are few; ties at every border."""
    logits = (4 * torch.randn(n, 20_011)).round()
    logits[0, 16_383:16_385] = 99.0
    got = topk_compress(logits, k, backend=backend)
    true = topk_compress(logits.double(), k)
    assert torch.equal(got.ids, true.ids)
    torch.testing.assert_close(got.log_probs.double(), true.log_probs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got.log_tail.double(), true.log_tail, rtol=1e-6, atol=1e-5)


def test_what_comes_together_is_found(backend):
    """Triton keeps the four best groups of a lane, which has a group of 16 in 4096."""
    logits = torch.randn(4, 6 * 4096)  # so many rows that they are not split
    logits[0, ::4096] += 100  # one lane's
    logits[1] = 0
    logits[2, 3:] = -INF
    logits[3, 7] = math.nan
    got = topk_compress(logits, 6, backend=backend)
    assert got.log_probs[3].isnan().all()
    assert got.log_tail[3].isnan()
    assert len(set(got.ids[3].tolist())) == 6
    true = topk_compress(logits[:3].double(), 6)
    assert torch.equal(got.ids[:3], true.ids)
    torch.testing.assert_close(got.log_probs[:3].double(), true.log_probs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got.log_tail[:3].double(), true.log_tail, rtol=1e-6, atol=1e-5)


def test_more_than_triton_sorts_is_refused_by_name_and_left_to_others():
    backends = available_backends(OPERATOR, torch.get_default_device())
    if "triton" not in backends:
        pytest.skip("Triton is not here")
    logits = torch.randn(1, 2000)
    with pytest.raises(BackendError, match=r"cannot run this topk: it sorts at most 1024 .*, k is 1025"):
        topk_compress(logits, 1025, backend="triton")
    assert len(topk_compress(logits, 1025)) == 1


def test_parts_are_concatenated_and_one_part_is_not_copied(kept):
    whole = TopK.cat([kept, kept[1:], kept[:0]])
    for name in ("ids", "log_probs", "log_tail"):
        x = getattr(kept, name)
        assert torch.equal(getattr(whole, name), torch.cat([x, x[1:]]))
    assert whole.vocab_size == kept.vocab_size
    assert TopK.cat([kept]) is kept


def test_parts_of_another_vocabulary_are_refused(kept):
    wider = dataclasses.replace(kept, vocab_size=7)
    with pytest.raises(ValueError, match=r"^TopK.cat .* one K and one V, got \[\(2, 6\), \(2, 7\)\]$"):
        TopK.cat([kept, wider])
