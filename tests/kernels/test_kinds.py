"""A kind of divergence that the reference alone has runs there by default, and a named backend refuses it."""

from typing import get_args

import pytest
import torch
import torch.distributed as dist
from kernels import oracles

from feddistill.config.training import DistillConfig
from feddistill_kernels import (
    BackendError,
    TeacherHead,
    available_backends,
    distillation_loss,
    kinds,
    linear_distillation_loss,
    softmax_divergence,
    topk_compress,
    use_backend,
)
from feddistill_kernels._kinds import KINDS
from feddistill_kernels.distillation import _native

pytestmark = pytest.mark.cpu("what it names are a CPU's backends")

COMPILED = ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_forward_kl", "skew_reverse_kl")
T = 2.0


def hellinger(a, b, beta):
    """Squared Hellinger distance: ``phi = (sqrt(p) - sqrt(q))^2 / 2``, ``psi = p dphi/dp``."""
    root_p, root_q = (a / 2).exp(), (b / 2).exp()
    return 0.5 * (root_p - root_q) ** 2, 0.5 * root_p * (root_p - root_q)


@pytest.fixture
def kind(monkeypatch):
    """What a contributor of a kind writes: two scalar functions, and a formula in the oracles."""
    between = oracles.between

    def with_hellinger(a, b, kind, beta):
        if kind != "hellinger":
            return between(a, b, kind, beta)
        return 1 - (a.exp() * b.exp()).sqrt().sum(-1)

    monkeypatch.setitem(KINDS, "hellinger", hellinger)
    monkeypatch.setattr(oracles, "between", with_hellinger)
    return "hellinger"


def true_rows(student, teacher, kind):
    if isinstance(teacher, torch.Tensor):
        return oracles.divergence(student, teacher, kind, 0.5, T)
    parts = teacher.ids, teacher.log_probs, teacher.log_tail, teacher.vocab_size
    return oracles.truncated(student, *parts, kind, 0.5, T)


@pytest.fixture
def inputs():
    """Student and labels; teachers of the three sorts, of one distribution but for the truncation."""
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
    logits = hidden @ weight.T
    teachers = {
        "dense": logits,
        "topk": topk_compress(logits, 3, temperature=T),
        "head": TeacherHead(hidden, weight),
    }
    return torch.randn(5, 9), torch.tensor([0, 8, -100, 3, 4]), teachers


@pytest.mark.parametrize("sort", ["dense", "topk"])
def test_loss_and_gradient_by_default(sort, kind, inputs):
    student, labels, teachers = inputs
    weight = (labels != -100).double()
    truth_of, student = student.double().requires_grad_(), student.requires_grad_()
    rows = true_rows(truth_of, teachers[sort], kind)
    truth = oracles.distillation(truth_of, rows, labels, weight, 0.6, T, "mean")
    settings = {"kind": kind, "temperature": T, "kd_weight": 0.6}
    loss = distillation_loss(student, teachers[sort], labels, **settings)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-6)
    (slope,), (right,) = torch.autograd.grad(0.3 * loss, student), torch.autograd.grad(0.3 * truth, truth_of)
    torch.testing.assert_close(slope.double(), right, rtol=1e-5, atol=1e-6)
    in_place = student * 1
    assert torch.equal(distillation_loss(in_place, teachers[sort], labels, inplace=True, **settings), loss)
    each = softmax_divergence(student, teachers[sort], kind=kind, temperature=T)
    torch.testing.assert_close(each.double(), rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(each.sum(), student)[0].double(),
        torch.autograd.grad(true_rows(truth_of, teachers[sort], kind).sum(), truth_of)[0],
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("sort", ["dense", "topk", "head"])
def test_loss_and_gradients_of_a_projection_by_default(sort, reduction, kind, inputs):
    _, _, teachers = inputs
    leaves = torch.randn(5, 4), torch.randn(9, 4)
    mine = [x.clone().requires_grad_() for x in leaves]
    wide = [x.double().requires_grad_() for x in leaves]
    rows = true_rows(wide[0] @ wide[1].T, teachers["dense" if sort == "head" else sort], kind)
    truth = {"mean": T**2 * rows.mean(), "none": T**2 * rows}[reduction]
    settings = {"kind": kind, "temperature": T, "reduction": reduction}
    loss = linear_distillation_loss(*mine, teachers[sort], **settings)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(loss)
    slopes = torch.autograd.grad(loss, mine, upstream)
    for slope, right in zip(slopes, torch.autograd.grad(truth, wide, upstream.double()), strict=True):
        torch.testing.assert_close(slope.double(), right, rtol=1e-4, atol=1e-5)


def test_loss_of_a_process_group_by_default(kind, inputs, tmp_path):
    student, _, teachers = inputs
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        for sort in ("dense", "topk"):
            student = student.detach().requires_grad_()
            given = {"kind": kind, "temperature": T}
            alone = distillation_loss(student, teachers[sort], **given)
            together = distillation_loss(student, teachers[sort], group=dist.group.WORLD, **given)
            torch.testing.assert_close(together, alone)
            slopes = [torch.autograd.grad(x, student)[0] for x in (together, alone)]
            torch.testing.assert_close(*slopes)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("sort", ["dense", "topk"])
def test_a_named_backend_refuses_it_in_one_line(sort, backend, kind, inputs):
    student, _, teachers = inputs
    reason = f"it has no kind 'hellinger', only {', '.join(COMPILED)}"
    calls = {
        "distillation": lambda **given: distillation_loss(student, teachers[sort], kind=kind, **given),
        "linear_distillation": lambda **given: linear_distillation_loss(
            torch.randn(5, 4), torch.randn(9, 4), teachers[sort], kind=kind, **given
        ),
    }
    for operator, call in calls.items():
        message = f"backend {backend!r} cannot run this {operator}: {reason}"
        for refused in (lambda call=call: call(backend=backend), lambda call=call: named(backend, call)):
            with pytest.raises(BackendError) as error:
                refused()
            assert str(error.value) == message


def named(backend, call):
    with use_backend(backend):
        return call()


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_backends_have_the_kinds_that_they_had(backend):
    """The tests of a backend skip a kind that it does not have: see conftest."""
    pair = torch.randn(2, 1, 3)
    for kind in COMPILED:
        assert softmax_divergence(*pair, kind=kind, backend=backend).isfinite().all()
    assert set(available_backends("distillation")) == {"native", "reference", "triton"}


@pytest.mark.parametrize("number", [-1, len(COMPILED), 99])
def test_the_compiled_module_raises_for_a_number_that_no_kind_has(number, monkeypatch):
    monkeypatch.setattr(_native, "kinds", lambda: {"forward_kl": number})
    message = f"^distillation_cpu: no kind of divergence has number {number}$"
    with pytest.raises(ValueError, match=message):
        distillation_loss(*torch.randn(2, 1, 3), backend="native")


def test_the_configuration_has_every_kind_and_the_mean_absolute_error():
    assert get_args(DistillConfig.model_fields["kind"].annotation) == (*kinds(), "mae")
