"""Loss and gradient of a perceptron's squared error in double-double arithmetic, rounded to float64 at the very end.

In float64 each sample's f − t is off by a few ε|f|, and so the gradient by a few ε Σ_n w_n |f_n| |∂f_n| even where it is
itself much smaller; sums that are compensated alone would not mend that. Here both passes are computed to 31 digits: what
comes back is the gradient at θ, to half an ulp of its largest elements and to about 1e-31 of what cancelled.

The samples lie, chunk by chunk, in a `Shard` as in `torch_gradflow.perceptron.compiled`; a, g′ and δ need two rows of its
storage each. It stands apart because it is compiled when it is asked for first. After changing that file or
`double_double`, touch this one: see `vector_math.compiled`.
"""

from typing import Any

import numpy as np

from torch_gradflow.perceptron.activations import CODES
from torch_gradflow.perceptron.compiled import (
    BEND,
    BIASES,
    CHUNK,
    CODE,
    COEFFICIENTS,
    COUNT,
    DELTA,
    DEPTH,
    FAN_IN,
    FEATURES,
    FIRST_RUN,
    HEADER,
    LAST_RUN,
    LAYER,
    OUTPUTS,
    PARAMETERS,
    RATE,
    RUN,
    SAMPLES,
    SLOPE,
    START,
    STOP,
    TANGENT,
    TARGET_ROWS,
    VALUE,
    WEIGHTS,
    WIDTH,
    CompiledPerceptron,
    Integers,
    Numbers,
    Shard,
)
from torch_gradflow.perceptron.double_double import (
    Pair,
    add,
    add_product,
    divide,
    exp_and_expm1_of_negative,
    log_one_plus,
    multiply,
    negative,
    paired,
    scaled,
    select,
    subtract,
    two_product,
)
from torch_gradflow.perceptron.vector_math import (
    LANES,
    broadcast,
    compiled,
    inlined,
    load,
    number_at,
    part,
    select_greater,
    store,
)

__all__ = ["ACTIVATIONS", "CompensatedGradient"]

ACTIVATIONS = (
    "identity",
    "relu",
    "leaky_relu",
    "silu",
    "sigmoid",
    "log_sigmoid",
    "tanh",
    "softplus",
    "sigmoid_softplus",
    "square",
    "cube",
    "polynomial",
)
_RELU, _LEAKY_RELU, _SILU, _SIGMOID = CODES["relu"], CODES["leaky_relu"], CODES["silu"], CODES["sigmoid"]
_LOG_SIGMOID, _TANH, _SOFTPLUS = CODES["log_sigmoid"], CODES["tanh"], CODES["softplus"]
_SIGMOID_SOFTPLUS, _SQUARE, _CUBE, _IDENTITY = CODES["sigmoid_softplus"], CODES["square"], CODES["cube"], CODES["identity"]

# Where the low parts stand: in rows of the Shard that hold second derivatives elsewhere.
_VALUE_LOW, _SLOPE_LOW, _DELTA_LOW = TANGENT, BEND, RATE


@inlined
def _load(storage: Numbers, high: int, low: int) -> Pair:
    return load(storage, high), load(storage, low)


@inlined
def _store(storage: Numbers, high: int, low: int, value: Pair) -> None:
    store(storage, high, value[0])
    store(storage, low, value[1])


@inlined
def _one() -> Pair:
    return paired(broadcast(1.0))


@inlined
def _positive(z: Pair) -> Pair:
    """z where z > 0, else 0."""
    return select(z[0], 0.0, z, paired(broadcast(0.0)))


@inlined
def _polynomial(z: Pair, storage: Numbers, coefficients: int, count: int) -> tuple[Pair, Pair]:
    """Horner's scheme for a polynomial and its derivative."""
    value, slope = paired(broadcast(0.0)), paired(broadcast(0.0))
    for i in range(count - 1, -1, -1):
        slope = add(multiply(slope, z), value)
        value = add(multiply(value, z), paired(broadcast(number_at(storage, coefficients + i))))
    return value, slope


