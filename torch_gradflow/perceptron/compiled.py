"""Derivatives of perceptrons' losses, compiled with Numba for one CPU core or several.

The samples come in chunks that fit into the cache. In a chunk every quantity is a matrix with one row per neuron and one
column per sample (feature-major), so that all arithmetic is on rows: several samples at a time, as `Lanes`. The number of
columns is padded to a multiple of `LANES` with copies of the last sample that have weight 0.

A kernel takes few arguments: the parameters φ, where to write, and the two arrays of a `Shard`, which hold everything else
(see "What the kernels find where"). As each array costs 0.1 µs, and a tensor's array 0.6 µs more, each kernel has a second
form that takes addresses.

Notation: z_l = W_l a_{l−1} + b_l, a_l = g_l(z_l), a_0 = x, f = a_L, and the loss is L = Σ_n w_n ℓ(f_n, t_n).
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_gradflow.perceptron.vector_math import (
    LANES,
    Lanes,
    absolute,
    broadcast,
    compiled,
    erf,
    exp_and_expm1_of_negative,
    exp_of_negative,
    inlined,
    integers_at,
    load,
    log_from_one,
    lower_tail,
    multiply_add,
    number_at,
    numbers_at,
    part,
    select_greater,
    square_root,
    store,
    total,
    twice_artanh,
)

__all__ = ["CompiledPerceptron"]

Numbers: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]
_Derivatives: TypeAlias = tuple[Lanes, Lanes, Lanes]

# --- Activations --------------------------------------------------------------------------------------------
# Each gives g(z), g′(z) and g″(z). What a kernel does not use of them is not computed. At kinks the derivatives are those of
# torch.autograd.

_ROOT_8_OVER_PI = math.sqrt(8 / math.pi)
_INVERSE_ROOT_2_PI = 1 / math.sqrt(2 * math.pi)
_2_OVER_ROOT_PI = 2 / math.sqrt(math.pi)
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


@inlined
def _logistic(z: Lanes) -> tuple[Lanes, Lanes, Lanes, Lanes]:
    """σ(z) = 1/(1 + exp(−z)), σ′ = σ(z) σ(−z), σ″ = σ′ (1 − 2σ), and e = exp(−|z|), by which all are stable."""
    e = exp_of_negative(0.0 - absolute(z))
    larger = 1.0 / (e + 1.0)
    smaller = e * larger
    slope = smaller * larger
    bend = slope * ((e - 1.0) * larger)
    return (
        select_greater(z, 0.0, larger, smaller + (z - z)),
        slope,
        select_greater(z, 0.0, bend, 0.0 - bend),
        e,
    )


@inlined
def _logistic_and_log1p(z: Lanes) -> tuple[Lanes, Lanes, Lanes]:
    """σ(z), σ′(z) and log(1 + exp(−|z|)), with one division for 1/(1 + e) and for the argument e/(2 + e) of the logarithm."""
    e = exp_of_negative(0.0 - absolute(z))
    one_more, two_more = e + 1.0, e + 2.0
    inverse = 1.0 / (one_more * two_more)
    larger = two_more * inverse
    smaller = e * larger
    logarithm = twice_artanh(e * one_more * inverse)
    return select_greater(z, 0.0, larger, smaller + (z - z)), smaller * larger, logarithm


@inlined
def _rectified(z: Lanes, negative_slope: float) -> _Derivatives:
    """z above 0, negative_slope · z below."""
    return select_greater(z, 0.0, z, z * negative_slope), select_greater(z, 0.0, 1.0, negative_slope), broadcast(0.0)


@inlined
def _exponential_linear(z: Lanes, scale: float, depth: float, rate: float) -> _Derivatives:
    """scale · z above 0, depth · (exp(rate · z) − 1) below."""
    exp, expm1 = exp_and_expm1_of_negative(select_greater(z, 0.0, 0.0, z * rate))
    slope = exp * (depth * rate)
    return (
        select_greater(z, 0.0, z * scale, expm1 * depth),
        select_greater(z, 0.0, scale, slope),
        select_greater(0.0, z, slope * rate, 0.0),
    )


@inlined
def _gelu(z: Lanes) -> _Derivatives:
    """z Φ(z), with the normal distribution's Φ and density φ: g′ = Φ + z φ, g″ = (2 − z²) φ."""
    gauss = exp_of_negative(z * z * -0.5)
    tail, density = lower_tail(z, gauss), gauss * _INVERSE_ROOT_2_PI
    return z * tail, multiply_add(z, density, tail), (2.0 - z * z) * density


@inlined
def _gelu_tanh(z: Lanes) -> _Derivatives:
    """z σ(u), u = √(8/π) (z + 0.044715 z³), which is z (1 + tanh(u/2))/2."""
    clipped = select_greater(absolute(z), 30.0, 30.0, z)  # where σ(u) is 0 or 1, and z³ cannot overflow
    clipped = select_greater(-30.0, z, -30.0, clipped)
    square = clipped * clipped
    s, s1, s2, _ = _logistic(clipped * (square * (_ROOT_8_OVER_PI * 0.044715) + _ROOT_8_OVER_PI))
    u1 = square * (3 * 0.044715 * _ROOT_8_OVER_PI) + _ROOT_8_OVER_PI
    u2 = clipped * (6 * 0.044715 * _ROOT_8_OVER_PI)
    s1_u1 = s1 * u1
    return z * s, multiply_add(clipped, s1_u1, s), s1_u1 * 2.0 + clipped * (s2 * u1 * u1 + s1 * u2)


@inlined
def _silu(z: Lanes) -> _Derivatives:
    """z σ(z)."""
    s, s1, s2, _ = _logistic(z)
    return z * s, multiply_add(z, s1, s), s1 * 2.0 + z * s2


@inlined
def _mish(z: Lanes) -> _Derivatives:
    """z t with t = tanh(log(1 + exp z)) = ((1 + exp z)² − 1) / ((1 + exp z)² + 1), t′ = (1 − t²) σ.

    Numerator and denominator of t and 1 − t² are polynomials of exp(−|z|), after division by exp(2z) if z > 0.
    """
    s, s1, _, e = _logistic(z)
    above, below = e * 2.0 + 1.0, e * (e + 2.0)
    inverse = 1.0 / select_greater(z, 0.0, above + e * e * 2.0, below + 2.0)
    t = select_greater(z, 0.0, above, below) * inverse
    both = (e + 1.0) * inverse
    rest = both * both * 4.0 * select_greater(z, 0.0, e * e, 1.0)
    t1 = rest * s
    t2 = rest * (s1 - t * s * s * 2.0)
    return z * t, multiply_add(z, t1, t), t1 * 2.0 + z * t2


@inlined
def _sigmoid(z: Lanes) -> _Derivatives:
    s, s1, s2, _ = _logistic(z)
    return s, s1, s2


@inlined
def _log_sigmoid(z: Lanes) -> _Derivatives:
    """−log(1 + exp(−z))."""
    s, s1, logarithm = _logistic_and_log1p(0.0 - z)
    return select_greater(z, 0.0, 0.0, z) - logarithm, s, 0.0 - s1


@inlined
def _tanh(z: Lanes) -> _Derivatives:
    """−expm1(−2|z|) / (2 + expm1(−2|z|)), with z's sign: accurate around 0, too."""
    exp, expm1 = exp_and_expm1_of_negative(absolute(z) * -2.0)
    inverse = 1.0 / (exp + 1.0)
    size = (0.0 - expm1) * inverse
    t = select_greater(z, 0.0, size, 0.0 - size)
    slope = exp * 4.0 * inverse * inverse
    return t, slope, t * slope * -2.0


@inlined
def _softplus(z: Lanes, beta: float, threshold: float) -> _Derivatives:
    """log(1 + exp(beta z)) / beta; z where beta z > threshold, as in torch."""
    y = z * beta
    s, s1, logarithm = _logistic_and_log1p(y)
    value = (select_greater(y, 0.0, y, 0.0) + logarithm) * (1.0 / beta)
    return (
        select_greater(y, threshold, z, value),
        select_greater(y, threshold, 1.0, s),
        select_greater(y, threshold, 0.0, s1 * beta),
    )


@inlined
def _softsign(z: Lanes) -> _Derivatives:
    """z / (1 + |z|)."""
    inverse = 1.0 / (absolute(z) + 1.0)
    value = z * inverse
    square = inverse * inverse
    return value, square, square * inverse * select_greater(z, 0.0, -2.0, select_greater(0.0, z, 2.0, 0.0))


@inlined
def _error_function(z: Lanes) -> _Derivatives:
    gauss = exp_of_negative(0.0 - z * z)
    slope = gauss * _2_OVER_ROOT_PI
    return erf(z, gauss), slope, z * slope * -2.0


