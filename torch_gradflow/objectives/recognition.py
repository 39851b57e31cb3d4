"""Is this recorded computation the loss of a multi-layer perceptron? Read backwards, from the loss to the data.

A program (what a closure, a loop or a module computed, call by call) is recognised if it is, from its end: sums and multiples
of losses; each a known loss, or the mean or sum of squared residuals, possibly weighted; a chain of affine maps and known
activations; data. Every value in between must be used once only, every parameter must stand in the chain once, and nothing
else may. What is read is then no more than a claim: whoever uses it compares loss and gradient with the user's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_gradflow.objectives.calls import NotRecognised
from torch_gradflow.objectives.layers import Chain, LayerReader
from torch_gradflow.objectives.losses import LossReader
from torch_gradflow.objectives.parameters import ParameterLayout
from torch_gradflow.objectives.program import Program, Slot
from torch_gradflow.objectives.trees import same
from torch_gradflow.objectives.values import Values
from torch_gradflow.perceptron.architecture import Loss, Perceptron, Samples


@dataclass(frozen=True)
class RecognisedPerceptron:
    """The loss of a perceptron, and how its parameters φ come from θ.

    Attributes:
        network: The perceptron.
        loss: Its loss.
        samples: Its data; not copied where that was not necessary.
        index: For each element of φ its place in θ, −1 where it is frozen; shape ``(P_φ,)``.
        frozen: φ with the values of what is frozen, and zeros; None where nothing is.
        scale: For each element of θ what multiplies it in φ, shape ``(P,)``; None where that is 1 throughout.
        decay: The c of a penalty Σ c θ² in the loss, shape ``(P,)``; None where there is none.
    """

    network: Perceptron
    loss: Loss
    samples: Samples
    index: Tensor
    frozen: Tensor | None
    scale: Tensor | None
    decay: Tensor | None


def recognise(program: Program, layout: ParameterLayout) -> RecognisedPerceptron:
    """Read ``program`` as the loss of a perceptron whose parameters lie in θ as ``layout`` says.

    Raises:
        NotRecognised: If it is not one, or one of a kind that is not known.
    """
    try:
        return _read(program, layout)
    except NotRecognised:
        raise
    except Exception as error:  # arguments that nobody foresaw: the program is replayed as it is
        raise NotRecognised(f"reading it failed ({type(error).__name__}: {error})") from error


def _read(program: Program, layout: ParameterLayout) -> RecognisedPerceptron:
    values = Values(program)
    losses, layers = LossReader(values, layout.shapes), LayerReader(values, layout.shapes)
    terms = []
    for loss in program.losses:
        scale = 1.0
        if loss.weight is not None:
            if loss.weight.numel() != 1:
                raise NotRecognised("backward was given a gradient of more than one element")
            scale = float(loss.weight)
        terms += losses.terms(values.slot(loss.slot), scale)
    if not terms:
        raise NotRecognised("the loss consists of penalties only")
    chains = [layers.chain(term) for term in terms]
    _check_same(chains)
    index, frozen, factors = _places(chains[0], layout)
    multiples = layout.expand(factors) if any(factor != 1.0 for factor in factors) else None
    decay = layout.expand([losses.decay.get(i, 0.0) for i in range(len(layout.shapes))]) if losses.decay else None
    samples = _together([chain.samples for chain in chains if chain.samples is not None])
    return RecognisedPerceptron(chains[0].network(), chains[0].loss, samples, index, frozen, multiples, decay)


def _check_same(chains: Sequence[Chain]) -> None:
    """All terms must be the same network's, with the same loss."""
    first = chains[0]
    for chain in chains[1:]:
        same = chain.network() == first.network() and chain.loss == first.loss
        if not same or not all(a.same_parameters_as(b) for a, b in zip(chain.layers, first.layers, strict=True)):
            raise NotRecognised("the loss is the sum of losses of different networks, or of different losses")


def joined(parts: Sequence[RecognisedPerceptron]) -> RecognisedPerceptron:
    """The sum of several losses of one network, such as those of chunks of the data.

    Raises:
        NotRecognised: If the networks, their parameters or the kinds of loss differ.
    """
    first = parts[0]
    for part in parts[1:]:
        same_places = torch.equal(part.index, first.index) and same((part.frozen, part.scale), (first.frozen, first.scale))
        if (part.network, part.loss) != (first.network, first.loss) or not same_places:
            raise NotRecognised("the chunks differ in their operations")
    decays = [part.decay for part in parts if part.decay is not None]
    decay = torch.stack(decays).sum(0) if decays else None
    return replace(first, samples=_together([part.samples for part in parts]), decay=decay)


def _together(parts: Sequence[Samples]) -> Samples:
    """All samples of several losses of one network."""
    if len(parts) == 1:
        return parts[0]
    x, targets = torch.cat([p.x for p in parts], 1), torch.cat([p.targets for p in parts], 1)
    return Samples(x, targets, torch.cat([p.weights for p in parts]))


def _places(chain: Chain, layout: ParameterLayout) -> tuple[Tensor, Tensor | None, list[float]]:
    """Where each element of φ lies in θ, the values of what does not, and what multiplies each parameter."""
    places = torch.arange(layout.n_parameters).split([shape.numel() for shape in layout.shapes])
    index, frozen, used = [], [], []
    factors: dict[int, float] = {}
    for layer in chain.layers:
        parts = ((layer.weight, layer.transposed, layer.weight_factor), (layer.bias, False, layer.bias_factor))
        for leaf, transposed, factor in parts:
            if leaf is None:
                continue
            if isinstance(leaf, Slot):
                used.append(leaf.index)
                factors[leaf.index] = factor
                matrix = places[leaf.index].view(layout.shapes[leaf.index])
                frozen.append(torch.zeros(matrix.numel(), dtype=torch.float64))
            else:
                matrix = torch.full(leaf.shape, -1)
                values = leaf.detach().T if transposed else leaf.detach()
                frozen.append(factor * values.reshape(-1).to("cpu", torch.float64))
            index.append((matrix.T if transposed else matrix).reshape(-1))
    if sorted(used) != list(range(len(layout.shapes))):
        raise NotRecognised("a parameter is used more than once, or not at all")
    everything = torch.cat(index)
    fixed = torch.cat(frozen) if bool((everything < 0).any()) else None
    return everything, fixed, [factors[i] for i in range(len(layout.shapes))]
