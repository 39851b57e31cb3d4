"""Hessians of perceptrons of any depth and any number of outputs, block by block.

With ã_{l−1} the inputs of layer l and a 1 for its biases, δ_l = ∂L/∂z_l, and per sample B_l = ∂²L/∂z_l∂z_l,
C_lq = (∂z_q/∂z_l)ᵀ B_q and S_lq = ∂a_{q−1}/∂z_l, the blocks for l ≤ q are

    ∂²L / ∂W_l[p,m] ∂W_q[r,s] = Σ_n C_lq[p,r] ã_{l−1}[m] ã_{q−1}[s]  +  Σ_n ã_{l−1}[m] δ_q[r] S_lq[s,p],

the second sum for l < q only (see `torch_gradflow.perceptron.plain`). Each sum over samples is a product of two matrices with
a column per sample. Compiled code fills these, chunk by chunk; torch's BLAS multiplies them, where nearly all of the time
goes: with hundreds of rows it is faster than loops compiled here. Where l = q, only p ≥ r and m ≥ s are multiplied. In the end
compiled code writes the sums to where they belong.

It stands apart from compiled.py because it is compiled when such a Hessian is asked for first. After changing that file, touch
this one: see `vector_math.compiled`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from torch_gradflow.perceptron.compiled import (
    BEND,
    BIASES,
    CURVATURE,
    DELTA,
    DEPTH,
    FAN_IN,
    FEATURES,
    HEADER,
    LAYER,
    LOSS,
    PARAMETER_COUNT,
    SAMPLES,
    SLOPE,
    TARGET_ROWS,
    TILE,
    VALUE,
    WEIGHTS,
    WIDTH,
    WORKSPACE,
    CompiledPerceptron,
    Integers,
    Numbers,
    Shard,
    add_outer,
    add_row_sums,
    aligned,
    bend_back,
    forward_pass,
    loss_of_chunk,
    multiply,
    padded,
    pull_back,
)
from torch_gradflow.perceptron.vector_math import LANES, broadcast, compiled, inlined, load, number_at, part, store

__all__ = ["BlockHessian"]

# --- The matrices of one chunk ------------------------------------------------------------------------------
# C_lq has the rows (r, p), S_lq the rows (s, p), B_q the rows (p, r). The workspace begins with a row of ones.


@inlined
def _row(plan: Integers, matrix: int, count: int, row: int, n: int) -> int:
    """The place of a row of ã; behind the last one come the ones of the biases."""
    return matrix + row * n if row < count else plan[WORKSPACE]


@inlined
def _inputs(plan: Integers, layer: int, x: int) -> int:
    """The place of a_{l−1}."""
    return x if layer == HEADER else plan[layer - LAYER + VALUE]


@inlined
def _extended(plan: Integers, layer: int) -> int:
    """How many rows ã_{l−1} has."""
    return int(plan[layer + FAN_IN] + (plan[layer + BIASES] >= 0))


@part
def _fill_pairs(plan: Integers, storage: Numbers, layer: int, x: int, n: int, out: int) -> None:
    """The rows ã[m] ã[s], s ≤ m, of a layer's inputs."""
    source, count = _inputs(plan, layer, x), plan[layer + FAN_IN]
    for m in range(_extended(plan, layer)):
        first = _row(plan, source, count, m, n)
        for s in range(m + 1):
            multiply(storage, out, first, _row(plan, source, count, s, n), n)
            out += n


@part
def _fill_products(plan: Integers, storage: Numbers, layer: int, x: int, later: int, n: int, out: int) -> None:
    """The rows ã_{l−1}[m] ã_{q−1}[s]."""
    source, count = _inputs(plan, layer, x), plan[layer + FAN_IN]
    source_q, count_q = _inputs(plan, later, x), plan[later + FAN_IN]
    for m in range(_extended(plan, layer)):
        first = _row(plan, source, count, m, n)
        for s in range(_extended(plan, later)):
            multiply(storage, out, first, _row(plan, source_q, count_q, s, n), n)
            out += n