@inlined
def _algebraic(code: int, z: Pair, p: float, storage: Numbers, parameters: int, count: int) -> tuple[Pair, Pair]:
    """g and g′ of the activations without exponentials."""
    if code == _IDENTITY:
        return z, _one()
    if code == _RELU:
        return _positive(z), paired(select_greater(z[0], 0.0, 1.0, 0.0))
    if code == _LEAKY_RELU:
        return select(z[0], 0.0, z, scaled(z, broadcast(p))), paired(select_greater(z[0], 0.0, 1.0, p))
    if code == _SQUARE:
        return multiply(z, z), (z[0] * 2.0, z[1] * 2.0)
    if code == _CUBE:
        square = multiply(z, z)
        return multiply(square, z), scaled(square, broadcast(3.0))
    return _polynomial(z, storage, parameters, count)


@inlined
def _exponential(code: int, z: Pair, beta: float, threshold: float) -> tuple[Pair, Pair]:
    """g and g′ of the activations made of e = exp(−|y|), with y = 2z for tanh, beta z for softplus, else z."""
    y = z
    if code == _TANH:
        y = z[0] * 2.0, z[1] * 2.0
    if code == _SOFTPLUS:
        y = scaled(z, broadcast(beta))
    above = y[0]
    e, expm1 = exp_and_expm1_of_negative(select(above, 0.0, negative(y), y))
    larger = divide(_one(), add(_one(), e))
    smaller = multiply(e, larger)
    logistic, other = select(above, 0.0, larger, smaller), select(above, 0.0, smaller, larger)
    bell = multiply(larger, smaller)
    if code == _TANH:
        size = multiply(negative(expm1), larger)
        return select(above, 0.0, size, negative(size)), (bell[0] * 4.0, bell[1] * 4.0)
    if code == _SIGMOID:
        return logistic, bell
    if code == _SILU:
        return multiply(z, logistic), add(logistic, multiply(z, bell))
    logarithm = log_one_plus(e)
    if code == _LOG_SIGMOID:
        return negative(add(_positive(negative(y)), logarithm)), other
    value = add(_positive(y), logarithm)
    if code == _SOFTPLUS:
        value = divide(value, paired(broadcast(beta)))
        return select(above, threshold, z, value), select(above, threshold, _one(), logistic)
    value, slope = select(above, 20.0, z, value), select(above, 20.0, _one(), logistic)
    square = multiply(e, e)
    fourth = multiply(square, square)
    larger = divide(_one(), add(_one(), fourth))
    smaller = multiply(fourth, larger)
    bell = multiply(larger, smaller)
    return add(value, select(above, 0.0, larger, smaller)), add(slope, (bell[0] * 4.0, bell[1] * 4.0))


@part
def _activate_pairs(
    storage: Numbers, code: int, parameters: int, count: int, value: int, value_low: int, slope: int, slope_low: int, size: int
) -> None:
    """g and g′ of `size` numbers z, which stand where g is written to."""
    p, q = storage[parameters], storage[parameters + 1]
    with_exponentials = code in (_SILU, _SIGMOID, _LOG_SIGMOID, _TANH, _SOFTPLUS, _SIGMOID_SOFTPLUS)
    for i in range(0, size, LANES):
        z = _load(storage, value + i, value_low + i)
        if with_exponentials:
            a, s = _exponential(code, z, p, q)
        else:
            a, s = _algebraic(code, z, p, storage, parameters, count)
        _store(storage, value + i, value_low + i, a)
        _store(storage, slope + i, slope_low + i, s)


