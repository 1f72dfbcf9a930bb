"""Gradients of formulas written on single numbers, by the chain rule for each operation. Slow, plain, and exact.

x = each(constant, [[0.5, -1.0]])            # nested lists of floats become Numbers
y = [[row[0] * exp(row[1])] for row in x]
backward(y, [[1.0]])                         # gradients(x) is now the gradient of sum(grad_y * y)
"""

import math


class Number:
    """A float that remembers what it was computed from, for reverse-mode differentiation."""

    tape: list["Number"] = []  # in the order of computation

    def __init__(self, value: float, *parents: tuple["Number", float]) -> None:
        self.value, self.parents, self.gradient = value, parents, 0.0  # parents: (number, derivative by it)
        Number.tape.append(self)

    def __add__(self, other):
        other = constant(other)
        return Number(self.value + other.value, (self, 1.0), (other, 1.0))

    def __mul__(self, other):
        other = constant(other)
        return Number(self.value * other.value, (self, other.value), (other, self.value))

    def __truediv__(self, other):
        other = constant(other)
        q = self.value / other.value
        return Number(q, (self, 1 / other.value), (other, -q / other.value))

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self):
        return self * -1.0


def constant(x) -> Number:
    return x if isinstance(x, Number) else Number(float(x))


def exp(x: Number) -> Number:
    y = math.exp(x.value)
    return Number(y, (x, y))


def log(x: Number) -> Number:
    return Number(math.log(x.value), (x, 1 / x.value))


def each(f, value):
    """f of every number in nested lists and dicts."""
    if isinstance(value, dict):
        return {key: each(f, part) for key, part in value.items()}
    return [each(f, part) for part in value] if isinstance(value, list) else f(value)


def flat(value) -> list:
    return [number for part in value for number in flat(part)] if isinstance(value, list) else [value]


def backward(y: list, grad_y: list) -> None:
    """Fill the gradient of sum(grad_y * y) into every Number that y was computed from."""
    for number, gradient in zip(flat(y), flat(grad_y), strict=True):
        number.gradient += gradient
    for number in reversed(Number.tape):
        for parent, derivative in number.parents:
            parent.gradient += derivative * number.gradient
    Number.tape.clear()


def values(value):
    return each(lambda number: number.value, value)


def gradients(value):
    return each(lambda number: number.gradient, value)
