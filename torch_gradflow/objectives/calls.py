"""Recorded calls by the names of their functions and arguments."""

from __future__ import annotations

from typing import Any

from torch_gradflow.objectives.program import Call

# Arguments by name: the torch functions' own signatures, as far as they matter.
_SIGNATURES: dict[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("bias", "input", "weight"),
    "matmul": ("input", "weight"),
    "mse_loss": ("input", "target", "size_average", "reduce", "reduction", "weight"),
    "cross_entropy": (
        *("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing"),
    ),
    "nll_loss": ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
    "log_softmax": ("input", "dim", "_stacklevel", "dtype"),
    "binary_cross_entropy_with_logits": (*("input", "target", "weight", "size_average", "reduce", "reduction", "pos_weight"),),
    "huber_loss": ("input", "target", "reduction", "delta", "weight"),
    "smooth_l1_loss": ("input", "target", "size_average", "reduce", "reduction", "beta"),
    "softplus": ("input", "beta", "threshold"),
    "leaky_relu": ("input", "negative_slope", "inplace"),
    "elu": ("input", "alpha", "inplace"),
    "celu": ("input", "alpha", "inplace"),
    "gelu": ("input", "approximate"),
}
_DEFAULTS: dict[str, Any] = {
    "beta": 1.0,
    "threshold": 20.0,
    "negative_slope": 0.01,
    "alpha": 1.0,
    "approximate": "none",
    "reduction": "mean",
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "delta": 1.0,
}
# Functions that give their argument's elements in the same order, in another shape.
RESHAPES = frozenset({"reshape", "view", "flatten", "squeeze", "unsqueeze", "ravel", "contiguous", "reshape_as", "view_as"})
# Functions that drop elements at random, and whether they do so unless told otherwise.
_DROPOUTS = {
    **dict.fromkeys(("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"), True),
    **dict.fromkeys(("alpha_dropout", "feature_alpha_dropout"), False),
}
_ALIASES = {"mm": "matmul", "__matmul__": "matmul", "leaky_relu_": "leaky_relu", "elu_": "elu", "celu_": "celu"}


class NotRecognised(Exception):
    """The program is not the loss of a perceptron, as far as we see; the message names the operation at which it ends."""


def call_name(call: Call) -> str:
    """The name of the called function or property, one for each of torch's several spellings."""
    name = getattr(call.function, "__name__", "")
    if name == "__get__":  # a property
        name = getattr(getattr(call.function, "__self__", None), "__name__", "")
    return _ALIASES.get(name, name)


def bind(call: Call) -> dict[str, Any]:
    """The call's arguments by name."""
    names = _SIGNATURES[call_name(call)]
    given = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
    return {name: given.get(name, _DEFAULTS.get(name)) for name in names}


def is_plain(call: Call) -> bool:
    """Whether it has one result, writes nothing in place, and runs under no special mode."""
    modes = call.grad_enabled and call.autocast is None
    return modes and not call.obstacle and not call.in_place and len(call.outputs) == 1


def does_nothing(call: Call) -> bool:
    """Whether the result is the argument itself: dropout in evaluation mode, or with probability 0."""
    name = call_name(call)
    if name not in _DROPOUTS or not is_plain(call) or len(call.inputs) != 1:
        return False
    given = dict(zip(("input", "p", "training"), call.args, strict=False)) | dict(call.kwargs)
    return given.get("training", _DROPOUTS[name]) is False or given.get("p", 0.5) == 0
