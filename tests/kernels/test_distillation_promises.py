"""What the distillation loss promises at its edges, and what it refuses."""

import math

import pytest
import torch
from kernels.again import backward_again_and_again

from feddistill_kernels import (
    DistillationLoss,
    distillation_loss,
    kinds,
    softmax_divergence,
    topk_compress,
)

OPERATOR = "distillation"
INF = math.inf


def gradient(loss, leaf):
    (result,) = torch.autograd.grad(loss, leaf)
    return result


@pytest.fixture
def pair():
    return torch.randn(4, 11, requires_grad=True), torch.randn(4, 11)


@pytest.mark.parametrize("kind", kinds())
def test_equal_logits_cost_nothing_and_pull_nowhere(kind, backend):
    student = torch.randn(3, 17, requires_grad=True)
    loss = softmax_divergence(student, student.detach() + 5, kind=kind, backend=backend)
    assert (loss >= 0).all()
    assert loss.max() < 1e-11 or (kind == "tvd" and loss.max() < 1e-6)
    if kind != "tvd":  # |x| has no slope at 0, only signs
        assert gradient(loss.sum(), student).abs().max() < 1e-6


@pytest.mark.interpreted(where=lambda keep, **_: keep == 5)
@pytest.mark.parametrize("keep", [1, 5, 17])
@pytest.mark.parametrize("kind", kinds())
def test_no_divergence_is_negative_nor_does_truncation_add_to_it(kind, keep, backend):
    rows = 4 if backend == "triton" else 50  # Triton is interpreted here, row by row
    student, teacher = 3 * torch.randn(2, rows, 17)
    dense = softmax_divergence(student, teacher, kind=kind, backend=backend)
    sparse = softmax_divergence(student, topk_compress(teacher, keep), kind=kind, backend=backend)
    assert (sparse >= 0).all()
    assert (sparse <= dense * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize("kind", kinds())
def test_the_gradient_of_each_row_sums_to_zero(kind, pair, backend):
    student, teacher = pair
    slope = gradient(softmax_divergence(student, teacher, kind=kind, backend=backend).sum(), student)
    assert slope.sum(-1).abs().max() < 1e-6


@pytest.mark.parametrize("kind", kinds())
def test_a_token_that_the_teacher_rules_out_is_no_nan(kind, backend):
    student = torch.randn(2, 6, requires_grad=True)
    teacher = torch.randn(2, 6)
    teacher[0, 2] = -INF
    loss = softmax_divergence(student, teacher, kind=kind, backend=backend)
    if kind == "reverse_kl":
        assert loss[0] == INF
        assert loss[1].isfinite()
    else:
        assert loss.isfinite().all()
        assert gradient(loss.sum(), student).isfinite().all()


@pytest.mark.parametrize("kind", kinds())
def test_a_token_that_the_student_rules_out_is_inf_or_finite_but_no_nan(kind, backend):
    student, teacher = torch.randn(2, 6), torch.randn(2, 6)
    student[0, 2] = -INF
    teacher[0, 2] = -300.0  # its q rounds to 0 in float32; the divergence is infinite all the same
    student.requires_grad_()
    loss = softmax_divergence(student, teacher, kind=kind, backend=backend)
    assert (loss[0] == INF) if kind == "forward_kl" else loss[0].isfinite()
    assert not gradient(loss[1], student).isnan().any()


@pytest.mark.parametrize("kind", kinds())
def test_a_token_that_both_rule_out_is_nothing(kind, backend):
    student, teacher = torch.randn(2, 3, 6)
    without = softmax_divergence(student[:, 1:], teacher[:, 1:], kind=kind, backend=backend)
    student[:, 0] = teacher[:, 0] = -INF
    leaf = student.requires_grad_()
    loss = softmax_divergence(leaf, teacher, kind=kind, backend=backend)
    torch.testing.assert_close(loss, without)
    assert (gradient(loss.sum(), leaf)[:, 0] == 0).all()


@pytest.mark.parametrize("kind", kinds())
def test_a_student_whose_tail_is_empty_is_no_nan(kind, backend):
    student = torch.tensor([[1.0, 2.0, -INF, -INF]], requires_grad=True)
    teacher = topk_compress(torch.tensor([[0.5, 0.0, -INF, -INF]]), 2)
    assert teacher.log_tail == -INF
    loss = softmax_divergence(student, teacher, kind=kind, backend=backend)
    assert loss.isfinite().all()
    assert gradient(loss.sum(), student).isfinite().all()


@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("kind", kinds())
def test_nan_stays_in_its_row(kind, whose, backend):
    tensors = {"student": torch.randn(3, 7), "teacher": torch.randn(3, 7)}
    tensors[whose][1, 4] = math.nan
    student = tensors["student"].requires_grad_()
    loss = softmax_divergence(student, tensors["teacher"], kind=kind, backend=backend)
    slope = gradient(loss.sum(), student)
    assert loss.isnan().tolist() == [False, True, False]
    assert slope.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "topk"])
