"""Is this recorded computation the loss of a multi-layer perceptron? Read backwards, from the loss to the data.

A program (what a closure, a loop or a module computed, call by call) is recognised if it is, from its end: sums and multiples
of losses; each a known loss, or the mean or sum of squared residuals, possibly weighted; a chain of affine maps and known
activations; data. Every value in between must be used once only, every parameter must stand in the chain once, and nothing
else may. What is read is then no more than a claim: whoever uses it compares loss and gradient with the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from torch_gradflow.objectives.calls import NotRecognised, bind, call_name
from torch_gradflow.objectives.parameters import ParameterLayout
from torch_gradflow.objectives.polynomials import Expansion
from torch_gradflow.objectives.program import Call, Program, Slot
from torch_gradflow.objectives.record import Recorder, Recording
from torch_gradflow.objectives.targets import Term, class_loss, elementwise_loss, logit_loss
from torch_gradflow.objectives.trees import leaves_in
from torch_gradflow.perceptron.activations import IDENTITY, REGISTERED, Activation
from torch_gradflow.perceptron.architecture import Loss, Perceptron, Samples

Runs = tuple[tuple[int, Activation], ...]


@dataclass(frozen=True)
class RecognisedPerceptron:
    """The loss of a perceptron, and how its parameters φ come from θ.

    Attributes:
        network: The perceptron.
        loss: Its loss.
        samples: Its data; not copied where that was not necessary.
        index: For each element of φ its place in θ, −1 where it is frozen; shape ``(P_φ,)``.
        frozen: φ with the values of what is frozen, and zeros; None where nothing is.
        decay: The c of a penalty Σ c θ² in the loss, shape ``(P,)``; None where there is none.
    """

    network: Perceptron
    loss: Loss
    samples: Samples
    index: Tensor
    frozen: Tensor | None
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
    reader = _Reader(program, layout.shapes)
    terms = []
    for loss in program.losses:
        scale = 1.0
        if loss.weight is not None:
            if loss.weight.numel() != 1:
                raise NotRecognised("backward was given a gradient of more than one element")
            scale = float(loss.weight)
        terms += reader.terms(loss.slot, scale)
    if not terms:
        raise NotRecognised("the loss consists of penalties only")
    chains = [reader.chain(term) for term in terms]
    _check_same(chains)
    index, frozen = _places(chains[0], layout)
    decay = layout.expand([reader.decay.get(i, 0.0) for i in range(len(layout.shapes))]) if reader.decay else None
    samples = together([chain.samples for chain in chains if chain.samples is not None])
    return RecognisedPerceptron(chains[0].network(), terms[0].loss, samples, index, frozen, decay)


@dataclass
class _Affine:
    """W a + b: where W (transposed or not) and b come from, and what follows."""

    weight: Slot | Tensor
    transposed: bool
    bias: Slot | Tensor | None
    fan_in: int
    fan_out: int
    runs: Runs = ()


@dataclass
class _Chain:
    """Layers, the last first until reversed, and data."""

    layers: list[_Affine] = field(default_factory=list)
    samples: Samples | None = None
    loss: Loss | None = None

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
_RESHAPES = {"reshape", "view", "flatten", "squeeze", "unsqueeze", "ravel", "contiguous", "reshape_as", "view_as"}
_TRANSPOSES = {"t", "transpose", "swapaxes", "adjoint", "permute"}


class _Reader:
    """One program, read backwards."""

    def __init__(self, program: Program, shapes: Sequence[torch.Size]) -> None:
        self._shapes = shapes
        self._n_parameters = program.n_inputs
        self.decay: dict[int, float] = {}  # of each parameter, by number
        self._maker: dict[int, Call] = {}
        self._uses: dict[int, int] = {loss.slot: 0 for loss in program.losses}
        for call in program.calls:
            self._maker.update(dict.fromkeys(call.outputs, call))
            for leaf in leaves_in((call.args, call.kwargs)):
                if isinstance(leaf, Slot):
                    self._uses[leaf.index] = self._uses.get(leaf.index, 0) + 1
        for loss in program.losses:
            self._uses[loss.slot] += 1

    # Sums of losses

    def terms(self, slot: int, scale: float) -> list[Term]:
        """The losses of which the value ``slot`` is a linear combination; penalties go to ``decay``."""
        call = self._made(slot)
        name = call_name(call)
        penalty = self._penalty(call)
        if penalty is not None:
            index, square = penalty
            self.decay[index] = self.decay.get(index, 0.0) + scale * square
            return []
        if name in ("add", "__add__", "__radd__", "sub", "__rsub__", "rsub") and not call.kwargs:
            signs = {"sub": (1.0, -1.0), "__rsub__": (-1.0, 1.0), "rsub": (-1.0, 1.0)}.get(name, (1.0, 1.0))
            terms = []
            for sign, part in zip(signs, call.args, strict=True):
                if isinstance(part, Slot):
                    terms += self.terms(part.index, sign * scale)
                elif _number(part) != 0:
                    raise NotRecognised(f"a number or tensor is added to the loss ({name})")
            return terms
        if name in ("mul", "__mul__", "__rmul__", "div", "true_divide", "neg") and not call.kwargs:
            factor = -1.0 if name == "neg" else _factor(call, name)
            if factor is not None:
                return self.terms(self._operand(call), factor * scale)
        if name in ("sum", "mean") and len(call.args) == 1 and not call.kwargs:
            stacked = self._made(self._operand(call))
            if call_name(stacked) == "stack" and isinstance(stacked.args[0], tuple | list) and len(stacked.args) == 1:
                parts = [p for p in stacked.args[0] if isinstance(p, Slot)]
                if len(parts) == len(stacked.args[0]):
                    each = scale if name == "sum" else scale / len(parts)
                    return [term for part in parts for term in self.terms(part.index, each)]
        return [self._term(slot, scale)]

    def _penalty(self, call: Call) -> tuple[int, float] | None:
        """Which parameter's squares are added up or averaged, and the factor; ``p.norm()**2`` too."""
        name = call_name(call)
        if name not in ("sum", "mean", "pow", "square") or len(call.inputs) != 1 or call.kwargs or len(call.args) > 2:
            return None
        if name in ("pow", "square"):
            norm = self._maker.get(call.inputs[0])
            squares = name == "square" or call.args[1:] == (2,)
            plain = norm is not None and norm.kwargs.get("p", "fro") in ("fro", 2) and norm.kwargs.get("dim") is None
            if norm is None or not squares or call_name(norm) != "norm" or not plain or len(norm.args) > 1:
                return None
            call = self._made(call.inputs[0])
            return (call.inputs[0], 1.0) if call.inputs[0] < self._n_parameters else None
        if len(call.args) != 1 or call.inputs[0] not in self._maker:
            return None
        square = self._maker[call.inputs[0]]
        if len(square.inputs) != 1 or square.inputs[0] >= self._n_parameters or square.kwargs:
            return None
        itself = call_name(square) == "mul" and all(isinstance(a, Slot) for a in square.args)
        if not (call_name(square) == "square" or (call_name(square) == "pow" and square.args[1:] == (2,)) or itself):
            return None
        self._made(call.inputs[0])
        index = square.inputs[0]
        return index, 1.0 if name == "sum" else 1 / max(self._shapes[index].numel(), 1)

    def _term(self, slot: int, scale: float) -> Term:
        call = self._made(slot)
        name = call_name(call)
        if name in ("sum", "mean") and len(call.args) == 1 and not call.kwargs:
            return self._reduced(self._operand(call), name, scale, None)
        if name in _LOSSES:
            given = bind(call)
            if given["reduction"] not in ("mean", "sum"):
                raise NotRecognised(f"the loss is not a scalar ({name} with reduction={given['reduction']!r})")
            return self._loss(call, given["reduction"], scale, None)
        raise NotRecognised(f"the loss ends with {name}, which is neither a known loss nor the mean or sum of one")

    def _reduced(self, slot: int, reduction: str, scale: float, weights: Tensor | None) -> Term:
        """The mean or sum of losses per element or per sample."""
        base, coefficients = self._polynomial(slot)
        if base != slot and len(coefficients) == 3 and coefficients[:2] == [0.0, 0.0]:
            return self._residuals(base, reduction, scale * coefficients[2], weights)
        call = self._made(slot)
        name = call_name(call)
        if name in ("mul", "__mul__", "__rmul__") and len(call.args) == 2 and not call.kwargs:
            constants = [a for a in call.args if isinstance(a, Tensor)]
            if len(constants) == 1 and weights is None:
                return self._reduced(self._operand(call), reduction, scale, constants[0])
        if name in _LOSSES and bind(call)["reduction"] == "none":
            return self._loss(call, reduction, scale, weights)
        raise NotRecognised(f"the {reduction} of {name} is not a known loss")

    def _residuals(self, slot: int, reduction: str, scale: float, weights: Tensor | None) -> Term:
        call = self._made(slot)
        if call_name(call) not in ("sub", "rsub", "__rsub__") or len(call.args) != 2 or call.kwargs:
            raise NotRecognised(f"what is squared is not a difference of output and target, but comes from {call_name(call)}")
        output = self._operand(call)
        target = next(a for a in call.args if not isinstance(a, Slot))
        return elementwise_loss(Loss("squared error"), output, target, reduction, scale, weights)

    def _loss(self, call: Call, reduction: str, scale: float, weights: Tensor | None) -> Term:
        name, given = call_name(call), bind(call)
        if given.get("size_average") is not None or given.get("reduce") is not None:
            raise NotRecognised(f"{name} is called with size_average or reduce, which torch deprecates")
        sides = [given["input"], given["target"]]
        slots = [s for s in sides if isinstance(s, Slot)]
        if len(slots) != 1:
            raise NotRecognised(f"input and target of {name} both depend on the parameters")
        target = next(s for s in sides if not isinstance(s, Slot))
        symmetric = name in ("mse_loss", "huber_loss", "smooth_l1_loss")
        if not symmetric and not isinstance(given["input"], Slot):
            raise NotRecognised(f"the target of {name} depends on the parameters")
        output = slots[0].index
        if symmetric:
            if given.get("weight") is not None:
                raise NotRecognised(f"{name} is called with weight")
            if name == "mse_loss":
                return elementwise_loss(Loss("squared error"), output, target, reduction, scale, weights)
            delta = float(given["delta"] if name == "huber_loss" else given["beta"])
            if delta <= 0:
                raise NotRecognised(f"{name} with a width of {delta} has kinks")
            scale = scale if name == "huber_loss" else scale / delta
            return elementwise_loss(Loss("huber", delta), output, target, reduction, scale, weights)
        if name == "binary_cross_entropy_with_logits":
            return logit_loss(output, target, given, reduction, scale, weights)
        if name == "nll_loss":
            softmax = self._made(output)
            how = bind(softmax) if call_name(softmax) == "log_softmax" else {}
            if how.get("dim") not in (1, -1) or how.get("dtype") is not None:
                raise NotRecognised("nll_loss is not applied to log_softmax(…, dim=1)")
            output = self._operand(softmax)
            given |= {"label_smoothing": 0.0}
        return class_loss(output, target, given, reduction, scale, weights)

    # Chains of layers

    def chain(self, term: Term) -> _Chain:
        """The layers from the data to the term's loss."""
        chain = _Chain(loss=term.loss)
        slot, reshapes = term.output, []
        while call_name(self._made(slot)) in _RESHAPES or self._is_column(self._made(slot)):
            reshapes.append(self._made(slot))
            slot = self._operand(self._made(slot))
        if reshapes and not term.per_element:
            raise NotRecognised(f"{call_name(reshapes[0])} stands between the network and a loss over classes")
        while True:
            while self._does_nothing(self._made(slot)):
                slot = self._operand(self._made(slot))
            runs, slot = self._activation(slot)
            layer, before = self._affine(slot)
            layer.runs = tuple((layer.fan_out, kind) if n == 0 else (n, kind) for n, kind in runs)
            if sum(n for n, _ in layer.runs) != layer.fan_out:
                raise NotRecognised("activations of slices do not cover the layer")
            chain.layers.append(layer)
            if isinstance(before, Tensor):
                break
            slot = before.index
        chain.layers.reverse()
        chain.samples = self._samples(before, chain, term, reshapes[::-1])
        return chain

    def _samples(self, x: Tensor, chain: _Chain, term: Term, reshapes: list[Call]) -> Samples:
        fan_in, fan_out = chain.layers[0].fan_in, chain.layers[-1].fan_out
        for before, after in zip(chain.layers, chain.layers[1:], strict=False):
            if before.fan_out != after.fan_in:
                raise NotRecognised("the layers do not fit together")
        if x.dim() == 0 or x.shape[-1] != fan_in or x.layout != torch.strided or not x.is_floating_point():
            raise NotRecognised("the input is not a tensor of numbers with one row per sample")
        if not term.per_element and x.dim() != 2:
            raise NotRecognised("a loss over classes is applied to an output that is not a matrix")
        shape = torch.Size((*x.shape[:-1], fan_out))
        output = torch.empty(shape, device="meta")
        for call in reshapes:
            if not isinstance(call.args[0] if call.args else None, Slot) or any(isinstance(a, Tensor) for a in call.args):
                raise NotRecognised(f"{call_name(call)} by the shape of a tensor, or with its argument by name")
            output = call.function(output, *call.args[1:], **call.kwargs)
        if output.numel() != shape.numel() or output.numel() == 0:
            raise NotRecognised("the loss uses a part of the output only, or there are no samples")
        targets, weights = term.targets(output.shape)
        rows = x.reshape(-1, fan_in)
        if term.per_element:
            targets = torch.cat([t.reshape(-1, fan_out) for t in targets.unbind(0)], 1)
            weights = weights.expand(output.shape).reshape(-1, fan_out)
            if bool((weights != weights[:, :1]).any()):
                raise NotRecognised("the outputs of one sample are weighted differently")
            weights = weights[:, 0]
        if bool((weights < 0).any()) or not bool(torch.isfinite(weights).all()):
            raise NotRecognised("the loss is multiplied with a negative weight")
        return Samples(rows.T, targets.T, weights)

    def _does_nothing(self, call: Call) -> bool:
        """Dropout of a model in evaluation mode."""
        if call_name(call) not in ("dropout", "alpha_dropout"):
            return False
        given = dict(zip(("input", "p", "training"), call.args, strict=False)) | dict(call.kwargs)
        return given.get("training") is False

    def _is_column(self, call: Call) -> bool:
        """``[..., 0]`` of an output with one column; the shape check sees to the rest."""
        if call_name(call) != "__getitem__" or len(call.args) != 2:
            return False
        key = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
        plain = all(k is Ellipsis or k is None or (isinstance(k, slice) and k == slice(None)) for k in key[:-1])
        return len(key) > 1 and plain and type(key[-1]) is int and key[-1] == 0 and self._one_output(self._operand(call))

    def _one_output(self, slot: int) -> bool:
        _, before = self._activation(slot)
        return self._affine(before)[0].fan_out == 1

    def _activation(self, slot: int) -> tuple[Runs, int]:
        """The activation that made the value, and the slot of the pre-activation; runs of length 0 stand for all neurons."""
        call = self._made(slot)
        name = call_name(call)
        if name == "cat":
            return self._sliced(call)
        if name in _SIMPLE or name in _WITH_NUMBERS or name == "gelu":
            return ((0, _named(call, name)),), self._operand(call)
        for activation, template in _templates(tuple(REGISTERED)):
            found = self._matches(template, slot)
            if found is not None:
                return ((0, activation),), found
        base, coefficients = self._polynomial(slot)
        if base == slot:
            return ((0, IDENTITY),), slot
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
            slicing = self._made(cut)
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
            if start != begin or self._uses[cut] != 1:
                raise NotRecognised("the slices of a layer do not follow one another")
            runs.append((stop - start, kind))
            begin = stop
        assert source is not None
        if self._uses[source] != len(parts):
            raise NotRecognised("a layer is used elsewhere too")
        self._uses[source] = 1
        return tuple(runs), source

    def _affine(self, slot: int, *, shared: bool = False) -> tuple[_Affine, Slot | Tensor]:
        """The affine map that made the value, and what it was applied to."""
        call = self._made(slot, shared=shared)
        name, bias = call_name(call), None
        if name in ("add", "__add__", "__radd__") and len(call.args) == 2 and not call.kwargs:
            made = [a for a in call.args if isinstance(a, Slot) and a.index in self._maker]
            rest = [a for a in call.args if not (isinstance(a, Slot) and a.index in self._maker)]
            if len(made) == len(rest) == 1 and isinstance(rest[0], Slot | Tensor):
                bias, call = rest[0], self._made(made[0].index)
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
        if isinstance(given["input"], Slot) and given["input"].index < self._n_parameters:
            raise NotRecognised(f"{name} is applied to a parameter")
        fan_out, fan_in = reversed(shape) if transposed else shape
        if bias is not None and self._shape(bias) not in ((fan_out,), (1, fan_out)):
            raise NotRecognised(f"a tensor of shape {tuple(self._shape(bias))} is added to a layer of {fan_out} neurons")
        return _Affine(weight, transposed, bias, fan_in, fan_out), given["input"]

    def _weight(self, weight: Any, transposed: bool) -> tuple[Slot | Tensor, bool]:
        """W, and whether it stands there as its transpose."""
        while isinstance(weight, Slot) and weight.index >= self._n_parameters:
            call = self._made(weight.index)
            name = call_name(call)
            if name not in ("T", "mT", *_TRANSPOSES) or (name == "permute" and call.args[1:] not in ((1, 0), ((1, 0),))):
                raise NotRecognised(f"a weight matrix is made by {name}")
            weight, transposed = call.args[0], not transposed
        if not isinstance(weight, Slot | Tensor):
            raise NotRecognised("a layer has no weight matrix")
        return weight, transposed

    def _shape(self, leaf: Slot | Tensor) -> tuple[int, ...]:
        if isinstance(leaf, Tensor):
            return tuple(leaf.shape)
        if leaf.index >= self._n_parameters:
            raise NotRecognised(f"a bias is made by {call_name(self._maker[leaf.index])}")
        return tuple(self._shapes[leaf.index])

    # Tools

    def _made(self, slot: int, *, shared: bool = False) -> Call:
        """The call that made the value, which nothing else may use."""
        call = self._maker.get(slot)
        if call is None:
            raise NotRecognised("a parameter enters the loss by itself (a penalty)")
        if call.obstacle or not call.grad_enabled or call.autocast is not None or len(call.outputs) != 1:
            raise NotRecognised(f"{call_name(call)} runs under no_grad or autocast, or has several results")
        if call.in_place and call_name(call).strip("_") not in _IN_PLACE:
            raise NotRecognised(f"{call_name(call)} writes in place")
        if not shared and self._uses.get(slot, 0) != 1:
            raise NotRecognised(f"the result of {call_name(call)} is used {self._uses.get(slot, 0)} times")
        return call

    def _operand(self, call: Call) -> int:
        """The one value among the arguments that depends on the parameters."""
        slots = [leaf.index for leaf in leaves_in((call.args, call.kwargs)) if isinstance(leaf, Slot)]
        if len(slots) != 1:
            raise NotRecognised(f"{call_name(call)} has {len(slots)} arguments that depend on the parameters")
        return slots[0]

    def _polynomial(self, slot: int) -> tuple[int, list[float]]:
        """The value as a polynomial of another one, by the coefficients, ascending; of itself where it is none."""
        expansion = Expansion(self._maker, self._n_parameters)
        base, coefficients = expansion.of(slot)
        if base == slot or not self._closed(slot, base, expansion.inside(slot, base)):
            return slot, [0.0, 1.0]
        self._uses[base] = 1
        return base, coefficients

    def _matches(self, template: Program, slot: int) -> int | None:
        """The slot that stands for the template's input where the value was made by the template's calls, else None."""
        makers = {output: call for call in template.calls for output in call.outputs}
        pairs: dict[int, int] = {}
        if not self._equal(Slot(template.losses[0].slot), Slot(slot), makers, pairs) or 0 not in pairs:
            return None
        base = pairs[0]
        inner = {found for found in pairs.values() if found not in (base, slot)}
        if base in self._maker and self._closed(slot, base, inner):
            self._uses[base] = 1
            return base
        return None

    def _equal(self, wanted: Any, found: Any, makers: Mapping[int, Call], pairs: dict[int, int]) -> bool:
        """Whether a value of ours was made as one of a template, up to the names in ``pairs``, which it completes."""
        if not isinstance(wanted, Slot) or not isinstance(found, Slot):
            return type(wanted) is type(found) and not isinstance(wanted, Tensor) and bool(wanted == found)
        if wanted.index in pairs:
            return pairs[wanted.index] == found.index
        pairs[wanted.index] = found.index
        one, other = makers.get(wanted.index), self._maker.get(found.index)
        if one is None or other is None:
            return one is None  # the template's input may be anything
        if call_name(one) != call_name(other) or other.in_place or not other.grad_enabled:
            return False
        left, right = list(leaves_in((one.args, one.kwargs))), list(leaves_in((other.args, other.kwargs)))
        return len(left) == len(right) and all(self._equal(a, b, makers, pairs) for a, b in zip(left, right, strict=True))

    def _closed(self, slot: int, base: int, inner: Iterable[int]) -> bool:
        """Whether what lies between ``base`` and ``slot``, and the base, are used in between only."""
        inside = {*inner, slot}
        uses: dict[int, int] = {}
        for call in {id(c): c for s in inside if (c := self._maker.get(s)) is not None}.values():
            for leaf in leaves_in((call.args, call.kwargs)):
                if isinstance(leaf, Slot):
                    uses[leaf.index] = uses.get(leaf.index, 0) + 1
        return all(uses.get(s, 0) == self._uses.get(s, 0) for s in {*inside, base} - {slot})