@part
def _affine_pairs(phi: Numbers, plan: Integers, storage: Numbers, layer: int, x: int, n: int) -> None:
    """z of a layer, to where a will stand."""
    fan_in, weights, biases = plan[layer + FAN_IN], plan[layer + WEIGHTS], plan[layer + BIASES]
    out, low = plan[layer + VALUE], plan[layer + _VALUE_LOW]
    is_first = layer == HEADER
    source = x if is_first else plan[layer - LAYER + VALUE]
    source_low = 0 if is_first else plan[layer - LAYER + _VALUE_LOW]
    for row in range(plan[layer + WIDTH]):
        for i in range(0, n, LANES):
            z = paired(broadcast(phi[biases + row] if biases >= 0 else 0.0))
            for m in range(fan_in):
                weight = broadcast(phi[weights + row * fan_in + m])
                if is_first:
                    z = add(z, two_product(weight, load(storage, source + m * n + i)))
                else:
                    z = add_product(z, _load(storage, source + m * n + i, source_low + m * n + i), weight)
            _store(storage, out + row * n + i, low + row * n + i, z)


@part
def _forward_pairs(phi: Numbers, plan: Integers, storage: Numbers, x: int, n: int) -> None:
    """a and g′ of every layer."""
    for layer in range(HEADER, HEADER + plan[DEPTH] * LAYER, LAYER):
        _affine_pairs(phi, plan, storage, layer, x, n)
        for run in range(plan[layer + FIRST_RUN], plan[layer + LAST_RUN], RUN):
            start, size = plan[run + START] * n, (plan[run + STOP] - plan[run + START]) * n
            value, value_low = plan[layer + VALUE] + start, plan[layer + _VALUE_LOW] + start
            slope, slope_low = plan[layer + SLOPE] + start, plan[layer + _SLOPE_LOW] + start
            parameters, count = plan[run + PARAMETERS], plan[COEFFICIENTS]
            _activate_pairs(storage, plan[run + CODE], parameters, count, value, value_low, slope, slope_low, size)


@inlined
def _gather(sums: Numbers, at: int, total: Pair) -> None:
    """Add the lanes of a sum to those that are kept in `sums`: LANES high parts, then LANES low parts."""
    _store(sums, at, at + LANES, add(_load(sums, at, at + LANES), total))


@part
def _loss_pairs(plan: Integers, storage: Numbers, x: int, n: int, sums: Numbers, at: int) -> None:
    """δ of the output, and the chunk's loss Σ w (f − t)²."""
    layer = HEADER + (plan[DEPTH] - 1) * LAYER
    targets = x + plan[FEATURES] * n
    weights = targets + plan[TARGET_ROWS] * n
    total = paired(broadcast(0.0))
    for row in range(plan[OUTPUTS]):
        for i in range(0, n, LANES):
            place = row * n + i
            f = _load(storage, plan[layer + VALUE] + place, plan[layer + _VALUE_LOW] + place)
            residual = subtract(f, paired(load(storage, targets + place)))
            weighted = scaled(residual, load(storage, weights + i))
            total = add(total, multiply(weighted, residual))
            slope = _load(storage, plan[layer + SLOPE] + place, plan[layer + _SLOPE_LOW] + place)
            delta = multiply((weighted[0] * 2.0, weighted[1] * 2.0), slope)
            _store(storage, plan[layer + DELTA] + place, plan[layer + _DELTA_LOW] + place, delta)
    _gather(sums, at, total)


@part
def _pull_back_pairs(phi: Numbers, plan: Integers, storage: Numbers, layer: int, n: int) -> None:
    """δ of the layer below this one."""
    below = layer - LAYER
    fan_in, weights = plan[layer + FAN_IN], plan[layer + WEIGHTS]
    for m in range(fan_in):
        for i in range(0, n, LANES):
            back = paired(broadcast(0.0))
            for row in range(plan[layer + WIDTH]):
                place = row * n + i
                delta = _load(storage, plan[layer + DELTA] + place, plan[layer + _DELTA_LOW] + place)
                back = add_product(back, delta, broadcast(phi[weights + row * fan_in + m]))
            place = m * n + i
            slope = _load(storage, plan[below + SLOPE] + place, plan[below + _SLOPE_LOW] + place)
            _store(storage, plan[below + DELTA] + place, plan[below + _DELTA_LOW] + place, multiply(back, slope))


