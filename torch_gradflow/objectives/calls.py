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