_LOSSES = frozenset(
    {"mse_loss", "cross_entropy", "nll_loss", "binary_cross_entropy_with_logits", "huber_loss", "smooth_l1_loss"}
)
_IN_PLACE = frozenset({"relu", "leaky_relu", "elu", "celu", "selu", "silu", "mish", "tanh", "sigmoid"})


def _factor(call: Call, name: str) -> float | None:
    """The number with which a value is multiplied, or None."""
    if len(call.args) != 2:
        return None
    numbers = [_number(a) for a in call.args if not isinstance(a, Slot)]
    if len(numbers) != 1 or numbers[0] is None:
        return None
    if name in ("div", "true_divide"):
        return 1 / numbers[0] if isinstance(call.args[0], Slot) and numbers[0] != 0 else None
    return numbers[0]


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex():
        return float(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


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


def _check_same(chains: Sequence[_Chain]) -> None:
    """All terms must be the same network's, with the same loss."""
    first = chains[0]
    for chain in chains[1:]:
        same = chain.network() == first.network() and chain.loss == first.loss
        pairs = zip(chain.layers, first.layers, strict=same)
        if not same or any(
            not _same_place(getattr(a, key), getattr(b, key)) for a, b in pairs for key in ("weight", "transposed", "bias")
        ):
            raise NotRecognised("the loss is the sum of losses of different networks, or of different losses")


def _same_place(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, Slot | bool) and a == b)


