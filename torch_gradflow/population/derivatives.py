"""The first four derivatives of smooth activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torch_gradflow.perceptron.activations import REGISTERED, Activation
from torch_gradflow.population.normal import density, distribution


def derivative(activation: Activation, k: int, z: Tensor) -> Tensor:
    """g⁽ᵏ⁾(z), elementwise, for k ≤ 4 and an activation that ``check_smooth`` lets pass.

    Softplus is log(1 + exp(beta z))/beta throughout: beyond its threshold torch takes z, which differs by 2e-9/beta.
    """
    formula = _FORMULAS.get(activation.name)
    return _by_autograd(activation, k, z) if formula is None else formula(k, z, *activation.parameters)


def check_smooth(activation: Activation) -> None:
    """Check that the activation has four derivatives.

    Raises:
        ValueError: If it has a kink.
    """
    if activation.name not in _FORMULAS and activation.name not in (*_BY_AUTOGRAD, *REGISTERED):
        smooth = ", ".join(sorted(("erf", "normal_cdf", "relu", "polynomial", *_FORMULAS, *_BY_AUTOGRAD)))
        raise ValueError(
            f"the activation {activation.name!r} has a kink, so that its population loss is not offered. Take one of "
            f"{smooth}, a smooth one of your own (register_activation), or a sample of data."
        )


def _sigmoid(k: int, z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    if k == 0:
        return s
    first = s * torch.sigmoid(-z)
    if k == 1:
        return first
    second = first * (1 - 2 * s)
    if k == 2:
        return second
    return first * (1 - 6 * first) if k == 3 else second * (1 - 12 * first)


def _softplus(k: int, z: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    if k == 0:
        return torch.logaddexp(beta * z, torch.zeros_like(z)) / beta
    return beta ** (k - 1) * _sigmoid(k - 1, beta * z)


def _log_sigmoid(k: int, z: Tensor) -> Tensor:
    return -((-1.0) ** k) * _softplus(k, -z)


def _tanh(k: int, z: Tensor) -> Tensor:
    return torch.tanh(z) if k == 0 else 2.0 ** (k + 1) * _sigmoid(k, 2 * z)


def _sigmoid_softplus(k: int, z: Tensor) -> Tensor:
    return 4.0**k * _sigmoid(k, 4 * z) + _softplus(k, z)


def _times_z(formula: Callable[[int, Tensor], Tensor]) -> Callable[[int, Tensor], Tensor]:
    """Derivatives of z f(z) from those of f."""
    return lambda k, z: z * formula(k, z) + (k * formula(k - 1, z) if k else 0.0)


def _normal_cdf(k: int, z: Tensor) -> Tensor:
    if k == 0:
        return distribution(z)
    return density(z) * (torch.ones_like(z), -z, z * z - 1, (3 - z * z) * z)[k - 1]


_FORMULAS: dict[str, Callable[..., Tensor]] = {
    "sigmoid": _sigmoid,
    "softplus": _softplus,
    "log_sigmoid": _log_sigmoid,
    "tanh": _tanh,
    "sigmoid_softplus": _sigmoid_softplus,
    "silu": _times_z(_sigmoid),
    "gelu": _times_z(_normal_cdf),
}
_BY_AUTOGRAD = ("gelu_tanh", "mish")


def _by_autograd(activation: Activation, k: int, z: Tensor) -> Tensor:
    if k <= 2:
        return activation.derivatives(z, k)[k]
    with torch.enable_grad():
        leaf = z.detach().requires_grad_(True)
        value = activation.derivatives(leaf, 2)[2]
        for order in range(2, k):
            (value,) = torch.autograd.grad(value.sum(), leaf, create_graph=order + 1 < k)
    return value.detach()
