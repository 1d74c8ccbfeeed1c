"""Losses and gradients of every backend against float64 textbook formulas."""

import math

import pytest
import torch
from kernels import oracles
from kernels.pairs import pairwise

from feddistill_kernels import TopK, distillation_loss, kinds, softmax_divergence, topk_compress

OPERATOR = "distillation"
# One row and number, ragged, a block, one column more in whole rows, and a prime row over several programs.
SHAPES = [(1, 1), (3, 7), (4, 1024), (5, 2049), (1, 4099)]
CASES = [(kind, 0.5) for kind in kinds()] + [("jsd", beta) for beta in (0.0, 0.1, 0.9, 1.0)]
EPS = torch.finfo(torch.float32).eps


def loss_and_gradient(function, leaf):
    """The upstream gradient is not ones."""
    leaf = leaf.detach().clone().requires_grad_()
    loss = function(leaf)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) + 0.1
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    return {"loss": loss.detach(), "gradient": gradient}


def assert_within_budget(got, truth, reference, student, teacher, temperature):
    """At most twice the reference's own error and what float32 owes; the reference, what float32 owes.

    A log-probability is a difference of numbers as large as the logits, so that is their rounding.  A loss
    owes it in nats, a gradient on the largest probability; a gradient is rounded to its dtype besides.
    """
    largest = max(float((z.double() / temperature).softmax(-1).max()) for z in (student, teacher))
    rounding = EPS * (1 + student.float().abs().nan_to_num(posinf=0, neginf=0).max() / temperature)
    for name, true in truth.items():
        error = (got[name].double() - true).abs().max()
        size = max({"loss": 1.0, "gradient": largest}[name], float(true.abs().max()))
        output = torch.finfo(got[name].dtype)
        owed = output.eps / 2 * float(true.abs().max()) + output.smallest_normal
        own = (reference[name].double() - true).abs().max()
        assert error <= 2 * own + 4 * rounding * size + owed, f"{name}: {error:.2e} against {own:.2e}"
        assert error <= 32 * rounding * size + owed, f"{name}: {error:.2e} is more than float32 owes"


def run_both(student, teacher, settings, backend):
    def run(name):
        return loss_and_gradient(lambda s: softmax_divergence(s, teacher, **settings, backend=name), student)

    return run(backend), run("reference")


def make(shape, dtype, scale=4.0):
    student, teacher = scale * torch.randn(2, *shape)
    return student.to(dtype), teacher.to(dtype)


HEATS = [
    *((torch.float32, temperature) for temperature in (0.5, 1.0, 4.0)),
    *((dtype, temperature) for dtype in (torch.bfloat16, torch.float16) for temperature in (0.5, 4.0)),
]


@pytest.mark.parametrize(
    ("kind", "beta", "dtype", "temperature", "shape"),
    [(*case, *heat, shape) for case, heat, shape in pairwise(CASES, HEATS, SHAPES)],
    ids=str,
)
def test_dense_divergence_and_gradient_agree_with_the_oracle(
    kind, beta, temperature, dtype, shape, backend, nan_filled_memory
):
    student, teacher = make(shape, dtype)
    settings = {"kind": kind, "beta": beta, "temperature": temperature}
    truth = loss_and_gradient(lambda s: oracles.divergence(s, teacher, **settings), student.double())
    got, reference = run_both(student, teacher, settings, backend)
    assert got["loss"].dtype == torch.float32
    assert got["gradient"].dtype == dtype
    assert_within_budget(got, truth, reference, student, teacher, temperature)


@pytest.mark.parametrize(
    ("kind", "beta", "shape", "dtype", "keep"),
    [
        (*case, *rest)
        for case, *rest in pairwise(
            CASES, [(3, 67), (5, 2049), (1, 4099)], [torch.float32, torch.bfloat16, torch.float16], [1, 6, 64]
        )
    ],
    ids=str,
)
def test_truncated_divergence_and_gradient_agree_with_the_oracle(
    kind, beta, shape, dtype, keep, backend, nan_filled_memory
):
    student, logits = make(shape, dtype)
    teacher = topk_compress(logits, keep, temperature=2.0, id_order=False)
    settings = {"kind": kind, "beta": beta, "temperature": 2.0}
    parts = (teacher.ids, teacher.log_probs, teacher.log_tail, teacher.vocab_size)
    truth = loss_and_gradient(lambda s: oracles.truncated(s, *parts, **settings), student.double())
    got, reference = run_both(student, teacher, settings, backend)
    assert_within_budget(got, truth, reference, student, logits, 2.0)


