"""The layers of a perceptron: chains of affine maps and activations, from an output back to the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from torch_gradflow.objectives.calls import RESHAPES, NotRecognised, bind, call_name
from torch_gradflow.objectives.program import Call, Program, Slot
from torch_gradflow.objectives.record import Recorder, Recording
from torch_gradflow.objectives.targets import Term
from torch_gradflow.objectives.values import Values
from torch_gradflow.perceptron.activations import IDENTITY, REGISTERED, Activation
from torch_gradflow.perceptron.architecture import Loss, Perceptron, Samples

Runs = tuple[tuple[int, Activation], ...]


@dataclass
class Affine:
    """W a + b: where W (transposed or not) and b come from, and what follows.

    Numbers with which values are multiplied on their way are folded into W and b: they multiply the parameters there.
    """

    weight: Slot | Tensor
    transposed: bool
    bias: Slot | Tensor | None
    fan_in: int
    fan_out: int
    runs: Runs = ()
    weight_factor: float = 1.0
    bias_factor: float = 1.0

    def same_parameters_as(self, other: Affine) -> bool:
        """Whether it is the same map, made of the same parameters."""
        keys = ("weight", "transposed", "bias", "weight_factor", "bias_factor")
        return all(_same_place(getattr(self, key), getattr(other, key)) for key in keys)


@dataclass
class Chain:
    """A network's layers, the last first until reversed, its loss, and the data."""

    loss: Loss
    layers: list[Affine] = field(default_factory=list)
    samples: Samples | None = None

    def network(self) -> Perceptron:
        """Its architecture."""
        sizes = (self.layers[0].fan_in, *(layer.fan_out for layer in self.layers))
        biases = tuple(layer.bias is not None for layer in self.layers)
        return Perceptron(sizes, biases, tuple(layer.runs for layer in self.layers))


# Activations without parameters, by the names of torch's functions.
_SIMPLE = {
    **{name: name for name in ("relu", "selu", "silu", "mish", "tanh", "sigmoid", "log_sigmoid", "softsign", "erf")},
    **{f"{name}_": name for name in ("relu", "selu", "tanh", "sigmoid")},
    "logsigmoid": "log_sigmoid",
    "special_expit": "sigmoid",
    "special_erf": "erf",
    "special_ndtr": "normal_cdf",
}
_WITH_NUMBERS = {"softplus": ("beta", "threshold"), "leaky_relu": ("negative_slope",), "elu": ("alpha",), "celu": ("alpha",)}
_NONE: Runs = ((0, IDENTITY),)
_TRANSPOSES = frozenset({"T", "mT", "t", "transpose", "swapaxes", "adjoint", "permute"})


