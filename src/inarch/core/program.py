"""A wiring as straight-line code: what a setup does at one place, recorded once and run in every forward.

The functions that wire adapters are run on registers instead of tensors, and every `+`, `*` and call becomes a step. So
the forward repeats exactly their operations, in their order, without walking through setup and configuration again.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any


@dataclass(frozen=True, slots=True)
class Program:
    """Steps on values; the first values are the arguments, then comes None, then what the steps give."""

    num_arguments: int
    steps: tuple[tuple[Callable[..., Any], int, int | None], ...]
    """A function and the numbers of the one or two values it takes."""
    results: tuple[int] | tuple[int, int]
    """The numbers of the one or two values that are returned, two as a tuple."""
    run: Callable[..., Any] = field(init=False, repr=False, compare=False)
    """The program as a function of its arguments."""

    def __post_init__(self) -> None:
        write = _writer(self.num_arguments, tuple(step[1:] for step in self.steps), self.results)
        object.__setattr__(self, "run", write(*[step[0] for step in self.steps]))

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the function, which a copy writes anew for its own steps."""
        return Program, (self.num_arguments, self.steps, self.results)

    def __call__(self, *arguments: Any) -> Any:
        return self.run(*arguments)

    def gives(self, result: int) -> bool:
        """Whether a result is something."""
        return self.results[result] != self.num_arguments

    def reads(self, argument: int) -> bool:
        """Whether an argument has any influence."""
        return argument in self.results or any(argument in step[1:] for step in self.steps)


@cache
def _writer(
    num_arguments: int, takes: tuple[tuple[int, int | None], ...], results: tuple[int, ...]
) -> Callable[..., Callable[..., Any]]:
    """What makes a function with a line for each step, of the steps' functions.

    Python source, for a loop over the steps takes several times as long, which a forward would pay at every site.
    """
    name = {num_arguments: "None"}
    lines = []
    for place, (left, right) in enumerate(takes):
        values = [name.get(number, f"v{number}") for number in (left, right) if number is not None]
        lines.append(f"v{num_arguments + 1 + place} = f{place}({', '.join(values)})")
    lines.append(f"return {', '.join(name.get(number, f'v{number}') for number in results)}")
    functions = ", ".join(f"f{place}" for place in range(len(takes)))
    arguments = ", ".join(f"v{number}" for number in range(num_arguments))
    body = "\n        ".join(lines)
    source = f"def write({functions}):\n    def run({arguments}):\n        {body}\n    return run\n"
    names: dict[str, Any] = {}
    exec(source, names)  # noqa: S102  of numbers alone
    found: Callable[..., Callable[..., Any]] = names["write"]
    return found


class Recorder:
    """Writes a program down, step by step."""

    def __init__(self, num_arguments: int) -> None:
        self._num_arguments = num_arguments
        self._steps: list[tuple[Callable[..., Any], int, int | None]] = []
        self.arguments = tuple(Register(self, number) for number in range(num_arguments))

    def call(self, function: Callable[..., Any], left: "Register", right: "Register | None" = None) -> "Register":
        """The register that will hold `function(left)` or `function(left, right)`."""
        self._steps.append((function, left.number, None if right is None else right.number))
        return Register(self, self._num_arguments + len(self._steps))

    def program(self, result: "Register", *second: "Register | None") -> Program:
        """What was recorded and has any influence, returning one or two registers; the second may be nothing."""
        first = self._num_arguments + 1  # the number of what the first step gives
        results = [self._num_arguments if register is None else register.number for register in (result, *second)]
        needed = set(results)
        for place in reversed(range(len(self._steps))):
            if first + place in needed:
                needed.update(number for number in self._steps[place][1:] if number is not None)
        new = {number: number for number in range(first)}
        steps: list[tuple[Callable[..., Any], int, int | None]] = []
        for place, (function, left, right) in enumerate(self._steps):
            if first + place in needed:
                new[first + place] = first + len(steps)
                steps.append((function, new[left], None if right is None else new[right]))
        numbers = [new[number] for number in results]
        one_or_two = (numbers[0],) if len(numbers) == 1 else (numbers[0], numbers[1])
        return Program(self._num_arguments, tuple(steps), one_or_two)


@dataclass(frozen=True, slots=True)
class Register:
    """A value that a program will have."""

    recorder: Recorder
    number: int

    def __add__(self, other: "Register") -> "Register":
        return self.recorder.call(operator.add, self, other)

    def __mul__(self, factor: int | Fraction) -> "Register":
        return self.recorder.call(Times(factor if isinstance(factor, int) else float(factor)), self)


def apply(function: Callable[..., Any], *values: Any) -> Any:
    """`function` of one value or two, recorded where they are registers."""
    return values[0].recorder.call(function, *values) if isinstance(values[0], Register) else function(*values)


def apply_all(function: Callable[[tuple[Any, ...]], Any], values: Sequence[Any]) -> Any:
    """`function` of a tuple of values, recorded where they are registers."""
    together = apply(_alone, values[0])
    for value in values[1:]:
        together = apply(_with, together, value)
    return apply(function, together)


def _alone(value: Any) -> tuple[Any, ...]:
    return (value,)


def _with(values: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    return (*values, value)


@dataclass(frozen=True, slots=True)
class Times:
    """Multiplication by a number."""

    factor: int | float

    def __call__(self, value: Any) -> Any:
        # Infinity times 0 is no number, and what is taken out of a sum leaves nothing; the gradient is 0 either way.
        return value * self.factor if self.factor else (value * 0).nan_to_num(0.0)