@part
def _fill_pulls(plan: Integers, storage: Numbers, layer: int, x: int, later: int, n: int, out: int) -> None:
    """The rows ã_{l−1}[m] δ_q[r]."""
    source, count = _inputs(plan, layer, x), plan[layer + FAN_IN]
    for m in range(_extended(plan, layer)):
        first = _row(plan, source, count, m, n)
        for r in range(plan[later + WIDTH]):
            multiply(storage, out, first, plan[later + DELTA] + r * n, n)
            out += n


@part
def _copy_rows(storage: Numbers, source: int, apart: int, count: int, n: int, out: int) -> None:
    """Rows that are `apart`, one behind the other."""
    for row in range(count):
        for i in range(0, n, LANES):
            store(storage, out + row * n + i, load(storage, source + row * apart + i))


@part
def _add_gradient(plan: Integers, storage: Numbers, x: int, n: int, gradient: Numbers) -> None:
    """Add the chunk's part of the gradient."""
    for layer in range(HEADER, HEADER + plan[DEPTH] * LAYER, LAYER):
        weights, biases, fan_in = plan[layer + WEIGHTS], plan[layer + BIASES], plan[layer + FAN_IN]
        delta, width = plan[layer + DELTA], plan[layer + WIDTH]
        add_outer(gradient, weights, fan_in, 1, storage, delta, width, _inputs(plan, layer, x), fan_in, n)
        if biases >= 0:
            add_row_sums(gradient, biases, storage, delta, width, n)


@part
def _curvature_of_outputs(plan: Integers, storage: Numbers, n: int, out: int) -> None:
    """B of the last layer: with ψ the loss as a function of the outputs, g′[p] ψ″[p,r] g′[r], and w ψ′ g″ on the diagonal."""
    layer = HEADER + (plan[DEPTH] - 1) * LAYER
    width, slope, bend, curvature = plan[layer + WIDTH], plan[layer + SLOPE], plan[layer + BEND], plan[CURVATURE]
    is_cross_entropy = plan[LOSS] == 1  # whose ψ″ is w T (diag(p) − p pᵀ); else diagonal
    for p in range(width):
        for r in range(width):
            for i in range(0, n, LANES):
                second = broadcast(0.0)
                if p == r:
                    second = load(storage, curvature + p * n + i)
                if is_cross_entropy:
                    share = load(storage, curvature + p * n + i) * load(storage, curvature + r * n + i)
                    second = (second - share) * load(storage, curvature + width * n + i)
                second = second * load(storage, slope + p * n + i) * load(storage, slope + r * n + i)
                if p == r:
                    second = second + load(storage, bend + p * n + i)
                store(storage, out + (p * width + r) * n + i, second)


@inlined
def _samples(plan: Integers, first: int) -> int:
    """The place of the chunk that begins with this sample."""
    return int(plan[SAMPLES] + first * (plan[FEATURES] + plan[TARGET_ROWS] + 1))


@compiled
def _begin(phi: Numbers, gradient: Numbers, plan: Integers, storage: Numbers, first: int, n: int, curvature: int) -> float:
    """Both passes through the n samples from the `first` on; adds to the gradient, and writes B of the last layer."""
    x = _samples(plan, first)
    output = plan[HEADER + (plan[DEPTH] - 1) * LAYER + VALUE]
    forward_pass(phi, plan, storage, x, n, True)
    loss = loss_of_chunk(plan, storage, output, x + plan[FEATURES] * n, n)
    bend_back(phi, plan, storage, n)
    _add_gradient(plan, storage, x, n, gradient)
    _curvature_of_outputs(plan, storage, n, curvature)
    return loss


@compiled
def _fill_same(
    phi: Numbers, plan: Integers, storage: Numbers, first: int, n: int, layer: int, b: int, left: int, right: int
) -> None:
    """The matrices for l = q: the rows (p, r), r ≤ p, of B_q, and those of ã ã."""
    width = plan[layer + WIDTH]
    for p in range(width):
        _copy_rows(storage, b + p * width * n, n, p + 1, n, left)
        left += (p + 1) * n
    _fill_pairs(plan, storage, layer, _samples(plan, first), n, right)


