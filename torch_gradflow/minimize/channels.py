"""Channels to infinity: two neurons align, their output weights diverge with opposite signs, and the loss goes on falling.

For neurons i and j of a layer with input weights (bias included) w_i, w_j and output weights a_i, a_j, let

    w = (w_i + w_j)/2,  ε = ‖w_i − w_j‖/2,  Δ = (w_i − w_j)/(2ε),  c = a_i + a_j,  a = ε (a_i − a_j).

As ε → 0 at fixed w, Δ, c and a, the pair computes c g(w·x) + a (Δ·x) g′(w·x), and L = L_0 + ε² h + O(ε⁴): for h > 0 the
channel attracts, and its minimum lies at infinity (Martinelli et al. 2025, arXiv 2506.14951).

The biases of the next layer are a constant neuron's output weights: a neuron i can align with it too. Then w_i loses its part
that sees the inputs and keeps the bias β, g(β) is the constant, and the pair tends to an affine function of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_gradflow.minimize.network import KnownNetwork, bias_places, incoming, neuron_kinds, outgoing
from torch_gradflow.minimize.symmetries import EQUAL
from torch_gradflow.objectives.base import Objective

# The criteria of the paper's appendix B.3.
COSINE_DISTANCE = 1e-3
WEIGHT_NORM = 1e3
WITHIN = 0.9


@dataclass(frozen=True)
class Channel:
    """A pair of neurons in a channel to infinity.

    Attributes:
        layer: The layer of the neurons, 0 for the first.
        neurons: i and j; None for j where it is the constant neuron of the next layer's biases.
        cosine_distance: 1 − cos ∠(w_i, w_j).
        epsilon: ε.
        output_sum: c, one number per neuron of the next layer.
        output_difference: ‖a_i − a_j‖, which diverges.
        fall: L(ε) − L(ε/2), which for a pair of neurons is 3 ε² h/4 up to O(ε⁴).
        weight_norm: ‖φ‖²/(2P).
        within: The part of the motion since an earlier point that lies in the channel's subspace (the pair's output weights,
            and the span of its input weights); None where no such point was given.
    """

    layer: int
    neurons: tuple[int, int | None]
    cosine_distance: float
    epsilon: float
    output_sum: tuple[float, ...]
    output_difference: float
    fall: float
    weight_norm: float
    within: float | None

    def __str__(self) -> str:
        """In words."""
        i, j = self.neurons
        who = (
            f"neuron {i} of layer {self.layer} and the biases above it"
            if j is None
            else f"neurons {i} and {j} of layer {self.layer}"
        )
        return (
            f"{who} align (cosine distance {self.cosine_distance:.1e}) while the difference of their output weights, "
            f"{self.output_difference:.2e}, grows, and halving their distance lowers the loss: the minimum lies at infinity"
        )


@dataclass(frozen=True)
class _Pair:
    """Two neurons.

    Attributes:
        distance: Their cosine distance.
        layer: Of both.
        neurons: i and j, or i and None.
        difference: w_i − w_j.
        total: a_i + a_j.
        opposed: a_i − a_j.
        into: The places in φ of the input weights of those that can move.
        out: The places of the output weights of i, and those of j.
        factor: What multiplies a_j in φ: 1, or g(β) where its place is that of a bias.
    """

    distance: float
    layer: int
    neurons: tuple[int, int | None]
    difference: Tensor
    total: Tensor
    opposed: Tensor
    into: tuple[Tensor, ...]
    out: tuple[Tensor, Tensor]
    factor: float

    def halved(self, phi: Tensor) -> Tensor:
        """φ with ε/2 for ε."""
        nearer = phi.clone()
        share = 0.5 / len(self.into)
        for places, sign in zip(self.into, (1, -1), strict=False):
            nearer[places] -= sign * share * self.difference
        # a_i − a_j doubles where both neurons move; where one stands still, a_i does.
        growth = 0.5 * self.opposed if len(self.into) == 2 else phi[self.out[0]]
        nearer[self.out[0]] += growth
        nearer[self.out[1]] -= self.factor * growth
        return nearer

    def within(self, phi: Tensor, moved: Tensor) -> float:
        """The part of a motion that lies in the span of the pair's output weights and its vectors of input weights."""
        out = torch.cat(self.out)
        n = len(self.into)
        span = phi.new_zeros(phi.numel(), n * n + len(out))
        for k, places in enumerate(self.into):
            for m, other in enumerate(self.into):
                span[places, n * k + m] = phi[other]
        span[out, n * n + torch.arange(len(out))] = 1.0
        basis, values, _ = torch.linalg.svd(span, full_matrices=False)
        basis = basis[:, values > 1e-12 * values[0]]
        return float((basis.T @ moved).norm()) / max(float(moved.norm()), 1e-300)