@inlined
def _normal_cdf(z: Lanes) -> _Derivatives:
    gauss = exp_of_negative(z * z * -0.5)
    slope = gauss * _INVERSE_ROOT_2_PI
    return lower_tail(z, gauss), slope, 0.0 - z * slope


@inlined
def _sigmoid_and_softplus(z: Lanes) -> _Derivatives:
    """σ(4z) + softplus(z), with torch's threshold; exp(−4|z|) is a power of exp(−|z|)."""
    a, a1, a2 = _softplus(z, 1.0, 20.0)
    s, s1, s2, _ = _logistic(z * 4.0)
    return a + s, multiply_add(s1, 4.0, a1), multiply_add(s2, 16.0, a2)


@inlined
def _polynomial(z: Lanes, storage: Numbers, coefficients: int, count: int) -> _Derivatives:
    """Horner's scheme for a polynomial with ascending coefficients, and for its derivatives."""
    value, slope, half_bend = broadcast(0.0), broadcast(0.0), broadcast(0.0)
    for i in range(count - 1, -1, -1):
        half_bend = multiply_add(half_bend, z, slope)
        slope = multiply_add(slope, z, value)
        value = multiply_add(value, z, number_at(storage, coefficients + i))
    return value, slope, half_bend * 2.0


@inlined
def _activation(code: int, z: Lanes, p: float, q: float, storage: Numbers, parameters: int, count: int) -> _Derivatives:
    """The activation with this code, and with the parameters p, q, ... that stand in the storage."""
    if code == 0:
        return z, broadcast(1.0), broadcast(0.0)
    if code == 1:
        return select_greater(0.0, z, 0.0, z), select_greater(z, 0.0, 1.0, 0.0), broadcast(0.0)
    if code == 2:
        return _rectified(z, p)
    if code <= 5:  # ELU, SELU, CELU
        scale = _SELU_SCALE if code == 4 else 1.0
        depth = _SELU_SCALE * _SELU_ALPHA if code == 4 else p
        return _exponential_linear(z, scale, depth, 1.0 / p if code == 5 else 1.0)
    if code == 6:
        return _gelu(z)
    if code == 7:
        return _gelu_tanh(z)
    if code == 8:
        return _silu(z)
    if code == 9:
        return _mish(z)
    if code == 10:
        return _sigmoid(z)
    if code == 11:
        return _log_sigmoid(z)
    if code == 12:
        return _tanh(z)
    if code == 13:
        return _softplus(z, p, q)
    if code == 14:
        return _softsign(z)
    if code == 15:
        return _error_function(z)
    if code == 16:
        return _normal_cdf(z)
    if code == 17:
        return _sigmoid_and_softplus(z)
    if code == 18:
        return z * z, z * 2.0, broadcast(2.0)
    if code == 19:
        return z * z * z, z * z * 3.0, z * 6.0
    return _polynomial(z, storage, parameters, count)


@part
def _activate(storage: Numbers, code: int, parameters: int, count: int, z: int, value: int, slope: int, size: int) -> None:
    """g and g′ of `size` numbers at z."""
    p, q = storage[parameters], storage[parameters + 1]
    for i in range(0, size, LANES):
        a, s, _ = _activation(code, load(storage, z + i), p, q, storage, parameters, count)
        store(storage, value + i, a)
        store(storage, slope + i, s)


@part
def _activate_twice(
    storage: Numbers, code: int, parameters: int, count: int, z: int, value: int, slope: int, bend: int, size: int
) -> None:
    """g, g′ and g″ of `size` numbers at z."""
    p, q = storage[parameters], storage[parameters + 1]
    for i in range(0, size, LANES):
        a, s, c = _activation(code, load(storage, z + i), p, q, storage, parameters, count)
        store(storage, value + i, a)
        store(storage, slope + i, s)
        store(storage, bend + i, c)


# --- What the kernels find where ----------------------------------------------------------------------------
# A plan is an array of integers: a header, a record per layer, a record per run of neurons with the same activation. "Place"
# means an index into the storage, an array of float64 numbers.

DEPTH, LOSS, FEATURES, OUTPUTS, TARGET_ROWS = 0, 1, 2, 3, 4
COUNT = 5  # samples, with those of the padding
CHUNK = 6  # columns of a chunk; the last one may have fewer
SAMPLES = 7  # place of the samples: for each chunk the rows of x, of the targets, and of the weights
LOSS_PARAMETER = 8  # its place
COEFFICIENTS = 9  # numbers in the parameters of an activation
SCRATCH = 10  # place of _SCRATCH_SIZE numbers, or of a row if that is longer
PULL = 11  # place of w ℓ′ for each output
CURVATURE = 12  # place of ℓ″ for each output, and one row more; see loss_of_chunk
ROWS = 13  # place of _ROWS_COUNT more rows
WORKSPACE = 14  # place of the rows that the kernels of Hessians want
PARAMETER_COUNT = 15  # P
HEADER = 16

FAN_IN, WIDTH, WEIGHTS, BIASES = 0, 1, 2, 3  # the latter two as indices into φ; −1 without biases
VALUE, SLOPE, BEND = 4, 5, 6  # places of a, g′ and g″
DELTA, RATE, TANGENT = 7, 8, 9  # places of ∂L/∂z, and of the changes of z and a along a vector
FIRST_RUN, LAST_RUN = 10, 11  # indices into the plan
LAYER = 12

START, STOP, CODE, PARAMETERS = 0, 1, 2, 3  # neurons of the layer; the latter a place
RUN = 4

_SCRATCH_SIZE = 1024
_ROWS_COUNT = 6
_PANEL = 8  # columns of the Hessian at a time
TILE = 32  # rows and columns of the blocks that are transposed
_BLOCK = 12  # rows at a time in the backward pass


# --- Products of matrices -----------------------------------------------------------------------------------


@inlined
def _add_weighted_rows(
    sums: tuple[Lanes, Lanes, Lanes, Lanes],
    weights: Numbers,
    first: int,
    across: int,
    along: int,
    storage: Numbers,
    column: int,
    stride: int,
    count: int,
) -> tuple[Lanes, Lanes, Lanes, Lanes]:
    """Four sums, r = 0..3, plus Σ_m weights[first + r · across + m · along] · (some columns of row m)."""
    a, b, c, d = sums
    for m in range(count):
        x = load(storage, column + m * stride)
        weight = first + m * along
        a = multiply_add(number_at(weights, weight), x, a)
        b = multiply_add(number_at(weights, weight + across), x, b)
        c = multiply_add(number_at(weights, weight + 2 * across), x, c)
        d = multiply_add(number_at(weights, weight + 3 * across), x, d)
    return a, b, c, d


@inlined
def _add_weighted_row(
    start: Lanes, weights: Numbers, first: int, along: int, storage: Numbers, column: int, stride: int, count: int
) -> Lanes:
    """The first of the sums of `_add_weighted_rows`; in four parts, so that the additions need not wait for one another."""
    a, b, c, d = start, broadcast(0.0), broadcast(0.0), broadcast(0.0)
    m = 0
    while m + 4 <= count:
        weight, x = first + m * along, column + m * stride
        a = multiply_add(number_at(weights, weight), load(storage, x), a)
        b = multiply_add(number_at(weights, weight + along), load(storage, x + stride), b)
        c = multiply_add(number_at(weights, weight + 2 * along), load(storage, x + 2 * stride), c)
        d = multiply_add(number_at(weights, weight + 3 * along), load(storage, x + 3 * stride), d)
        m += 4
    for last in range(m, count):
        a = multiply_add(number_at(weights, first + last * along), load(storage, column + last * stride), a)
    return (a + b) + (c + d)


@inlined
def _bias(phi: Numbers, biases: int, row: int) -> float:
    return number_at(phi, biases + row) if biases >= 0 else 0.0


@part
def _affine(
    phi: Numbers,
    weights: int,
    biases: int,
    fan_in: int,
    storage: Numbers,
    source: int,
    n: int,
    start: int,
    stop: int,
    out: int,
) -> None:
    """Rows start..stop−1 of W a + b, written from `out` on."""
    row = start
    while row + 4 <= stop:
        offsets = (
            broadcast(_bias(phi, biases, row)),
            broadcast(_bias(phi, biases, row + 1)),
            broadcast(_bias(phi, biases, row + 2)),
            broadcast(_bias(phi, biases, row + 3)),
        )
        for i in range(0, n, LANES):
            a, b, c, d = _add_weighted_rows(offsets, phi, weights + row * fan_in, fan_in, 1, storage, source + i, n, fan_in)
            store(storage, out + i, a)
            store(storage, out + n + i, b)
            store(storage, out + 2 * n + i, c)
            store(storage, out + 3 * n + i, d)
        row += 4
        out += 4 * n
    for last in range(row, stop):
        offset = broadcast(_bias(phi, biases, last))
        for i in range(0, n, LANES):
            z = _add_weighted_row(offset, phi, weights + last * fan_in, 1, storage, source + i, n, fan_in)
            store(storage, out + (last - row) * n + i, z)


