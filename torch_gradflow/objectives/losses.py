"""The loss of a program: sums and multiples of known losses, and squares of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from torch_gradflow.objectives.calls import NotRecognised, bind, call_name
from torch_gradflow.objectives.program import Call, Slot
from torch_gradflow.objectives.reductions import Reduction, is_linear
from torch_gradflow.objectives.targets import Term, class_loss, elementwise_loss, logit_loss
from torch_gradflow.objectives.trees import leaves_in
from torch_gradflow.objectives.values import Values
from torch_gradflow.perceptron.architecture import Loss

_LOSSES = frozenset(
    {"mse_loss", "cross_entropy", "nll_loss", "binary_cross_entropy_with_logits", "huber_loss", "smooth_l1_loss"}
)
_SYMMETRIC = ("mse_loss", "huber_loss", "smooth_l1_loss")


class LossReader:
    """Reads the losses of one program.

    Args:
        values: The program's values.
        shapes: Those of the parameters.

    Attributes:
        decay: For each parameter, by number, the c of a penalty Σ c θ² that was read.
    """

    def __init__(self, values: Values, shapes: Sequence[torch.Size]) -> None:
        self.decay: dict[int, float] = {}
        self._values, self._shapes = values, shapes

    def terms(self, slot: int, scale: float) -> list[Term]:
        """The losses of which the value ``slot`` is a linear combination; penalties go to ``decay``."""
        call = self._values.made(slot)
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
                return self.terms(self._values.operand(call), factor * scale)
        if name in ("sum", "mean") and len(call.args) == 1 and not call.kwargs:
            stacked = self._values.made(self._values.operand(call))
            if call_name(stacked) == "stack" and isinstance(stacked.args[0], tuple | list) and len(stacked.args) == 1:
                parts = [p for p in stacked.args[0] if isinstance(p, Slot)]
                if len(parts) == len(stacked.args[0]):
                    each = scale if name == "sum" else scale / len(parts)
                    return [term for part in parts for term in self.terms(part.index, each)]
        return [self._term(slot, scale)]

    def _penalty(self, call: Call) -> tuple[int, float] | None:
        """Which parameter's squares are added up or averaged, and the factor; ``p.norm()**2`` too."""
        name, values = call_name(call), self._values
        if name not in ("sum", "mean", "pow", "square") or len(call.inputs) != 1 or call.kwargs or len(call.args) > 2:
            return None
        inner = values.maker(call.inputs[0])
        if inner is None:
            return None
        if name in ("pow", "square"):
            squares = name == "square" or call.args[1:] == (2,)
            plain = inner.kwargs.get("p", "fro") in ("fro", 2) and inner.kwargs.get("dim") is None
            if not squares or call_name(inner) != "norm" or not plain or len(inner.args) > 1:
                return None
            inner = values.made(call.inputs[0])
            return (inner.inputs[0], 1.0) if values.is_parameter(inner.inputs[0]) else None
        if len(call.args) != 1 or len(inner.inputs) != 1 or not values.is_parameter(inner.inputs[0]) or inner.kwargs:
            return None
        itself = call_name(inner) == "mul" and all(isinstance(a, Slot) for a in inner.args)
        if not (call_name(inner) == "square" or (call_name(inner) == "pow" and inner.args[1:] == (2,)) or itself):
            return None
        values.made(call.inputs[0])
        index = inner.inputs[0]
        return index, 1.0 if name == "sum" else 1 / max(self._shapes[index].numel(), 1)

    def _term(self, slot: int, scale: float) -> Term:
        """One known loss, down the linear calls that add up what it gives."""
        calls: list[Call] = []
        while (term := self._loss(slot, Reduction(tuple(reversed(calls)), scale))) is None:
            call = self._values.made(slot)
            if not is_linear(call):
                name = call_name(call)
                if calls:
                    raise NotRecognised(f"the {call_name(calls[-1])} of {name} is not a known loss")
                raise NotRecognised(f"the loss ends with {name}, which is neither a known loss nor the mean or sum of one")
            calls.append(call)
            slot = self._values.operand(call)
        return term

    def _loss(self, slot: int, reduction: Reduction) -> Term | None:
        """What the value is the loss of; None where it is not one of those that are known."""
        call = self._values.made(slot)
        if call_name(call) in _LOSSES:
            given = bind(call)
            own = str(given["reduction"])
            if own not in ("mean", "sum", "none") or (own == "none" and not reduction.calls):
                raise NotRecognised(f"the loss is not a scalar ({call_name(call)} with reduction={own!r})")
            how = Reduction(reduction.calls, reduction.factor, cast(Literal["mean", "sum", "none"], own))
            return self._of_function(call, given, how)
        if reduction.calls:
            base, coefficients = self._values.polynomial(slot)
            if base != slot and len(coefficients) == 3 and coefficients[:2] == [0.0, 0.0]:
                return self._residuals(base, reduction.times(coefficients[2]))
        return None

    def _residuals(self, slot: int, reduction: Reduction) -> Term:
        """Squares of what is the difference of output and target."""
        call = self._values.made(slot)
        if call_name(call) not in ("sub", "rsub", "__rsub__") or len(call.args) != 2 or call.kwargs:
            raise NotRecognised(f"what is squared is not a difference of output and target, but comes from {call_name(call)}")
        output = self._values.operand(call)
        target = next(a for a in call.args if not isinstance(a, Slot))
        return elementwise_loss(Loss("squared error"), output, target, reduction)

    def _of_function(self, call: Call, given: dict[str, Any], reduction: Reduction) -> Term:
        """One of torch's own functions."""
        name = call_name(call)
        if given.get("size_average") is not None or given.get("reduce") is not None:
            raise NotRecognised(f"{name} is called with size_average or reduce, which torch deprecates")
        output, target = _sides(name, given)
        if name in _SYMMETRIC and given.get("weight") is not None:
            raise NotRecognised(f"{name} is called with weight")
        if name == "mse_loss":
            return elementwise_loss(Loss("squared error"), output, target, reduction)
        if name in _SYMMETRIC:
            delta = float(given["delta"] if name == "huber_loss" else given["beta"])
            if delta <= 0:
                raise NotRecognised(f"{name} with a width of {delta} has kinks")
            scaled = reduction if name == "huber_loss" else reduction.times(1 / delta)
            return elementwise_loss(Loss("huber", delta), output, target, scaled)
        if name == "binary_cross_entropy_with_logits":
            return logit_loss(output, target, given, reduction)
        if name == "nll_loss":
            return class_loss(self._logits(output), target, given | {"label_smoothing": 0.0}, reduction)
        return class_loss(output, target, given, reduction)

    def _logits(self, slot: int) -> int:
        """What log_softmax over the classes was applied to."""
        softmax = self._values.made(slot)
        how = bind(softmax) if call_name(softmax) == "log_softmax" else {}
        narrowed = any(isinstance(leaf, torch.dtype) for leaf in leaves_in((softmax.args, dict(softmax.kwargs))))
        if how.get("dim") not in (1, -1) or narrowed:
            raise NotRecognised("nll_loss is not applied to log_softmax(…, dim=1)")
        return self._values.operand(softmax)


def _sides(name: str, given: dict[str, Any]) -> tuple[int, Any]:
    """The slot of the output, and the target, of a loss function's arguments."""
    sides = [given["input"], given["target"]]
    slots = [side for side in sides if isinstance(side, Slot)]
    if len(slots) != 1:
        raise NotRecognised(f"input and target of {name} both depend on the parameters")
    if name not in _SYMMETRIC and not isinstance(given["input"], Slot):
        raise NotRecognised(f"the target of {name} depends on the parameters")
    return slots[0].index, next(side for side in sides if not isinstance(side, Slot))


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
