"""Which perceptron an objective is the loss of, and how its parameters φ come from θ."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_gradflow.objectives.base import Objective
from torch_gradflow.objectives.distributed import DistributedObjective
from torch_gradflow.objectives.module import ModuleObjective
from torch_gradflow.objectives.perceptron import PerceptronObjective
from torch_gradflow.objectives.recognition import RecognisedPerceptron
from torch_gradflow.objectives.regularized import Penalties, Regularized, Rescaled
from torch_gradflow.perceptron.activations import Activation
from torch_gradflow.perceptron.architecture import Loss, Perceptron, Samples


@dataclass(frozen=True)
class KnownNetwork:
    """A perceptron, as far as it is known.

    Attributes:
        network: Sizes, biases, activations.
        loss: ℓ, or None where it is not known.
        samples: The data, or None where they are not known.
        index: For each element of φ its place in θ, −1 where it is frozen; shape ``(P_φ,)``.
        frozen: φ with the values of what is frozen; None where nothing is.
        scale: What multiplies each element of θ in φ, shape ``(P,)``.
        decay: The c of a penalty Σ c θ² in the loss, shape ``(P,)``; None where there is none.
    """

    network: Perceptron
    loss: Loss | None
    samples: Samples | None
    index: Tensor
    frozen: Tensor | None
    scale: Tensor
    decay: Tensor | None

    def phi(self, theta: Tensor) -> Tensor:
        """φ of θ."""
        phi = (self.scale * theta)[self.index.clamp(min=0)]
        return phi if self.frozen is None else torch.where(self.index < 0, self.frozen, phi)

    def theta(self, theta: Tensor, phi: Tensor) -> Tensor:
        """θ with the values of φ; what is frozen in φ is not looked at."""
        moving = self.index >= 0
        result = theta.clone()
        places = self.index[moving]
        result[places] = phi[moving] / self.scale[places]
        return result

    def directions(self, tangents: Tensor) -> Tensor:
        """Those linear combinations of directions of φ, shape ``(P_φ, k)``, that θ can follow, as directions of θ."""
        moving = self.index >= 0
        if not bool(moving.all()) and tangents.shape[1]:
            _, sizes, rows = torch.linalg.svd(tangents[~moving], full_matrices=True)
            rank = int((sizes > 1e3 * torch.finfo(sizes.dtype).eps * sizes.max()).sum())
            tangents = tangents @ rows[rank:].T
        result = tangents.new_zeros(len(self.scale), tangents.shape[1])
        result[self.index[moving]] = tangents[moving]
        return result / self.scale[:, None]


def neuron_kinds(network: Perceptron, layer: int) -> list[Activation]:
    """The activation of each neuron of a layer."""
    return [kind for count, kind in network.activations[layer] for _ in range(count)]


def bias_places(network: Perceptron, layer: int) -> Tensor | None:
    """The places in φ of a layer's biases; None where it has none."""
    bias = network.offsets()[layer][1]
    return None if bias is None else bias + torch.arange(network.sizes[layer + 1])


def incoming(network: Perceptron, layer: int, neuron: int) -> Tensor:
    """The places in φ of a neuron's input weights, and then its bias."""
    fan_in, biases = network.sizes[layer], bias_places(network, layer)
    places = network.offsets()[layer][0] + fan_in * neuron + torch.arange(fan_in)
    return places if biases is None else torch.cat([places, biases[neuron : neuron + 1]])


def outgoing(network: Perceptron, layer: int, neuron: int) -> Tensor:
    """The places in φ of the weights with which a neuron enters the next layer."""
    return network.offsets()[layer + 1][0] + neuron + network.sizes[layer + 1] * torch.arange(network.sizes[layer + 2])


def known_network(objective: Objective, given: Perceptron | RecognisedPerceptron | None) -> KnownNetwork | None:
    """What is known of the network behind an objective; None where that is nothing.

    Args:
        objective: L(θ): a ``PerceptronObjective``, a ``ModuleObjective`` that is one, or such a one rescaled, penalised, or
            divided among processes (whose data are then not all known).
        given: What its user knows: the network, where θ is φ, or the network with its loss and its data.

    Raises:
        ValueError: If what is given has another number of parameters than the objective.
    """
    if given is not None:
        known = _described(objective, given)
        if len(known.scale) != objective.n_parameters:
            raise ValueError(
                f"network must have the {objective.n_parameters} parameters of the objective; it has {len(known.scale)}."
            )
        return known
    if isinstance(objective, Rescaled):
        base = known_network(objective.base, None)
        return None if base is None else _rescaled(base, objective.scale)
    if isinstance(objective, Regularized):
        base = known_network(objective.base, None)
        return None if base is None else _penalised(base, objective.penalties)
    if isinstance(objective, DistributedObjective):
        base = known_network(objective.base, None)
        return None if base is None else replace(base, loss=None, samples=None)
    if isinstance(objective, ModuleObjective):
        perceptron = objective.perceptron
        return None if perceptron is None else _described(objective, perceptron.recognised)
    return _described(objective, objective.recognised) if isinstance(objective, PerceptronObjective) else None


def _described(objective: Objective, given: Perceptron | RecognisedPerceptron) -> KnownNetwork:
    if isinstance(given, Perceptron):
        index = torch.arange(given.n_parameters, device=objective.device)
        return KnownNetwork(given, None, None, index, None, torch.ones_like(index, dtype=objective.dtype), None)
    index = given.index.to(objective.device)
    one = torch.ones(int(index.max()) + 1, dtype=objective.dtype, device=objective.device)
    frozen, scale, decay = (None if t is None else t.to(one) for t in (given.frozen, given.scale, given.decay))
    return KnownNetwork(given.network, given.loss, given.samples, index, frozen, one if scale is None else scale, decay)


def _rescaled(known: KnownNetwork, root: Tensor) -> KnownNetwork:
    """With θ = D^½ φ for θ."""
    return replace(known, scale=known.scale * root, decay=None if known.decay is None else known.decay * root**2)


def _penalised(known: KnownNetwork, penalties: Penalties) -> KnownNetwork:
    """With λ/2 ‖θ‖² in the loss. With a barrier, or where L is maximised, the loss is no longer known, but the network is."""
    if penalties.max_norm is not None or penalties.sign != 1.0:
        return replace(known, loss=None)
    if penalties.weight_decay is None:
        return known
    decay = 0.5 * penalties.weight_decay
    return replace(known, decay=decay if known.decay is None else known.decay + decay)