class LayerReader:
    """Reads the chains of layers of one program.

    Args:
        values: The program's values.
        shapes: Those of the parameters.
    """

    def __init__(self, values: Values, shapes: Sequence[torch.Size]) -> None:
        self._values, self._shapes = values, shapes

    def chain(self, term: Term) -> Chain:
        """The layers from the data to the term's loss."""
        chain = Chain(term.loss)
        slot, reshapes = term.output, []
        while _is_reshape(call := self._values.made(slot)):
            reshapes.append(call)
            slot = self._values.operand(call)
        while True:
            outer, runs, inner, slot = self._scaled_activation(slot)
            layer, before = self._affine(slot)
            layer.runs = tuple((layer.fan_out, kind) if n == 0 else (n, kind) for n, kind in runs)
            if sum(n for n, _ in layer.runs) != layer.fan_out:
                raise NotRecognised("activations of slices do not cover the layer")
            layer.weight_factor = layer.bias_factor = inner
            if outer != 1.0 and not chain.layers:
                raise NotRecognised("what the last activation gives is multiplied by a number")
            if chain.layers:
                chain.layers[-1].weight_factor *= outer
            chain.layers.append(layer)
            if isinstance(before, Tensor):
                break
            slot = before.index
        chain.layers.reverse()
        chain.samples = _samples(before, chain, term, reshapes[::-1])
        return chain

    def _scaled_activation(self, slot: int) -> tuple[float, Runs, float, int]:
        """The numbers c and s, the activation g between them, and the slot of z: the value is c g(s z)."""
        outer = 1.0
        runs, below = self._activation(slot)
        if (factor := _factor(runs)) is not None:
            outer, (runs, below) = factor, self._activation(below)
        if runs == _NONE:
            return 1.0, runs, outer, below
        factor = _factor(self._activation(below)[0])
        return (outer, runs, 1.0, below) if factor is None else (outer, runs, factor, self._values.polynomial(below)[0])

    def _activation(self, slot: int) -> tuple[Runs, int]:
        """The activation that made the value, and the slot of the pre-activation; runs of length 0 stand for all neurons."""
        call = self._values.made(slot)
        name = call_name(call)
        if name == "cat":
            return self._sliced(call)
        if name in _SIMPLE or name in _WITH_NUMBERS or name == "gelu":
            return ((0, _named(call, name)),), self._values.operand(call)
        for activation, template in _templates(tuple(REGISTERED)):
            found = self._values.argument_of(template, slot)
            if found is not None:
                return ((0, activation),), found
        base, coefficients = self._values.polynomial(slot)
        if base == slot:
            return _NONE, slot
        kinds = {(0.0, 0.0, 1.0): Activation("square"), (0.0, 0.0, 0.0, 1.0): Activation("cube"), (0.0, 1.0): IDENTITY}
        return ((0, kinds.get(tuple(coefficients), Activation("polynomial", tuple(coefficients)))),), base

    def _sliced(self, call: Call) -> tuple[Runs, int]:
        """``cat([g(z[:, :3]), h(z[:, 3:])], dim=1)``: activations by neuron."""
        parts = call.args[0] if call.args else call.kwargs.get("tensors", ())
        dim = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)
        if dim not in (1, -1) or not all(isinstance(p, Slot) for p in parts):
            raise NotRecognised("cat joins something else than the columns of one layer")
        runs: list[tuple[int, Activation]] = []
        source, begin = None, 0
        for part in parts:
            ((_, kind),), cut = self._activation(part.index)
            slicing = self._values.made(cut)
            key = slicing.args[1] if call_name(slicing) == "__getitem__" and len(slicing.args) == 2 else None
            columns = key[-1] if isinstance(key, tuple) and key[:-1] in ((slice(None),), (Ellipsis,)) else None
            before = slicing.args[0] if slicing.args else None
            if not isinstance(columns, slice) or columns.step not in (None, 1) or not isinstance(before, Slot):
                raise NotRecognised("cat joins something else than activations of slices z[:, i:j]")
            if source not in (None, before.index):
                raise NotRecognised("cat joins activations of different layers")
            source = before.index
            width = self._affine(source, shared=True)[0].fan_out
            start, stop, _ = columns.indices(width)
            if start != begin:
                raise NotRecognised("the slices of a layer do not follow one another")
            runs.append((stop - start, kind))
            begin = stop
        if source is None or self._values.uses(source) != len(parts):
            raise NotRecognised("a layer is used elsewhere too")
        self._values.used_once(source)
        return tuple(runs), source

    def _affine(self, slot: int, *, shared: bool = False) -> tuple[Affine, Slot | Tensor]:
        """The affine map that made the value, and what it was applied to."""
        call = self._values.made(slot, shared=shared)
        name, bias = call_name(call), None
        if name in ("add", "__add__", "__radd__") and len(call.args) == 2 and not call.kwargs:
            made = [a for a in call.args if isinstance(a, Slot) and not self._values.is_parameter(a.index)]
            rest = [a for a in call.args if not (isinstance(a, Slot) and not self._values.is_parameter(a.index))]
            if len(made) == len(rest) == 1 and isinstance(rest[0], Slot | Tensor):
                bias, call = rest[0], self._values.made(made[0].index)
                name = call_name(call)
                if name != "matmul":
                    raise NotRecognised(f"something is added to the result of {name}")
        if name not in ("linear", "addmm", "matmul"):
            raise NotRecognised(f"{name} is neither an affine map nor a known activation")
        if name == "addmm" and set(call.kwargs) & {"alpha", "beta"}:
            raise NotRecognised("addmm is called with alpha or beta")
        given = bind(call)
        bias = given["bias"] if name != "matmul" else bias
        weight, transposed = self._weight(given["weight"], name != "linear")
        shape = self._shape(weight)
        if len(shape) != 2 or not isinstance(given["input"], Slot | Tensor):
            raise NotRecognised(f"{name} does not multiply with a matrix")
        if isinstance(given["input"], Slot) and self._values.is_parameter(given["input"].index):
            raise NotRecognised(f"{name} is applied to a parameter")
        fan_out, fan_in = reversed(shape) if transposed else shape
        if bias is not None and self._shape(bias) not in ((fan_out,), (1, fan_out)):
            raise NotRecognised(f"a tensor of shape {tuple(self._shape(bias))} is added to a layer of {fan_out} neurons")
        return Affine(weight, transposed, bias, fan_in, fan_out), given["input"]

    def _weight(self, weight: Any, transposed: bool) -> tuple[Slot | Tensor, bool]:
        """W, and whether it stands there as its transpose."""
        while isinstance(weight, Slot) and not self._values.is_parameter(weight.index):
            call = self._values.made(weight.index)
            if call_name(call) not in _TRANSPOSES or not _swaps(call):
                raise NotRecognised(f"a weight matrix is made by {call_name(call)}")
            weight, transposed = call.args[0], not transposed
        if not isinstance(weight, Slot | Tensor):
            raise NotRecognised("a layer has no weight matrix")
        return weight, transposed

    def _shape(self, leaf: Slot | Tensor) -> tuple[int, ...]:
        if isinstance(leaf, Tensor):
            return tuple(leaf.shape)
        maker = self._values.maker(leaf.index)
        if maker is not None:
            raise NotRecognised(f"a bias is made by {call_name(maker)}")
        return tuple(self._shapes[leaf.index])


