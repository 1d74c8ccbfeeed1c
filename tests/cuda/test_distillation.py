"""The CUDA kernel of the loss, thread by thread, against the reference in float64."""

import ctypes
import itertools
import math

import pytest
import torch
from kernels.pairs import pairwise

from feddistill_kernels import topk_compress
from feddistill_kernels._kinds import KINDS
from feddistill_kernels._native import DTYPES
from feddistill_kernels.distillation import _reference

INF, NAN = math.inf, math.nan
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WHOLE = 227 * 1024
"""Shared memory of a block on sm_90."""


class Matrix(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("stride", ctypes.c_int64), ("dtype", ctypes.c_int))

    @classmethod
    def of(cls, x):
        if x is None:
            return cls(None, 0, 0)
        stride = x.stride(0) if x.dim() == 2 else 1
        return cls(x.data_ptr(), stride, DTYPES.get(x.dtype, 0))


class Settings(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "vocab", "width", "kept")),
        ("kind", ctypes.c_int),
        *((name, ctypes.c_double) for name in ("beta", "temperature", "kd", "ce")),
        *((name, ctypes.c_int) for name in ("shared_limit", "processors", "capability")),
    )


@pytest.fixture(scope="module")
def library(emulated):
    return emulated("distillation")


@pytest.fixture(scope="module")
def numbers(library):
    """The compiled kinds, with their numbers."""
    library.kind_name.restype = ctypes.c_char_p
    names = itertools.takewhile(bool, map(library.kind_name, itertools.count()))
    return {name.decode(): number for number, name in enumerate(names)}


@pytest.fixture
def rows(library, numbers):
    """``_reference.rows`` by the kernel; ``shared`` and ``capability`` choose how it goes about it."""

    def call(
        student,
        teacher,
        ids=None,
        log_tail=None,
        labels=None,
        scale=None,
        gradient=None,
        *,
        vocab,
        kind="forward_kl",
        beta=0.3,
        temperature=1.0,
        kd=1.0,
        ce=0.0,
        shared=WHOLE,
        processors=4,
        capability=90,
    ):
        if kind in KINDS and kind not in numbers:
            pytest.skip(f"{kind} runs in the reference")
        n, width = student.shape
        loss = torch.full((n,), NAN)
        kept = 0 if ids is None else ids.shape[1]
        settings = Settings(
            n,
            vocab,
            width,
            kept,
            numbers.get(kind, kind),
            *(beta, temperature, kd, ce),
            *(shared, processors, capability),
        )
        message = ctypes.create_string_buffer(500)
        failed = library.run(
            *map(ctypes.byref, (settings, *map(Matrix.of, (student, teacher, ids, log_tail)))),
            ctypes.c_void_p(0 if labels is None else labels.data_ptr()),
            ctypes.c_void_p(scale.data_ptr()),
            ctypes.byref(Matrix.of(gradient)),
            ctypes.c_void_p(loss.data_ptr()),
            message,
            ctypes.c_size_t(len(message)),
        )
        if failed:
            raise RuntimeError(message.value.decode())
        return loss

    return call


def laid_out(x, offset, extra):
    """``x`` with rows ``extra`` columns apart more than they are long, the first ``offset`` elements in."""
    n, v = x.shape
    memory = torch.full((offset + n * (v + extra) + 64,), NAN, dtype=x.dtype)
    rows = memory[offset : offset + n * (v + extra)].view(n, v + extra)[:, :v]
    rows.copy_(x)
    return rows


def outside(rows):
    """All memory of ``laid_out`` rows but the rows."""
    memory = rows._base.clone()
    memory.as_strided(rows.shape, rows.stride(), rows.storage_offset()).fill_(NAN)
    return memory


