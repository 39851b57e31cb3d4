"""Directions in which a perceptron's parameters can move without changing what it computes on the data.

At a critical point each of them is a null direction of the Hessian: where f(θ(s)) stays the same, so does L, and with ∇L = 0
its second derivative along θ′(0) is θ′ᵀ H θ′ = 0, and H θ′ = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_gradflow.minimize.network import KnownNetwork, bias_places, incoming, neuron_kinds, outgoing
from torch_gradflow.perceptron.activations import Activation
from torch_gradflow.perceptron.architecture import Perceptron, Samples

RESCALING, MIXING, LOGITS = "rescaling of homogeneous neurons", "mixing of linear neurons", "shift of all logits"
UNUSED, EQUALS, DEAD = "neurons without output", "equal neurons", "dead neurons"
DEPENDENT = "linearly dependent inputs of a layer"
# Neurons whose input weights differ by less, relative to their norm, count as equal (Martinelli et al., arXiv 2506.14951),
# those with output weights that are smaller than this part of their layer's largest as unused.
EQUAL = 1e-6
# Singular values below this part of the largest one count as zero.
RANK = 1e-10
# How far beside it a kink is looked for, relative to 1 + |z|.
BESIDE = 1e-6
# A direction lies among the null vectors if the cosine of its angle with them is at least this.
ALIGNED = 0.99
# g(cz) = c^p g(z) for c > 0.
DEGREES = {"identity": 1, "relu": 1, "leaky_relu": 1, "square": 2, "cube": 3}
# g(−z) = ± g(z).
PARITIES = {"tanh": -1, "erf": -1, "softsign": -1, "identity": -1, "cube": -1, "square": 1}


@dataclass(frozen=True)
class Symmetry:
    """A family of directions.

    Attributes:
        name: What leaves the network's outputs alone, one of the names above.
        tangents: Directions of θ, shape ``(P, k)``, possibly linearly dependent.
    """

    name: str
    tangents: Tensor


@dataclass(frozen=True)
class Explanation:
    """How many zero eigenvalues the architecture predicts, and how many of those that were found it explains.

    Attributes:
        n_predicted: The dimension of all predicted directions together.
        n_explained: The dimension of what they have in common with the null vectors that were found.
        names: The families, each with how many dimensions it adds to those before it.
        joint: Whether one can follow all of them at once. (With a neuron that is not used its input weights are free, and,
            with equal ones, its output weight is; but not both at a time.)
    """

    n_predicted: int
    n_explained: int
    names: tuple[tuple[str, int], ...]
    joint: bool

    def __str__(self) -> str:
        """In words."""
        parts = ", ".join(f"{name} ({n})" for name, n in self.names)
        return f"{self.n_explained} of them explained by the architecture{': ' if parts else ''}{parts}"


def explain(known: KnownNetwork, theta: Tensor, null_vectors: Tensor) -> Explanation:
    """Compare the null vectors of the Hessian at θ, an orthonormal basis of shape ``(P, n)``, with the symmetries."""
    basis = null_vectors[:, :0]
    names = []
    for symmetry in symmetries(known, theta):
        added = _independent(symmetry.tangents, basis)
        if added.shape[1]:
            names.append((symmetry.name, added.shape[1]))
            basis = torch.cat([basis, added], dim=1)
    common = torch.linalg.svdvals(null_vectors.T @ basis) if basis.shape[1] else basis.new_zeros(0)
    found = dict(names)
    joint = UNUSED not in found or not (EQUALS in found or DEPENDENT in found)
    return Explanation(basis.shape[1], int((common >= ALIGNED).sum()), tuple(names), joint)


def symmetries(known: KnownNetwork, theta: Tensor) -> Iterator[Symmetry]:
    """The continuous symmetries of a network at θ, and, where its data are known, what these leave undetermined.

    Neurons with g(cz) = c^p g(z) can be rescaled; linear neurons of a layer can be mixed by any invertible matrix, and their
    biases moved into the next layer's; the input weights of a neuron whose output is not used are free; of neurons with
    equal input weights (or opposite ones, for an odd or even g) only the sum of the outputs matters; the softmax does not
    see what all logits have in common. On the data: the weights of dead neurons (ReLU) are free, and so are those of
    inputs of a layer, hidden or not, that are linearly dependent on all samples.
    """
    layout = _Layout(known.network, known.phi(theta))
    families: list[tuple[str, Callable[[], list[Tensor]]]] = [
        (RESCALING, layout.rescalings),
        (MIXING, layout.mixings),
        (UNUSED, layout.unused),
        (EQUALS, layout.equal),
    ]
    if known.loss is not None and known.loss.name == "cross entropy":
        families.append((LOGITS, layout.logit_shifts))
    if known.samples is not None:
        states = _States.of(layout, known.samples)
        families.append((DEAD, lambda: layout.dead(states)))
        families.append((DEPENDENT, lambda: layout.dependent(states)))
    for name, directions in families:
        columns = directions()
        if columns:
            yield Symmetry(name, known.directions(torch.stack(columns, dim=1)))


def rank_tolerance(values: Tensor) -> float:
    """Below which part of the largest singular value another one is zero, in the type of ``values``."""
    return max(RANK, 1e3 * torch.finfo(values.dtype).eps)


def _independent(tangents: Tensor, basis: Tensor) -> Tensor:
    """An orthonormal basis of what the tangents add to the space of ``basis``."""
    sizes = tangents.norm(dim=0)
    tangents = tangents[:, sizes > 0] / sizes[sizes > 0]
    for _ in range(2):
        tangents = tangents - basis @ (basis.T @ tangents)
    if tangents.shape[1] == 0:
        return tangents
    left, values, _ = torch.linalg.svd(tangents, full_matrices=False)
    added: Tensor = left[:, values > rank_tolerance(values) * max(1.0, float(values[0]))]
    return added


class _Layout:
    """Directions of φ for a network at φ, each as a vector of shape ``(P_φ,)``."""

    def __init__(self, network: Perceptron, phi: Tensor) -> None:
        self.network = network
        self.phi = phi
        self.hidden = range(network.n_layers - 1)
        self._kinds = [neuron_kinds(network, layer) for layer in range(network.n_layers)]

    def kind(self, layer: int, neuron: int) -> Activation:
        return self._kinds[layer][neuron]

    def incoming(self, layer: int, neuron: int) -> Tensor:
        return incoming(self.network, layer, neuron)

    def outgoing(self, layer: int, neuron: int) -> Tensor:
        return outgoing(self.network, layer, neuron)

    def rescalings(self) -> list[Tensor]:
        directions = []
        for layer in self.hidden:
            for i in range(self.network.sizes[layer + 1]):
                degree = DEGREES.get(self.kind(layer, i).name)
                if degree is not None:
                    into, out = self.incoming(layer, i), self.outgoing(layer, i)
                    directions.append(self._direction((into, self.phi[into]), (out, -degree * self.phi[out])))
        return directions

    def mixings(self) -> list[Tensor]:
        directions = []
        for layer in self.hidden:
            linear = [i for i in range(self.network.sizes[layer + 1]) if self.kind(layer, i).is_identity]
            here, above = (bias_places(self.network, k) for k in (layer, layer + 1))
            for i in linear:
                # W_l → (1 + s E_ij) W_l, W_{l+1} → W_{l+1} (1 − s E_ij).
                for j in linear:
                    source, target = self.incoming(layer, j), self.incoming(layer, i)
                    moved = (self.outgoing(layer, j), -self.phi[self.outgoing(layer, i)])
                    directions.append(self._direction((target, self.phi[source]), moved))
                if here is not None and above is not None:
                    one = torch.ones(1).to(self.phi)
                    directions.append(self._direction((here[i : i + 1], one), (above, -self.phi[self.outgoing(layer, i)])))
        return directions

    def unused(self) -> list[Tensor]:
        directions = []
        for layer in self.hidden:
            neurons = range(self.network.sizes[layer + 1])
            sizes = torch.stack([self.phi[self.outgoing(layer, i)].abs().max() for i in neurons])
            for i in neurons:
                if float(sizes[i]) <= EQUAL * float(sizes.max()):
                    directions += self._free(self.incoming(layer, i))
        return directions

    def equal(self) -> list[Tensor]:
        """a_i σ(z) ± a_j σ(±z): each neuron paired with the first one that equals it."""
        directions = []
        for layer in self.hidden:
            first: list[int] = []
            for j in range(self.network.sizes[layer + 1]):
                twin = next(((i, sign) for i in first if (sign := self._same(layer, i, j)) != 0), None)
                if twin is None:
                    first.append(j)
                    continue
                i, sign = twin
                into = zip(self.outgoing(layer, i), self.outgoing(layer, j), strict=True)
                change = torch.tensor([1.0, -float(sign)]).to(self.phi)
                directions += [self._direction((torch.stack(pair), change)) for pair in into]
        return directions

    def _same(self, layer: int, i: int, j: int) -> int:
        """±1 if σ_i(z_i) = ± σ_j(z_j) for all inputs, else 0."""
        if self.kind(layer, i) != self.kind(layer, j):
            return 0
        a, b = self.phi[self.incoming(layer, i)], self.phi[self.incoming(layer, j)]
        near = EQUAL * float(a.norm())
        if float((a - b).norm()) <= near:
            return 1
        return PARITIES.get(self.kind(layer, i).name, 0) if float((a + b).norm()) <= near else 0

    def logit_shifts(self) -> list[Tensor]:
        last = self.network.n_layers - 1
        if not all(kind.is_identity for kind in self._kinds[last]):
            return []
        rows = torch.stack([self.incoming(last, i) for i in range(self.network.sizes[-1])])
        return [self._direction((column, torch.ones(len(column)).to(self.phi))) for column in rows.T]

    def dead(self, states: _States) -> list[Tensor]:
        directions = []
        for layer in self.hidden:
            for i in range(self.network.sizes[layer + 1]):
                if not bool(states.alive[layer][i]):
                    directions += self._free(self.incoming(layer, i))
                    if not bool((states.inputs[layer + 1][i] != 0).any()):
                        directions += self._free(self.outgoing(layer, i))
        return directions

    def dependent(self, states: _States) -> list[Tensor]:
        directions = []
        for layer in range(self.network.n_layers):
            features = states.inputs[layer]
            if self.network.biases[layer]:
                features = torch.cat([features, torch.ones_like(features[:1])])
            # Of tall data the small matrix R of a QR decomposition has the same null vectors.
            small = torch.linalg.qr(features.T, mode="r").R if features.shape[1] > features.shape[0] else features.T
            _, sizes, rows = torch.linalg.svd(small, full_matrices=True)
            null = rows[int((sizes > rank_tolerance(sizes) * float(sizes.max())).sum()) :]
            for i in range(self.network.sizes[layer + 1]):
                directions += [self._direction((self.incoming(layer, i), vector)) for vector in null]
        return directions

    def _free(self, places: Tensor) -> list[Tensor]:
        one = torch.ones(1).to(self.phi)
        return [self._direction((place[None], one)) for place in places]

    def _direction(self, *parts: tuple[Tensor, Tensor]) -> Tensor:
        direction = torch.zeros_like(self.phi)
        for places, values in parts:
            direction[places] += values
        return direction


@dataclass(frozen=True)
class _States:
    """What the network does on the data.

    Attributes:
        inputs: a_0, …, a_{L−1}, one column per sample.
        alive: For each layer whether the neurons have a slope on any sample, or beside a kink would have one.
    """

    inputs: list[Tensor]
    alive: list[Tensor]

    @classmethod
    def of(cls, layout: _Layout, samples: Samples) -> _States:
        network, phi = layout.network, layout.phi
        inputs, alive = [samples.to(phi.dtype).x[:, samples.weights > 0]], []
        for layer, runs in enumerate(network.activations):
            fan_in, fan_out = network.sizes[layer], network.sizes[layer + 1]
            start = network.offsets()[layer][0]
            z = phi[start : start + fan_in * fan_out].view(fan_out, fan_in) @ inputs[-1]
            biases = bias_places(network, layer)
            if biases is not None:
                z = z + phi[biases][:, None]
            parts = z.split([count for count, _ in runs])
            kinds = [kind for _, kind in runs]
            inputs.append(torch.cat([kind.derivatives(part, 0)[0] for kind, part in zip(kinds, parts, strict=True)]))
            near = [torch.cat([part, part + BESIDE * (1 + part.abs())], dim=1) for part in parts]
            slopes = torch.cat([kind.derivatives(part, 1)[1] for kind, part in zip(kinds, near, strict=True)])
            alive.append((slopes != 0).any(1))
        return cls(inputs[:-1], alive)
