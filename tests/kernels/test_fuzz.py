"""Random cases of every sort against the float64 oracles; the header of the run says the seed."""

import math
import random
from functools import partial
from importlib import import_module

import pytest
import torch
from kernels import oracles

from feddistill_kernels import (
    BackendError,
    available_backends,
    distillation_loss,
    kinds,
    softmax_divergence,
    topk_compress,
    trimmed_mean,
    use_backend,
)
from feddistill_kernels._native import library

CASES = 2000
PARTS = {"cpu": 4, "cuda": 20}
"""Tests that they are divided into: on a GPU, shares of the tests run side by side."""
INF = math.inf
EPS = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 65, 100, 257, 1000, 1023, 1024, 1025, 2049, 3001)


def logits(rng, n, vocab):
    """Of any size, about any number, with ties and tokens ruled out, in any dtype and layout."""
    x = torch.randn(n, vocab) * rng.choice([0.01, 1.0, 4.0, 30.0]) + rng.choice([0.0, 0.0, -50.0, 1000.0])
    if rng.random() < 0.3:
        x = (x * 2).round() / 2
    dtype = rng.choice(DTYPES)
    x = x.to(dtype)
    if rng.random() < 0.4:
        ruled_out = torch.rand(n, vocab) < rng.choice([0.02, 0.5, 0.99])
        ruled_out[torch.arange(n), torch.randint(vocab, (n,))] = False
        x = x.masked_fill(ruled_out, -INF)
    return laid_out(rng, x)


def laid_out(rng, x):
    match rng.choice(["contiguous", "rows", "columns", "offset", "transposed"]):
        case "rows":
            wide = torch.full((2 * x.shape[0], x.shape[1] + 3), math.nan, dtype=x.dtype)
            wide[::2, :-3] = x
            return wide[::2, :-3]
        case "columns":
            wide = torch.full((x.shape[0], 2 * x.shape[1]), math.nan, dtype=x.dtype)
            wide[:, ::2] = x
            return wide[:, ::2]
        case "offset":
            wide = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype)
            wide[1:] = x.flatten()
            return wide[1:].view(x.shape)
        case "transposed":
            return x.T.contiguous().T
    return x


def near(x):
    """A teacher hardly different, in the student's dtype."""
    return (x.float() + 1e-3 * torch.randn(x.shape)).to(x.dtype)


def assert_close(got, true, size, slack, what):
    """Equal where infinite; else within what float32 and the result's own dtype owe."""
    finite = true.isfinite()
    assert torch.equal(got[~finite].double(), true[~finite]), what
    owed = torch.finfo(got.dtype).eps / 2 * true[finite].abs() + torch.finfo(got.dtype).smallest_normal
    error = (got[finite].double() - true[finite]).abs()
    assert (error <= slack * size + owed).all(), (
        f"{what}: {float((error - owed).max()):.2e} over {slack * size:.2e}"
    )


def check_loss(rng):
    n, vocab = rng.randint(1, 5), rng.choice(WIDTHS)
    student = logits(rng, n, vocab + rng.choice([0, 0, 5]))
    plain = student[:, :vocab]
    is_near = rng.random() < 0.3
    teacher = near(plain) if is_near else logits(rng, n, vocab)
    if (plain == -INF).all(-1).any() or (teacher == -INF).all(-1).any():
        return
    kind, beta = rng.choice(kinds()), rng.choice([0.0, 0.2, 0.5, 1.0])
    temperature, kd_weight = rng.choice([0.7, 1.0, 1.0, 2.0]), rng.choice([1.0, 1.0, 0.5, 0.0])
    row_weight = torch.tensor([rng.choice([0.0, 1.0, 0.3]) for _ in range(n)])
    labels = torch.randint(vocab, (n,)) if kd_weight < 1 else None
    given = teacher
    if rng.random() < 0.5:
        k = rng.randint(1, min(vocab, 80))
        given = topk_compress(teacher, k, temperature=temperature, id_order=rng.random() < 0.5)
    settings = {"kind": kind, "beta": beta, "temperature": temperature}
    what = (
        f"{settings} {tuple(student.shape)} {student.dtype} {teacher.dtype} {kd_weight=} {given is teacher=}"
    )

    def each_of(leaf):
        if given is teacher:
            divergence = oracles.divergence(leaf, teacher, **settings)
        else:
            parts = (given.ids, given.log_probs, given.log_tail, vocab)
            divergence = oracles.truncated(leaf, *parts, **settings)
        logits = leaf[:, :vocab]
        return oracles.distillation(logits, divergence, labels, row_weight, kd_weight, temperature, "none")

    leaf = student.detach().double().requires_grad_()
    true = each_of(leaf)
    counts = true.isfinite()
    upstream = torch.rand(n) + 0.5
    (true_slope,) = torch.autograd.grad(true[counts] @ upstream[counts].double(), leaf)
    true = true.detach()
    mine = student.detach().requires_grad_()
    got = distillation_loss(
        mine,
        given,
        labels,
        **settings,
        kd_weight=kd_weight,
        row_weight=row_weight,
        reduction="none",
    )
    (slope,) = torch.autograd.grad(got @ upstream, mine)
    largest = max(
        (float(z.float().nan_to_num(neginf=0).abs().max()) for z in (plain, teacher) if n), default=0
    )
    rounding = EPS * (1 + largest / min(1.0, temperature)) * max(1.0, temperature**2)
    size = float(true[counts].abs().max()) if counts.any() else 0.0
    assert_close(got.detach(), true, max(1, size), 64 * rounding, f"loss {what}")
    if kind == "tvd" and is_near:
        return  # |x| has no slope at 0, only signs
    live = counts & true_slope.isfinite().all(-1)
    assert_close(slope[live], true_slope[live], max(1, size), 64 * rounding, f"gradient {what}")