def check(
    rows,
    student,
    teacher,
    *,
    kept=0,
    labels=None,
    layout=(0, 0),
    pad=0,
    inplace=False,
    scale=None,
    **settings,
):
    """Loss and gradient against float64, and the loss without gradient; nothing else is written."""
    n, vocab = student.shape
    temperature = settings.get("temperature", 1.0)
    where = {name: settings.pop(name) for name in ("shared", "processors", "capability") if name in settings}
    settings = {
        "vocab": vocab,
        "kind": "forward_kl",
        "beta": 0.3,
        "temperature": 1.0,
        "kd": 1.0,
        "ce": 0.0,
    } | settings
    scale = torch.rand(n) + 0.5 if scale is None else scale
    ids = tail = None
    given = teacher
    if kept:
        short = topk_compress(teacher, kept, temperature=temperature)
        ids, given, tail = short.ids, short.log_probs, short.log_tail
    true_slope = torch.full((n, vocab + pad), NAN, dtype=torch.float64)
    wide = torch.full((n, vocab + pad), NAN, dtype=torch.float64)
    wide[:, :vocab] = student.double()
    true = _reference.rows(
        wide,
        given.double(),
        ids,
        None if tail is None else tail.double(),
        labels,
        scale.double(),
        true_slope,
        **settings,
    )
    padded = laid_out(torch.full((n, vocab + pad), NAN).to(student.dtype), *layout)
    padded[:, :vocab] = student
    if given is teacher:
        given = laid_out(teacher, *layout)
    slope = padded if inplace else laid_out(torch.full_like(padded, NAN), *layout)
    alone = None if inplace else rows(padded, given, ids, tail, labels, scale, None, **settings, **where)
    loss = rows(padded, given, ids, tail, labels, scale, slope, **settings, **where)
    size = max(1.0, float(true[true.isfinite()].abs().max()) if true.isfinite().any() else 1.0)
    torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=3e-6 * size, equal_nan=True)
    if alone is not None:
        torch.testing.assert_close(alone.double(), true, rtol=1e-5, atol=3e-6 * size, equal_nan=True)
    live = true.isfinite() & true_slope.isfinite().all(-1)
    owed = (
        torch.finfo(student.dtype).eps / 2 * true_slope[live].abs()
        + torch.finfo(student.dtype).smallest_normal
    )
    error = (slope[live].double() - true_slope[live]).abs()
    assert (error <= owed + 4e-6 * size).all(), float((error - owed).max())
    if not inplace:
        assert outside(slope).isnan().all()
    return loss, slope


def pair(n, v, dtype=torch.float32, spread=3.0):
    return (torch.randn(n, v) * spread).to(dtype), (torch.randn(n, v) * spread).to(dtype)


MODES = [
    {"kept": 0},
    {"kept": 6},
    {"kept": 0, "ce": 0.4, "labels": True},
    {"kept": 6, "ce": 0.4, "labels": True, "temperature": 2.0},
    {"kept": 0, "kd": 0.0, "ce": 1.0, "labels": True},
]


def settings_of(mode, n, v):
    mode = dict(mode)
    if mode.get("labels"):
        mode["labels"] = torch.randint(v, (n,))
    if mode["kept"]:
        mode["kept"] = min(mode["kept"], v)
    return mode


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_reference_in_one_slice(kind, dtype, rows):
    torch.manual_seed(0)
    for mode in MODES:
        check(rows, *pair(3, 7, dtype), kind=kind, **settings_of(mode, 3, 7))


@pytest.mark.parametrize(("kind", "mode", "dtype"), pairwise(KINDS, MODES, FLOATS), ids=str)
def test_agrees_with_the_reference(kind, mode, dtype, rows):
    torch.manual_seed(0)
    check(rows, *pair(2, 4099, dtype), kind=kind, **settings_of(mode, 2, 4099))


