"""A wiring as straight-line code: what a setup does at one place, recorded once and run in every forward.

The functions that wire adapters are run on registers instead of tensors, and every `+`, `*` and call becomes a step. So
the forward repeats exactly their operations, in their order, without walking through setup and configuration again.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Program:
    """Steps on values; the first values are the arguments, then comes None, then what the steps give."""

    num_arguments: int
    steps: tuple[tuple[Callable[..., Any], int, int | None], ...]
    """A function and the numbers of the one or two values it takes."""
    results: tuple[int] | tuple[int, int]
    """The numbers of the one or two values that are returned, two as a tuple."""

    def __call__(self, *arguments: Any) -> Any:
        values = [*arguments, None]
        for function, left, right in self.steps:
            values.append(function(values[left]) if right is None else function(values[left], values[right]))
        results = self.results
        return values[results[0]] if len(results) == 1 else (values[results[0]], values[results[1]])

    def gives(self, result: int) -> bool:
        """Whether a result is something."""
        return self.results[result] != self.num_arguments

    def reads(self, argument: int) -> bool:
        """Whether an argument has any influence."""
        return argument in self.results or any(argument in step[1:] for step in self.steps)


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
        """What was recorded, returning one or two registers, of which the second may be nothing."""
        numbers = [self._num_arguments if register is None else register.number for register in (result, *second)]
        one_or_two = (numbers[0],) if len(numbers) == 1 else (numbers[0], numbers[1])
        return Program(self._num_arguments, tuple(self._steps), one_or_two)


@dataclass(frozen=True, slots=True)
class Register:
    """A value that a program will have."""

    recorder: Recorder
    number: int

    def __add__(self, other: "Register") -> "Register":
        return self.recorder.call(operator.add, self, other)

    def __mul__(self, factor: int) -> "Register":
        return self.recorder.call(Times(factor), self)


@dataclass(frozen=True, slots=True)
class Times:
    """Multiplication by a whole number."""

    factor: int

    def __call__(self, value: Any) -> Any:
        return value * self.factor