def check_identity(rng):
    """In one pass, in place and in backward, the gradient is the same."""
    n, vocab = rng.randint(1, 5), rng.choice(WIDTHS)
    dtype = rng.choice(DTYPES)
    leaf, teacher = (torch.randn(n, vocab).to(dtype) for _ in range(2))
    leaf.requires_grad_()
    settings = {"kind": rng.choice(kinds()), "temperature": rng.choice([1.0, 3.0])}
    ways = [
        distillation_loss(leaf * 1, teacher, reduction="sum", inplace=inplace, **settings)
        for inplace in (False, True)
    ]
    ways.append(settings["temperature"] ** 2 * softmax_divergence(leaf, teacher, **settings).sum())
    slopes = [torch.autograd.grad(loss, leaf)[0].float() for loss in ways]
    for slope in slopes[1:]:
        torch.testing.assert_close(
            slope, slopes[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-6, msg=lambda m: f"{settings} {m}"
        )


def check_topk(rng):
    n, vocab = rng.randint(0, 5), rng.choice(WIDTHS)
    x = logits(rng, n, vocab)
    k, temperature = rng.randint(1, vocab), rng.choice([0.5, 1.0, 3.0])
    got = topk_compress(x, k, temperature=temperature)
    a = (x.double() / temperature).log_softmax(-1)
    # Descending, of equal ones the first.
    order = x.float().sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(-1).values
    what = f"{tuple(x.shape)} {x.dtype} {k=} {temperature=}"
    assert torch.equal(got.ids.long(), order), what
    largest = float(x.float().nan_to_num(neginf=0).abs().max()) if n else 0
    rounding = EPS * (1 + largest / temperature)
    assert_close(got.log_probs, a.gather(-1, order), 1, 16 * rounding, f"log_probs {what}")
    rest = a.scatter(-1, order, -INF)
    tail = torch.where((rest == -INF).all(-1), -INF, rest.nan_to_num(neginf=-1e300).logsumexp(-1))
    assert_close(got.log_tail, tail, 1, 32 * rounding, f"log_tail {what}")


def check_trimmed(rng):
    count, shape = rng.randint(1, 40), (rng.randint(0, 4), rng.choice(WIDTHS))
    dtype = rng.choice(DTYPES)
    xs = [torch.randn(shape).to(dtype) for _ in range(count)]
    if rng.random() < 0.5:
        xs = [(x * 2).round() for x in xs]
    trim = rng.randint(0, (count - 1) // 2)
    true = oracles.trimmed_mean(torch.stack(xs), trim)
    got = trimmed_mean(xs, trim)
    assert_close(
        got, true, float(true.abs().max()) if true.numel() else 0, 8 * EPS, f"{count=} {trim=} {dtype}"
    )


CHECKS = [check_loss] * 6 + [check_identity, check_topk, check_topk, check_trimmed]


class OnLevel:
    """The compiled module with its kernels for one instruction set."""

    def __init__(self, level):
        self.level = library().instruction_sets().index(level)

    def __getattr__(self, name):
        function = getattr(library(), name)
        return partial(function, set=self.level) if name.endswith("_cpu") else function


OPERATORS = ("distillation", "order_statistics", "topk")


def pytest_generate_tests(metafunc):
    """Instruction sets of a CPU, backends of a GPU."""
    device = metafunc.config.getoption("--device")
    on_gpu = {name for operator in OPERATORS for name in available_backends(operator, device)}
    levels = sorted(on_gpu) if device != "cpu" else library().instruction_sets()
    metafunc.parametrize("level", levels, indirect=True)
    metafunc.parametrize("part", range(PARTS[device]))


@pytest.fixture
def level(request, device, monkeypatch):
    """The share of the cases that it takes."""
    if device == "cpu":
        on_level = OnLevel(request.param)
        for operator in OPERATORS:
            module = import_module(f"feddistill_kernels.{operator}._native")
            monkeypatch.setattr(module, "library", lambda: on_level)
        yield 3  # the levels differ in little
        return
    with use_backend(request.param):
        # Triton compiles for every dtype, kind and power of two of a width: a second each.
        yield 16 if request.param == "triton" else 4


def test_random_cases_agree_with_the_oracle(part, fuzz_seed, level, device):
    for case in range(part, CASES // level, PARTS[device]):
        rng = random.Random(f"{fuzz_seed}/{case}")
        torch.manual_seed(rng.getrandbits(60))
        check = rng.choice(CHECKS)
        try:
            check(rng)
        except Exception as error:
            if device != "cpu" and isinstance(error, BackendError):
                continue  # this backend has no such operator, or takes no such size
            error.add_note(f"{check.__name__}, case {case} of seed {fuzz_seed}")
            raise