@pytest.mark.parametrize(
    ("mode", "shared", "capability"), pairwise(MODES, [WHOLE, 12 * 1024, 3 * 1024], [80, 90]), ids=str
)
def test_in_clusters_of_any_size_staged_or_not(mode, shared, capability, rows):
    """The less shared memory, the more blocks a row, until a slice does not fit and is read again."""
    torch.manual_seed(1)
    for kind, inplace, near in (("forward_kl", False, False), ("jsd", True, False), ("jsd", False, True)):
        student, teacher = pair(2, 5003)
        if near:
            teacher = student + 0.1 * torch.randn_like(student)
        check(
            rows,
            student,
            teacher,
            kind=kind,
            inplace=inplace,
            shared=shared,
            capability=capability,
            **settings_of(mode, 2, 5003),
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_begin_and_end_anywhere(dtype, rows):
    torch.manual_seed(2)
    for v, layout, pad in pairwise([1, 2, 8, 9, 31, 64, 65, 1023], [(0, 0), (1, 0), (3, 5), (8, 8)], [0, 3]):
        mode = settings_of(MODES[v % len(MODES)], 2, v)
        check(rows, *pair(2, v, dtype), layout=layout, pad=pad, processors=1 + v % 9, **mode)


def test_where_slices_meet(rows):
    """Rows a column more or less than whole slices of 1 to 8 blocks, which many processors call for."""
    torch.manual_seed(3)
    for v in (2047, 2048, 4095, 4096, 4097, 8200, 16391):
        check(rows, *pair(1, v), processors=132, kind="reverse_kl", kept=0)
        check(rows, *pair(1, v), processors=132, kept=17)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0, 5])
def test_tokens_that_are_ruled_out(kind, kept, rows):
    torch.manual_seed(4)
    student, teacher = pair(4, 300)
    teacher[:, 10:200] = -INF
    teacher[:, 201] = -INF
    if kind in ("reverse_kl", "skew_reverse_kl", "jsd"):
        student[:2, 20:40] = -INF
    student[3, teacher[3].argmax()] = -INF
    check(rows, student, teacher, kind=kind, kept=kept)


def test_nan_stays_in_its_row_and_a_row_without_a_choice_is_nan(rows):
    torch.manual_seed(5)
    for kind, kept in itertools.product(KINDS, (0, 4)):
        student, teacher = pair(5, 70)
        ids = tail = None
        given = teacher.clone()
        if kept:
            short = topk_compress(teacher, kept)
            ids, given, tail = short.ids, short.log_probs, short.log_tail
        student[1, 3] = NAN
        given[2, 1] = NAN
        student[3] = -INF
        slope = torch.full_like(student, 7.0)
        loss = rows(student, given, ids, tail, None, torch.ones(5), slope, vocab=70, kind=kind)
        assert loss[[0, 4]].isfinite().all()
        assert loss[[1, 2, 3]].isnan().all(), (kind, kept, loss)
        assert slope[[0, 4]].isfinite().all()
        assert slope[[1, 3]].isnan().all()


def test_rows_of_no_weight_are_not_looked_at(rows):
    student, teacher = pair(3, 500)
    student[1], teacher[1] = NAN, NAN
    labels = torch.tensor([3, 10**9, 4])
    slope = torch.full_like(student, NAN)
    loss = rows(student, teacher, None, None, labels, torch.tensor([1.0, 0.0, 2.0]), slope, vocab=500, ce=0.5)
    assert loss[1] == 0
    assert (slope[1] == 0).all()
    assert slope.isfinite().all()


def test_a_label_or_an_id_outside_the_vocabulary_is_nan_in_its_row(rows):
    student, teacher = pair(3, 50)
    slope = torch.zeros_like(student)
    loss = rows(
        student, teacher, None, None, torch.tensor([0, 50, -1]), torch.ones(3), slope, vocab=50, ce=0.5
    )
    assert loss.isnan().tolist() == [False, True, True]
    assert slope.isnan().any(-1).tolist() == [False, True, True]
    short = topk_compress(teacher, 3)
    ids = short.ids.clone()
    ids[1, 2] = 50
    loss = rows(student, short.log_probs, ids, short.log_tail, None, torch.ones(3), slope, vocab=50)
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_keep_different_numbers_of_ids(kind, rows):
    student, teacher = pair(4, 3000)
    short = topk_compress(teacher, 5)
    lengths = torch.tensor([5, 3, 0, 1])
    none = torch.arange(5) >= lengths[:, None]
    tail = torch.where(none, short.log_probs, -INF).logsumexp(-1).logaddexp(short.log_tail)
    given = short.log_probs.masked_fill(none, NAN), short.ids.masked_fill(none, -1), tail
    labels, scale, slope = torch.randint(3000, (4,)), torch.ones(4), torch.full_like(student, NAN)
    settings = {"vocab": 3000, "kind": kind, "beta": 0.3, "temperature": 1.0, "kd": 1.0, "ce": 0.4}
    loss = rows(student, *given, labels, scale, slope, **settings)
    wide = [x.double() if x.is_floating_point() else x for x in (student, *given, labels, scale)]
    true_slope = torch.empty_like(wide[0])
    true = _reference.rows(*wide, true_slope, **settings)
    torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope.double(), true_slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_near_equal_distributions_keep_their_digits(kind, rows):
    torch.manual_seed(6)
    student = torch.randn(3, 3000) * 2
    teacher = student + 3e-4 * torch.randn(3, 3000)
    loss = rows(student, teacher, None, None, None, torch.ones(3), None, vocab=3000, kind=kind)
    arguments = {"vocab": 3000, "kind": kind, "beta": 0.3, "temperature": 1.0, "kd": 1.0, "ce": 0.0}
    true = _reference.rows(
        student.double(), teacher.double(), None, None, None, torch.ones(3).double(), None, **arguments
    )
    assert float(true.max()) < 2e-4
    torch.testing.assert_close(loss.double(), true, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.03, 0.3, 0.6, 1.0, 2.0])
