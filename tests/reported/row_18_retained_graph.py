"""A loss whose graph is retained gives its gradient once more at each backward pass."""

import sys

import torch

from feddistill_kernels import distillation_loss, linear_distillation_loss, use_backend

torch.manual_seed(0)
hidden, weight, teacher = torch.randn(6, 4), torch.randn(9, 4), torch.randn(6, 9)
LOSSES = {
    "linear_distillation_loss": lambda h, w: linear_distillation_loss(h, w, teacher),
    "distillation_loss": lambda h, w: distillation_loss(h @ w.T, teacher),
    "distillation_loss in place": lambda h, w: distillation_loss(h @ w.T, teacher, inplace=True),
}


def gradients(loss, passes):
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    value = loss(*leaves)
    for _ in range(passes):
        value.backward(retain_graph=passes > 1)
    return [leaf.grad / passes for leaf in leaves]


wrong = 0
for backend in ("reference", "native"):
    for name, loss in LOSSES.items():
        with use_backend(backend):
            once = gradients(loss, 1)
            try:
                off = max(float((a - b).abs().max()) for a, b in zip(gradients(loss, 3), once, strict=True))
                found = f"the mean of three gradients is {off:.1e} from that of one backward pass"
                wrong += off > 1e-6
            except RuntimeError as error:
                found = f"RuntimeError: {str(error).splitlines()[0][:70]}"
                wrong += 1
        print(f"{backend}, {name}: {found}")
print("right: 0, but for rounding")
sys.exit(bool(wrong))
