"""The loss of a perceptron in ball arithmetic: enclosures of its gradient and Hessian over a box of parameters.

Every number is a midpoint with a radius that holds all rounding (Johansson 2017, Arb, IEEE Trans. Comput. 66, 1281–1292);
parameters, data and weights are taken as the exact numbers that their floating-point values are. The sums over samples are
the blocks that `torch_gradflow.perceptron.blocks` describes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

from flint import arb, arb_mat

from torch_gradflow.minimize.network import KnownNetwork, neuron_kinds
from torch_gradflow.perceptron.activations import Activation
from torch_gradflow.perceptron.architecture import Loss, Samples

Ball: TypeAlias = arb
# One ball per sample; one row per neuron; one row per pair of neurons.
Row: TypeAlias = list[Ball]
Rows: TypeAlias = list[Row]
Stack: TypeAlias = list[Rows]
Pair: TypeAlias = tuple[int, int]
Formula: TypeAlias = Callable[[Ball], tuple[Ball, Ball, Ball]]

# Samples that are treated together; their balls take some hundred MiB.
CHUNK = 2000


class NotAnalyticError(ValueError):
    """An activation or a loss that is not analytic over the box, or not known in ball arithmetic."""


def _sigmoid(z: Ball) -> Ball:
    return 1 / (1 + (-z).exp())


def _softplus(beta: float, threshold: float) -> Formula:
    """torch's, which is z itself above the threshold."""

    def formula(z: Ball) -> tuple[Ball, Ball, Ball]:
        scaled = beta * z
        if scaled > threshold:
            return z, arb(1), arb(0)
        if not scaled < threshold:
            raise NotAnalyticError("softplus, which torch replaces by z above its threshold, is evaluated at that threshold")
        s = _sigmoid(scaled)
        return scaled.exp().log1p() / beta, s, beta * s * (1 - s)

    return formula


def _logistic() -> Formula:
    def formula(z: Ball) -> tuple[Ball, Ball, Ball]:
        s = _sigmoid(z)
        slope = s * (1 - s)
        return s, slope, slope * (1 - 2 * s)

    return formula


def _sigmoid_softplus() -> Formula:
    logistic, softplus = _logistic(), _softplus(1.0, 20.0)

    def formula(z: Ball) -> tuple[Ball, Ball, Ball]:
        a, b = logistic(4 * z), softplus(z)
        return a[0] + b[0], 4 * a[1] + b[1], 16 * a[2] + b[2]

    return formula


def _tanh() -> Formula:
    def formula(z: Ball) -> tuple[Ball, Ball, Ball]:
        t = z.tanh()
        slope = 1 - t * t
        return t, slope, -2 * t * slope

    return formula


def _erf() -> Formula:
    factor = 2 / arb.pi().sqrt()

    def formula(z: Ball) -> tuple[Ball, Ball, Ball]:
        slope = factor * (-z * z).exp()
        return z.erf(), slope, -2 * z * slope

    return formula


def _normal_cdf() -> Formula:
    inside, factor = 1 / arb(2).sqrt(), 1 / (2 * arb.pi()).sqrt()

    def formula(z: Ball) -> tuple[Ball, Ball, Ball]:
        density = factor * (-z * z / 2).exp()
        return (1 + (inside * z).erf()) / 2, density, -z * density

    return formula


def _gelu() -> Formula:
    cdf = _normal_cdf()

    def formula(z: Ball) -> tuple[Ball, Ball, Ball]:
        value, density, _ = cdf(z)
        return z * value, value + z * density, (2 - z * z) * density

    return formula


def _gelu_tanh() -> Formula:
    root, cubic = (2 / arb.pi()).sqrt(), arb(0.044715)

    def formula(z: Ball) -> tuple[Ball, Ball, Ball]:
        t = (root * (z + cubic * z**3)).tanh()
        sech2 = 1 - t * t
        du, ddu = root * (1 + 3 * cubic * z * z), root * 6 * cubic * z
        second = sech2 * (du + z * ddu / 2 - z * t * du * du)
        return z * (1 + t) / 2, (1 + t) / 2 + z * sech2 * du / 2, second

    return formula