def _is_reshape(call: Call) -> bool:
    """Whether it keeps the elements' order, or ``[:, 0]`` and the like, which do where one column is all there is.

    (That nothing is lost is seen to by a comparison of the numbers of elements.)
    """
    if call_name(call) != "__getitem__":
        return call_name(call) in RESHAPES
    key = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    plain = all(k is Ellipsis or k is None or (isinstance(k, slice) and k == slice(None)) for k in key[:-1])
    return len(key) > 1 and plain and type(key[-1]) is int and key[-1] == 0


def _swaps(call: Call) -> bool:
    """Whether the transposition swaps the dimensions of a matrix."""
    matrix = torch.empty(2, 3, device="meta")
    return isinstance(call.args[0], Slot | Tensor) and call.function(matrix, *call.args[1:], **call.kwargs).shape == (3, 2)


def _samples(x: Tensor, chain: Chain, term: Term, reshapes: list[Call]) -> Samples:
    """The data: a sample for each row of the input, with its target and its weight."""
    fan_in, fan_out = chain.layers[0].fan_in, chain.layers[-1].fan_out
    _check_rows(x, chain)
    shape = _shape_in_loss(torch.Size((*x.shape[:-1], fan_out)), reshapes)
    if not term.per_element and shape[-1:] != (fan_out,):
        raise NotRecognised("the classes of the loss are not the network's outputs")
    targets, weights = term.targets(shape)
    if term.per_element:
        targets = torch.cat([t.reshape(-1, fan_out) for t in targets.unbind(0)], 1)
        weights = weights.expand(shape).reshape(-1, fan_out)
        if bool((weights != weights[:, :1]).any()):
            raise NotRecognised("the outputs of one sample are weighted differently")
        weights = weights[:, 0]
    if bool((weights < 0).any()) or not bool(torch.isfinite(weights).all()):
        raise NotRecognised("the loss is multiplied with a negative weight")
    return Samples(x.reshape(-1, fan_in).T, targets.T, weights)