def together(parts: Sequence[Samples]) -> Samples:
    """All samples of several losses of one network."""
    if len(parts) == 1:
        return parts[0]
    return Samples(
        torch.cat([p.x for p in parts], 1), torch.cat([p.targets for p in parts], 1), torch.cat([p.weights for p in parts])
    )


def _places(chain: _Chain, layout: ParameterLayout) -> tuple[Tensor, Tensor | None]:
    """Where each element of φ lies in θ, and the values of what does not."""
    places = torch.arange(layout.n_parameters).split([shape.numel() for shape in layout.shapes])
    index, frozen, used = [], [], []
    for layer in chain.layers:
        for leaf, transposed in ((layer.weight, layer.transposed), (layer.bias, False)):
            if leaf is None:
                continue
            if isinstance(leaf, Slot):
                used.append(leaf.index)
                matrix = places[leaf.index].view(layout.shapes[leaf.index])
                frozen.append(torch.zeros(matrix.numel(), dtype=torch.float64))
            else:
                matrix = torch.full(leaf.shape, -1)
                values = leaf.detach().T if transposed else leaf.detach()
                frozen.append(values.reshape(-1).to("cpu", torch.float64))
            index.append((matrix.T if transposed else matrix).reshape(-1))
    if sorted(used) != list(range(len(layout.shapes))):
        raise NotRecognised("a parameter is used more than once, or not at all")
    everything = torch.cat(index)
    return everything, torch.cat(frozen) if bool((everything < 0).any()) else None
