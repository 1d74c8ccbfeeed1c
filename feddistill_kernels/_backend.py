"""Which implementation of an operator runs where.

A backend is a module, ``feddistill_kernels/<operator>/_<backend>.py``: the file tree is the registry.
Beside its functions it has ``missing(device_type) -> str | None``: why it cannot run there.  One with limits
has ``cannot(device_type, **facts) -> str | None`` as well: why it cannot run this call there.
"""

import pkgutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from feddistill_kernels._check import one_of
from feddistill_kernels._dispatch import entries

BACKENDS = ("reference", "native", "triton")

AUTO = "auto"
_override = AUTO


class BackendError(RuntimeError):
    """A backend was named that cannot run this call here."""


def operators() -> tuple[str, ...]:
    """Names of the operators, for ``available_backends``.

    >>> operators()
    ('aggregation', 'distances', 'distillation', 'linear_distillation', 'order_statistics', 'topk',
     'vocabulary_parallel')
    """
    home = str(Path(__file__).parent)
    return tuple(sorted(module.name for module in pkgutil.iter_modules([home]) if module.ispkg))


def available_backends(op: str, device: str | torch.device = "cpu") -> tuple[str, ...]:
    """Backends that run ``op`` on ``device``, the one that runs by default first (see ``_dispatch``).

    Raises:
        ValueError: No such operator.

    >>> available_backends("distillation", "cpu")[:2]
    ('native', 'reference')
    """
    one_of("operator", op, operators())
    place = torch.device(device)
    whole = next(entry for entry in _entries(op, place, None) if entry.any_shape)
    return tuple(name for name in whole.backends if _missing(op, name, place.type) is None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the block on backend ``name``, where no other is named in the call.

    The choice is the process's, not the thread's: autograd runs backward passes in threads of its own,
    and they must see it.  Compiled functions are compiled again for it.

    Raises:
        ValueError: No such backend.
        BackendError: Later, from an operator that the backend cannot run.

    >>> from feddistill_kernels import coordinate_median
    >>> with use_backend("reference"):
    ...     coordinate_median([torch.tensor([1.0]), torch.tensor([2.0])])
    tensor([1.5000])
    """
    global _override
    one_of("backend", name, BACKENDS)
    before, _override = _override, name
    try:
        yield
    finally:
        _override = before


def named(requested: str | None) -> str:
    """The backend that the caller named: the argument, else ``use_backend``'s, else ``AUTO``.

    The compiler can trace this; ``load``, which looks at the machine, runs inside the operators.
    """
    if requested is None:
        return _override
    one_of("backend", requested, BACKENDS)
    return requested


def load(op: str, backend: str, like: torch.Tensor, **facts: int | str) -> ModuleType:
    """Return the module that runs ``op`` on tensors ``like`` this; never swap a backend that was named.

    Args:
        op: One of ``operators()``.
        backend: A name, or ``AUTO``.
        like: Its device, dtype and shape count.
        facts: What the limits of backends depend on, passed to ``cannot``.
    """
    device_type = like.device.type
    # float64 is there for oracles and gradcheck, and one backend with it is enough.
    wide = like.dtype == torch.float64
    if backend == AUTO:
        if wide:
            return _module(op, "reference")
        for entry in _entries(op, like.device, like.dtype):
            if not (entry.any_shape or entry.fits(like.shape)):
                continue
            # One by one: on a CPU Triton comes last and is not looked at, which would load it.
            for name in entry.backends:
                if _missing(op, name, device_type) is None and not _cannot(op, name, device_type, facts):
                    return _module(op, name)
        raise AssertionError(f"{op} has no reference")
    if reason := _missing(op, backend, device_type):
        raise BackendError(f"backend {backend!r} cannot run {op} on {device_type}: {reason}")
    if wide and backend != "reference":
        raise BackendError(f"backend {backend!r} cannot run {op}: float64 is for the reference only")
    if reason := _cannot(op, backend, device_type, facts):
        raise BackendError(f"backend {backend!r} cannot run this {op}: {reason}")
    return _module(op, backend)


def watched(*tensors: Tensor | None) -> bool:
    """Whether a compiler, a profiler, a mode or a subclass of Tensor must see calls as operators."""
    return (
        torch.compiler.is_compiling()
        or _dispatch_modes() > 0
        or _innermost_transform() is not None
        or _profiling()
        or any(x is not None and (type(x) not in _PLAIN or x.is_meta) for x in tensors)
    )


_dispatch_modes = torch._C._len_torch_dispatch_stack
_innermost_transform = torch._C._functorch.peek_interpreter_stack
_profiling = torch._C._autograd._profiler_enabled
_PLAIN = (Tensor, torch.nn.Parameter)


class Operator:
    """A function that is called directly, or as an operator of torch.library if something must see one.

    The dispatcher takes some 10 us a call, as long as torch.topk of a short row; when nothing watches and no
    input requires a gradient, the function itself is called.

    Args:
        name: ``feddistill::...``.
        schema: As ``torch.library.custom_op`` takes it; ``None`` infers it from ``function``.
        mutates_args: Names of the arguments that ``function`` writes.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        schema: str | None = None,
        mutates_args: Collection[str] = (),
    ) -> None:
        self.direct = function
        self.dispatched = torch.library.custom_op(name, function, mutates_args=mutates_args, schema=schema)
        self.register_fake = self.dispatched.register_fake
        self.register_autograd = self.dispatched.register_autograd

    def __call__(self, *arguments: Any) -> Any:
        """Run it; the dispatcher takes an input that requires a gradient, and has the gradient or refuses."""
        if watched():
            return self.dispatched(*arguments)
        for argument in arguments:
            for x in argument if type(argument) is list else (argument,):
                if isinstance(x, Tensor) and (type(x) not in _PLAIN or x.requires_grad or x.is_meta):
                    return self.dispatched(*arguments)
        return self.direct(*arguments)


def operator(
    name: str, schema: str | None = None, mutates_args: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Operator]:
    """Make an ``Operator`` of the function below."""
    return lambda function: Operator(name, function, schema, mutates_args)


def schema_like(
    function: Callable[..., Any], returns: str, more: str = "", mutates_args: Collection[str] = ()
) -> str:
    """The schema of an operator with the positional arguments of ``function``, then ``more``.

    >>> def function(x: Tensor, k: int, *, out: Tensor | None = None) -> Tensor: ...
    >>> schema_like(function, "(Tensor, Tensor)", ", bool[] wanted")
    '(Tensor x, SymInt k, bool[] wanted) -> (Tensor, Tensor)'
    """
    arguments, _, _ = torch.library.infer_schema(function, mutates_args=mutates_args).partition(", *")
    return f"{arguments}{more}) -> {returns}"


_entries = cache(entries)


@cache
def _module(op: str, backend: str) -> ModuleType:
    return import_module(f"feddistill_kernels.{op}._{backend}")


def _cannot(op: str, backend: str, device_type: str, facts: dict[str, int | str]) -> str | None:
    cannot = _limits(op, backend) if facts else None
    return cannot(device_type, **facts) if cannot else None


@cache
def _limits(op: str, backend: str) -> Callable[..., str | None] | None:
    return getattr(_module(op, backend), "cannot", None)


@cache
def _missing(op: str, backend: str, device_type: str) -> str | None:
    if find_spec(f"feddistill_kernels.{op}._{backend}") is None:
        return "it is not written for that backend"
    if backend == "reference":
        return None
    if backend == "triton" and find_spec("triton") is None:
        return "triton is not installed"
    reason: str | None = _module(op, backend).missing(device_type)
    return reason