@inlined
def _inner_3_by_2(storage: Numbers, x: int, y: int, n: int) -> tuple[float, float, float, float, float, float]:
    """The inner products of three rows from x on with two from y on.

    The six sums and what is multiplied fit into AVX2's sixteen registers; with four rows it was slower by a quarter there, and
    no faster with AVX-512.
    """
    a = b = c = d = e = f = broadcast(0.0)
    for i in range(0, n, LANES):
        p, q = load(storage, y + i), load(storage, y + n + i)
        r = load(storage, x + i)
        a, b = multiply_add(r, p, a), multiply_add(r, q, b)
        r = load(storage, x + n + i)
        c, d = multiply_add(r, p, c), multiply_add(r, q, d)
        r = load(storage, x + 2 * n + i)
        e, f = multiply_add(r, p, e), multiply_add(r, q, f)
    return total(a), total(b), total(c), total(d), total(e), total(f)


@inlined
def _inner_4_by_1(storage: Numbers, x: int, y: int, n: int) -> tuple[float, float, float, float]:
    """The inner products of four rows from x on with the row y."""
    a = b = c = d = broadcast(0.0)
    for i in range(0, n, LANES):
        p = load(storage, y + i)
        a = multiply_add(load(storage, x + i), p, a)
        b = multiply_add(load(storage, x + n + i), p, b)
        c = multiply_add(load(storage, x + 2 * n + i), p, c)
        d = multiply_add(load(storage, x + 3 * n + i), p, d)
    return total(a), total(b), total(c), total(d)


@inlined
def _inner(storage: Numbers, x: int, y: int, n: int) -> float:
    """The inner product of two rows."""
    sum_ = broadcast(0.0)
    for i in range(0, n, LANES):
        sum_ = multiply_add(load(storage, x + i), load(storage, y + i), sum_)
    return float(total(sum_))


@inlined
def _row_sum(storage: Numbers, x: int, n: int) -> float:
    sum_ = broadcast(0.0)
    for i in range(0, n, LANES):
        sum_ = sum_ + load(storage, x + i)
    return float(total(sum_))


@part
def add_outer(
    out: Numbers, at: int, stride: int, step: int, storage: Numbers, x: int, rows: int, y: int, columns: int, n: int
) -> None:
    """Add X Yᵀ, for matrices with the rows from x and from y on, to a matrix that stands in `out` from `at` on.

    Its rows are `stride` apart, its columns `step`.
    """
    r = 0
    while r + 3 <= rows:
        m = 0
        while m + 2 <= columns:
            a, b, c, d, e, f = _inner_3_by_2(storage, x + r * n, y + m * n, n)
            place = at + r * stride + m * step
            out[place] += a
            out[place + step] += b
            out[place + stride] += c
            out[place + stride + step] += d
            out[place + 2 * stride] += e
            out[place + 2 * stride + step] += f
            m += 2
        if m < columns:
            for row in range(r, r + 3):
                out[at + row * stride + m * step] += _inner(storage, x + row * n, y + m * n, n)
        r += 3
    for last in range(r, rows):
        m = 0
        while m + 4 <= columns:
            a, b, c, d = _inner_4_by_1(storage, y + m * n, x + last * n, n)
            place = at + last * stride + m * step
            out[place] += a
            out[place + step] += b
            out[place + 2 * step] += c
            out[place + 3 * step] += d
            m += 4
        for column in range(m, columns):
            out[at + last * stride + column * step] += _inner(storage, x + last * n, y + column * n, n)


@part
def add_row_sums(out: Numbers, at: int, storage: Numbers, x: int, rows: int, n: int) -> None:
    """Add the sum of each row from x on to `out`, from `at` on."""
    for r in range(rows):
        out[at + r] += _row_sum(storage, x + r * n, n)


# --- Losses -------------------------------------------------------------------------------------------------


@inlined
def _squared_error(f: Lanes, target: Lanes) -> _Derivatives:
    residual = f - target
    return residual * residual, residual * 2.0, broadcast(2.0)


@inlined
def _binary_cross_entropy(f: Lanes, positive: Lanes, negative: Lanes) -> _Derivatives:
    """a log(1 + exp(−f)) + b log(1 + exp f)."""
    s, s1, logarithm = _logistic_and_log1p(f)
    opposite = _logistic(0.0 - f)[0]
    value = positive * (select_greater(f, 0.0, 0.0, 0.0 - f) + logarithm)
    value = value + negative * (select_greater(f, 0.0, f, 0.0) + logarithm)
    return value, negative * s - positive * opposite, (positive + negative) * s1


@inlined
def _huber(f: Lanes, target: Lanes, delta: float) -> _Derivatives:
    """r²/2 for |r| ≤ δ, else δ (|r| − δ/2)."""
    residual = f - target
    size = absolute(residual)
    bounded = select_greater(residual, delta, delta, select_greater(-delta, residual, -delta, residual))
    value = select_greater(size, delta, (size - 0.5 * delta) * delta, residual * residual * 0.5)
    return value, bounded, select_greater(size, delta, 0.0, 1.0)


@part
def _separable_loss(plan: Integers, storage: Numbers, f: int, targets: int, n: int) -> float:
    """Σ w ℓ for a loss that is a sum over outputs; writes w ℓ′ to PULL and w ℓ″ to CURVATURE."""
    code, outputs, pull, curvature = plan[LOSS], plan[OUTPUTS], plan[PULL], plan[CURVATURE]
    weights = targets + plan[TARGET_ROWS] * n
    delta = storage[plan[LOSS_PARAMETER]]
    sum_ = broadcast(0.0)
    for row in range(outputs):
        for i in range(0, n, LANES):
            place = row * n + i
            output, target = load(storage, f + place), load(storage, targets + place)
            if code == 0:
                value, slope, bend = _squared_error(output, target)
            elif code == 2:
                value, slope, bend = _binary_cross_entropy(output, target, load(storage, targets + outputs * n + place))
            else:
                value, slope, bend = _huber(output, target, delta)
            weight = load(storage, weights + i)
            sum_ = multiply_add(weight, value, sum_)
            store(storage, pull + place, weight * slope)
            store(storage, curvature + place, weight * bend)
    return float(total(sum_))


@part
def _cross_entropy(plan: Integers, storage: Numbers, f: int, targets: int, n: int) -> float:
    """Σ w ℓ with ℓ = Σ_c t_c (log Σ_d exp f_d − f_c), and w ℓ′ = w (T p − t) to PULL, with T = Σ_c t_c and p = softmax(f).

    Writes p to the rows of CURVATURE and w T to the row behind them: the second derivative is w T (diag(p) − p pᵀ).
    """
    outputs, pull, curvature = plan[OUTPUTS], plan[PULL], plan[CURVATURE]
    weights = targets + outputs * n
    sum_ = broadcast(0.0)
    for i in range(0, n, LANES):
        largest = load(storage, f + i)
        for row in range(1, outputs):
            output = load(storage, f + row * n + i)
            largest = select_greater(output, largest, output, largest)
        normalizer, mass, distance = broadcast(0.0), broadcast(0.0), broadcast(0.0)
        for row in range(outputs):
            below = load(storage, f + row * n + i) - largest
            target = load(storage, targets + row * n + i)
            e = exp_of_negative(below)
            store(storage, curvature + row * n + i, e)
            normalizer = normalizer + e
            mass = mass + target
            # A target of 0 does not mind an output of −∞.
            distance = distance + select_greater(target, 0.0, target * below, target * (largest - largest))
        weight = load(storage, weights + i)
        sum_ = multiply_add(weight, mass * log_from_one(normalizer) - distance, sum_)
        inverse = 1.0 / normalizer
        for row in range(outputs):
            share = load(storage, curvature + row * n + i) * inverse
            store(storage, curvature + row * n + i, share)
            store(storage, pull + row * n + i, weight * (mass * share - load(storage, targets + row * n + i)))
        store(storage, curvature + outputs * n + i, weight * mass)
    return float(total(sum_))