def test_nothing_leaks_into_a_padded_vocabulary(compressed, backend):
    student, teacher = torch.randn(3, 16), torch.randn(3, 13)
    padded = student.clone().requires_grad_()
    cut = student[:, :13].clone().requires_grad_()
    given = topk_compress(teacher, 5) if compressed else teacher
    labels = torch.tensor([0, 12, 3])
    losses = [distillation_loss(s, given, labels, kd_weight=0.5, backend=backend) for s in (padded, cut)]
    assert losses[0] == losses[1]
    slope = gradient(losses[0], padded)
    assert torch.equal(slope[:, :13], gradient(losses[1], cut))
    assert (slope[:, 13:] == 0).all()


@pytest.mark.parametrize(
    ("mask", "reduction"),
    [("labels", "mean"), ("row_weight", "sum"), ("labels", "none"), ("row_weight", "mean")],
)
def test_a_masked_row_costs_nothing_whatever_is_in_it(mask, reduction, pair, backend):
    student, teacher = pair[0].detach(), pair[1]
    student[1], teacher[2] = math.nan, -INF
    student.requires_grad_()
    given = {
        "labels": {"labels": torch.tensor([3, -100, -100, 0])},
        "row_weight": {"row_weight": torch.tensor([1.0, 0.0, 0.0, 1.0])},
    }[mask]
    rows = torch.tensor([0, 3])
    loss = distillation_loss(student, teacher, reduction=reduction, backend=backend, **given)
    kept = student.detach()[rows].requires_grad_()
    alone = distillation_loss(kept, teacher[rows], reduction=reduction, backend=backend)
    torch.testing.assert_close(loss[rows] if reduction == "none" else loss, alone)
    slope = gradient(loss.sum(), student)
    torch.testing.assert_close(slope[rows], gradient(alone.sum(), kept))
    assert (slope[1:3] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_left_costs_nothing(reduction, pair, backend):
    student, teacher = pair
    labels = torch.full((4,), 7)
    loss = distillation_loss(
        student, teacher, labels, kd_weight=0.5, ignore_index=7, reduction=reduction, backend=backend
    )
    assert (loss == 0).all()
    assert (gradient(loss.sum(), student) == 0).all()


@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "topk"])
def test_no_rows_at_all(compressed, backend):
    student, teacher = torch.randn(0, 5, requires_grad=True), torch.randn(0, 5)
    given = topk_compress(teacher, 2) if compressed else teacher
    assert softmax_divergence(student, given, backend=backend).shape == (0,)
    loss = distillation_loss(student, given, backend=backend)
    assert loss == 0
    assert gradient(loss, student).shape == (0, 5)


def test_the_mean_is_weighted(pair, backend):
    student, teacher = pair
    weight = torch.tensor([1.0, 3.0, 0.0, 4.0])
    each = distillation_loss(student, teacher, reduction="none", backend=backend)
    mean = distillation_loss(student, teacher, row_weight=weight, backend=backend)
    torch.testing.assert_close(mean, (weight * each).sum() / weight.sum())