def find_channel(
    objective: Objective, known: KnownNetwork, theta: Tensor, loss: Tensor, *, earlier: Tensor | None = None
) -> Channel | None:
    """The pair of neurons, the most aligned first, that is in a channel to infinity at θ; None where there is none.

    The pair's input weights must have a cosine distance below 1e-3 (and lengths that differ as little) without being equal,
    its output weights must be opposed, and either the loss must fall when ε is halved, or, where rounding hides that,
    ‖φ‖²/(2P) be above 1e3; of the motion since ``earlier`` more than 0.9 must lie in the channel's subspace.

    Args:
        objective: L, evaluated once per pair that aligns.
        known: The network.
        theta: The point, shape ``(P,)``.
        loss: L there.
        earlier: A point from which the flow or a minimiser came to θ.
    """
    phi = known.phi(theta)
    moved = None if earlier is None else phi - known.phi(earlier)
    weight_norm = float(phi @ phi) / (2 * phi.numel())
    pairs = [
        pair
        for layer in range(known.network.n_layers - 1)
        for pair in (*_neighbours(known, phi, layer), *_constants(known, phi, layer))
    ]
    for pair in sorted(pairs, key=lambda pair: pair.distance):
        within = None if moved is None else pair.within(phi, moved)
        if within is not None and within < WITHIN:
            continue
        there, _ = objective.loss_and_gradient(known.theta(theta, pair.halved(phi)))
        fall = float(loss - there)
        noise = 1e3 * objective.resolution * abs(float(loss))
        if fall > noise or (abs(fall) <= noise and weight_norm > WEIGHT_NORM):
            return Channel(
                layer=pair.layer,
                neurons=pair.neurons,
                cosine_distance=pair.distance,
                epsilon=0.5 * float(pair.difference.norm()),
                output_sum=tuple(pair.total.tolist()),
                output_difference=float(pair.opposed.norm()),
                fall=fall,
                weight_norm=weight_norm,
                within=within,
            )
    return None


def _neighbours(known: KnownNetwork, phi: Tensor, layer: int) -> list[_Pair]:
    """The pairs of a layer that may be in a channel, as far as their weights tell."""
    network, kinds = known.network, neuron_kinds(known.network, layer)
    places, outs = ([find(network, layer, n) for n in range(len(kinds))] for find in (incoming, outgoing))
    into, out = torch.stack([phi[p] for p in places]), torch.stack([phi[p] for p in outs])
    sizes = into.norm(dim=1).clamp(min=torch.finfo(phi.dtype).tiny)
    # 1 − cos as half the squared distance of unit vectors, in which nothing cancels.
    cosine = 0.5 * _distances(into / sizes[:, None]) ** 2
    relative = _distances(into) / torch.maximum(sizes[:, None], sizes)
    alike = (cosine < COSINE_DISTANCE) & (relative > EQUAL) & (relative < (2 * COSINE_DISTANCE) ** 0.5)
    return [
        _Pair(
            distance=float(cosine[i, j]),
            layer=layer,
            neurons=(i, j),
            difference=into[i] - into[j],
            total=out[i] + out[j],
            opposed=out[i] - out[j],
            into=(places[i], places[j]),
            out=(outs[i], outs[j]),
            factor=1.0,
        )
        for i, j in (alike & (out @ out.T < 0)).triu(1).nonzero().tolist()
        if kinds[i] == kinds[j]
    ]


def _constants(known: KnownNetwork, phi: Tensor, layer: int) -> list[_Pair]:
    """The neurons of a layer that align with the constant one, likewise."""
    network = known.network
    biases = bias_places(network, layer + 1)
    if biases is None or not network.biases[layer]:
        return []
    pairs = []
    for i, kind in enumerate(neuron_kinds(network, layer)):
        places, out = incoming(network, layer, i), outgoing(network, layer, i)
        weights, bias = phi[places].clone(), phi[places[-1:]]
        value = float(kind.derivatives(bias, 0)[0])
        length = float(weights.norm())
        weights[-1] = 0.0
        distance = 1 - abs(float(bias)) / length if length > 0 else 1.0
        if value == 0 or not EQUAL * length < float(weights.norm()) or distance >= COSINE_DISTANCE:
            continue
        total, opposed = phi[out] + phi[biases] / value, phi[out] - phi[biases] / value
        if float(phi[out] @ phi[biases]) * value < 0:
            pairs.append(
                _Pair(distance, layer, (i, None), weights, total, opposed, into=(places,), out=(out, biases), factor=value)
            )
    return pairs


def _distances(rows: Tensor) -> Tensor:
    """‖r_i − r_j‖, without the usual trick by which small ones cancel."""
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
