"""Residuals of a perceptron's squared error, their Jacobian, and products with its transpose, compiled with Numba.

L = ½‖r‖² with r_on = √(2 w_n) (f_on − t_on), output by output. See `torch_gradflow.perceptron.plain` for the formulas and
`torch_gradflow.perceptron.compiled` for where things stand. It stands apart because it is compiled when it is asked for first.
After changing that file, touch this one: see `vector_math.compiled`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from torch_gradflow.perceptron.compiled import (
    BIASES,
    CHUNK,
    COUNT,
    DELTA,
    DEPTH,
    FAN_IN,
    FEATURES,
    HEADER,
    LAYER,
    OUTPUTS,
    PARAMETER_COUNT,
    PULL,
    SAMPLES,
    SLOPE,
    TARGET_ROWS,
    VALUE,
    WEIGHTS,
    WIDTH,
    CompiledPerceptron,
    Integers,
    Numbers,
    Shard,
    add_outer,
    add_row_sums,
    forward_pass,
    multiply,
    padded,
    pull_back,
)
from torch_gradflow.perceptron.vector_math import LANES, broadcast, compiled, inlined, load, part, square_root, store

__all__ = ["CompiledResiduals"]


@inlined
def _samples(plan: Integers, first: int) -> int:
    """The place of the chunk that begins with this sample."""
    return int(plan[SAMPLES] + first * (plan[FEATURES] + plan[TARGET_ROWS] + 1))


@inlined
def _inputs(plan: Integers, layer: int, x: int) -> int:
    """The place of a_{l−1}."""
    return x if layer == HEADER else int(plan[layer - LAYER + VALUE])


@inlined
def _output(plan: Integers) -> int:
    """The record of the last layer."""
    return int(HEADER + (plan[DEPTH] - 1) * LAYER)


@part
def _residual_row(plan: Integers, storage: Numbers, x: int, n: int, row: int, out: int) -> None:
    """√(2 w) (f − t) of one output."""
    targets = x + plan[FEATURES] * n
    weights, f = targets + plan[TARGET_ROWS] * n, plan[_output(plan) + VALUE]
    for i in range(0, n, LANES):
        root = square_root(load(storage, weights + i) * 2.0)
        store(storage, out + i, root * (load(storage, f + row * n + i) - load(storage, targets + row * n + i)))


@part
def _pull_to_inputs(phi: Numbers, plan: Integers, storage: Numbers, n: int) -> None:
    """δ of every layer from what is pulled at the outputs."""
    layer = _output(plan)
    multiply(storage, plan[layer + DELTA], plan[layer + SLOPE], plan[PULL], plan[layer + WIDTH] * n)
    while layer > HEADER:
        below = layer - LAYER
        fan_in, width, delta = plan[layer + FAN_IN], plan[layer + WIDTH], plan[layer + DELTA]
        pull_back(
            phi, plan[layer + WEIGHTS], fan_in, width, storage, delta, n, fan_in, plan[below + SLOPE], plan[below + DELTA]
        )
        layer = below


@compiled
def _forward_kernel(phi: Numbers, plan: Integers, storage: Numbers, first: int, n: int) -> None:
    """a and g′ of every layer for the chunk that begins with this sample."""
    forward_pass(phi, plan, storage, _samples(plan, first), n, False)


@compiled
def _residual_kernel(plan: Integers, storage: Numbers, first: int, n: int, residuals: Numbers, count: int) -> None:
    """The chunk's residuals, to where they belong among those of all `count` samples."""
    x = _samples(plan, first)
    for row in range(plan[OUTPUTS]):
        _residual_row(plan, storage, x, n, row, plan[PULL])
        for i in range(min(n, count - first)):
            residuals[row * count + first + i] = storage[plan[PULL] + i]


@compiled
def _pull_kernel(
    phi: Numbers, plan: Integers, storage: Numbers, first: int, n: int, cotangent: Numbers, count: int, gradient: Numbers
) -> None:
    """Add the chunk's part of Jᵀu to the gradient."""
    x, pull = _samples(plan, first), plan[PULL]
    weights = x + (plan[FEATURES] + plan[TARGET_ROWS]) * n
    for row in range(plan[OUTPUTS]):
        for i in range(n):
            storage[pull + row * n + i] = cotangent[row * count + min(first + i, count - 1)]  # padding has weight 0
        for i in range(0, n, LANES):
            place = pull + row * n + i
            store(storage, place, load(storage, place) * square_root(load(storage, weights + i) * 2.0))
    _pull_to_inputs(phi, plan, storage, n)
    for layer in range(HEADER, _output(plan) + LAYER, LAYER):
        fan_in, width, delta = plan[layer + FAN_IN], plan[layer + WIDTH], plan[layer + DELTA]
        add_outer(gradient, plan[layer + WEIGHTS], fan_in, 1, storage, delta, width, _inputs(plan, layer, x), fan_in, n)
        if plan[layer + BIASES] >= 0:
            add_row_sums(gradient, plan[layer + BIASES], storage, delta, width, n)


