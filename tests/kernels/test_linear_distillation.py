"""``linear_distillation_loss`` is ``distillation_loss`` of the logits, which are never all there."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from kernels import oracles
from kernels.again import backward_again_and_again
from kernels.pairs import pairwise
from torch.utils._python_dispatch import TorchDispatchMode

from feddistill_kernels import (
    LinearDistillationLoss,
    TeacherHead,
    distillation_loss,
    kinds,
    linear_distillation_loss,
    topk_compress,
)
from feddistill_kernels.linear_distillation import _op, _reference

OPERATOR = "linear_distillation"
N, H, V, PADDED = 11, 7, 53, 56
LABELS = torch.tensor([0, 52, -100, 7, 7, 30, -100, 1, 2, 3, 4])


def head(dtype=torch.float32, vocab=PADDED):
    """Hidden states, weight and bias of a student."""
    parts = torch.randn(N, H), torch.randn(vocab, H), torch.randn(vocab)
    return [x.to(dtype).requires_grad_() for x in parts]


def teachers(dtype=torch.float32):
    logits = (3 * torch.randn(N, V)).to(dtype)
    projected = TeacherHead(
        torch.randn(N, 3).to(dtype), torch.randn(V, 3).to(dtype), torch.randn(V).to(dtype)
    )
    return {"dense": logits, "topk": topk_compress(logits, 9, temperature=2.0), "head": projected}


def oracle(hidden, weight, bias, teacher, reduction, kind, row_weight):
    """Float64, from logits that are all there."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logits = (leaves[0] @ leaves[1].T + leaves[2])[:, :V]
    if isinstance(teacher, TeacherHead):
        teacher = teacher.hidden.double() @ teacher.weight.double().T + teacher.bias.double()
    if isinstance(teacher, torch.Tensor):
        each = oracles.divergence(logits, teacher, kind, 0.3, 2.0)
    else:
        parts = (teacher.ids, teacher.log_probs, teacher.log_tail, V)
        each = oracles.truncated(logits, *parts, kind, 0.3, 2.0)
    loss = oracles.distillation(logits, each, LABELS, row_weight, 0.6, 2.0, reduction)
    return loss, leaves


ROW, ROWS, WHOLE = 1, 3 * 56 * 8, None
"""Workspaces for a row at once, for some and for all."""


# The loop over rows is one for all backends, whose kernels have tests of their own: of the two ways in which
# they sweep over a row, one kind each is interpreted.
@pytest.mark.interpreted(where=lambda kind, **_: kind in ("forward_kl", "jsd"))
@pytest.mark.parametrize(
    ("kind", "reduction", "workspace_bytes", "teacher"),
    [
        (kind, *chunks, teacher)
        for kind, chunks, teacher in pairwise(
            kinds(),
            [("mean", ROW), ("mean", ROWS), ("mean", WHOLE), ("sum", ROWS), ("none", ROWS)],
            ["dense", "topk", "head"],
        )
    ],
)
def test_loss_and_every_gradient_agree_with_the_oracle(
    kind, reduction, teacher, workspace_bytes, backend, nan_filled_memory
):
    student, given = head(), teachers()[teacher]
    row_weight = torch.rand(N)
    row_weight[4] = 0
    weight = torch.where(LABELS == -100, 0.0, row_weight).double()
    loss = linear_distillation_loss(
        *student[:2],
        given,
        LABELS,
        bias=student[2],
        kind=kind,
        beta=0.3,
        temperature=2.0,
        kd_weight=0.6,
        row_weight=row_weight,
        reduction=reduction,
        workspace_bytes=workspace_bytes,
        backend=backend,
    )
    truth, leaves = oracle(*student, given, reduction, kind, weight)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    upstream = torch.rand_like(loss) + 0.5
    got = torch.autograd.grad(loss, student, upstream)
    expected = torch.autograd.grad(truth, leaves, upstream.double())
    for mine, true in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=2e-5 * float(true.abs().max()))
    assert (got[1][V:] == 0).all()
    assert (got[2][V:] == 0).all()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_retained_graph_gives_its_gradients_again(reduction, backend):
    student, teacher = head(), teachers()["dense"]

    def loss(hidden, weight, bias):
        settings = {"bias": bias, "reduction": reduction, "backend": backend}
        return linear_distillation_loss(hidden, weight, teacher, **settings).sum()

    once = torch.autograd.grad(loss(*student), student)
    backward_again_and_again(loss(*student), student, once)