def test_temperature_squared_is_on_the_loss_and_on_its_gradient(pair, backend):
    student, teacher = pair
    loss = distillation_loss(student, teacher, temperature=3.0, reduction="sum", backend=backend)
    plain = 9 * softmax_divergence(student, teacher, temperature=3.0, backend=backend).sum()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradient(loss, student), gradient(plain, student))


@pytest.mark.parametrize("layout", ["rows", "columns", "expanded"])
def test_strides_do_not_matter(layout, pair, backend):
    whole = torch.randn(8, 22)
    student = {"rows": whole[::2, :11], "columns": whole[:4, ::2], "expanded": whole[:1, :11].expand(4, 11)}[
        layout
    ]
    leaf, copy = student.detach().requires_grad_(), student.clone().contiguous().requires_grad_()
    losses = [distillation_loss(s, pair[1], backend=backend) for s in (leaf, copy)]
    assert losses[0] == losses[1]
    assert torch.equal(gradient(losses[0], leaf), gradient(losses[1], copy))


@pytest.mark.interpreted(where=lambda **_: False)  # it has no chunks of rows
def test_more_rows_than_one_chunk(backend):
    student, teacher = torch.randn(2, 70, 1 << 16)
    whole = softmax_divergence(student, teacher, backend=backend)
    parts = [softmax_divergence(student[i : i + 1], teacher[i : i + 1], backend=backend) for i in (0, 63, 69)]
    torch.testing.assert_close(whole[[0, 63, 69]], torch.cat(parts), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_gives_the_same_gradient_in_the_students_memory(dtype, backend):
    leaf, teacher = torch.randn(4, 11).to(dtype).requires_grad_(), torch.randn(4, 11)
    plain = distillation_loss(leaf * 1, teacher, kind="jsd", backend=backend)
    student = leaf * 1
    address = student.data_ptr()
    loss = distillation_loss(student, teacher, kind="jsd", inplace=True, backend=backend)
    assert loss == plain
    assert student.data_ptr() == address
    assert torch.equal(student.detach(), gradient(plain, leaf))
    made = student.detach().clone()
    assert torch.equal(gradient(0.3 * loss, leaf), (0.3 * made.float()).to(dtype))


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("settings", [{}, {"inplace": True}, {"reduction": "none"}], ids=str)
def test_a_retained_graph_gives_its_gradient_again(settings, share, pair, backend):
    leaf, teacher = pair

    def loss():
        return share * distillation_loss(leaf + 0, teacher, **settings, backend=backend).sum()

    once = gradient(loss(), leaf)
    backward_again_and_again(loss(), [leaf], [once])


def test_a_retained_graph_in_place_of_strided_rows(pair, backend):
    leaf, teacher = torch.randn(4, 13, requires_grad=True), pair[1]
    once = gradient(distillation_loss(leaf[:, :11], teacher, backend=backend), leaf)
    loss = distillation_loss((leaf + 0)[:, :11], teacher, inplace=True, backend=backend)
    backward_again_and_again(loss, [leaf], [once])


def test_in_place_over_logits_that_backward_needs_is_refused(pair, backend):
    leaf, teacher = pair
    loss = distillation_loss(leaf.log_softmax(-1), teacher, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_without_gradient_writes_nothing(pair, backend):
    student, teacher = pair[0].detach(), pair[1]
    before = student.clone()
    distillation_loss(student, teacher, inplace=True, backend=backend)
    assert torch.equal(student, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_upstream_gradient_is_not_rounded_to_the_students_dtype(dtype, backend):
    """0.7512 is 0.75 in bfloat16: the whole gradient would be off by as much."""
    leaf, teacher = torch.randn(64, 33).to(dtype).requires_grad_(), torch.randn(64, 33)
    loss = distillation_loss(leaf, teacher, backend=backend)
    one, more = (
        torch.autograd.grad(loss, leaf, torch.tensor(u), retain_graph=True)[0] for u in (1.0, 0.7512)
    )
    assert float(more.double().abs().sum() / one.double().abs().sum()) == pytest.approx(0.7512, abs=4e-4)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_scaled_loss_saves_a_float16_gradient_from_underflow(inplace, backend):
    """As of 4,000 rows, none has a slope that float16 knows until the upstream gradient of a loss scaler."""
    leaf, teacher = torch.randn(40, 16).half().requires_grad_(), torch.randn(40, 16).half()
    share = {"row_weight": torch.full((40,), 1 / 4000), "reduction": "sum", "temperature": 8.0}
    loss = distillation_loss(leaf * 1, teacher, inplace=inplace, **share, backend=backend)
    (got,) = torch.autograd.grad(loss * 2.0**16, leaf)
    wide = leaf.detach().float().requires_grad_()
    (true,) = torch.autograd.grad(distillation_loss(wide, teacher, **share) * 2.0**16, wide)
    torch.testing.assert_close(got.float(), true, rtol=2e-3, atol=1e-4)


def test_the_module_is_the_function(pair, backend):
    student, teacher = pair
    labels = torch.tensor([1, 2, -1, 4])
    settings = {"kind": "skew_reverse_kl", "temperature": 2.0, "kd_weight": 0.4, "ignore_index": -1}
    module = DistillationLoss(**settings, backend=backend)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert module(student, teacher, labels, row_weight=weight) == distillation_loss(
        student, teacher, labels, row_weight=weight, **settings, backend=backend
    )
    assert "kd_weight=0.4" in repr(module)


@pytest.mark.cpu("to look at rows would be a host sync: such a row gives NaN")
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_row_that_rules_everything_out_is_refused(whose, pair):
    tensors = {"student": pair[0].detach(), "teacher": pair[1]}
    tensors[whose][2] = -INF
    with pytest.raises(ValueError, match=f"{whose} row 2 is all -inf"):
        softmax_divergence(**tensors, backend="reference")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "foward_kl"}, "unknown kind 'foward_kl'; .*did you mean 'forward_kl'"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": math.nan}, "temperature must be positive and finite, got nan"),
        ({"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        ({"kd_weight": -0.1}, r"kd_weight must be in \[0, 1\], got -0.1"),
        ({"kd_weight": 0.5}, "kd_weight = 0.5 gives the labels a share of the loss, but labels is None"),
        ({"reduction": "batchmean"}, "unknown reduction 'batchmean'; choose from mean, sum, none"),
        ({"backend": "cuda"}, "unknown backend 'cuda'; choose from reference, native, triton"),
        ({"teacher": torch.zeros(4, 12)}, "teacher's vocabulary is 12, student has 11 columns"),
        ({"teacher": torch.zeros(3, 11)}, "teacher has 3 rows, student has 4"),
        ({"teacher": torch.zeros(11)}, r"teacher must have shape \[N, V\], got \[11\]"),
        ({"teacher": torch.zeros(4, 11, dtype=torch.int64)}, "teacher must be floating point"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels has 3 rows, student has 4"),
        ({"labels": torch.zeros(4)}, "labels must be int64, got torch.float32"),
        pytest.param(
            {"labels": torch.tensor([0, 11, 0, 0]), "kd_weight": 0.5},
            r"labels row 1 is 11; .* \[0, 11\)",
            marks=pytest.mark.cpu("to look at labels would be a host sync"),
        ),
        ({"row_weight": torch.zeros(4, 1)}, r"row_weight must have shape \[N\], got \[4, 1\]"),
        ({"inplace": True}, "student, which is a leaf"),
        ({"inplace": True, "reduction": "none"}, "inplace=True needs reduction 'mean' or 'sum'"),
    ],
)
def test_a_wrong_argument_is_named(change, message, pair):
    student, teacher = pair
    arguments = {"teacher": teacher, **change}
    with pytest.raises(ValueError, match=message):
        distillation_loss(student, **arguments)


def test_in_place_over_rows_that_share_memory_is_refused():
    student = torch.randn(1, 5, requires_grad=True).expand(3, 5)
    with pytest.raises(ValueError, match="rows do not share memory"):
        distillation_loss(student, torch.zeros(3, 5), inplace=True)