def _check_rows(x: Tensor, chain: Chain) -> None:
    """Check that the rows of x are the samples of that chain of layers."""
    for before, after in zip(chain.layers, chain.layers[1:], strict=False):
        if before.fan_out != after.fan_in:
            raise NotRecognised("the layers do not fit together")
    fan_in = chain.layers[0].fan_in
    if x.dim() == 0 or x.shape[-1] != fan_in or x.layout != torch.strided or not x.is_floating_point():
        raise NotRecognised("the input is not a tensor of numbers with one row per sample")
    if x.dim() != 2 and any(len(layer.runs) > 1 for layer in chain.layers):
        raise NotRecognised("cat joins slices of something else than a matrix")  # z[:, :2] may then be other samples


def _shape_in_loss(shape: torch.Size, reshapes: list[Call]) -> torch.Size:
    """The shape in which the loss gets the network's output."""
    output = torch.empty(shape, device="meta")
    for call in reshapes:
        if not isinstance(call.args[0] if call.args else None, Slot) or any(isinstance(a, Tensor) for a in call.args):
            raise NotRecognised(f"{call_name(call)} by the shape of a tensor, or with its argument by name")
        output = call.function(output, *call.args[1:], **call.kwargs)
    if output.numel() != shape.numel() or output.numel() == 0:
        raise NotRecognised("the loss uses a part of the output only, or there are no samples")
    return output.shape


def _factor(runs: Runs) -> float | None:
    """The number with which a polynomial of degree one only multiplies, or None."""
    ((n, kind), *_) = runs
    only = n == 0 and kind.name == "polynomial" and len(kind.parameters) == 2 and kind.parameters[0] == 0
    return kind.parameters[1] if only else None


def _named(call: Call, name: str) -> Activation:
    if name == "gelu":
        return Activation("gelu_tanh" if bind(call)["approximate"] == "tanh" else "gelu")
    if name in _SIMPLE:
        return Activation(_SIMPLE[name])
    given = bind(call)
    if name == "celu" and not _is_float32(1 / given["alpha"]):
        raise NotRecognised("torch rounds 1/alpha of celu to float32 in its derivative")
    return Activation(name, tuple(float(given[key]) for key in _WITH_NUMBERS[name]))


def _is_float32(number: float) -> bool:
    return float(torch.tensor(number, dtype=torch.float32)) == number


@cache
def _templates(_: tuple[str, ...]) -> list[tuple[Activation, Program]]:
    """Activations that are made of several calls, as programs of one number."""
    builtin: list[tuple[Activation, Callable[[Tensor], Tensor]]] = [
        (Activation("normal_cdf"), lambda z: 0.5 * (1 + torch.erf(z / 2**0.5))),
        (Activation("normal_cdf"), lambda z: 0.5 * (1.0 + torch.erf(z / 2**0.5))),
        (Activation("sigmoid_softplus"), lambda z: torch.sigmoid(4 * z) + torch.nn.functional.softplus(z)),
        (Activation("sigmoid_softplus"), lambda z: torch.nn.functional.softplus(z) + torch.sigmoid(4 * z)),
    ]
    registered = [(Activation(name), function) for name, function in REGISTERED.items()]
    programs = []
    for activation, function in builtin + registered:
        z = torch.full((1,), 0.3, dtype=torch.float64, requires_grad=True)
        recording = Recording([z])
        with torch.enable_grad(), Recorder([recording]):
            value = function(z)
        program = recording.program(value)
        if program is not None:
            programs.append((activation, program))
    return programs


def _same_place(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, Slot | bool | float) and a == b)