def _silu() -> Formula:
    logistic = _logistic()

    def formula(z: Ball) -> tuple[Ball, Ball, Ball]:
        s, slope, bend = logistic(z)
        return z * s, s + z * slope, 2 * slope + z * bend

    return formula


def _polynomial(*coefficients: float) -> Formula:
    orders = [tuple(arb(c) for c in coefficients)]
    for _ in range(2):
        orders.append(tuple(k * c for k, c in enumerate(orders[-1]))[1:])

    def formula(z: Ball) -> tuple[Ball, Ball, Ball]:
        values = []
        for order in orders:
            value = arb(0)
            for c in reversed(order):
                value = value * z + c
            values.append(value)
        return values[0], values[1], values[2]

    return formula


# g, g′ and g″ by the names of `torch_gradflow.perceptron.activations`; called at the precision in which they are used.
FORMULAS: dict[str, Callable[..., Formula]] = {
    "identity": lambda: _polynomial(0.0, 1.0),
    "tanh": _tanh,
    "sigmoid": _logistic,
    "softplus": _softplus,
    "erf": _erf,
    "normal_cdf": _normal_cdf,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "sigmoid_softplus": _sigmoid_softplus,
    "square": lambda: _polynomial(0.0, 0.0, 1.0),
    "cube": lambda: _polynomial(0.0, 0.0, 0.0, 1.0),
    "polynomial": _polynomial,
}
LOSSES = ("squared error", "cross entropy", "binary cross entropy")


