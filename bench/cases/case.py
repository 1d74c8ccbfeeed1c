"""One case, and what cases share: inputs, and baselines in several forms."""

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
# Allowed relative error if all arithmetic is in that dtype: log-probabilities in bfloat16 have two digits.
ROUGH = {"bfloat16": 0.25, "float16": 0.05}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Rows and vocabulary of Llama 2 and 3, then GPT-2, Qwen 2.5 and Gemma: 66 to 131 MB a float32 tensor.
_HEADLINE = ((1024, 32000), (256, 128256))
_LARGE = ((512, 50257), (128, 151936), (64, 256000))
SMALL = ((1, 100), (8, 100), (64, 1000), (1, 32000), (4, 128256))

# A CPU case has a hundred megabytes, a GPU case gigabytes: 8192 rows of Llama 3.
_ROWS = {"cpu": 1, "cuda": 32}


def more(device: str) -> int:
    """Factor on the number of rows of large cases."""
    return _ROWS[device]


def headline_shapes(device: str) -> list[tuple[int, int]]:
    """Rows and vocabulary of the headline cases."""
    return [(rows * more(device), vocab) for rows, vocab in _HEADLINE]


def large_shapes(device: str) -> list[tuple[int, int]]:
    """Rows and vocabulary of the other large cases."""
    return [(rows * more(device), vocab) for rows, vocab in _LARGE]


@dataclass(frozen=True)
class Setup:
    """Device and competitors of a run; ``skipped`` maps those that could not run to the reason."""

    device: str
    compare: frozenset[str]
    skipped: dict[str, str] = field(default_factory=dict)

    def peer(self, name: str, make: Callable[[], Any]) -> Any:
        """The callable that ``make`` returns; ``None`` if this peer was not selected or cannot run."""
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
    """Creates the inputs and the contenders, ours first."""
    headline: bool = False
    """Whether torch.compile competes and plots show the case."""
    floor: str = "copy"
    """The limit: ``copy`` for the counted bytes at copy speed, else the time of this contender."""

    @property
    def name(self) -> str:
        """Operator, variant, dtype and shape; unique."""
        sizes = " ".join(f"{letter}={size}" for letter, size in self.shape.items())
        return " ".join(filter(None, [self.op, self.variant, self.dtype, sizes]))


def logits(setup: Setup, dtype: str, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Correlated logits of a student and a teacher, ``[rows, vocab]`` each."""
    generator = torch.Generator(setup.device).manual_seed(0)
    draw = partial(torch.randn, rows, vocab, generator=generator, device=setup.device)
    teacher = draw() * 3
    return (teacher + draw()).to(DTYPES[dtype]), teacher.to(DTYPES[dtype])


def itemsize(dtype: str) -> int:
    """Bytes per element."""
    return DTYPES[dtype].itemsize


def with_gradient(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Wrap a loss to return its value and the gradients of the arguments that require one."""

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        value = loss(*arguments)
        wanted = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
        return value.detach(), *torch.autograd.grad(value, wanted)

    return run


def alone(result: Tensor) -> list[Tensor]:
    """Value of a contender whose result is one tensor."""
    return [result]


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """``wrap`` of ``written_by_hand`` for a function without gradient."""
    return function


def always(*arguments: Any) -> Callable[[], tuple[Any, ...]]:
    """``prepare`` of a contender that gets the same arguments at each call."""
    return lambda: arguments


def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function to convert its tensors to float32."""
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
    """A baseline in the inputs' dtype (if ``narrow``), in float32 (if that is another), and compiled."""
    if "eager" in setup.compare and (narrow or dtype == FULL):
        yield Contender("eager", wrap(function), always(*tensors), value, tolerance=ROUGH.get(dtype))
    if "eager" in setup.compare and dtype != FULL:
        yield Contender("eager float32", wrap(in_float32(function)), always(*tensors), value)
    if compiler and "compile" in setup.compare:
        # float32 inside, as in our kernels; compiled, it stays in registers.
        fused = baselines.compiled(function if dtype == FULL else in_float32(function))
        yield Contender("compile", wrap(fused), always(*tensors), value)