@compiled
def _jacobian_kernel(
    phi: Numbers, plan: Integers, storage: Numbers, first: int, n: int, output: int, block: Numbers, at: int, columns: int
) -> None:
    """The gradients of the chunk's residuals of one output, and these: columns from `at` on of a matrix with P + 1 rows."""
    x, pull = _samples(plan, first), plan[PULL]
    weights = x + (plan[FEATURES] + plan[TARGET_ROWS]) * n
    for row in range(plan[OUTPUTS]):
        for i in range(0, n, LANES):
            root = square_root(load(storage, weights + i) * 2.0)
            store(storage, pull + row * n + i, root if row == output else broadcast(0.0))
    _pull_to_inputs(phi, plan, storage, n)
    for layer in range(HEADER, _output(plan) + LAYER, LAYER):
        fan_in, source = plan[layer + FAN_IN], _inputs(plan, layer, x)
        for row in range(plan[layer + WIDTH]):
            delta = plan[layer + DELTA] + row * n
            for m in range(fan_in):
                place = (plan[layer + WEIGHTS] + row * fan_in + m) * columns + at
                for i in range(0, n, LANES):
                    store(block, place + i, load(storage, delta + i) * load(storage, source + m * n + i))
            if plan[layer + BIASES] >= 0:
                place = (plan[layer + BIASES] + row) * columns + at
                for i in range(0, n, LANES):
                    store(block, place + i, load(storage, delta + i))
    _residual_row(plan, storage, x, n, output, pull)
    for i in range(0, n, LANES):
        store(block, plan[PARAMETER_COUNT] * columns + at + i, load(storage, pull + i))


class CompiledResiduals:
    """The residuals of a perceptron's squared error as functions of φ. There is one workspace: only one call at a time.

    Args:
        network: The perceptron, with its data.
    """

    def __init__(self, network: CompiledPerceptron) -> None:
        self._network = network
        self._count = network.samples.shape[1]
        shard = Shard(network, network.samples, network.chunk, 0)
        self._plan, self._storage = shard.plan, shard.storage

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are made anew: they must not compute in this one's workspace."""
        return CompiledResiduals, (self._network,)

    def residuals(self, phi: Numbers) -> Numbers:
        """r, shape ``(O N,)``."""
        found = np.empty(self._network.sizes[-1] * self._count)
        for first, n in self._chunks(phi, range(self._count)):
            _residual_kernel(self._plan, self._storage, first, n, found, self._count)
        return found

    def pull_back(self, phi: Numbers, cotangent: Numbers) -> Numbers:
        """Jᵀu for u of shape ``(O N,)``."""
        gradient = np.zeros(self._network.n_parameters)
        for first, n in self._chunks(phi, range(self._count)):
            _pull_kernel(phi, self._plan, self._storage, first, n, cotangent, self._count, gradient)
        return gradient

    def jacobian_blocks(self, phi: Numbers, size: int) -> Iterator[Numbers]:
        """J and r, about `size` residuals at a time: blocks of shape ``(P + 1, m)``, Jᵀ with r as its last row."""
        outputs, chunk = self._network.sizes[-1], self._network.chunk
        step = chunk * max(1, size // (outputs * chunk))
        for begin in range(0, self._count, step):
            part_ = range(begin, min(begin + step, self._count))
            width = padded(len(part_))
            block = np.empty((self._network.n_parameters + 1, outputs * width))
            for first, n in self._chunks(phi, part_):
                for output in range(outputs):
                    at = output * width + first - begin
                    _jacobian_kernel(phi, self._plan, self._storage, first, n, output, block.reshape(-1), at, outputs * width)
            used = block.reshape(-1, outputs, width)[:, :, : len(part_)]  # without the padding
            yield np.ascontiguousarray(used).reshape(-1, outputs * len(part_))

    def _chunks(self, phi: Numbers, samples: range) -> Iterator[tuple[int, int]]:
        """First sample and number of columns of each chunk of these samples, after the forward pass."""
        for first in range(samples.start, samples.stop, int(self._plan[CHUNK])):
            n = min(int(self._plan[CHUNK]), int(self._plan[COUNT]) - first)
            _forward_kernel(phi, self._plan, self._storage, first, n)
            yield first, n
