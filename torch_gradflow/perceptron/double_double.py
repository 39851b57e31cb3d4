"""Numbers of twice the precision of float64, for kernels compiled with Numba: about 31 digits.

A value x is the unevaluated sum x_h + x_l of two `Lanes`, |x_l| ≤ ½ ulp(x_h) (Dekker 1971, "A floating-point technique for
extending the available precision"). Operations are correct to a few units of 2⁻¹⁰⁴, relative to their result. The exact sum
of two numbers takes six additions (Knuth, The Art of Computer Programming 2, section 4.2.2), the exact product one fused
multiply-add; neither survives if the compiler contracts what is written, hence `rounded_sum` and the like. In the low parts
of results contraction does no harm.
"""

from typing import TypeAlias

from torch_gradflow.perceptron.vector_math import (
    Lanes,
    broadcast,
    fused,
    inlined,
    log_from_one,
    nearest_integer,
    part,
    power_of_two,
    rounded_difference,
    rounded_product,
    rounded_sum,
    select_greater,
)

__all__ = [
    "Pair",
    "add",
    "add_product",
    "divide",
    "exp_and_expm1_of_negative",
    "log_one_plus",
    "multiply",
    "negative",
    "paired",
    "scaled",
    "select",
    "subtract",
    "two_product",
    "two_sum",
]

Pair: TypeAlias = tuple[Lanes, Lanes]


@inlined
def paired(x: Lanes) -> Pair:
    """x itself."""
    return x, broadcast(0.0)


@inlined
def two_sum(x: Lanes, y: Lanes) -> Pair:
    """x + y, exactly."""
    total = rounded_sum(x, y)
    part = rounded_difference(total, x)
    rest = rounded_difference(total, part)
    return total, rounded_sum(rounded_difference(x, rest), rounded_difference(y, part))


@inlined
def _quick_two_sum(x: Lanes, y: Lanes) -> Pair:
    """x + y, exactly, for |x| ≥ |y|."""
    total = rounded_sum(x, y)
    return total, rounded_difference(y, rounded_difference(total, x))


@inlined
def two_product(x: Lanes, y: Lanes) -> Pair:
    """x y, exactly."""
    product = rounded_product(x, y)
    return product, fused(x, y, rounded_difference(0.0, product))


@part
def add(x: Pair, y: Pair) -> Pair:
    """x + y."""
    high, low = two_sum(x[0], y[0])
    lower, lowest = two_sum(x[1], y[1])
    high, low = _quick_two_sum(high, rounded_sum(low, lower))
    return _quick_two_sum(high, rounded_sum(low, lowest))


@inlined
def negative(x: Pair) -> Pair:
    """−x."""
    return rounded_difference(0.0, x[0]), rounded_difference(0.0, x[1])


@part
def subtract(x: Pair, y: Pair) -> Pair:
    """x − y."""
    return add(x, negative(y))


@part
def multiply(x: Pair, y: Pair) -> Pair:
    """x y."""
    high, low = two_product(x[0], y[0])
    return _quick_two_sum(high, rounded_sum(low, x[0] * y[1] + x[1] * y[0]))


@part
def scaled(x: Pair, factor: Lanes) -> Pair:
    """x times a float64 number."""
    high, low = two_product(x[0], factor)
    return _quick_two_sum(high, rounded_sum(low, x[1] * factor))


@part
def add_product(total: Pair, x: Pair, factor: Lanes) -> Pair:
    """total + x · (a float64 number)."""
    return add(total, scaled(x, factor))


@part
def divide(x: Pair, y: Pair) -> Pair:
    """x / y: the quotient of the high parts, then that of what remains."""
    first = x[0] / y[0]
    rest = subtract(x, scaled(y, first))
    return _quick_two_sum(first, rest[0] / y[0])


@inlined
def select(x: Lanes, y: float, chosen: Pair, otherwise: Pair) -> Pair:
    """In each lane `chosen` where x > y, else `otherwise`."""
    return select_greater(x, y, chosen[0], otherwise[0]), select_greater(x, y, chosen[1], otherwise[1])


_LOG2_E = 1.4426950408889634
_LN2 = (0.6931471805599453, 2.3190468138462996e-17, 5.707708438416212e-34)
_HALVINGS = 8
_EXP_SMALLEST = -700.0


@part
def exp_and_expm1_of_negative(x: Pair) -> tuple[Pair, Pair]:
    """The pair exp(x), exp(x) − 1 for x ≤ 0; exp is 0 below −700.

    x = n ln 2 + 2⁸ r with |r| < 0.0014: expm1(r) by its Taylor series, of which only the first terms need both parts, then
    eight times expm1(2r) = 2 expm1(r) + expm1(r)².
    """
    bounded = select_greater(_EXP_SMALLEST, x[0], _EXP_SMALLEST, x[0]), select_greater(_EXP_SMALLEST, x[0], 0.0, x[1])
    n = nearest_integer(bounded[0] * _LOG2_E)
    reduced = subtract(bounded, two_product(n, broadcast(_LN2[0])))
    reduced = subtract(reduced, two_product(n, broadcast(_LN2[1])))
    reduced = subtract(reduced, paired(n * _LN2[2]))
    shrink = broadcast(1 / 2**_HALVINGS)
    r = reduced[0] * shrink, reduced[1] * shrink
    tail = r[0] * (1 / 5040 + r[0] * (1 / 40320 + r[0] * (1 / 362880 + r[0] * (1 / 3628800)))) + 1 / 720
    series = add((broadcast(0.008333333333333333), broadcast(1.1564823173178714e-19)), scaled(r, tail))
    series = add((broadcast(0.041666666666666664), broadcast(2.3129646346357427e-18)), multiply(r, series))
    series = add((broadcast(0.16666666666666666), broadcast(9.25185853854297e-18)), multiply(r, series))
    series = add(paired(broadcast(0.5)), multiply(r, series))
    expm1 = add(r, multiply(multiply(r, r), series))
    for _ in range(_HALVINGS):
        expm1 = add((expm1[0] * 2.0, expm1[1] * 2.0), multiply(expm1, expm1))
    power = power_of_two(n)
    grown = rounded_product(expm1[0], power), rounded_product(expm1[1], power)
    exp = add(paired(power), grown)
    less = add(two_sum(power, broadcast(-1.0)), grown)
    return select(_EXP_SMALLEST, x[0], paired(broadcast(0.0)), exp), less


@part
def log_one_plus(x: Pair) -> Pair:
    """log(1 + x) for 0 ≤ x ≤ 1, to about 1e-31 absolutely.

    One Newton step from float64's y: log(1 + x) = y + log(1 + w) with w = (1 + x) exp(−y) − 1, about 1e-16.
    """
    grown = add(paired(broadcast(1.0)), x)
    start = log_from_one(select_greater(grown[0], 1.0, grown[0], 1.0))
    inverse, _ = exp_and_expm1_of_negative(paired(0.0 - start))
    w = subtract(multiply(grown, inverse), paired(broadcast(1.0)))
    return add(paired(start), add(w, paired(w[0] * w[0] * -0.5)))
