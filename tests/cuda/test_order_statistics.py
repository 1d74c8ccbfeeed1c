"""The CUDA kernels of the order statistics, thread by thread, against the reference."""

import ctypes
import math

import pytest
import torch

from feddistill_kernels._native import DTYPES
from feddistill_kernels.order_statistics import _reference as order_statistics

INF, NAN = math.inf, math.nan
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def trimmed(emulated):
    run = emulated("order_statistics").trimmed

    def call(xs, trim=0, nearest=0):
        assert all(x.is_contiguous() for x in xs)
        clients = (ctypes.c_void_p * len(xs))(*[x.data_ptr() for x in xs])
        out = torch.full_like(xs[0], NAN)
        n, dtype = ctypes.c_int64(out.numel()), DTYPES[out.dtype]
        run(clients, len(xs), n, dtype, trim, nearest, ctypes.c_void_p(out.data_ptr()))
        return out

    return call


def assert_alike(got, expected):
    """Two means of the same values, each rounded once."""
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, expected, rtol=eps, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count", range(1, 33))
def test_every_number_of_clients(count, dtype, trimmed):
    xs = [torch.randn(270).to(dtype) for _ in range(count)]
    for trim in {0, (count - 1) // 3, (count - 1) // 2}:
        assert_alike(trimmed(xs, trim), order_statistics.trimmed(xs, trim))
    for keep in {1, count // 2, count - 1}:
        if 1 <= keep <= count:
            assert_alike(trimmed(xs, nearest=keep), order_statistics.around_median(xs, keep))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [0, 1, 3, 7, 8, 9, 1023, 1025, 2049])
def test_sizes_around_the_packs(n, dtype, trimmed):
    for count in (5, 20):
        xs = [torch.randn(n).to(dtype) for _ in range(count)]
        assert_alike(trimmed(xs, 2), order_statistics.trimmed(xs, 2))
        assert_alike(trimmed(xs, nearest=3), order_statistics.around_median(xs, 3))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("start", [1, 3, 4])
def test_clients_may_begin_anywhere(start, dtype, trimmed):
    xs = [torch.randn(200).to(dtype)[start * i :][:150] for i in range(5)]
    assert_alike(trimmed(xs, 1), order_statistics.trimmed(xs, 1))
    assert_alike(trimmed(xs, nearest=3), order_statistics.around_median(xs, 3))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5, 8, 32])
def test_nan_stays_in_its_column(count, dtype, trimmed):
    for liar in {0, count // 2, count - 1}:
        xs = [torch.randn(70).to(dtype) for _ in range(count)]
        xs[liar][11], xs[liar][64] = NAN, -NAN
        for got in (trimmed(xs, (count - 1) // 2), trimmed(xs), trimmed(xs, nearest=1)):
            assert got.isnan().nonzero()[:, 0].tolist() == [11, 64]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_infinities_are_outvoted(dtype, trimmed):
    xs = [torch.randn(70).to(dtype) for _ in range(5)]
    xs[0].fill_(INF)
    xs[1].fill_(-INF)
    for got in (trimmed(xs, 1), trimmed(xs, 2), trimmed(xs, nearest=3)):
        assert got.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_number_survives(dtype, trimmed):
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    got = trimmed([numbers])
    finite = ~numbers.isnan()
    assert torch.equal(got.isnan(), ~finite)
    assert torch.equal(got[finite], numbers[finite])


def test_ties_around_the_median_fall_to_the_lower(trimmed):
    """The grid of bfloat16 is full of them."""
    xs = [torch.randint(-4, 5, (500,)).to(torch.bfloat16) for _ in range(9)]
    for keep in (1, 2, 3, 4, 8):
        assert torch.equal(trimmed(xs, nearest=keep), order_statistics.around_median(xs, keep))
