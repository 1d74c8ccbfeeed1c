"""The CUDA kernel of ``topk_compress``, thread by thread, against the reference in float64."""

import ctypes
import math

import pytest
import torch

from feddistill_kernels._native import DTYPES
from feddistill_kernels.topk import _reference

INF, NAN = math.inf, math.nan
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def compress(emulated):
    run = emulated("topk").compress

    def call(x, k, temperature=1.0, id_order=True):
        n, vocab = x.shape
        assert x.stride(1) == 1
        ids, log_probs = torch.full((n, k), -1, dtype=torch.int32), torch.full((n, k), NAN)
        log_tail = torch.full((n,), NAN)
        sizes = [ctypes.c_int64(size) for size in (n, vocab, k)]
        logits = ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.stride(0)), DTYPES[x.dtype]
        results = [ctypes.c_void_p(result.data_ptr()) for result in (ids, log_probs, log_tail)]
        run(*sizes, *logits, ctypes.c_double(temperature), int(id_order), *results)
        return ids, log_probs, log_tail

    return call


def assert_right(got, x, k, temperature=1.0, id_order=True):
    ids, log_probs, log_tail = got
    assert torch.equal(ids, _reference.compress(x.float(), k, temperature, id_order)[0])
    a = (x.double() / temperature).log_softmax(-1)
    rounding = 4 * torch.finfo(torch.float32).eps * (1 + float(x[x.isfinite()].abs().max()) / temperature)
    torch.testing.assert_close(
        log_probs.double(), a.gather(-1, ids.long()), rtol=1e-6, atol=rounding, equal_nan=True
    )
    tail = a.scatter(-1, ids.long(), -INF).logsumexp(-1)
    torch.testing.assert_close(log_tail.double(), tail, rtol=1e-6, atol=2 * rounding)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("n", "vocab", "k"),
    [
        (1, 1, 1),
        (2, 2, 1),
        (3, 7, 3),
        (9, 33, 5),
        (5, 4099, 64),
        (3, 130, 130),
        (2, 9001, 1),
        (1, 5000, 1024),
    ],
)
def test_kept_and_tail_agree_with_float64(n, vocab, k, dtype, compress):
    """Odd rows begin at every distance from a multiple of 16 bytes."""
    x = (4 * torch.randn(n, vocab)).to(dtype)
    for temperature, id_order in ((0.5, False), (4.0, True)):
        assert_right(compress(x, k, temperature, id_order), x, k, temperature, id_order)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("k", [64, 700])
def test_rows_in_any_order(k, dtype, compress):
    """Ascending ones let in the most candidates."""
    x = (4 * torch.randn(1, 30_011)).to(dtype).sort().values
    rows = torch.cat([x, x.flip(-1), torch.full_like(x, 3.0), x.roll(9000, -1), -x.abs()])
    assert_right(compress(rows, k), rows, k)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("id_order", [True, False])
def test_of_equal_ones_the_lowest_ids(id_order, dtype, compress):
    x = torch.randint(-1, 2, (3, 20_011)).to(dtype)
    x[0, ::7] *= -1.0  # zeros of either sign are equal
    for k in (100, 2048):
        assert_right(compress(x, k, 1.0, id_order), x, k, 1.0, id_order)


def test_values_a_bit_apart_far_from_0(compress):
    x = 1e6 + torch.randn(2, 12_000)
    assert_right(compress(x, 64, 8.0), x, 64, 8.0)


def test_a_tiny_tail_keeps_its_digits(compress):
    for gap in (28.0, 200.0, 3e4):  # from 88 on float32 does not hold it beside what is kept
        x = torch.full((1, 9000), -gap)
        x[0, 5], x[0, 4000] = 0, 1
        a = x.double().log_softmax(-1)
        tail = a.scatter(-1, torch.tensor([[5, 4000]]), -INF).logsumexp(-1)
        assert float(compress(x, 2)[2]) == pytest.approx(float(tail), rel=1e-6)


def test_ruled_out_entries_weigh_nothing(compress):
    x = torch.full((2, 9001), -INF)
    x[0, 8000:8003] = torch.tensor([1.0, 2.0, 1.0])
    x[1, 3] = 0.0
    ids, log_probs, log_tail = compress(x, 5)
    assert ids.tolist() == [[0, 1, 8000, 8001, 8002], [0, 1, 2, 3, 4]]
    torch.testing.assert_close(log_probs, x.log_softmax(-1).gather(-1, ids.long()))
    assert log_tail.tolist() == [-INF, -INF]


@pytest.mark.parametrize("bad", [NAN, -NAN, INF, None])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_that_is_no_distribution_is_nan_by_itself(dtype, bad, compress):
    x = torch.randn(3, 9000).to(dtype)
    clean = compress(x, 6)
    if bad is None:
        x[1] = -INF
    else:
        x[1, 8111] = bad
    ids, log_probs, log_tail = compress(x, 6)
    assert log_probs.isnan().all(-1).tolist() == log_tail.isnan().tolist() == [False, True, False]
    assert all(len(set(row)) == 6 and set(row) <= set(range(9000)) for row in ids.tolist())
    others = torch.tensor([0, 2])
    assert torch.equal(ids[others], clean[0][others])
    torch.testing.assert_close(log_probs[others], clean[1][others])  # sums are in the order of arrival


def test_huge_logits_and_temperatures(compress):
    x = torch.tensor([[3e38, -3e38, 2.9e38, 0.0]])
    ids, log_probs, log_tail = compress(x, 2, 1e37)
    a = (x.double() / 1e37).log_softmax(-1)
    assert ids.tolist() == [[0, 2]]
    torch.testing.assert_close(log_probs.double(), a[:, [0, 2]], rtol=1e-5, atol=1e-6)
    assert float(log_tail) == pytest.approx(float(a[:, [1, 3]].logsumexp(-1)), rel=1e-5)


def test_rows_with_a_stride_and_none(compress):
    whole = torch.randn(6, 300)
    rows = whole[::2, 1:280]
    assert_right(compress(rows, 9), rows, 9)
    assert compress(whole[:0], 4)[0].shape == (0, 4)