@part
def _gradient_pairs(plan: Integers, storage: Numbers, layer: int, x: int, n: int, sums: Numbers) -> None:
    """Add δ_l ã_{l−1}ᵀ."""
    fan_in, weights, biases = plan[layer + FAN_IN], plan[layer + WEIGHTS], plan[layer + BIASES]
    is_first = layer == HEADER
    source = x if is_first else plan[layer - LAYER + VALUE]
    source_low = 0 if is_first else plan[layer - LAYER + _VALUE_LOW]
    for row in range(plan[layer + WIDTH]):
        high, low = plan[layer + DELTA] + row * n, plan[layer + _DELTA_LOW] + row * n
        for m in range(fan_in):
            total = paired(broadcast(0.0))
            for i in range(0, n, LANES):
                delta = _load(storage, high + i, low + i)
                if is_first:
                    total = add_product(total, delta, load(storage, source + m * n + i))
                else:
                    total = add(total, multiply(delta, _load(storage, source + m * n + i, source_low + m * n + i)))
            _gather(sums, 2 * LANES * (weights + row * fan_in + m), total)
        if biases >= 0:
            total = paired(broadcast(0.0))
            for i in range(0, n, LANES):
                total = add(total, _load(storage, high + i, low + i))
            _gather(sums, 2 * LANES * (biases + row), total)


@compiled
def _compensated_kernel(phi: Numbers, plan: Integers, storage: Numbers, sums: Numbers) -> None:
    """The lanes of the gradient's elements and, behind them, of the loss: LANES high parts, LANES low parts of each."""
    sums[:] = 0.0
    rows = plan[FEATURES] + plan[TARGET_ROWS] + 1
    last = HEADER + (plan[DEPTH] - 1) * LAYER
    for first in range(0, plan[COUNT], plan[CHUNK]):
        n = min(plan[CHUNK], plan[COUNT] - first)
        x = plan[SAMPLES] + first * rows
        _forward_pairs(phi, plan, storage, x, n)
        _loss_pairs(plan, storage, x, n, sums, 2 * LANES * phi.size)
        for layer in range(last, HEADER - 1, -LAYER):
            _gradient_pairs(plan, storage, layer, x, n, sums)
            if layer > HEADER:
                _pull_back_pairs(phi, plan, storage, layer, n)


_CHUNK = 64


class CompensatedGradient:
    """Loss and gradient of a perceptron's squared error, accurate to float64's last digit. Only one call at a time.

    Args:
        network: The perceptron, with its data, its loss and activations from ``ACTIVATIONS``.
    """

    def __init__(self, network: CompiledPerceptron) -> None:
        self._network = network
        self._shard = Shard(network, network.samples, _CHUNK, 0)
        self._sums = np.empty(2 * LANES * (network.n_parameters + 1))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are made anew: they must not compute in this one's workspace."""
        return CompensatedGradient, (self._network,)

    def loss_and_gradient(self, phi: Numbers) -> tuple[float, Numbers]:
        """L(φ) and ∇L(φ)."""
        _compensated_kernel(phi, self._shard.plan, self._shard.storage, self._sums)
        high, low = self._sums.reshape(-1, 2, LANES).transpose(1, 2, 0)
        total = np.zeros_like(high[0]), np.zeros_like(high[0])
        for pair in zip(high, low, strict=True):
            total = _sum_of_pairs(total, pair)
        sums = total[0] + total[1]
        return float(sums[-1]), sums[:-1]


def _sum_of_pairs(x: tuple[Numbers, Numbers], y: tuple[Numbers, Numbers]) -> tuple[Numbers, Numbers]:
    """As ``double_double.add``, of arrays."""
    high = x[0] + y[0]
    part = high - x[0]
    low = (x[0] - (high - part)) + (y[0] - part) + (x[1] + y[1])
    total = high + low
    return total, low - (total - high)