@part
def _pull_back_each(
    phi: Numbers, plan: Integers, storage: Numbers, layer: int, source: int, count: int, n: int, out: int
) -> None:
    """From `count` matrices with a row per neuron of the next layer, g′ (Wᵀ M) of each, with a row per neuron of this one."""
    later = layer + LAYER
    width, later_width, weights = plan[layer + WIDTH], plan[later + WIDTH], plan[later + WEIGHTS]
    for i in range(count):
        matrix, result = source + i * later_width * n, out + i * width * n
        pull_back(phi, weights, width, later_width, storage, matrix, n, width, plan[layer + SLOPE], result)


@part
def _slopes_two_below(phi: Numbers, plan: Integers, storage: Numbers, later: int, n: int, out: int) -> None:
    """S_lq for l = q − 2, g′_{q−1}[s] W_{q−1}[s,p] g′_l[p]."""
    between = later - LAYER
    width, fan_in, weights = plan[between + WIDTH], plan[between + FAN_IN], plan[between + WEIGHTS]
    slope, slope_below = plan[between + SLOPE], plan[between - LAYER + SLOPE]
    for s in range(width):
        for p in range(fan_in):
            weight = number_at(phi, weights + s * fan_in + p)
            for i in range(0, n, LANES):
                store(storage, out + i, load(storage, slope + s * n + i) * weight * load(storage, slope_below + p * n + i))
            out += n


@compiled
def _fill_cross(
    phi: Numbers,
    plan: Integers,
    storage: Numbers,
    first: int,
    n: int,
    layer: int,
    later: int,
    c_above: int,
    c: int,
    products: int,
    s_above: int,
    s: int,
    pulls: int,
) -> None:
    """The matrices for l < q: C_lq from that of l + 1, or from B_q for l = q − 1; ã ã; S_lq likewise, for l < q − 1; ã δ."""
    x = _samples(plan, first)
    _pull_back_each(phi, plan, storage, layer, c_above, plan[later + WIDTH], n, c)
    _fill_products(plan, storage, layer, x, later, n, products)
    if layer == later - 2 * LAYER:
        _slopes_two_below(phi, plan, storage, later, n, s)
    elif layer < later - 2 * LAYER:
        _pull_back_each(phi, plan, storage, layer, s_above, plan[later + FAN_IN], n, s)
    _fill_pulls(plan, storage, layer, x, later, n, pulls)