class BallLoss:
    """L over boxes of θ, for a network whose loss and data are known; precision is that of ``flint.ctx`` at each call.

    Args:
        known: The network, its loss and data.
        loss: ℓ.
        samples: The data.

    Raises:
        NotAnalyticError: For an activation or a loss that is not analytic, or not known here.
    """

    def __init__(self, known: KnownNetwork, loss: Loss, samples: Samples) -> None:
        names = {kind.name for layer in range(known.network.n_layers) for kind in neuron_kinds(known.network, layer)}
        unknown = sorted(names - set(FORMULAS))
        if unknown or loss.name not in LOSSES:
            what = f"the activation {unknown[0]!r}" if unknown else f"the loss {loss.name!r}"
            raise NotAnalyticError(f"{what} is not analytic, or not known in ball arithmetic")
        self._known, self._network, self._loss = known, known.network, loss
        used = samples.weights > 0
        self._x, self._targets = samples.x[:, used].double().tolist(), samples.targets[:, used].double().tolist()
        self._weights = samples.weights[used].double().tolist()
        self._index: list[int] = known.index.tolist()
        self._scale: list[float] = known.scale.double().tolist()
        self._decay: list[float] = [0.0] * len(self._scale) if known.decay is None else known.decay.double().tolist()

    def gradient(self, theta: Sequence[Ball]) -> list[Ball]:
        """∇L over the box ``theta``, one ball per parameter."""
        total = [2 * c * t for c, t in zip(self._decay, theta, strict=True)]
        phi = self._phi(theta)
        for chunk in self._chunks(phi):
            for layer, (extended, delta) in enumerate(zip(chunk.extended, chunk.deltas, strict=True)):
                sums = arb_mat(delta) * arb_mat(extended).transpose()
                for p, m in product(range(len(delta)), range(len(extended))):
                    place = self._place(layer, p, m)
                    if place >= 0:
                        total[place] += self._scale[place] * sums[p, m]
        return total

    def hessian(self, theta: Sequence[Ball]) -> arb_mat:
        """A matrix that encloses H at every point of the box ``theta``."""
        n = len(theta)
        total = arb_mat(n, n)
        for i, c in enumerate(self._decay):
            total[i, i] = arb(2 * c)
        phi = self._phi(theta)
        for chunk in self._chunks(phi):
            for block in self._blocks(phi, chunk):
                sums = arb_mat(block.left) * arb_mat(block.right).transpose()
                for (a, row), (b, column) in product(enumerate(block.rows), enumerate(block.columns)):
                    for i, j in block.places(row, column):
                        if i < 0 or j < 0:
                            continue
                        share = self._scale[i] * self._scale[j] * sums[a, b]
                        total[i, j] += share
                        if i != j:
                            total[j, i] += share
        return total

    def _phi(self, theta: Sequence[Ball]) -> list[Ball]:
        frozen = [0.0] * len(self._index) if self._known.frozen is None else self._known.frozen.double().tolist()
        return [arb(f) if i < 0 else self._scale[i] * theta[i] for i, f in zip(self._index, frozen, strict=True)]

    def _place(self, layer: int, p: int, m: int) -> int:
        """Where in θ the weight from input m (or the bias, one further) to neuron p of a layer stands; −1 where frozen."""
        (start, bias), fan_in = self._network.offsets()[layer], self._network.sizes[layer]
        return self._index[start + p * fan_in + m if bias is None or m < fan_in else bias + p]

    def _matrix(self, phi: list[Ball], layer: int, *, with_biases: bool) -> arb_mat:
        (start, bias), fan_in = self._network.offsets()[layer], self._network.sizes[layer]
        rows = [phi[start + p * fan_in : start + (p + 1) * fan_in] for p in range(self._network.sizes[layer + 1])]
        if with_biases and bias is not None:
            rows = [[*row, phi[bias + p]] for p, row in enumerate(rows)]
        return arb_mat(rows)

    def _chunks(self, phi: list[Ball]) -> Iterator[_Chunk]:
        """The forward and the backward pass of some samples after the other."""
        formulas = {
            kind: FORMULAS[kind.name](*kind.parameters)
            for layer in range(self._network.n_layers)
            for kind in neuron_kinds(self._network, layer)
        }
        for start in range(0, len(self._weights), CHUNK):
            yield self._pass(phi, formulas, slice(start, start + CHUNK))

    def _pass(self, phi: list[Ball], formulas: dict[Activation, Formula], part: slice) -> _Chunk:
        weights = [arb(w) for w in self._weights[part]]
        values: Rows = [[arb(v) for v in row[part]] for row in self._x]
        extended, slopes, bends = [], [], []
        for layer in range(self._network.n_layers):
            if self._network.biases[layer]:
                values = [*values, [arb(1)] * len(weights)]
            extended.append(values)
            z = (self._matrix(phi, layer, with_biases=True) * arb_mat(values)).tolist()
            kinds = neuron_kinds(self._network, layer)
            triples = [[formulas[kind](ball) for ball in row] for kind, row in zip(kinds, z, strict=True)]
            values, first, second = ([[triple[k] for triple in row] for row in triples] for k in range(3))
            slopes.append(first)
            bends.append(second)
        targets = [[arb(t) for t in row[part]] for row in self._targets]
        back, curvature = _loss_terms(self._loss, values, targets, weights)
        deltas, backs = [[_times(b, g) for b, g in zip(back, slopes[-1], strict=True)]], [back]
        for layer in reversed(range(1, self._network.n_layers)):
            weight = self._matrix(phi, layer, with_biases=False)
            backs.insert(0, (weight.transpose() * arb_mat(deltas[0])).tolist())
            deltas.insert(0, [_times(b, g) for b, g in zip(backs[0], slopes[layer - 1], strict=True)])
        return _Chunk(extended, slopes, bends, deltas, backs, curvature)

    def _blocks(self, phi: list[Ball], chunk: _Chunk) -> Iterator[_Block]:
        """The sums over samples of which H consists, as products of two matrices with a column per sample."""
        last = self._network.n_layers - 1
        slopes = chunk.slopes[last]
        outer = [
            [_times(_times(row, g), h) for row, h in zip(rows, slopes, strict=True)]
            for rows, g in zip(chunk.curvature, slopes, strict=True)
        ]
        b = chunk.bent(last, outer)
        for q in reversed(range(last + 1)):
            yield self._same_layer(chunk, q, b)
            c, sensitivity = b, chunk.diagonal(q - 1) if q > 0 else []
            for layer in reversed(range(q)):
                weight = self._matrix(phi, layer + 1, with_biases=False)
                c = _pulled(weight, chunk.slopes[layer], c)
                if layer < q - 1:
                    sensitivity = _pulled(weight, chunk.slopes[layer], sensitivity)
                yield self._second(chunk, layer, q, c)
                yield self._first(chunk, layer, q, sensitivity)
            if q > 0:
                weight = self._matrix(phi, q, with_biases=False)
                half = _pulled(weight, chunk.slopes[q - 1], b)
                b = chunk.bent(q - 1, _pulled(weight, chunk.slopes[q - 1], [list(row) for row in zip(*half, strict=True)]))

    def _same_layer(self, chunk: _Chunk, q: int, b: Stack) -> _Block:
        """Σ B_q[p, r] ã[m] ã[s] for p ≥ r and m ≥ s."""
        inputs = chunk.extended[q]
        rows = [(p, r) for p in range(len(b)) for r in range(p + 1)]
        columns = [(m, s) for m in range(len(inputs)) for s in range(m + 1)]

        def places(row: Pair, column: Pair) -> set[Pair]:
            (p, r), (m, s) = row, column
            pairs = ((self._place(q, p, m), self._place(q, r, s)), (self._place(q, p, s), self._place(q, r, m)))
            return {(max(pair), min(pair)) for pair in pairs}

        left, right = [b[p][r] for p, r in rows], [_times(inputs[m], inputs[s]) for m, s in columns]
        return _Block(rows, columns, left, right, places)

    def _second(self, chunk: _Chunk, layer: int, q: int, c: Stack) -> _Block:
        """Σ C_lq[p, r] ã_{l−1}[m] ã_{q−1}[s]."""
        below, inputs = chunk.extended[layer], chunk.extended[q]
        rows = list(product(range(len(c)), range(len(c[0]))))
        columns = list(product(range(len(below)), range(len(inputs))))

        def places(row: Pair, column: Pair) -> set[Pair]:
            return {(self._place(layer, row[0], column[0]), self._place(q, row[1], column[1]))}

        left, right = [c[p][r] for p, r in rows], [_times(below[m], inputs[s]) for m, s in columns]
        return _Block(rows, columns, left, right, places)

    def _first(self, chunk: _Chunk, layer: int, q: int, sensitivity: Stack) -> _Block:
        """Σ ã_{l−1}[m] δ_q[r] S_lq[s, p], whose S is diagonal for the layer just below."""
        below, deltas = chunk.extended[layer], chunk.deltas[q]
        pairs = product(range(len(sensitivity)), range(len(sensitivity[0])))
        rows = [(p, s) for p, s in pairs if layer < q - 1 or p == s]
        columns = list(product(range(len(below)), range(len(deltas))))

        def places(row: Pair, column: Pair) -> set[Pair]:
            return {(self._place(layer, row[0], column[0]), self._place(q, column[1], row[1]))}

        left, right = [sensitivity[p][s] for p, s in rows], [_times(below[m], deltas[r]) for m, r in columns]
        return _Block(rows, columns, left, right, places)