def test_on_either_side_of_the_plain_formulas(spread, kind, rows):
    """Rows of less than 1/16 nat are summed otherwise; some tokens differ much in these too."""
    torch.manual_seed(8)
    student = torch.randn(3, 3000)
    teacher = student + spread * torch.randn(3, 3000)
    student[:, :300] -= 9
    teacher[:, :200] -= 6
    teacher[:, 5::700] = student[:, 5::700]
    check(rows, student, teacher, kind=kind)


def test_mixed_dtypes_and_huge_logits(rows):
    torch.manual_seed(7)
    student, teacher = pair(2, 1000)
    check(rows, student.bfloat16(), teacher, layout=(1, 0))
    check(rows, student * 1000, teacher * 1000, kind="tvd")
    student[:, 5] += 3000  # after many small ones: sums change their base
    check(rows, student, teacher.flip(1) + 500)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_sums_follow_logits_that_rise(mode, rows):
    """By more than a sum has room for, while a thread reads them."""
    torch.manual_seed(9)
    student, teacher = pair(2, 8000)
    rise = torch.linspace(-90, 0, 8000)
    check(rows, student + rise, teacher + rise.roll(40), **settings_of(mode, 2, 8000))


def test_as_many_kept_as_there_are(rows):
    student, teacher = pair(2, 40)
    check(rows, student, teacher, kept=40, kind="reverse_kl")


def test_no_row_is_no_launch(rows):
    empty = torch.empty(0, 5)
    assert rows(empty, empty, None, None, None, torch.empty(0), None, vocab=5).shape == (0,)


def test_a_teacher_that_keeps_too_many_is_refused(rows):
    student = torch.zeros(1, 9000)
    ids = torch.arange(9000, dtype=torch.int32)[None]
    with pytest.raises(RuntimeError, match="a teacher that keeps 9000 ids a row"):
        rows(student, student, ids, torch.zeros(1), None, torch.ones(1), None, vocab=9000, shared=16 * 1024)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_gradient_is_scaled_in_float32(dtype, library):
    for n, offset in itertools.product([1, 8, 5003], [0, 1]):
        x = torch.randn(n + 1).to(dtype)[offset : offset + n]
        y, by = torch.full_like(x, NAN), torch.tensor(0.7512)
        library.scale(
            *map(ctypes.c_void_p, (x.data_ptr(),)),
            ctypes.c_int64(n),
            DTYPES[dtype],
            ctypes.c_void_p(by.data_ptr()),
            ctypes.c_void_p(y.data_ptr()),
        )
        assert torch.equal(y, (x.float() * by).to(dtype))


def test_the_compiled_kinds_are_the_references(numbers):
    assert set(numbers) <= set(KINDS)
    assert numbers["skew_reverse_kl"] == 5


@pytest.mark.parametrize("number", [-1, 99])
def test_an_unknown_kind_is_refused(number, rows):
    x = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=f"distillation_cuda: no kind of divergence has number {number}$"):
        rows(x, x, scale=torch.ones(2), vocab=3, kind=number)
