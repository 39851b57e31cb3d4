"""Values as polynomials of others: what additions, multiplications and powers of one value amount to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch_gradflow.objectives.calls import call_name
from torch_gradflow.objectives.program import Call, Slot
from torch_gradflow.objectives.trees import leaves_in

# A polynomial of a higher degree than this is nobody's activation.
_MOST_COEFFICIENTS = 9


class Expansion:
    """Values as polynomials of others."""

    def __init__(self, maker: Mapping[int, Call], n_parameters: int) -> None:
        self._maker, self._n_parameters = maker, n_parameters

    def of(self, slot: int) -> tuple[int, list[float]]:
        """The deepest value of which this one is a polynomial, and its coefficients."""
        call = self._maker.get(slot)
        if call is None or call.in_place or call.kwargs or not call.grad_enabled or call.autocast is not None:
            return slot, [0.0, 1.0]
        name = call_name(call)
        numbers = [isinstance(a, int | float) and not isinstance(a, bool) for a in call.args]
        rule = _POLYNOMIAL.get(name)
        if rule is None or not all(n or isinstance(a, Slot) for n, a in zip(numbers, call.args, strict=True)):
            return slot, [0.0, 1.0]
        polynomials = [self.of(a.index) for a in call.args if isinstance(a, Slot)]
        bases = {base for base, _ in polynomials}
        if len(bases) != 1 or any(base < self._n_parameters for base in bases):
            return slot, [0.0, 1.0]
        of_slots = iter(polynomials)
        values = [[float(a)] if n else next(of_slots)[1] for n, a in zip(numbers, call.args, strict=True)]
        coefficients = rule(*values) if 1 <= len(values) <= 2 else None
        if coefficients is None or len(coefficients) > _MOST_COEFFICIENTS:
            return slot, [0.0, 1.0]
        return bases.pop(), coefficients

    def inside(self, slot: int, base: int) -> set[int]:
        """The values between ``base`` and ``slot``."""
        found: set[int] = set()
        pending = [slot]
        while pending:
            call = self._maker[pending.pop()]
            for leaf in leaves_in(call.args):
                if isinstance(leaf, Slot) and leaf.index != base and leaf.index not in found:
                    found.add(leaf.index)
                    pending.append(leaf.index)
        return found


def _plus(a: list[float], b: list[float]) -> list[float]:
    n = max(len(a), len(b))
    return [(a[i] if i < len(a) else 0.0) + (b[i] if i < len(b) else 0.0) for i in range(n)]


def _times(a: list[float], b: list[float]) -> list[float]:
    product = [0.0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] += x * y
    return product


def _power(a: list[float], exponent: list[float]) -> list[float] | None:
    if len(exponent) != 1 or exponent[0] not in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        return None
    result = a
    for _ in range(int(exponent[0]) - 1):
        result = _times(result, a)
    return result


def _quotient(a: list[float], b: list[float]) -> list[float] | None:
    return [x / b[0] for x in a] if len(b) == 1 and b[0] != 0 else None


def _minus(a: list[float], b: list[float]) -> list[float]:
    return _plus(a, [-x for x in b])


_POLYNOMIAL: dict[str, Callable[..., list[float] | None]] = {
    **dict.fromkeys(("add", "__add__", "__radd__"), _plus),
    "sub": _minus,
    **dict.fromkeys(("rsub", "__rsub__"), lambda a, b: _minus(b, a)),
    **dict.fromkeys(("mul", "__mul__", "__rmul__"), _times),
    **dict.fromkeys(("div", "true_divide"), _quotient),
    **dict.fromkeys(("pow", "__pow__"), _power),
    "square": lambda a: _times(a, a),
    "neg": lambda a: [-x for x in a],
}