@dataclass(frozen=True)
class _Block:
    """Products left rightᵀ, and which elements of H each of them adds to.

    Attributes:
        rows: What names the rows of ``left``.
        columns: What names those of ``right``.
        left: A row per name, a ball per sample.
        right: Likewise.
        places: The pairs of places in θ for a row and a column, each unordered pair once; negative where frozen.
    """

    rows: list[Pair]
    columns: list[Pair]
    left: Rows
    right: Rows
    places: Callable[[Pair, Pair], set[Pair]]


@dataclass(frozen=True)
class _Chunk:
    """Both passes through some samples.

    Attributes:
        extended: ã_0, …, ã_{L−1}: the inputs of each layer, and ones where it has biases.
        slopes: g_l′(z_l).
        bends: g_l″(z_l).
        deltas: δ_1, …, δ_L.
        backs: What δ_l is before the factor g_l′.
        curvature: w ∂²ℓ/∂f∂f.
    """

    extended: list[Rows]
    slopes: list[Rows]
    bends: list[Rows]
    deltas: list[Rows]
    backs: list[Rows]
    curvature: Stack

    def diagonal(self, layer: int) -> Stack:
        """diag(g′) of a layer."""
        zero = [arb(0)] * len(self.slopes[layer][0])
        slopes = self.slopes[layer]
        return [[slopes[p] if p == s else zero for s in range(len(slopes))] for p in range(len(slopes))]

    def bent(self, layer: int, stack: Stack) -> Stack:
        """B of a layer: what comes from above, and ψ′ g″ on the diagonal."""
        result = [list(rows) for rows in stack]
        for p, (back, bend) in enumerate(zip(self.backs[layer], self.bends[layer], strict=True)):
            result[p][p] = [a + b * g for a, b, g in zip(result[p][p], back, bend, strict=True)]
        return result


