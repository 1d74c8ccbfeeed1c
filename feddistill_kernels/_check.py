"""Checks of arguments; every error is one line."""

import difflib
import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

NO_ID = -1
"""Stands in the ids of a ``TopK`` where a row has no further entry."""

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def bind(spec: str, **tensors: Tensor) -> tuple[int, ...]:
    """Return the sizes of ``spec``'s letters, requiring every tensor to have that shape.

    >>> import torch
    >>> bind("N V", student=torch.zeros(2, 5), teacher=torch.zeros(2, 5))
    (2, 5)
    """
    letters = spec.split()
    bound: tuple[int, ...] | None = None
    owner = ""
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if len(shape) != len(letters):
            raise ValueError(f"{name} must have shape [{', '.join(letters)}], got {list(shape)}")
        if bound is None:
            bound, owner = shape, name
        elif shape != bound:
            raise ValueError(
                f"{name} has shape {list(shape)} but {owner} bound [{', '.join(letters)}] to {list(bound)}"
            )
    assert bound is not None, "bind() needs at least one tensor"
    return bound


def one_of(what: str, given: str, names: Collection[str]) -> None:
    """Require ``given`` to be one of ``names``; name the nearest."""
    if given in names:
        return
    nearest = difflib.get_close_matches(given, names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"unknown {what} {given!r}; choose from {', '.join(names)}{hint}")


def floating(**tensors: Tensor) -> None:
    """Require floating-point tensors of a dtype that the kernels know."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATING:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
            raise ValueError(f"{name} must be floating point ({names}), got {tensor.dtype}")


def positive_temperature(temperature: float) -> None:
    """Require a temperature that can divide logits."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def same_device(owner: Tensor, **tensors: Tensor) -> None:
    """Require every tensor on ``owner``'s device."""
    for name, tensor in tensors.items():
        if tensor.device != owner.device:
            raise ValueError(f"{name} is on {tensor.device}, the others are on {owner.device}")


def alike(xs: Sequence[Tensor]) -> None:
    """Require at least one tensor, and one shape, dtype and device for all."""
    if isinstance(xs, Tensor):
        raise ValueError(
            "xs must be a list of tensors, one a client, got one tensor; list(xs) takes it apart"
        )
    if not xs:
        raise ValueError("xs must hold at least one tensor, got an empty list")
    first = xs[0]
    floating(**{"xs[0]": first})
    # Each look at a tensor takes 30 to 100 ns, and the kernels 1 us where a row is short.
    shape, dtype, device = first.shape, first.dtype, first.device
    for index, x in enumerate(xs):
        if x is not first and (x.dtype is not dtype or x.shape != shape or x.device != device):
            raise ValueError(
                f"xs[{index}] is {_kind(x)} but xs[0] is {_kind(first)}; all clients must be alike"
            )


def no_derivative_twice() -> None:
    """Raise in a backward whose gradient is to be differentiated again.

    The gradient has no graph: as a constant it would silently make a Hessian or a gradient penalty wrong.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the distillation losses are differentiable once: kernels make their gradients, which have none; "
            "create_graph=True needs a loss written in torch operators"
        )


def no_forward_mode(**tensors: Tensor | None) -> None:
    """Refuse tensors that carry a tangent, which would be lost silently."""
    if getattr(forward_ad, "_current_level", 0) < 0:  # no forward mode is active: this check costs nothing
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"{name} carries a tangent, and the distillation losses have no forward mode")


def rows_with_a_choice(name: str, z: Tensor, start: int = 0) -> None:
    """Raise for a row of ``z [N, V]`` that rules every entry out.

    On the CPU only: elsewhere looking would be a host sync.

    Args:
        name: What the caller calls ``z``.
        z: Logits or log-probabilities.
        start: Number of the first row, for the message.
    """
    if z.device.type != "cpu" or not z.shape[1]:
        return
    empty = z.amax(-1) == -math.inf
    if empty.any():
        raise empty_row(name, start + int(empty.to(torch.uint8).argmax()))


def empty_row(name: str, row: int) -> ValueError:
    """The error for a row that rules every entry out."""
    return ValueError(f"{name} row {row} is all -inf: it rules every entry out")


def labels_in_vocabulary(labels: Tensor, vocab: int, start: int = 0) -> None:
    """Raise for a label ``[N]`` outside ``[0, vocab)``.  CPU only, as ``rows_with_a_choice``."""
    if labels.device.type != "cpu":
        return
    outside = (labels < 0) | (labels >= vocab)
    if outside.any():
        first = int(outside.to(torch.uint8).argmax())
        raise label_outside(start + first, int(labels[first]), vocab)


def label_outside(row: int, label: int, vocab: int) -> ValueError:
    """The error for a label outside ``[0, vocab)``."""
    return ValueError(f"labels row {row} is {label}; it must be in [0, {vocab}) or ignore_index")


def distinct_ids(name: str, ids: Tensor, vocab: int, start: int = 0) -> None:
    """Raise for a row of ``ids [N, K]`` with one outside ``[0, vocab)`` or one that occurs twice.

    ``NO_ID`` is neither.  CPU only, as ``rows_with_a_choice``.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ordered = ids.sort(-1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NO_ID)
    wrong = (ordered[:, 0] < NO_ID) | (ordered[:, -1] >= vocab) | repeated.any(-1)
    if wrong.any():
        row = int(wrong.to(torch.uint8).argmax())
        raise wrong_ids(name, start + row, ids[row], vocab)


def wrong_ids(name: str, row: int, ids: Tensor, vocab: int) -> ValueError:
    """The error for a row whose ``ids [K]`` are not distinct ones of ``[0, vocab)``."""
    seen = set()
    for each in (each for each in ids.tolist() if each != NO_ID):
        if not 0 <= each < vocab:
            return ValueError(f"{name} row {row} keeps an id outside [0, {vocab}): {each}")
        if each in seen:
            return ValueError(f"{name} row {row} keeps id {each} twice; {NO_ID} stands for no entry")
        seen.add(each)
    raise AssertionError(f"nothing is wrong with {ids.tolist()}")


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