@compiled
def _curvature_below(
    phi: Numbers, plan: Integers, storage: Numbers, first: int, n: int, later: int, c: int, scratch: int, b: int
) -> None:
    """B_l = C W diag(g′) + diag(g″ Wᵀ δ) for l = q − 1, with C = C_lq and W = W_q."""
    layer = later - LAYER
    width, later_width, weights, slope = plan[layer + WIDTH], plan[later + WIDTH], plan[later + WEIGHTS], plan[layer + SLOPE]
    for p in range(width):
        row = b + p * width * n
        _copy_rows(storage, c + p * n, width * n, later_width, n, scratch)
        # Up to the diagonal, and what makes four rows full.
        pull_back(phi, weights, width, later_width, storage, scratch, n, min(width, p // 4 * 4 + 4), slope, row)
        diagonal, bend = row + p * n, plan[layer + BEND] + p * n
        for i in range(0, n, LANES):
            store(storage, diagonal + i, load(storage, diagonal + i) + load(storage, bend + i))
    for p in range(width):
        for r in range(p):
            _copy_rows(storage, b + (p * width + r) * n, n, 1, n, b + (r * width + p) * n)


# --- The Hessian from its sums ------------------------------------------------------------------------------

_GROUP = 4


@inlined
def _copy(out: Numbers, at: int, numbers: Numbers, place: int, count: int) -> None:
    """Some numbers in a row; the last vector may overlap the one before."""
    if count < LANES:
        for i in range(count):
            out[at + i] = number_at(numbers, place + i)
    else:
        for i in range(0, count - LANES, LANES):
            store(out, at + i, load(numbers, place + i))
        store(out, at + count - LANES, load(numbers, place + count - LANES))


@part
def _unpack(sums: Numbers, packed: int, order: int, squares: Numbers, at: int) -> None:
    """The symmetric matrix whose rows stand one behind the other, up to the diagonal."""
    for m in range(order):
        _copy(squares, at + m * order, sums, packed, m + 1)
        for s in range(m):
            squares[at + s * order + m] = number_at(sums, packed + s)
        packed += m + 1


@part
def _write_squares(
    plan: Integers, squares: Numbers, at: int, apart: int, hessian: Numbers, layer: int, p: int, first: int, count: int
) -> None:
    """From the squares (m, s) of the neuron p with some others, from `first` on, the rows of p."""
    weights, biases, fan_in, order = plan[layer + WEIGHTS], plan[layer + BIASES], plan[layer + FAN_IN], _extended(plan, layer)
    for m in range(order):
        row = (weights + p * fan_in + m if m < fan_in else biases + p) * plan[PARAMETER_COUNT]
        for i in range(count):
            place = at + i * apart + m * order
            _copy(hessian, row + weights + (first + i) * fan_in, squares, place, fan_in)
            if biases >= 0:
                hessian[row + biases + first + i] = number_at(squares, place + fan_in)


@part
def _write_same(plan: Integers, sums: Numbers, packed: int, squares: Numbers, hessian: Numbers, layer: int) -> None:
    """The block of one layer, from its sums for p ≥ r and m ≥ s.

    Four by four neurons at a time, so that what is written to one row is longer.
    """
    order, width = _extended(plan, layer), plan[layer + WIDTH]
    size = order * order
    for first_p in range(0, width, _GROUP):
        count_p = min(_GROUP, width - first_p)
        for first_r in range(0, first_p + 1, _GROUP):
            count_r = min(_GROUP, width - first_r)
            for p in range(count_p):
                for r in range(count_r):
                    large, small = max(first_p + p, first_r + r), min(first_p + p, first_r + r)
                    pair = large * (large + 1) // 2 + small
                    _unpack(sums, packed + pair * (order * (order + 1) // 2), order, squares, (p * _GROUP + r) * size)
            for p in range(count_p):
                _write_squares(plan, squares, p * _GROUP * size, size, hessian, layer, first_p + p, first_r, count_r)
            if first_r < first_p:
                for r in range(count_r):
                    _write_squares(plan, squares, r * size, _GROUP * size, hessian, layer, first_r + r, first_p, count_p)


@part
def _write_cross(plan: Integers, sums: Numbers, second: int, first: int, hessian: Numbers, layer: int, later: int) -> None:
    """The block of two layers, rows of the earlier one, from both of its sums: those with C_lq, and those with S_lq."""
    parameters, width, fan_in = plan[PARAMETER_COUNT], plan[layer + WIDTH], plan[layer + FAN_IN]
    later_width, count, biases = plan[later + WIDTH], plan[later + FAN_IN], plan[later + BIASES]
    inputs, later_inputs = _extended(plan, layer), _extended(plan, later)
    for p in range(width):
        for m in range(inputs):
            row = plan[layer + WEIGHTS] + p * fan_in + m if m < fan_in else plan[layer + BIASES] + p
            for r in range(later_width):
                place = second + ((r * width + p) * inputs + m) * later_inputs
                at = row * parameters + plan[later + WEIGHTS] + r * count
                _copy(hessian, at, sums, place, count)
                if biases >= 0:
                    hessian[row * parameters + biases + r] = sums[place + count]
                if layer == later - LAYER:  # where a_{q−1}[s] depends on z_l[s] only
                    hessian[at + p] += sums[first + (m * later_width + r) * count + p]
                else:
                    for s in range(count):
                        hessian[at + s] += sums[first + ((m * later_width + r) * count + s) * width + p]


@part
def _transpose(hessian: Numbers, order: int, start: int, stop: int, column: int, end: int) -> None:
    """Copy the block of these rows and columns to where it stands transposed, in pieces that fit into the cache."""
    for first_row in range(start, stop, TILE):
        for first_column in range(column, end, TILE):
            for c in range(first_column, min(first_column + TILE, end)):
                for r in range(first_row, min(first_row + TILE, stop)):
                    hessian[c * order + r] = hessian[r * order + c]


@inlined
def _end(plan: Integers, layer: int) -> int:
    """The place in φ behind a layer's parameters."""
    return int(plan[layer + WEIGHTS] + plan[layer + WIDTH] * _extended(plan, layer))


@compiled
def _assemble(plan: Integers, places: Integers, sums: Numbers, squares: Numbers, hessian: Numbers) -> None:
    """The Hessian from all its sums, whose places are given for each pair (l, q), l ≤ q."""
    depth = plan[DEPTH]
    for q in range(depth):
        later = HEADER + q * LAYER
        _write_same(plan, sums, places[2 * (q * depth + q)], squares, hessian, later)
        for lower in range(q):
            layer, place = HEADER + lower * LAYER, 2 * (lower * depth + q)
            _write_cross(plan, sums, places[place], places[place + 1], hessian, layer, later)
            begin = plan[layer + WEIGHTS], plan[later + WEIGHTS]
            _transpose(hessian, plan[PARAMETER_COUNT], begin[0], _end(plan, layer), begin[1], _end(plan, later))


# --- The class ----------------------------------------------------------------------------------------------

_WORKSPACE_NUMBERS = 2**21  # of a chunk's matrices: 16 MiB
_SMALLEST_CHUNK, _LARGEST_CHUNK = 32, 256

_Kernel: TypeAlias = Callable[..., None]


class _Product(NamedTuple):
    """A sum over samples, to which left rightᵀ is added with each chunk."""

    sum: Tensor
    left: Tensor
    right: Tensor


class _Step(NamedTuple):
    """Part of what is done with each chunk: a kernel, its last arguments, and what is multiplied then."""

    kernel: _Kernel
    arguments: tuple[int, ...]
    products: list[_Product]


class BlockHessian:
    """Loss, gradient and Hessian of a perceptron. There is one workspace: only one call at a time.

    Args:
        network: The perceptron, with its data.
    """

    def __init__(self, network: CompiledPerceptron) -> None:
        self._network = network
        self._sizes = network.sizes
        self._inputs = [n + has for n, has in zip(network.sizes, network.biases, strict=False)]  # rows of ã_{l−1}
        self._count = padded(network.samples.shape[1])
        rows = self._rows()
        allowed = min(max(_WORKSPACE_NUMBERS // sum(rows.values()), _SMALLEST_CHUNK), _LARGEST_CHUNK)
        self._chunk = padded(-(-self._count // -(-self._count // allowed)))
        shard = Shard(network, network.samples, self._chunk, 1 + sum(rows.values()))
        self._plan, self._storage = shard.plan, shard.storage
        self._numbers = _as_tensor(self._storage)
        workspace = int(self._plan[WORKSPACE])
        self._storage[workspace : workspace + self._chunk] = 1.0
        place = workspace + self._chunk
        self._buffers: dict[str, int] = {}
        for name, count in rows.items():
            self._buffers[name] = place
            place += count * self._chunk
        self._reserve_sums()
        self._squares = aligned((_GROUP * max(self._inputs)) ** 2)
        self._steps: dict[int, list[_Step]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are made anew: their tensors must be parts of their own workspace."""
        return BlockHessian, (self._network,)

    def loss_gradient_hessian(self, phi: Tensor, gradient: Tensor, hessian: Tensor, loss: Tensor) -> None:
        """Write L(φ), ∇L(φ) and ∇²L(φ), to contiguous tensors of float64 numbers."""
        point, slope = phi.numpy(), gradient.zero_().numpy()
        sum_ = 0.0
        for first in range(0, self._count, self._chunk):
            n = min(self._chunk, self._count - first)
            if n not in self._steps:
                self._steps[n] = list(self._plan_steps(n))
            sum_ += _begin(point, slope, self._plan, self._storage, first, n, self._buffers["B0"])
            for kernel, arguments, products in self._steps[n]:
                kernel(point, self._plan, self._storage, first, n, *arguments)
                for product in products:
                    product.sum.addmm_(product.left, product.right, beta=float(first > 0))
        _assemble(self._plan, self._places, self._sums, self._squares, hessian.numpy().reshape(-1))
        loss.fill_(sum_)

    def _pairs(self) -> list[tuple[int, int]]:
        """The pairs l < q."""
        depth = len(self._inputs)
        return [(lower, q) for q in range(depth) for lower in range(q)]

    def _rows(self) -> dict[str, int]:
        """How many rows each buffer of the workspace needs; of B, C and S there are two, the one from the other."""
        inputs, widths, pairs = self._inputs, self._sizes[1:], self._pairs()
        b = max(k * k for k in widths)
        c = max((widths[lower] * widths[q] for lower, q in pairs), default=0)
        s = max((widths[lower] * self._sizes[q] for lower, q in pairs if lower < q - 1), default=0)
        products = max(map(_triangle, inputs))
        products = max([products, *(inputs[lower] * inputs[q] for lower, q in pairs)])
        pulls = max((inputs[lower] * widths[q] for lower, q in pairs), default=0)
        left = max(map(_triangle, widths))
        return {"B0": b, "B1": b, "C0": c, "C1": c, "S0": s, "S1": s, "products": products, "left": left, "pulls": pulls}

    def _reserve_sums(self) -> None:
        """The sums' places: for each pair (l, q), l ≤ q, those with C_lq and those with S_lq."""
        inputs, widths, depth = self._inputs, self._sizes[1:], len(self._inputs)
        shapes = {(q, q, 0): (_triangle(widths[q]), _triangle(inputs[q])) for q in range(depth)}
        for lower, q in self._pairs():
            shapes[lower, q, 0] = widths[q] * widths[lower], inputs[lower] * inputs[q]
            columns = self._sizes[q] * (widths[lower] if lower < q - 1 else 1)
            shapes[lower, q, 1] = inputs[lower] * widths[q], columns
        places = np.zeros((depth, depth, 2), dtype=np.int64)
        size = 0
        for pair, (rows, columns) in shapes.items():
            places[pair] = size
            size += padded(rows * columns)
        self._sums, self._places = aligned(size), places.ravel()
        numbers = _as_tensor(self._sums)
        self._matrices = {
            pair: numbers[int(places[pair]) :][: rows * columns].view(rows, columns)
            for pair, (rows, columns) in shapes.items()
        }

    def _matrix(self, place: int, rows: int, n: int) -> Tensor:
        """Part of the storage, as a matrix with n columns."""
        return self._numbers[place : place + rows * n].view(rows, n)

    def _product(self, pair: tuple[int, int, int], left: int, right: int, n: int) -> _Product:
        """That of two matrices in the storage."""
        total = self._matrices[pair]
        return _Product(total, self._matrix(left, total.shape[0], n), self._matrix(right, total.shape[1], n).T)

    def _plan_steps(self, n: int) -> Iterator[_Step]:
        """What is done with a chunk of n samples, after both passes: the blocks of the last layer first."""
        places = self._buffers
        products, pulls, left = places["products"], places["pulls"], places["left"]
        for q in reversed(range(len(self._inputs))):
            later = HEADER + q * LAYER
            parity = (len(self._inputs) - 1 - q) % 2
            b, b_below = places[f"B{parity}"], places[f"B{1 - parity}"]
            yield _Step(_fill_same, (later, b, left, products), [self._product((q, q, 0), left, products, n)])
            c_above = b
            s_above = 0
            for lower in reversed(range(q)):
                layer = HEADER + lower * LAYER
                c, s = places[f"C{lower % 2}"], places[f"S{lower % 2}"]
                if lower == q - 1:
                    s = int(self._plan[layer + SLOPE])
                arguments = layer, later, c_above, c, products, s_above, s, pulls
                both = [self._product((lower, q, 0), c, products, n), self._product((lower, q, 1), pulls, s, n)]
                yield _Step(_fill_cross, arguments, both)
                if lower == q - 1:
                    yield _Step(_curvature_below, (later, c, left, b_below), [])
                c_above, s_above = c, s


def _as_tensor(numbers: Numbers) -> Tensor:
    """A tensor of the same memory that can be written to later, whatever mode this is called in."""
    with torch.inference_mode(mode=False):
        return torch.from_numpy(numbers)


def _triangle(order: int) -> int:
    """Elements of a symmetric matrix up to the diagonal."""
    return order * (order + 1) // 2
