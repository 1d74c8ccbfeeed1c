"""Geometric medians of anything: every backend's costs no more than the reference's."""

import pytest
import torch

from feddistill_kernels import available_backends, geometric_median

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st = hypothesis.strategies


def cost(z, xs):
    z, *xs = (x.double() - x.double().mean(-1, keepdim=True) for x in (z, *xs))
    return sum((z - x).norm(dim=-1) for x in xs)


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(
    count=st.integers(1, 12),
    rows=st.integers(1, 5),
    columns=st.integers(1, 1100),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    liars=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_backends_agree_on_anything(device, count, rows, columns, scale, liars, seed):
    others = [name for name in available_backends("distances", device) if name != "reference"]
    if device == "cpu" and count * count * rows > 60:
        others = [name for name in others if name != "triton"]  # it takes the interpreter long
    if not others:
        pytest.skip("nothing to compare with")
    generator = torch.Generator(device).manual_seed(seed)
    draw = {"generator": generator, "device": device}
    xs = [torch.randn(rows, columns, **draw) * scale for _ in range(count)]
    for index in range(min(liars, (count - 1) // 2)):
        xs[index] *= 1e4
    for per_row in (True, False):
        a, *rest = (geometric_median(xs, per_row=per_row, backend=name) for name in ("reference", *others))
        for b in rest:
            assert ((cost(a, xs) - cost(b, xs)).abs() <= 1e-5 * cost(a, xs) + 1e-30).all()
