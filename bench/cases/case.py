"""One case, and what the cases share: inputs, and baselines that come in several forms."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import baselines
from ..timing import Contender

TEMPERATURE = 2.0
FULL, HALF = "float32", "bfloat16"
# Relative error of what is computed in a dtype throughout: log-probabilities in bfloat16 have two digits.
ROUGH = {"bfloat16": 0.25, "float16": 0.05}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Rows and vocabulary of Llama 2 and 3, then GPT-2, Qwen 2.5 and Gemma: 66 to 131 MB a float32 tensor.
_HEADLINE = ((1024, 32000), (256, 128256))
_LARGE = ((512, 50257), (128, 151936), (64, 256000))
SMALL = ((1, 100), (8, 100), (64, 1000), (1, 32000), (4, 128256))

# What a CPU has a hundred megabytes of, a GPU has gigabytes of: 8192 rows of Llama 3.
_ROWS = {"cpu": 1, "cuda": 32}


def more(device: str) -> int:
    """How many times a CPU's rows a device is given, where they are many."""
    return _ROWS[device]


def headline_shapes(device: str) -> list[tuple[int, int]]:
    """Rows and vocabulary of the cases that are shown."""
    return [(rows * more(device), vocab) for rows, vocab in _HEADLINE]


def large_shapes(device: str) -> list[tuple[int, int]]:
    """Rows and vocabulary of the other large ones."""
    return [(rows * more(device), vocab) for rows, vocab in _LARGE]


@dataclass(frozen=True)
class Setup:
    """Where a case runs, who competes, and who could not: name to reason."""

    device: str
    compare: frozenset[str]
    skipped: dict[str, str] = field(default_factory=dict)

    def peer(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` makes; ``None`` where this peer was not asked for, or gave a reason."""
        if name not in self.compare:
            return None
        made = make()
        if isinstance(made, str):
            self.skipped[name] = made
            return None
        return made


@dataclass(frozen=True)
class Case:
    """One operator on one kind of input."""

    op: str
    variant: str
    dtype: str
    shape: dict[str, int]
    counted_bytes: int
    """Inputs read once and outputs written once."""
    contenders: Callable[[Setup], list[Contender]]
    """Makes the inputs; ours comes first."""
    headline: bool = False
    """The compiler competes, and it stands in figures."""
    floor: str = "copy"
    """Its limit: counted bytes at copy speed, or the time of this contender."""

    @property
    def name(self) -> str:
        """Unique."""
        sizes = " ".join(f"{letter}={size}" for letter, size in self.shape.items())
        return " ".join(filter(None, [self.op, self.variant, self.dtype, sizes]))


def logits(setup: Setup, dtype: str, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """A student's and a teacher's, which resemble each other."""
    generator = torch.Generator(setup.device).manual_seed(0)
    draw = partial(torch.randn, rows, vocab, generator=generator, device=setup.device)
    teacher = draw() * 3
    return (teacher + draw()).to(DTYPES[dtype]), teacher.to(DTYPES[dtype])


def itemsize(dtype: str) -> int:
    """Bytes of a number."""
    return DTYPES[dtype].itemsize


def with_gradient(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The loss, and its gradients for the arguments that require one."""

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        value = loss(*arguments)
        wanted = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
        return value.detach(), *torch.autograd.grad(value, wanted)

    return run


def alone(result: Tensor) -> list[Tensor]:
    """A result that is one tensor."""
    return [result]


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """For ``written_by_hand``: a function without a gradient."""
    return function


def always(*arguments: Any) -> Callable[[], tuple[Any, ...]]:
    """Arguments that are the same at each call."""
    return lambda: arguments


def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same on tensors made float32."""
    return lambda *xs: function(*(x.float() for x in xs))


def written_by_hand(
    setup: Setup,
    dtype: str,
    function: Callable[..., Any],
    tensors: tuple[Tensor, ...],
    wrap: Callable[..., Any],
    value: Callable[[Any], Sequence[Tensor]],
    compiler: bool = False,
    narrow: bool = True,
) -> Iterator[Contender]:
    """A baseline in the inputs' dtype if ``narrow``, in float32 where that is another, and compiled."""
    if "eager" in setup.compare and (narrow or dtype == FULL):
        yield Contender("eager", wrap(function), always(*tensors), value, tolerance=ROUGH.get(dtype))
    if "eager" in setup.compare and dtype != FULL:
        yield Contender("eager float32", wrap(in_float32(function)), always(*tensors), value)
    if compiler and "compile" in setup.compare:
        # float32 inside, as our contract says; compiled, it stays in registers.
        fused = baselines.compiled(function if dtype == FULL else in_float32(function))
        yield Contender("compile", wrap(fused), always(*tensors), value)
