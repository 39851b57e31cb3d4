"""How losses per element or per sample are added up: linear maps that end in one number, and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from torch_gradflow.objectives.calls import RESHAPES, NotRecognised, call_name
from torch_gradflow.objectives.program import Call, Slot
from torch_gradflow.objectives.trees import leaves_in, map_leaves

_PRODUCTS = frozenset({"mul", "__mul__", "__rmul__", "dot", "inner", "matmul"})  # with a constant, on either side
_OF_THE_FIRST = frozenset({"sum", "mean", "neg", "div", "true_divide", "__getitem__", *RESHAPES})
_OPTIONS = frozenset({"dim", "axis", "keepdim", "start_dim", "end_dim", "shape"})


def is_linear(call: Call) -> bool:
    """Whether the result is a linear function of the one argument that depends on the parameters."""
    name, leaves = call_name(call), list(leaves_in((call.args, call.kwargs)))
    if set(call.kwargs) - _OPTIONS or any(isinstance(leaf, torch.dtype) for leaf in leaves):
        return False
    if sum(isinstance(leaf, Slot) for leaf in leaves) != 1:
        return False
    return name in _PRODUCTS or (name in _OF_THE_FIRST and isinstance(call.args[0], Slot))


@dataclass(frozen=True)
class Reduction:
    """What is made of losses ℓ on the way to L: their part of it is Σ w ℓ.

    Attributes:
        calls: The linear calls from the losses, or from what the loss function makes of them, to one number.
        factor: What multiplies that number.
        own: What the loss function itself does: takes the mean, the sum, or leaves the losses as they are.
    """

    calls: tuple[Call, ...]
    factor: float
    own: Literal["mean", "sum", "none"] = "none"

    def times(self, factor: float) -> Reduction:
        """The same of losses that are multiplied by ``factor``."""
        return replace(self, factor=self.factor * factor)

    def weights(self, shape: Sequence[int], count: float, device: torch.device) -> Tensor:
        """The w of losses of that ``shape``, in that shape or one that broadcasts to it; own means divide by ``count``."""
        if self.own == "none":
            return self.factor * self._slopes(shape, device)
        factor = self.factor / count if self.own == "mean" else self.factor
        return factor * self._slopes((), device).reshape((1,) * len(shape))

    def _slopes(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """The gradient of the calls' result with respect to what they begin with: of linear calls, at zero as anywhere."""
        if not self.calls:
            return torch.ones(tuple(shape), dtype=torch.float64, device=device)
        with torch.enable_grad():
            losses = torch.zeros(tuple(shape), dtype=torch.float64, device=device, requires_grad=True)
            value = losses
            for call in self.calls:
                value = _called(call, value)
            if value.numel() != 1:
                raise NotRecognised(f"the loss is not a scalar, but has the shape {tuple(value.shape)}")
            (slopes,) = torch.autograd.grad(value, losses)
        return slopes


def _called(call: Call, value: Tensor) -> Tensor:
    """The call's result for that argument, in float64."""

    def leaf(item: Any) -> Any:
        if isinstance(item, Slot):
            return value
        return item.detach().to(torch.float64) if isinstance(item, Tensor) and item.is_floating_point() else item

    result: Tensor = call.function(*map_leaves(leaf, call.args), **map_leaves(leaf, call.kwargs))
    return result