def test_two_losses_of_one_hidden_state(backend):
    student, given = head(), teachers()

    def loss(name):
        return linear_distillation_loss(*student[:2], given[name], bias=student[2], backend=backend)

    each = [torch.autograd.grad(loss(name), student) for name in ("dense", "head")]
    backward_again_and_again(
        loss("dense") + loss("head"), student, [a + b for a, b in zip(*each, strict=True)]
    )


@pytest.mark.parametrize("teacher", ["dense", "topk", "head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_good_as_the_layer_that_it_replaces(dtype, teacher, backend):
    student, given = head(dtype), teachers(dtype)[teacher]
    truth, leaves = oracle(*student, given, "mean", "jsd", (LABELS != -100).double())
    expected = torch.autograd.grad(truth, leaves)

    def errors(loss):
        gradients = torch.autograd.grad(loss, student)
        pairs = [(loss.detach(), truth.detach()), *zip(gradients, expected, strict=True)]
        return [float((mine.double() - true).abs().max()) for mine, true in pairs]

    options = {"kind": "jsd", "beta": 0.3, "temperature": 2.0, "kd_weight": 0.6, "backend": backend}
    whole = given
    if isinstance(given, TeacherHead):
        whole = given.hidden @ given.weight.T + given.bias
    plain = errors(distillation_loss(student[0] @ student[1].T + student[2], whole, LABELS, **options))
    for workspace_bytes in (300, None):
        given_workspace = {"workspace_bytes": workspace_bytes, "bias": student[2]}
        chunked = errors(linear_distillation_loss(*student[:2], given, LABELS, **options, **given_workspace))
        eps = torch.finfo(dtype).eps
        sizes = [1.0, *(float(g.abs().max()) for g in expected)]
        for mine, theirs, size in zip(chunked, plain, sizes, strict=True):
            assert mine <= 2 * theirs + 2 * eps * size


def test_only_the_gradients_that_are_asked_for_are_made_and_kept(backend):
    hidden, weight, bias = (x.detach() for x in head())
    teacher = teachers()["dense"]
    for leaf in (hidden, weight, bias):
        leaf.requires_grad_()
        loss = linear_distillation_loss(hidden, weight, teacher, bias=bias, backend=backend)
        assert [x.numel() > 0 for x in loss.grad_fn.saved_tensors] == [
            x is leaf for x in (hidden, weight, bias)
        ]
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert gradient.shape == leaf.shape
        leaf.requires_grad_(False)
    assert not linear_distillation_loss(hidden, weight, teacher, backend=backend).requires_grad


class _Allocations(TorchDispatchMode):
    """Shapes of all that is allocated."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(argument.alias_info is not None for argument in function._schema.arguments):
            return result  # a view, or what was given
        parts = result if isinstance(result, tuple | list) else [result]
        self.shapes += [tuple(x.shape) for x in parts if isinstance(x, torch.Tensor)]
        return result


@pytest.mark.parametrize("masked", [False, True])
def test_no_logits_of_all_rows_are_ever_there(masked, backend):
    rows, vocab, workspace_bytes = 20, 1009, 16 * 1009 * 4
    head = TeacherHead(torch.randn(rows, 3), torch.randn(vocab, 3))
    scale = torch.ones(rows)
    if masked:
        scale[::3] = 0
    tensors = (torch.randn(rows, H), torch.randn(vocab, H), None, *[None] * 3, head.hidden, head.weight, None)
    numbers = (vocab, "jsd", 0.5, 1.0, 1.0, 0.0, masked, workspace_bytes, backend)
    with _Allocations() as made:
        _op.linear_gradients.direct(*tensors, None, scale, *numbers, [True, True, False])
    largest = max(shape[0] for shape in made.shapes if shape[1:] == (vocab,))
    assert 1 <= largest <= 8  # of the student and of the teacher


@pytest.mark.parametrize("rows", [0, 1, 128, 129, 700, 2048])
def test_chunks_are_few_alike_and_of_whole_tiles(rows):
    for most in (1, 2, 127, 128, 200, 300, 1 << 20):
        step = _reference._rows_at_once(rows, most)
        assert 1 <= step <= most
        if most >= 128:
            assert step == rows or step % 128 == 0 or rows == 0
            most -= most % 128
        assert len(range(0, rows, step)) == len(range(0, rows, most))
        assert rows <= most or step - rows % step < step // 2 + 128 or rows % step == 0


@pytest.mark.parametrize("mask", ["labels", "row_weight", None])
def test_rows_are_looked_for_only_where_some_may_be_masked(mask, backend, monkeypatch):
    looked, nonzero = [], torch.Tensor.nonzero
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda x: looked.append(x) or nonzero(x))
    student = head()
    given = {"labels": {"labels": LABELS}, "row_weight": {"row_weight": torch.rand(N)}, None: {}}[mask]
    linear_distillation_loss(*student[:2], teachers()["head"], backend=backend, **given)
    assert len(looked) == (mask is not None)


@pytest.mark.parametrize("teacher", ["dense", "head"])
def test_off_the_cpu_no_number_is_looked_at(teacher):
    """A tensor without memory has none to look at."""
    meta = [x.detach().to("meta") for x in head()]
    given = teachers()[teacher]
    parts = (None, given.hidden, given.weight, given.bias) if teacher == "head" else (given, *[None] * 3)
    dense, *projected = (x if x is None else x.to("meta") for x in parts)
    numbers = {"vocab": V, "kind": "jsd", "beta": 0.5, "temperature": 1.0, "kd": 1.0, "ce": 0.0}
    numbers |= {"masked": False, "workspace_bytes": 3 * V * 8}
    scale, results = torch.ones(N, device="meta"), [torch.empty_like(x) for x in meta]
    loss = _reference.rows(*meta, dense, None, None, *projected, None, scale, *results, **numbers)
    assert loss.is_meta


class _Stream:
    """A queue of a GPU, which knows what must have ended before what it does next."""

    current = None
    device = "cuda:0"

    def __init__(self):
        self.past = set()

    def wait_event(self, event):
        self.past |= event

    def wait_stream(self, other):
        self.past |= other.past

    def record_event(self):
        return set(self.past)

    def __enter__(self):
        self.before, _Stream.current = _Stream.current, self

    def __exit__(self, *error):
        _Stream.current = self.before

    @classmethod
    def do(cls, what):
        """Return what has ended when ``what`` begins."""
        past = set(cls.current.past)
        cls.current.past.add(what)
        return past


@pytest.mark.cpu("its streams are not the device's")
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_teachers_products_run_beside_the_students_and_in_order(masked, fails, monkeypatch):
    main, side, began = _Stream(), _Stream(), {}
    monkeypatch.setattr(_reference, "_side_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: _Stream.current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    given, chunk, product = teachers()["head"], 0, _reference._product

    def made(hidden, weight, bias, out):
        whose = "teacher" if weight is given.weight else "student"
        began[whose, chunk] = _Stream.do((whose, chunk))
        return product(hidden, weight, bias, out)

    def lost(*arguments, **numbers):
        nonlocal chunk
        began["loss", chunk] = _Stream.do(("loss", chunk))
        chunk += 1
        if fails and chunk == 2:
            raise ValueError("a bad row")
        return torch.zeros(len(arguments[0]))

    monkeypatch.setattr(_reference, "_product", made)
    hidden, weight, _ = (x.detach() for x in head())
    tensors = (hidden, weight, None, None, None, None, given.hidden, given.weight, None, None, torch.ones(N))
    numbers = {"vocab": V, "kind": "jsd", "beta": 0.5, "temperature": 1.0, "kd": 1.0, "ce": 0.0}
    numbers |= {"masked": masked, "workspace_bytes": 3 * V * 8}
    main.past.add("inputs")
    with main, pytest.raises(ValueError, match="a bad row") if fails else nullcontext():
        _reference.chunked(
            lost, *tensors, torch.empty_like(hidden), torch.empty_like(weight), None, **numbers
        )
    assert chunk == (2 if fails else 4)
    for i in range(chunk):
        assert "inputs" in began["teacher", i]
        assert ("student", i) not in began["teacher", i]
        assert ("teacher", i) not in began["student", i]
        assert {("teacher", i), ("student", i)} <= began["loss", i]
        if i:
            assert ("loss", i - 1) in began["teacher", i]
    assert side.past <= main.past  # so that memory may be used again


def test_aligned_rows_of_logits_change_nothing(backend, device, monkeypatch):
    student, given, results = head(), teachers()["head"], []
    for alignment in (1, 64):
        monkeypatch.setitem(_reference.ALIGNMENT, device, alignment)
        loss = linear_distillation_loss(*student[:2], given, workspace_bytes=4 * V * 8, backend=backend)
        results.append([loss.detach(), *torch.autograd.grad(loss, student[:2])])
    for plain, aligned in zip(*results, strict=True):
        torch.testing.assert_close(aligned, plain)


def test_a_gpu_is_asked_to_add_in_float32(monkeypatch):
    """On tensors without memory: whether torch takes the calls."""
    monkeypatch.setattr(_reference, "_adds_wide", lambda device: True)
    weight = torch.empty(V, H, device="meta", dtype=torch.bfloat16)
    sums = _reference._Sums(weight, None, V - 2, several=True)
    with _Allocations() as made:
        for _ in range(2):
            sums.add(*(torch.empty(3, x, device="meta", dtype=torch.bfloat16) for x in (V - 2, H)))
    assert (V - 2, H) not in made.shapes
    sums.finish()


def test_masked_rows_are_not_looked_at(backend):
    hidden, weight, bias = head()
    teacher = teachers()["dense"]
    with torch.no_grad():
        hidden[2] = teacher[6] = torch.nan
    loss = linear_distillation_loss(hidden, weight, teacher, LABELS, bias=bias, backend=backend)
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][[2, 6]] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_changes_nothing(reduction, backend, device):
    hidden, weight, bias = head()
    teacher = teachers()["dense"]
    results = []
    for enabled in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            loss = linear_distillation_loss(
                hidden, weight, teacher, LABELS, bias=bias, reduction=reduction, backend=backend
            )
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight, bias))])
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_row_left_costs_nothing(rows, reduction, backend, nan_filled_memory):
    hidden, weight = torch.randn(rows, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    labels = torch.full((rows,), -100)
    loss = linear_distillation_loss(
        hidden, weight, torch.randn(rows, V), labels, reduction=reduction, backend=backend
    )
    assert (loss == 0).all()
    for gradient in torch.autograd.grad(loss.sum(), (hidden, weight)):
        assert (gradient == 0).all()


@pytest.mark.cpu("to look at labels would be a host sync")
def test_a_bad_row_is_named(backend):
    hidden, weight, bias = head()
    labels = torch.zeros(N, dtype=torch.int64)
    labels[5] = V
    given = (hidden, weight, teachers()["dense"], labels)
    settings = {"bias": bias, "kd_weight": 0.5, "backend": backend}
    if backend == "triton":  # to look would be a host sync
        losses = linear_distillation_loss(*given, **settings, reduction="none")
        assert losses.isnan().nonzero().tolist() == [[5]]
        return
    with pytest.raises(ValueError, match=f"labels row . is {V}"):
        linear_distillation_loss(*given, **settings)


@pytest.mark.parametrize(("teacher", "reduction"), [("dense", "mean"), ("topk", "none"), ("head", "mean")])
def test_the_compiled_loss_is_the_loss(teacher, reduction):
    torch._dynamo.reset()
    student, given = head(), teachers()[teacher]

    def loss(hidden, weight, bias):
        return linear_distillation_loss(
            hidden, weight, given, LABELS, bias=bias, kd_weight=0.5, reduction=reduction
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [f(*student) for f in (loss, compiled)]
    upstream = torch.rand_like(results[0])
    torch.testing.assert_close(*results)
    for pair in zip(*(torch.autograd.grad(r, student, upstream) for r in results), strict=True):
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("teacher", ["dense", "topk", "head"])
def test_opcheck(teacher):
    given = teachers()[teacher]
    parts = {
        "dense": (given, None, None, None, None, None),
        "topk": (
            getattr(given, "log_probs", None),
            getattr(given, "ids", None),
            getattr(given, "log_tail", None),
        )
        + (None,) * 3,
        "head": (None, None, None, *(getattr(given, name, None) for name in ("hidden", "weight", "bias"))),
    }[teacher]
    tensors = *(x.detach() for x in head()), *parts, LABELS.clamp_min(0), torch.rand(N)
    numbers = (V, "jsd", 0.3, 2.0, 1.0, 0.5, True, 1000, "reference")
    torch.library.opcheck(torch.ops.feddistill.linear_distillation.default, (*tensors, *numbers))
    for wanted in ([True, True, True], [False, True, False]):
        operator = torch.ops.feddistill.linear_distillation_gradients.default
        torch.library.opcheck(operator, (*tensors, *numbers, wanted))


def test_the_module_is_the_function(backend):
    hidden, weight, bias = head()
    settings = {"kind": "tvd", "temperature": 2.0, "kd_weight": 0.4, "workspace_bytes": 1000}
    module = LinearDistillationLoss(**settings, backend=backend)
    teacher = teachers()["dense"]
    assert module(hidden, weight, teacher, LABELS, bias=bias) == linear_distillation_loss(
        hidden, weight, teacher, LABELS, bias=bias, **settings, backend=backend
    )
    assert "workspace_bytes=1000" in repr(module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(V, 6)}, "weight has 6 columns, hidden has 7"),
        ({"weight": torch.zeros(V, H).bfloat16()}, "weight is torch.bfloat16, hidden is torch.float32"),
        ({"bias": torch.zeros(5)}, "bias has 5 entries, weight has 53 rows"),
        ({"hidden": torch.zeros(H)}, r"hidden must have shape \[N, H\], got \[7\]"),
        ({"teacher": torch.zeros(N, V + 1)}, "teacher's vocabulary is 54, student has 53 columns"),
        ({"teacher": torch.zeros(3, V)}, "teacher has 3 rows, student has 11"),
        ({"workspace_bytes": 0}, "workspace_bytes must be at least 1, got 0"),
        ({"kind": "kl"}, "unknown kind 'kl'"),
        ({"kd_weight": 0.5}, "labels is None"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    arguments = {
        "hidden": torch.zeros(N, H),
        "weight": torch.zeros(V, H),
        "teacher": torch.zeros(N, V),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        linear_distillation_loss(**arguments)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            (torch.zeros(3, 4), torch.zeros(5, 6)),
            "TeacherHead's weight has 6 columns, TeacherHead's hidden has 4",
        ),
        ((torch.zeros(3, 4), torch.zeros(5, 4).double()), "TeacherHead's weight is torch.float64"),
    ],
)
def test_a_teacher_that_does_not_fit_together_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        TeacherHead(*parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wide_sum_is_made_of_parts(dtype, monkeypatch, nan_filled_memory):
    torch.manual_seed(0)
    teacher = teachers(dtype)["topk"]

    def gradients(entries):
        monkeypatch.setattr(_reference, "PRODUCT", entries)
        torch.manual_seed(1)
        given = head(dtype)
        loss = linear_distillation_loss(*given[:2], teacher, LABELS, kd_weight=0.5, workspace_bytes=400)
        loss.backward()
        return [x.grad for x in given[:2]]

    for whole, parts in zip(gradients(1 << 20), gradients(3 * H), strict=True):
        torch.testing.assert_close(whole, parts)


MEASURED = """
import ctypes
from pathlib import Path

import torch

from feddistill_kernels import linear_distillation_loss, topk_compress

ctypes.CDLL(None).mallopt(-3, 1 << 20)  # what is freed goes back to the system at once
V, H = 32_768, 256
weight = torch.randn(V, H).bfloat16().requires_grad_()


def step(rows):
    teacher = topk_compress(torch.randn(rows, V), 4)
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    hidden = torch.randn(rows, H).bfloat16().requires_grad_()
    linear_distillation_loss(hidden, weight, teacher, workspace_bytes=16 << 20).backward()
    weight.grad = None
    return held("VmHWM") - before


def held(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


step(8)
print(step(1024))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells how much memory was held")
def test_no_more_memory_than_is_documented():
    said = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    wide, result, workspace, slack = 32, 16, 16, 24
    assert float(said.stdout) <= wide + result + workspace + slack