@part
def loss_of_chunk(plan: Integers, storage: Numbers, f: int, targets: int, n: int) -> float:
    """The chunk's part of the loss, and its derivatives with respect to the outputs f."""
    if plan[LOSS] == 1:
        return _cross_entropy(plan, storage, f, targets, n)
    return _separable_loss(plan, storage, f, targets, n)


# --- Forward and backward -----------------------------------------------------------------------------------


@part
def forward_pass(phi: Numbers, plan: Integers, storage: Numbers, x: int, n: int, twice: bool) -> None:
    """a and g′ of every layer, with `twice` also g″, for the n samples with rows from x on."""
    source, scratch = x, plan[SCRATCH]
    group = max(_SCRATCH_SIZE // n, 1)
    for layer in range(HEADER, HEADER + plan[DEPTH] * LAYER, LAYER):
        weights, biases, fan_in = plan[layer + WEIGHTS], plan[layer + BIASES], plan[layer + FAN_IN]
        for run in range(plan[layer + FIRST_RUN], plan[layer + LAST_RUN], RUN):
            code, parameters, count, end = plan[run + CODE], plan[run + PARAMETERS], plan[COEFFICIENTS], plan[run + STOP]
            for start in range(plan[run + START], end, group):
                stop = min(start + group, end)
                _affine(phi, weights, biases, fan_in, storage, source, n, start, stop, scratch)
                size = (stop - start) * n
                value, slope = plan[layer + VALUE] + start * n, plan[layer + SLOPE] + start * n
                if twice:
                    bend = plan[layer + BEND] + start * n
                    _activate_twice(storage, code, parameters, count, scratch, value, slope, bend, size)
                else:
                    _activate(storage, code, parameters, count, scratch, value, slope, size)
        source = plan[layer + VALUE]


@part
def multiply(storage: Numbers, out: int, x: int, y: int, size: int) -> None:
    """Products of numbers at x and y, elementwise."""
    for i in range(0, size, LANES):
        store(storage, out + i, load(storage, x + i) * load(storage, y + i))


@part
def pull_back(
    phi: Numbers, weights: int, fan_in: int, width: int, storage: Numbers, delta: int, n: int, rows: int, factor: int, out: int
) -> None:
    """Some rows of Wᵀ δ, times the rows of `factor`: ∂L/∂z of the layer before, if these are that layer's g′.

    W is the matrix from `weights` on, of `fan_in` columns, of which the first `rows` matter.
    """
    row = 0
    zero = broadcast(0.0)
    while row + 4 <= rows:
        for i in range(0, n, LANES):
            place = row * n + i
            a, b, c, d = _add_weighted_rows(
                (zero, zero, zero, zero), phi, weights + row, 1, fan_in, storage, delta + i, n, width
            )
            store(storage, out + place, a * load(storage, factor + place))
            store(storage, out + place + n, b * load(storage, factor + place + n))
            store(storage, out + place + 2 * n, c * load(storage, factor + place + 2 * n))
            store(storage, out + place + 3 * n, d * load(storage, factor + place + 3 * n))
        row += 4
    for last in range(row, rows):
        for i in range(0, n, LANES):
            place = last * n + i
            a = _add_weighted_row(zero, phi, weights + last, fan_in, storage, delta + i, n, width)
            store(storage, out + place, a * load(storage, factor + place))


@part
def _backward(phi: Numbers, plan: Integers, storage: Numbers, x: int, n: int, gradient: Numbers) -> None:
    """Add the chunk's part of the gradient; ∂L/∂z takes the place of g′.

    What is done with a row of a and ∂L/∂z is done for few rows at a time, while they are in the first-level cache.
    """
    last = HEADER + (plan[DEPTH] - 1) * LAYER
    multiply(storage, plan[last + SLOPE], plan[last + SLOPE], plan[PULL], plan[last + WIDTH] * n)
    if plan[last + BIASES] >= 0:
        add_row_sums(gradient, plan[last + BIASES], storage, plan[last + SLOPE], plan[last + WIDTH], n)
    for layer in range(last, HEADER, -LAYER):
        earlier = layer - LAYER
        fan_in, width, delta = plan[layer + FAN_IN], plan[layer + WIDTH], plan[layer + SLOPE]
        for row in range(0, fan_in, _BLOCK):
            rows = min(_BLOCK, fan_in - row)
            weights, slope = plan[layer + WEIGHTS] + row, plan[earlier + SLOPE] + row * n
            add_outer(gradient, weights, fan_in, 1, storage, delta, width, plan[earlier + VALUE] + row * n, rows, n)
            pull_back(phi, weights, fan_in, width, storage, delta, n, rows, slope, slope)
            if earlier == HEADER:
                features = plan[FEATURES]
                at = plan[earlier + WEIGHTS] + row * features
                add_outer(gradient, at, features, 1, storage, slope, rows, x, features, n)
            if plan[earlier + BIASES] >= 0:
                add_row_sums(gradient, plan[earlier + BIASES] + row, storage, slope, rows, n)
    if last == HEADER:
        features = plan[FEATURES]
        add_outer(gradient, plan[last + WEIGHTS], features, 1, storage, plan[last + SLOPE], plan[OUTPUTS], x, features, n)


@compiled
def _gradient_kernel(phi: Numbers, gradient: Numbers, plan: Integers, storage: Numbers, add: bool) -> float:
    """The loss of a shard; its gradient is written, or added to what is there."""
    if not add:
        gradient[:] = 0.0
    loss = 0.0
    rows = plan[FEATURES] + plan[TARGET_ROWS] + 1
    output = plan[HEADER + (plan[DEPTH] - 1) * LAYER + VALUE]
    for first in range(0, plan[COUNT], plan[CHUNK]):
        n = min(plan[CHUNK], plan[COUNT] - first)
        x = plan[SAMPLES] + first * rows
        forward_pass(phi, plan, storage, x, n, False)
        loss += loss_of_chunk(plan, storage, output, x + plan[FEATURES] * n, n)
        _backward(phi, plan, storage, x, n, gradient)
    return loss


@compiled
def _gradient_at(
    phi: int, gradient: int, loss: int, order: int, plan: int, plan_size: int, storage: int, storage_size: int
) -> None:
    """The same of a shard with all samples, by addresses, with P = order; the loss is written, too."""
    numbers_at(loss, 1)[0] = _gradient_kernel(
        numbers_at(phi, order),
        numbers_at(gradient, order),
        integers_at(plan, plan_size),
        numbers_at(storage, storage_size),
        False,
    )


@compiled
def _gradients_at(
    phis: int, gradients: int, losses: int, count: int, order: int, plan: int, plan_size: int, storage: int, storage_size: int
) -> None:
    """The same at so many points, one after the other in memory, as are what is written."""
    step = 8 * order
    for i in range(count):
        _gradient_at(phis + i * step, gradients + i * step, losses + 8 * i, order, plan, plan_size, storage, storage_size)


# --- Hessian–vector products --------------------------------------------------------------------------------
# Pearlmutter's R-operator (Neural Computation 6, 1994). Along a vector V, W → W + ε V, the quantities z, a and δ = ∂L/∂z
# change at the rates
#   Rz_l = V_l a_{l−1} + W_l Ra_{l−1},  Ra_l = g′ Rz_l,
#   Rδ_l = g″ (W_{l+1}ᵀ δ_{l+1}) Rz_l + g′ (W_{l+1}ᵀ Rδ_{l+1} + V_{l+1}ᵀ δ_{l+1}),
# and the product's part for W_l is Rδ_l a_{l−1}ᵀ + δ_l Ra_{l−1}ᵀ. Only g″ (Wᵀ δ), which takes the place of g″, a, g′ and δ are
# needed for this, thus one forward and one backward pass serve all vectors.


@inlined
def _store_bent(storage: Numbers, sum_: Lanes, place: int, slope: int, bend: int, delta: int) -> None:
    """From part of Wᵀ δ that of g′ (Wᵀ δ), and of g″ (Wᵀ δ) in place of g″."""
    store(storage, delta + place, sum_ * load(storage, slope + place))
    store(storage, bend + place, sum_ * load(storage, bend + place))


@part
def _bend_back_through(phi: Numbers, plan: Integers, storage: Numbers, layer: int, n: int) -> None:
    """δ and g″ (Wᵀ δ) of a layer from δ of the next one, whose weights are W."""
    later = layer + LAYER
    weights, width, later_width = plan[later + WEIGHTS], plan[layer + WIDTH], plan[later + WIDTH]
    slope, bend, delta, later_delta = plan[layer + SLOPE], plan[layer + BEND], plan[layer + DELTA], plan[later + DELTA]
    zero = broadcast(0.0)
    row = 0
    while row + 4 <= width:
        for i in range(0, n, LANES):
            sums = _add_weighted_rows(
                (zero, zero, zero, zero), phi, weights + row, 1, width, storage, later_delta + i, n, later_width
            )
            for r in range(4):
                _store_bent(storage, sums[r], (row + r) * n + i, slope, bend, delta)
        row += 4
    for last in range(row, width):
        for i in range(0, n, LANES):
            sum_ = _add_weighted_row(zero, phi, weights + last, width, storage, later_delta + i, n, later_width)
            _store_bent(storage, sum_, last * n + i, slope, bend, delta)


@part
def bend_back(phi: Numbers, plan: Integers, storage: Numbers, n: int) -> None:
    """δ of every layer, and g″ (Wᵀ δ) in place of g″."""
    last = HEADER + (plan[DEPTH] - 1) * LAYER
    size = plan[last + WIDTH] * n
    multiply(storage, plan[last + BEND], plan[last + BEND], plan[PULL], size)
    multiply(storage, plan[last + DELTA], plan[last + SLOPE], plan[PULL], size)
    for layer in range(last - LAYER, HEADER - 1, -LAYER):
        _bend_back_through(phi, plan, storage, layer, n)


@part
def _tangents(phi: Numbers, vectors: Numbers, at: int, plan: Integers, storage: Numbers, layer: int, x: int, n: int) -> None:
    """Rz and Ra of a layer, for the vector that stands in `vectors` from `at` on."""
    weights, biases, fan_in, width = plan[layer + WEIGHTS], plan[layer + BIASES], plan[layer + FAN_IN], plan[layer + WIDTH]
    slope, rate, tangent = plan[layer + SLOPE], plan[layer + RATE], plan[layer + TANGENT]
    is_first = layer == HEADER
    source = x if is_first else plan[layer - LAYER + VALUE]
    moved = 0 if is_first else plan[layer - LAYER + TANGENT]
    moving = 0 if is_first else fan_in  # inputs that change themselves
    directions, shifts = at + weights, at + biases if biases >= 0 else -1
    row = 0
    while row + 4 <= width:
        start = (
            broadcast(_bias(vectors, shifts, row)),
            broadcast(_bias(vectors, shifts, row + 1)),
            broadcast(_bias(vectors, shifts, row + 2)),
            broadcast(_bias(vectors, shifts, row + 3)),
        )
        skipped = row * fan_in
        for i in range(0, n, LANES):
            sums = _add_weighted_rows(start, vectors, directions + skipped, fan_in, 1, storage, source + i, n, fan_in)
            sums = _add_weighted_rows(sums, phi, weights + skipped, fan_in, 1, storage, moved + i, n, moving)
            place = row * n + i
            for r in range(4):
                store(storage, rate + place + r * n, sums[r])
                store(storage, tangent + place + r * n, sums[r] * load(storage, slope + place + r * n))
        row += 4
    for last in range(row, width):
        shift = broadcast(_bias(vectors, shifts, last))
        skipped = last * fan_in
        for i in range(0, n, LANES):
            sum_ = _add_weighted_row(shift, vectors, directions + skipped, 1, storage, source + i, n, fan_in)
            sum_ = _add_weighted_row(sum_, phi, weights + skipped, 1, storage, moved + i, n, moving)
            place = last * n + i
            store(storage, rate + place, sum_)
            store(storage, tangent + place, sum_ * load(storage, slope + place))


@part
def _rates_of_output(plan: Integers, storage: Numbers, n: int) -> None:
    """Rδ of the last layer, in place of Rz; the loss' second derivative times Ra on the way."""
    layer = HEADER + (plan[DEPTH] - 1) * LAYER
    tangent, rate, slope, bend = plan[layer + TANGENT], plan[layer + RATE], plan[layer + SLOPE], plan[layer + BEND]
    outputs, curvature = plan[OUTPUTS], plan[CURVATURE]
    for i in range(0, n, LANES):
        mean, mass = broadcast(0.0), broadcast(1.0)
        if plan[LOSS] == 1:  # w T (diag(p) − p pᵀ), else diagonal
            mass = load(storage, curvature + outputs * n + i)
            for row in range(outputs):
                place = row * n + i
                mean = multiply_add(load(storage, curvature + place), load(storage, tangent + place), mean)
        for row in range(outputs):
            place = row * n + i
            pulled = load(storage, curvature + place) * mass * (load(storage, tangent + place) - mean)
            bent = load(storage, bend + place) * load(storage, rate + place)
            store(storage, rate + place, multiply_add(load(storage, slope + place), pulled, bent))


@part
def _rates(phi: Numbers, vectors: Numbers, at: int, plan: Integers, storage: Numbers, layer: int, n: int) -> None:
    """Rδ of a layer before the last, in place of Rz."""
    later = layer + LAYER
    weights, width, later_width = plan[later + WEIGHTS], plan[layer + WIDTH], plan[later + WIDTH]
    rate, slope, bend = plan[layer + RATE], plan[layer + SLOPE], plan[layer + BEND]
    later_rate, later_delta = plan[later + RATE], plan[later + DELTA]
    zero = broadcast(0.0)
    row = 0
    while row + 4 <= width:
        for i in range(0, n, LANES):
            sums = _add_weighted_rows(
                (zero, zero, zero, zero), phi, weights + row, 1, width, storage, later_rate + i, n, later_width
            )
            sums = _add_weighted_rows(sums, vectors, at + weights + row, 1, width, storage, later_delta + i, n, later_width)
            for r in range(4):
                place = (row + r) * n + i
                bent = load(storage, bend + place) * load(storage, rate + place)
                store(storage, rate + place, multiply_add(load(storage, slope + place), sums[r], bent))
        row += 4
    for last in range(row, width):
        for i in range(0, n, LANES):
            place = last * n + i
            sum_ = _add_weighted_row(zero, phi, weights + last, width, storage, later_rate + i, n, later_width)
            sum_ = _add_weighted_row(sum_, vectors, at + weights + last, width, storage, later_delta + i, n, later_width)
            bent = load(storage, bend + place) * load(storage, rate + place)
            store(storage, rate + place, multiply_add(load(storage, slope + place), sum_, bent))


@part
def _add_product(
    phi: Numbers, vectors: Numbers, at: int, plan: Integers, storage: Numbers, x: int, n: int, products: Numbers
) -> None:
    """Add the chunk's part of the Hessian times the vector from `at` on."""
    last = HEADER + (plan[DEPTH] - 1) * LAYER
    for layer in range(HEADER, last + 1, LAYER):
        _tangents(phi, vectors, at, plan, storage, layer, x, n)
    for layer in range(last, HEADER - 1, -LAYER):
        if layer == last:
            _rates_of_output(plan, storage, n)
        else:
            _rates(phi, vectors, at, plan, storage, layer, n)
        fan_in, width = plan[layer + FAN_IN], plan[layer + WIDTH]
        rate, weights = plan[layer + RATE], at + plan[layer + WEIGHTS]
        if layer == HEADER:
            add_outer(products, weights, fan_in, 1, storage, rate, width, x, fan_in, n)
        else:
            value, tangent = plan[layer - LAYER + VALUE], plan[layer - LAYER + TANGENT]
            add_outer(products, weights, fan_in, 1, storage, rate, width, value, fan_in, n)
            add_outer(products, weights, fan_in, 1, storage, plan[layer + DELTA], width, tangent, fan_in, n)
        if plan[layer + BIASES] >= 0:
            add_row_sums(products, at + plan[layer + BIASES], storage, rate, width, n)


@compiled
def _product_kernel(phi: Numbers, vectors: Numbers, products: Numbers, plan: Integers, storage: Numbers, add: bool) -> float:
    """The loss of a shard; its Hessian times several vectors, which follow one another, is written, or added."""
    if not add:
        products[:] = 0.0
    loss = 0.0
    rows = plan[FEATURES] + plan[TARGET_ROWS] + 1
    output = plan[HEADER + (plan[DEPTH] - 1) * LAYER + VALUE]
    for first in range(0, plan[COUNT], plan[CHUNK]):
        n = min(plan[CHUNK], plan[COUNT] - first)
        x = plan[SAMPLES] + first * rows
        forward_pass(phi, plan, storage, x, n, True)
        loss += loss_of_chunk(plan, storage, output, x + plan[FEATURES] * n, n)
        bend_back(phi, plan, storage, n)
        for at in range(0, vectors.size, phi.size):
            _add_product(phi, vectors, at, plan, storage, x, n, products)
    return loss


@compiled
def _products_at(
    phi: int,
    vectors: int,
    products: int,
    count: int,
    order: int,
    plan: int,
    plan_size: int,
    storage: int,
    storage_size: int,
) -> None:
    """The same of a shard with all samples, by addresses, with P = order."""
    _product_kernel(
        numbers_at(phi, order),
        numbers_at(vectors, count * order),
        numbers_at(products, count * order),
        integers_at(plan, plan_size),
        numbers_at(storage, storage_size),
        False,
    )


# --- Hessians of networks with one hidden layer and one output ----------------------------------------------
# With the output's pre-activation y = Σ_j v_j g_j(z_j) + c and ψ(y) = w ℓ(g(y)),
#   ∇²L = Σ_n ψ″ ∇y ∇yᵀ + ψ′ ∇²y.
# Of ∇²y only those elements are not 0 that belong to one hidden neuron j:
#   ∂²y/∂v_j ∂W_j = g_j′ x̃ᵀ,  ∂²y/∂W_j ∂W_j = v_j g_j″ x̃ x̃ᵀ, with x̃ = (x, 1), or x̃ = x in a layer without biases.
# For the first term, let the matrices B_m (one per element of x̃) and A have a row per hidden neuron and a column per sample:
# √|ψ″| v_j g_j′ x̃_m and √|ψ″| g_j. Their products B_m B_lᵀ, A B_mᵀ and A Aᵀ are the term's blocks; the square root is
# there so that both factors are the same matrix, where ψ″ ≥ 0. B_m B_lᵀ is symmetric for m ≠ l as well, so that half of each
# suffices: for two inputs 13 of the 16 products per pair of neurons that half of all elements would take.


@part
def _curvature_of_output(plan: Integers, storage: Numbers, n: int) -> bool:
    """The rows ψ′, √|ψ″|, and √|ψ″| with the sign of ψ″, to ROWS; returns whether a sign is negative."""
    layer, rows = HEADER + LAYER, plan[ROWS]
    negative = broadcast(0.0)
    for i in range(0, n, LANES):
        pull, slope = load(storage, plan[PULL] + i), load(storage, plan[layer + SLOPE] + i)
        bend, curvature = load(storage, plan[layer + BEND] + i), load(storage, plan[CURVATURE] + i)
        if plan[LOSS] == 1:  # of one class: constant
            curvature = broadcast(0.0)
        second = curvature * slope * slope + pull * bend
        root = square_root(absolute(second))
        store(storage, rows + i, pull * slope)
        store(storage, rows + n + i, root)
        store(storage, rows + 2 * n + i, select_greater(0.0, second, 0.0 - root, root))
        negative = select_greater(0.0, second, 1.0, negative)
    return float(total(negative)) > 0.0


@part
def _fill_jacobian(phi: Numbers, plan: Integers, storage: Numbers, x: int, n: int, factor: int, out: int) -> None:
    """The matrices B_m, then A, with the row `factor` for √|ψ″|."""
    hidden = HEADER
    features, width, has_biases = plan[FEATURES], plan[hidden + WIDTH], plan[hidden + BIASES] >= 0
    weights = plan[hidden + LAYER + WEIGHTS]
    for j in range(width):
        v = phi[weights + j]
        value, slope = plan[hidden + VALUE] + j * n, plan[hidden + SLOPE] + j * n
        for i in range(0, n, LANES):
            scale = load(storage, factor + i)
            base = load(storage, slope + i) * (scale * v)
            place = out + j * n + i
            for m in range(features):
                store(storage, place, base * load(storage, x + m * n + i))
                place += width * n
            if has_biases:
                store(storage, place, base)
                place += width * n
            store(storage, place, scale * load(storage, value + i))


@part
def _add_panels(out: Numbers, at: int, stride: int, step: int, storage: Numbers, x: int, y: int, width: int, n: int) -> None:
    """As `add_outer` for a square matrix, by few columns at a time, which stay in the cache."""
    for column in range(0, width, _PANEL):
        columns = min(_PANEL, width - column)
        add_outer(out, at + column * step, stride, step, storage, x, width, y + column * n, columns, n)


@part
def _add_half(out: Numbers, at: int, stride: int, step: int, storage: Numbers, x: int, y: int, width: int, n: int) -> None:
    """As `add_outer` for a square matrix, but only for its lower triangle; some elements above it are changed, too."""
    for column in range(0, width, _PANEL):
        columns = min(_PANEL, width - column)
        for row in range(column, width, 3):
            rows = min(3, width - row)
            place = at + row * stride + column * step
            add_outer(out, place, stride, step, storage, x + row * n, rows, y + column * n, columns, n)


@inlined
def _first_and_step(plan: Integers, m: int) -> tuple[int, int]:
    """Where ∂/∂W_0m stands in φ, and how far apart ∂/∂W_jm are; the biases are the column m = D."""
    if m == plan[FEATURES]:
        return plan[HEADER + BIASES], 1
    return m, plan[FEATURES]


@part
def _add_square(plan: Integers, storage: Numbers, x: int, y: int, n: int, root: int, signed: int, hessian: Numbers) -> None:
    """Add ψ″ ∇y ∇yᵀ, from the matrices at x and (with signs) at y: the lower triangle, as far as `_complete` needs it."""
    output, order = HEADER + LAYER, plan[PARAMETER_COUNT]
    width, v, c = plan[HEADER + WIDTH], plan[output + WEIGHTS], plan[output + BIASES]
    inputs = plan[FEATURES] + (plan[HEADER + BIASES] >= 0)
    size = width * n
    values = inputs * size
    for m in range(inputs):
        row, stride = _first_and_step(plan, m)
        for k in range(m + 1):
            column, step = _first_and_step(plan, k)
            _add_half(hessian, row * order + column, stride * order, step, storage, x + m * size, y + k * size, width, n)
        _add_panels(hessian, v * order + row, order, stride, storage, x + values, y + m * size, width, n)
        if c >= 0:
            add_outer(hessian, c * order + row, order, stride, storage, root, 1, y + m * size, width, n)
    _add_half(hessian, v * order + v, order, 1, storage, x + values, y + values, width, n)
    if c >= 0:
        add_outer(hessian, c * order + v, order, 1, storage, root, 1, y + values, width, n)
        hessian[c * order + c] += _inner(storage, root, signed, n)


@part
def _mirror(matrix: Numbers, order: int) -> None:
    """Copy the lower triangle of a square matrix to the upper one, in blocks that fit into the cache."""
    for first_row in range(0, order, TILE):
        end_row = min(first_row + TILE, order)
        for first_column in range(0, end_row, TILE):
            for column in range(first_column, min(first_column + TILE, end_row)):
                for row in range(max(first_row, column + 1), end_row):
                    matrix[column * order + row] = matrix[row * order + column]


@compiled
def _complete(plan: Integers, hessian: Numbers) -> None:
    """What `_add_square` left out: the other halves of the blocks that are symmetric, then the upper triangle."""
    order, width, features = plan[PARAMETER_COUNT], plan[HEADER + WIDTH], plan[FEATURES]
    for m in range(1, features + (plan[HEADER + BIASES] >= 0)):
        row, stride = _first_and_step(plan, m)
        for k in range(m):
            column, step = _first_and_step(plan, k)
            for j in range(width):
                for i in range(j):
                    known = hessian[(row + j * stride) * order + column + i * step]
                    if m == features:
                        hessian[(row + i * stride) * order + column + j * step] = known
                    else:
                        hessian[(column + j * step) * order + row + i * stride] = known
    _mirror(hessian, order)


@part
def _add_neuron(
    phi: Numbers, plan: Integers, storage: Numbers, x: int, n: int, j: int, gradient: Numbers, hessian: Numbers
) -> None:
    """Add what ψ′ ∇²y has for the hidden neuron j, and the elements of the gradient for its weights."""
    hidden, output, order = HEADER, HEADER + LAYER, plan[PARAMETER_COUNT]
    features, biases = plan[FEATURES], plan[hidden + BIASES]
    v_index = plan[output + WEIGHTS] + j
    v = phi[v_index]
    pull, first, second, product = plan[ROWS], plan[ROWS] + 3 * n, plan[ROWS] + 4 * n, plan[ROWS] + 5 * n
    multiply(storage, first, plan[hidden + SLOPE] + j * n, pull, n)
    multiply(storage, second, plan[hidden + BEND] + j * n, pull, n)
    gradient[v_index] += _inner(storage, plan[hidden + VALUE] + j * n, pull, n)
    for m in range(features):
        row = j * features + m
        both = _inner(storage, first, x + m * n, n)
        gradient[row] += v * both
        hessian[v_index * order + row] += both
        multiply(storage, product, second, x + m * n, n)
        for k in range(m + 1):
            hessian[row * order + j * features + k] += v * _inner(storage, product, x + k * n, n)
        if biases >= 0:
            hessian[(biases + j) * order + row] += v * _row_sum(storage, product, n)
    if biases >= 0:
        row = biases + j
        both = _row_sum(storage, first, n)
        gradient[row] += v * both
        hessian[v_index * order + row] += both
        hessian[row * order + row] += v * _row_sum(storage, second, n)


@compiled
def _hessian_kernel(phi: Numbers, gradient: Numbers, hessian: Numbers, plan: Integers, storage: Numbers, add: bool) -> float:
    """The loss of a shard; its gradient, and of its Hessian what `_complete` needs, are written, or added."""
    if not add:
        gradient[:] = 0.0
        hessian[:] = 0.0
    loss = 0.0
    order = phi.size
    output = HEADER + LAYER
    rows = plan[FEATURES] + plan[TARGET_ROWS] + 1
    for first in range(0, plan[COUNT], plan[CHUNK]):
        n = min(plan[CHUNK], plan[COUNT] - first)
        x = plan[SAMPLES] + first * rows
        forward_pass(phi, plan, storage, x, n, True)
        loss += loss_of_chunk(plan, storage, plan[output + VALUE], x + plan[FEATURES] * n, n)
        has_negative = _curvature_of_output(plan, storage, n)
        jacobian = signed = plan[WORKSPACE]
        _fill_jacobian(phi, plan, storage, x, n, plan[ROWS] + n, jacobian)
        if has_negative:
            signed = jacobian + order * n
            _fill_jacobian(phi, plan, storage, x, n, plan[ROWS] + 2 * n, signed)
        root, root_signed = plan[ROWS] + n, plan[ROWS] + 2 * n
        _add_square(plan, storage, jacobian, signed, n, root, root_signed, hessian)
        for j in range(plan[HEADER + WIDTH]):
            _add_neuron(phi, plan, storage, x, n, j, gradient, hessian)
        if plan[output + BIASES] >= 0:
            gradient[plan[output + BIASES]] += _row_sum(storage, plan[ROWS], n)
    return loss


@compiled
def _hessian_at(
    phi: int, gradient: int, hessian: int, loss: int, order: int, plan: int, plan_size: int, storage: int, storage_size: int
) -> None:
    """Loss, gradient and the whole Hessian of a shard with all samples, by addresses, with P = order."""
    plan_, hessian_ = integers_at(plan, plan_size), numbers_at(hessian, order * order)
    numbers_at(loss, 1)[0] = _hessian_kernel(
        numbers_at(phi, order), numbers_at(gradient, order), hessian_, plan_, numbers_at(storage, storage_size), False
    )
    _complete(plan_, hessian_)


@compiled
def _hessians_at(
    phis: int,
    gradients: int,
    hessians: int,
    losses: int,
    count: int,
    order: int,
    plan: int,
    plan_size: int,
    storage: int,
    storage_size: int,
) -> None:
    """The same at so many points, one after the other in memory, as are what is written."""
    step = 8 * order
    for i in range(count):
        _hessian_at(
            phis + i * step,
            gradients + i * step,
            hessians + i * step * order,
            losses + 8 * i,
            order,
            plan,
            plan_size,
            storage,
            storage_size,
        )


# --- The class ----------------------------------------------------------------------------------------------

_CACHED_NUMBERS = 49152  # of a chunk's values and slopes: 384 KiB, within the second-level cache
_SMALLEST_CHUNK, _LARGEST_CHUNK = 32, 256
# Rough times in ns, which decide how the samples are shared among threads: per activation, per product and addition.
_ACTIVATION_TIME, _PRODUCT_TIME = 3.0, 0.05
_SHARD_TIME = 300_000.0  # worth the tens of µs that it takes to give a thread some work

_Kernel: TypeAlias = Callable[..., float]


class Shard:
    """Some of the samples, with the workspace to compute with them: the plan and the storage that kernels take.

    Args:
        network: The perceptron.
        samples: Rows of x, of the targets, and of the weights.
        n: Columns of a chunk.
        workspace: Rows of n numbers, at the place WORKSPACE, for what a kernel may want.
    """

    def __init__(self, network: "CompiledPerceptron", samples: Numbers, n: int, workspace: int) -> None:
        self._size = 0
        count = padded(samples.shape[1])
        layers, runs = self._layers(network, n)
        header = np.zeros(HEADER, dtype=np.int64)
        header[DEPTH], header[LOSS] = len(network.biases), network.loss
        header[FEATURES], header[OUTPUTS], header[TARGET_ROWS] = network.sizes[0], network.sizes[-1], network.target_rows
        header[COUNT], header[CHUNK] = count, n
        header[LOSS_PARAMETER] = self._reserve(LANES)
        header[COEFFICIENTS] = network.parameters.shape[1]
        header[SCRATCH] = self._reserve(max(_SCRATCH_SIZE, n))
        header[PULL] = self._reserve(network.sizes[-1] * n)
        header[CURVATURE] = self._reserve((network.sizes[-1] + 1) * n)
        header[ROWS] = self._reserve(_ROWS_COUNT * n)
        header[PARAMETER_COUNT] = network.n_parameters
        header[WORKSPACE] = self._reserve(workspace * n)
        header[SAMPLES] = self._reserve(len(samples) * count)
        self.plan = np.concatenate([header, layers.ravel(), runs.ravel()])
        self.storage = aligned(self._size)
        self.storage[header[LOSS_PARAMETER]] = network.loss_parameter
        for place, parameters in self._parameters:
            self.storage[place : place + len(parameters)] = parameters
        self._fill(samples)

    def _reserve(self, count: int) -> int:
        """The place of the next `count` numbers, where a cache line begins."""
        place = self._size
        self._size += padded(count)
        return place

    def _layers(self, network: "CompiledPerceptron", n: int) -> tuple[Integers, Integers]:
        """The plan's records of layers and runs, for chunks of n samples."""
        layers = np.zeros((len(network.biases), LAYER), dtype=np.int64)
        runs: list[tuple[int, int, int, int]] = []
        self._parameters: list[tuple[int, Numbers]] = []
        first_run = HEADER + layers.size
        phi = neuron = 0
        for layer, fan_in, width, has_biases in zip(layers, network.sizes, network.sizes[1:], network.biases, strict=False):
            layer[FAN_IN], layer[WIDTH] = fan_in, width
            layer[WEIGHTS] = phi
            phi += fan_in * width
            layer[BIASES] = phi if has_biases else -1
            phi += width * has_biases
            for buffer in (VALUE, SLOPE, BEND, DELTA, RATE, TANGENT):
                layer[buffer] = self._reserve(width * n)
            layer[FIRST_RUN] = first_run + len(runs) * RUN
            codes, parameters = network.codes[neuron : neuron + width], network.parameters[neuron : neuron + width]
            for start, stop in _equal_runs(codes, parameters):
                place = self._reserve(parameters.shape[1])
                self._parameters.append((place, parameters[start]))
                runs.append((start, stop, int(codes[start]), place))
            layer[LAST_RUN] = first_run + len(runs) * RUN
            neuron += width
        return layers, np.array(runs, dtype=np.int64)

    def _fill(self, rows: Numbers) -> None:
        """Lay the samples out in chunks, with copies of the last one, of weight 0, as padding."""
        count, n = self.plan[COUNT], self.plan[CHUNK]
        padding = np.repeat(rows[:, -1:], count - rows.shape[1], axis=1)
        padding[-1] = 0.0
        rows = np.concatenate([rows, padding], axis=1)
        place = self.plan[SAMPLES]
        for first in range(0, count, n):
            chunk = rows[:, first : first + n]
            self.storage[place : place + chunk.size] = chunk.ravel()
            place += chunk.size


def padded(count: int) -> int:
    """The next multiple of the lanes."""
    return -(-count // LANES) * LANES


def aligned(size: int) -> Numbers:
    """So many numbers, beginning with a cache line: a load that crosses two lines takes twice as long."""
    line = 8 * LANES
    numbers = np.empty(size + LANES)
    skipped = -numbers.ctypes.data % line // 8
    return numbers[skipped : skipped + size]


def _equal_runs(codes: Integers, parameters: Numbers) -> list[tuple[int, int]]:
    """The runs (start, stop) of neurons with the same activation and the same parameters of it."""
    differs = (codes[1:] != codes[:-1]) | (parameters[1:] != parameters[:-1]).any(axis=1)
    bounds = [0, *(np.flatnonzero(differs) + 1).tolist(), len(codes)]
    return list(pairwise(bounds))


def _slices(count: int, chunk: int, parts: int) -> list[slice]:
    """Slices of the samples, each with about as many whole chunks; the last may end in part of one."""
    chunks = -(-count // chunk)
    bounds = [chunk * (i * chunks // parts) for i in range(parts)] + [count]
    return [slice(*pair) for pair in pairwise(bounds)]


def _chunk(sizes: Sequence[int], count: int) -> int:
    """Columns of a chunk: as many as the cache allows, and about the same in each chunk."""
    allowed = _CACHED_NUMBERS // (2 * sum(sizes[1:]) + sizes[0])
    allowed = min(max(allowed, _SMALLEST_CHUNK), _LARGEST_CHUNK)
    return padded(-(-count // -(-count // allowed)))


class CompiledPerceptron:
    """The loss of a perceptron as a function of its parameters φ, and its derivatives.

    φ is W_1 (row by row, n_1 × n_0), b_1 if that layer has biases, W_2, b_2, ... The data are copied.

    Losses by code, with R rows of targets t:
    0 squared error Σ_o (f_o − t_o)²;
    1 cross entropy Σ_c t_c (log Σ_d exp f_d − f_c) with t_c ≥ 0;
    2 binary cross entropy Σ_o a_o log(1 + exp(−f_o)) + b_o log(1 + exp f_o), whose targets are the rows a, then the rows b;
    3 Huber's, with δ: Σ_o r_o²/2 if |r_o| ≤ δ, else δ (|r_o| − δ/2), where r = f − t.

    Activations by code: 0 identity, 1 ReLU, 2 LeakyReLU (slope), 3 ELU (alpha), 4 SELU, 5 CELU (alpha), 6 GELU, 7 its
    approximation by tanh, 8 SiLU, 9 Mish, 10 Sigmoid, 11 LogSigmoid, 12 Tanh, 13 Softplus (beta, threshold), 14 Softsign,
    15 erf, 16 normal cdf, 17 σ(4z) + softplus(z), 18 square, 19 cube, 20 polynomial (coefficients, ascending).

    The methods take contiguous tensors of float64 numbers on the CPU, and of the right shapes: that is not checked.

    An object has one workspace: only one of its methods may run at a time. Where there is work enough, they use as many
    threads as torch does (`torch.get_num_threads()`).

    Args:
        sizes: n_0, ..., n_L.
        biases: For each layer whether it has them.
        codes: The activation of each neuron, n_1 + ... + n_L of them.
        params: A row of parameters per neuron, at least two columns; what an activation does not use is ignored.
        loss: A code.
        loss_parameter: δ of Huber's loss.
        x: Inputs, D × N.
        targets: R × N.
        weights: N.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        biases: Sequence[bool],
        codes: Integers,
        params: Numbers,
        loss: int,
        loss_parameter: float,
        x: Numbers,
        targets: Numbers,
        weights: Numbers,
    ) -> None:
        self.sizes, self.biases = tuple(sizes), tuple(biases)
        self.codes, self.parameters = codes, params
        self.loss, self.loss_parameter = loss, loss_parameter
        self.has_hessian = len(self.biases) == 2 and self.sizes[-1] == 1
        self.n_parameters = sum(
            width * (fan_in + has) for fan_in, width, has in zip(self.sizes, self.sizes[1:], self.biases, strict=False)
        )
        count = len(weights)
        self.chunk = _chunk(self.sizes, count)
        products = self.n_parameters**2 / 2 if self.has_hessian else 0.0
        self._gradient_time = count * (sum(self.sizes[1:]) * _ACTIVATION_TIME + 3 * self.n_parameters * _PRODUCT_TIME)
        self._hessian_time = count * products * _PRODUCT_TIME + self._gradient_time
        self.target_rows = len(targets)
        self.samples = np.concatenate([x, targets, weights[np.newaxis]])
        # How many threads there is work for; for one alone, the number of torch's threads need not be asked.
        self._most_shards = min(int(max(self._gradient_time, self._hessian_time) / _SHARD_TIME), -(-count // self.chunk))
        self._pool: ThreadPoolExecutor | None = None
        self._divide(1)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are made anew: they must not compute in this one's workspace."""
        x, targets, weights = np.split(self.samples, [self.sizes[0], self.sizes[0] + self.target_rows])
        given = self.sizes, self.biases, self.codes, self.parameters, self.loss, self.loss_parameter, x, targets, weights[0]
        return CompiledPerceptron, given

    def _divide(self, parts: int) -> None:
        """Share the samples out among so many threads."""
        slices = _slices(self.samples.shape[1], self.chunk, parts)
        workspace = 2 * self.n_parameters if self.has_hessian else 0
        self._shards = [Shard(self, self.samples[:, part], self.chunk, workspace) for part in slices]
        plan, storage = self._shards[0].plan, self._shards[0].storage
        self._plan, self._storage = plan, storage
        self._place = (self.n_parameters, plan.ctypes.data, plan.size, storage.ctypes.data, storage.size)
        self._pool = ThreadPoolExecutor(len(slices) - 1) if len(slices) > 1 else None

    def loss_and_gradient(self, phi: Tensor, gradient: Tensor, loss: Tensor) -> None:
        """Write L(φ) and ∇L(φ)."""
        if self._most_shards <= 1:
            _gradient_at(phi.data_ptr(), gradient.data_ptr(), loss.data_ptr(), *self._place)
        else:
            loss.fill_(self._sum(_gradient_kernel, (phi.numpy(),), (gradient.numpy(),), self._gradient_time))

    def hvp(self, phi: Tensor, vectors: Tensor, products: Tensor) -> None:
        """Write the products of ∇²L(φ) with the rows of `vectors` to the rows of `products`."""
        count = vectors.numel() // self.n_parameters
        if self._most_shards <= 1:
            _products_at(phi.data_ptr(), vectors.data_ptr(), products.data_ptr(), count, *self._place)
        else:
            inputs, outputs = (phi.numpy(), vectors.numpy().reshape(-1)), (products.numpy().reshape(-1),)
            self._sum(_product_kernel, inputs, outputs, self._gradient_time * (1 + count))

    def loss_gradient_hessian(self, phi: Tensor, gradient: Tensor, hessian: Tensor, loss: Tensor) -> None:
        """Write L(φ), ∇L(φ) and ∇²L(φ). For networks that have `has_hessian`."""
        if self._most_shards <= 1:
            _hessian_at(phi.data_ptr(), gradient.data_ptr(), hessian.data_ptr(), loss.data_ptr(), *self._place)
        else:
            elements = hessian.numpy().reshape(-1)
            loss.fill_(self._sum(_hessian_kernel, (phi.numpy(),), (gradient.numpy(), elements), self._hessian_time))
            _complete(self._plan, elements)

    def loss_and_gradient_many(self, phis: Tensor, gradients: Tensor, losses: Tensor) -> None:
        """Write L and ∇L for each row of `phis`."""
        if self._most_shards <= 1:
            _gradients_at(phis.data_ptr(), gradients.data_ptr(), losses.data_ptr(), len(phis), *self._place)
        else:
            for row in zip(phis, gradients, losses, strict=True):
                self.loss_and_gradient(*row)

    def loss_gradient_hessian_many(self, phis: Tensor, gradients: Tensor, hessians: Tensor, losses: Tensor) -> None:
        """Write L, ∇L and ∇²L for each row of `phis`. For networks that have `has_hessian`."""
        if self._most_shards <= 1:
            pointers = phis.data_ptr(), gradients.data_ptr(), hessians.data_ptr(), losses.data_ptr()
            _hessians_at(*pointers, len(phis), *self._place)
        else:
            for row in zip(phis, gradients, hessians, losses, strict=True):
                self.loss_gradient_hessian(*row)

    def _sum(self, kernel: _Kernel, inputs: tuple[Numbers, ...], outputs: tuple[Numbers, ...], time: float) -> float:
        """Run the kernel over all shards, one for each of torch's threads; the sum of the losses.

        Each has its own outputs, which are added in the shards' order: the result depends on the number of threads, but not on
        chance.
        """
        parts = min(torch.get_num_threads(), self._most_shards)
        if parts != len(self._shards):
            self._divide(parts)
        if self._pool is None or time < 2 * _SHARD_TIME:
            return sum(kernel(*inputs, *outputs, shard.plan, shard.storage, i > 0) for i, shard in enumerate(self._shards))
        pending = []
        for shard in self._shards[1:]:
            own = tuple(np.empty_like(output) for output in outputs)
            pending.append((own, self._pool.submit(kernel, *inputs, *own, shard.plan, shard.storage, False)))
        loss = kernel(*inputs, *outputs, self._plan, self._storage, False)
        for own, future in pending:
            loss += future.result()
            for output, more in zip(outputs, own, strict=True):
                output += more
        return loss