def _loss_terms(loss: Loss, f: Rows, targets: Rows, weights: Row) -> tuple[Rows, Stack]:
    """w ∂ℓ/∂f and w ∂²ℓ/∂f∂f of each sample."""
    n = len(f)
    zero = [arb(0)] * len(weights)
    if loss.name == "cross entropy":
        mass = [w * sum(column) for w, column in zip(weights, zip(*targets, strict=True), strict=True)]
        logits = list(zip(*f, strict=True))
        p = [[1 / sum((other - each[c]).exp() for other in each) for each in logits] for c in range(n)]
        slope = [
            [m * q - w * t for m, q, w, t in zip(mass, row, weights, target, strict=True)]
            for row, target in zip(p, targets, strict=True)
        ]
        curvature = [
            [[m * a * ((1 if c == d else 0) - b) for m, a, b in zip(mass, p[c], p[d], strict=True)] for d in range(n)]
            for c in range(n)
        ]
        return slope, curvature
    if loss.name == "binary cross entropy":
        s = [[_sigmoid(ball) for ball in row] for row in f]
        slope = [
            [w * (no * q - yes * (1 - q)) for w, q, yes, no in zip(weights, row, a, b, strict=True)]
            for row, a, b in zip(s, targets[:n], targets[n:], strict=True)
        ]
        second = [
            [w * (yes + no) * q * (1 - q) for w, q, yes, no in zip(weights, row, a, b, strict=True)]
            for row, a, b in zip(s, targets[:n], targets[n:], strict=True)
        ]
    else:
        slope = [
            [2 * w * (a - t) for w, a, t in zip(weights, row, target, strict=True)]
            for row, target in zip(f, targets, strict=True)
        ]
        second = [[2 * w for w in weights] for _ in f]
    return slope, [[second[c] if c == d else zero for d in range(n)] for c in range(n)]


def _times(a: Row, b: Row) -> Row:
    return [x * y for x, y in zip(a, b, strict=True)]


def _pulled(weight: arb_mat, slopes: Rows, stack: Stack) -> Stack:
    """(Σ_p' W[p', p] stack[p'][r]) g′[p]: derivatives by z of one layer from those of the layer above."""
    columns = [(weight.transpose() * arb_mat([rows[r] for rows in stack])).tolist() for r in range(len(stack[0]))]
    return [[_times(column[p], slope) for column in columns] for p, slope in enumerate(slopes)]