@pytest.mark.parametrize(
    ("kd_weight", "reduction", "dtype", "compressed"),
    pairwise([0.0, 0.3, 1.0], ["mean", "sum", "none"], [torch.float32, torch.bfloat16], [False, True]),
    ids=str,
)
def test_loss_with_labels_and_weights_agrees_with_the_oracle(
    kd_weight, dtype, compressed, reduction, backend, nan_filled_memory
):
    student, logits = make((6, 131), dtype)
    labels = torch.tensor([0, 130, -100, 7, 7, 64])
    labels[4] = logits[4].argmax()  # a teacher that is compressed keeps it
    row_weight = torch.tensor([1.0, 0.5, 1.0, 0.0, 2.0, 0.25])
    weight = torch.where(labels == -100, 0.0, row_weight).double()
    teacher = topk_compress(logits, 9, temperature=3.0) if compressed else logits

    def truth_of(s):
        if compressed:
            parts = (teacher.ids, teacher.log_probs, teacher.log_tail, teacher.vocab_size)
            each = oracles.truncated(s, *parts, "forward_kl", 0.5, 3.0)
        else:
            each = oracles.divergence(s, teacher, "forward_kl", 0.5, 3.0)
        return oracles.distillation(s, each, labels, weight, kd_weight, 3.0, reduction)

    def run(name):
        return loss_and_gradient(
            lambda s: distillation_loss(
                s,
                teacher,
                labels,
                temperature=3.0,
                kd_weight=kd_weight,
                row_weight=row_weight,
                reduction=reduction,
                backend=name,
            ),
            student,
        )

    truth, got = loss_and_gradient(truth_of, student.double()), run(backend)
    # T**2 times the divergence, whose rounding it multiplies; a bfloat16 gradient is rounded a second time
    # when the upstream gradient arrives after it was made.
    twice = 2 if dtype == torch.bfloat16 and reduction != "none" else 1
    rounding = EPS * float(1 + student.float().abs().max()) * 9 * 32
    for name in truth:
        size = float(truth[name].abs().max())
        owed = twice * torch.finfo(got[name].dtype).eps / 2 * size
        assert (got[name].double() - truth[name]).abs().max() <= rounding * max(1, size) + owed


def test_a_gradient_wrong_by_a_thousandth_is_over_budget(backend):
    student, teacher = make((5, 4099), torch.float32, scale=1.0)
    truth = loss_and_gradient(lambda s: oracles.divergence(s, teacher, "tvd", 0.5, 1.0), student.double())
    got = loss_and_gradient(lambda s: softmax_divergence(s, teacher, kind="tvd", backend=backend), student)
    wrong = {**got, "gradient": got["gradient"] * 1.001}
    assert_within_budget(got, truth, got, student, teacher, 1.0)
    with pytest.raises(AssertionError, match="gradient"):
        assert_within_budget(wrong, truth, got, student, teacher, 1.0)


@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "topk"])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_a_divergence_of_1e_7_keeps_three_digits(kind, beta, compressed, backend):
    torch.manual_seed(1)
    student = torch.randn(8, 1000)
    teacher = student + 4e-4 * torch.randn(8, 1000)
    truth = oracles.divergence(student, teacher, kind, beta, 1.0)
    given = teacher
    if compressed:
        given = topk_compress(teacher, 400)
        parts = (given.ids, given.log_probs, given.log_tail, 1000)
        truth = oracles.truncated(student, *parts, kind, beta, 1.0)
    got = softmax_divergence(student, given, kind=kind, beta=beta, backend=backend)
    if kind != "tvd":
        assert 1e-9 < truth.min() < truth.max() < 2e-7
    assert ((got - truth) / truth).abs().max() < 1e-3


@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_huge_logits_neither_overflow_nor_lose_digits(kind, beta, backend):
    student, teacher = 1e4 + 3 * torch.randn(2, 4, 37)
    truth = loss_and_gradient(lambda s: oracles.divergence(s, teacher, kind, beta, 1.0), student.double())
    got = loss_and_gradient(
        lambda s: softmax_divergence(s, teacher, kind=kind, beta=beta, backend=backend), student
    )
    for name in truth:
        torch.testing.assert_close(got[name].double(), truth[name], rtol=1e-4, atol=1e-6)


@pytest.mark.cpu("float64 is for the reference")
@pytest.mark.parametrize(
    ("kind", "beta", "reduction", "compressed"),
    [(*case, *rest) for case, *rest in pairwise(CASES, ["mean", "sum", "none"], [False, True])],
)
def test_gradcheck_in_float64(kind, beta, compressed, reduction):
    student = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(4, 9, dtype=torch.float64)
    teacher = topk_compress(logits, 3, temperature=1.5) if compressed else logits
    labels = torch.tensor([8, -100, 0, 3])

    def loss(s):
        settings = {"kind": kind, "beta": beta, "temperature": 1.5, "kd_weight": 0.7}
        return distillation_loss(s, teacher, labels, **settings, reduction=reduction)

    assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_a_teacher_that_keeps_everything_is_the_dense_one(kind, beta, backend):
    student, logits = make((4, 53), torch.float32)
    teacher = topk_compress(logits, 53, temperature=2.0)
    assert (teacher.log_tail == -math.inf).all()
    settings = {"kind": kind, "beta": beta, "temperature": 2.0, "backend": backend}
    dense = loss_and_gradient(lambda s: softmax_divergence(s, logits, **settings), student)
    sparse = loss_and_gradient(lambda s: softmax_divergence(s, teacher, **settings), student)
    for name in dense:
        torch.testing.assert_close(sparse[name], dense[name], rtol=1e-5, atol=1e-6)


def test_a_tail_of_1e_12_is_exact(backend):
    """``log(1 - sum of the kept)`` has no digits there."""
    student = torch.tensor([[30.0, 29.0, 0.0, 1.0, 2.0]])
    teacher = TopK(torch.tensor([[0, 1]], dtype=torch.int32), *(_log(0.7, 0.2), _log(0.1)[0]), vocab_size=5)
    parts = (teacher.ids, teacher.log_probs, teacher.log_tail, 5)
    truth = loss_and_gradient(
        lambda s: oracles.truncated(s, *parts, "forward_kl", 0.5, 1.0), student.double()
    )
    got = loss_and_gradient(lambda s: softmax_divergence(s, teacher, backend=backend), student)
    for name in truth:
        torch.testing.assert_close(got[name].double(), truth[name], rtol=1e-6, atol=1e-7)


def _log(*values):
    return torch.tensor([values]).log()
