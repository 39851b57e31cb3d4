"""Activation functions g with their first two derivatives, in plain torch.

Each is stable for large arguments (no overflow, no 0·∞), and equal to what torch computes under that name, also where it is
piecewise: derivatives at a kink are those that torch's autograd gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# g, g′ and g″ of z with the activation's parameters; g′ and g″ only as far as the order asks.
Derivatives = tuple[Tensor, ...]
Formula = Callable[..., Derivatives]

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
_ROOT_2_OVER_PI = math.sqrt(2 / math.pi)


@dataclass(frozen=True)
class Activation:
    """A function that is applied to each pre-activation.

    Attributes:
        name: As in ``FORMULAS``, or as it was registered.
        parameters: Its numbers, such as Softplus' beta and threshold; the coefficients of a polynomial, ascending.
    """

    name: str
    parameters: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in FORMULAS:
            known = ", ".join(sorted(FORMULAS))
            raise ValueError(f"name must be a known activation, not {self.name!r}. Known: {known}; see register_activation.")
        wanted = _N_PARAMETERS.get(self.name, 0)
        if self.name == "polynomial":
            wanted = max(1, len(self.parameters))
        if len(self.parameters) != wanted:
            raise ValueError(f"parameters of {self.name!r} must be {wanted} numbers, not {self.parameters!r}.")

    def derivatives(self, z: Tensor, order: int = 2) -> Derivatives:
        """g(z), and with it g′(z) and g″(z) up to ``order``, elementwise."""
        return FORMULAS[self.name](z, order, *self.parameters)

    @property
    def is_identity(self) -> bool:
        """Whether g(z) = z."""
        return self.name == "identity"


IDENTITY: Activation  # below the formulas


def _identity(z: Tensor, order: int) -> Derivatives:
    return (z, torch.ones_like(z), torch.zeros_like(z))[: order + 1]


def _relu(z: Tensor, order: int) -> Derivatives:
    return (torch.relu(z), (z > 0).to(z.dtype), torch.zeros_like(z))[: order + 1]


def _leaky_relu(z: Tensor, order: int, slope: float) -> Derivatives:
    first = torch.where(z > 0, torch.ones_like(z), slope)
    return (F.leaky_relu(z, slope), first, torch.zeros_like(z))[: order + 1]


def _elu_like(z: Tensor, order: int, value: Tensor, scale: float, height: float, rate: float) -> Derivatives:
    """scale·z above zero, scale·height·(exp(rate·z) − 1) below, whose value is given."""
    if order == 0:
        return (value,)
    # At 0, torch's first derivative is that from below, its second that from above.
    exponential = scale * height * rate * torch.exp(rate * z.clamp(max=0))
    first = torch.where(z <= 0, exponential, scale)
    return (value, first, torch.where(z < 0, rate * exponential, 0.0))[: order + 1]


def _elu(z: Tensor, order: int, alpha: float) -> Derivatives:
    return _elu_like(z, order, F.elu(z, alpha), 1.0, alpha, 1.0)


def _selu(z: Tensor, order: int) -> Derivatives:
    return _elu_like(z, order, F.selu(z), _SELU_SCALE, _SELU_ALPHA, 1.0)


def _celu(z: Tensor, order: int, alpha: float) -> Derivatives:
    return _elu_like(z, order, F.celu(z, alpha), 1.0, alpha, 1 / alpha)


def _density(z: Tensor) -> Tensor:
    """The standard normal density φ(z)."""
    return torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))


def _gelu(z: Tensor, order: int) -> Derivatives:
    """z Φ(z): g′ = Φ + z φ, g″ = (2 − z²) φ."""
    if order == 0:
        return (F.gelu(z),)
    density = _density(z)
    return (F.gelu(z), torch.special.ndtr(z) + z * density, (2 - z * z) * density)[: order + 1]


def _gelu_tanh(z: Tensor, order: int) -> Derivatives:
    """z (1 + tanh u)/2 with u = √(2/π) (z + 0.044715 z³)."""
    # Beyond 20, tanh is ±1 to the last digit, and the cube cannot overflow.
    c = z.clamp(-20, 20)
    t = torch.tanh(_ROOT_2_OVER_PI * (c + 0.044715 * c**3))
    value = 0.5 * z * (1 + t)
    if order == 0:
        return (value,)
    sech2 = (1 - t) * (1 + t)
    du, ddu = _ROOT_2_OVER_PI * (1 + 3 * 0.044715 * c * c), _ROOT_2_OVER_PI * 6 * 0.044715 * c
    first = 0.5 * (1 + t) + 0.5 * c * sech2 * du
    return (value, first, sech2 * (du + 0.5 * c * ddu - c * t * du * du))[: order + 1]


def _silu(z: Tensor, order: int) -> Derivatives:
    s = torch.sigmoid(z)
    if order == 0:
        return (z * s,)
    slope = s * torch.sigmoid(-z)
    return (z * s, s + z * slope, slope * (2 + z * (1 - 2 * s)))[: order + 1]


def _mish(z: Tensor, order: int) -> Derivatives:
    """z tanh(softplus(z)), where with v = sigmoid(−z) the tanh is (1 − v²)/(1 + v²), its derivative 4 v²/(1 + v²)²."""
    s, v = torch.sigmoid(z), torch.sigmoid(-z)
    t = s * (1 + v) / (1 + v * v)
    if order == 0:
        return (z * t,)
    sech2 = (2 * v / (1 + v * v)) ** 2
    slope, bend = s * torch.sigmoid(-z), -2 * t * s * s
    return (z * t, t + z * sech2 * s, sech2 * (2 * s + z * (slope + bend)))[: order + 1]


def _sigmoid(z: Tensor, order: int) -> Derivatives:
    s = torch.sigmoid(z)
    if order == 0:
        return (s,)
    slope = s * torch.sigmoid(-z)
    return (s, slope, slope * (1 - 2 * s))[: order + 1]


def _log_sigmoid(z: Tensor, order: int) -> Derivatives:
    value = F.logsigmoid(z)
    if order == 0:
        return (value,)
    other = torch.sigmoid(-z)
    return (value, other, -other * torch.sigmoid(z))[: order + 1]


def _tanh(z: Tensor, order: int) -> Derivatives:
    t = torch.tanh(z)
    if order == 0:
        return (t,)
    sech2 = 4 * torch.sigmoid(2 * z) * torch.sigmoid(-2 * z)  # keeps its digits where 1 − t² has none
    return (t, sech2) if order == 1 else (t, sech2, -2 * t * sech2)


def _softplus(z: Tensor, order: int, beta: float, threshold: float) -> Derivatives:
    """log(1 + exp(beta z))/beta; z itself where beta z > threshold, as torch has it."""
    value = F.softplus(z, beta, threshold)
    if order == 0:
        return (value,)
    linear = beta * z > threshold
    s = torch.sigmoid(beta * z)
    if order == 1:
        return (value, torch.where(linear, 1.0, s))
    second = beta * s * torch.sigmoid(-beta * z)
    # At the threshold itself torch's second derivative is 0.
    return (value, torch.where(linear, 1.0, s), torch.where(beta * z >= threshold, 0.0, second))[: order + 1]


def _softsign(z: Tensor, order: int) -> Derivatives:
    inverse = 1 / (1 + z.abs())
    return (z * inverse, inverse**2, -2 * z.sign() * inverse**3)[: order + 1]


def _erf(z: Tensor, order: int) -> Derivatives:
    if order == 0:
        return (torch.erf(z),)
    first = (2 / math.sqrt(math.pi)) * torch.exp(-z * z)
    return (torch.erf(z), first, -2 * z * first)[: order + 1]


def _normal_cdf(z: Tensor, order: int) -> Derivatives:
    if order == 0:
        return (torch.special.ndtr(z),)
    density = _density(z)
    return (torch.special.ndtr(z), density, -z * density)[: order + 1]


def _sigmoid_softplus(z: Tensor, order: int) -> Derivatives:
    """sigmoid(4 z) + softplus(z), with torch's threshold."""
    parts = zip(_sigmoid(4 * z, order), _softplus(z, order, 1.0, 20.0), (1, 4, 16), strict=False)
    return tuple(factor * a + b for a, b, factor in parts)


def _square(z: Tensor, order: int) -> Derivatives:
    return (z * z, 2 * z, torch.full_like(z, 2.0))[: order + 1]


def _cube(z: Tensor, order: int) -> Derivatives:
    return (z * z * z, 3 * z * z, 6 * z)[: order + 1]


def _polynomial(z: Tensor, order: int, *coefficients: float) -> Derivatives:
    derivatives = []
    for _ in range(order + 1):
        value = torch.zeros_like(z)
        for c in reversed(coefficients):
            value = value * z + c
        derivatives.append(value)
        coefficients = tuple(i * c for i, c in enumerate(coefficients))[1:]
    return tuple(derivatives)


# By name; the order is that of the codes of the compiled kernels.
FORMULAS: dict[str, Formula] = {
    "identity": _identity,
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "selu": _selu,
    "celu": _celu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "mish": _mish,
    "sigmoid": _sigmoid,
    "log_sigmoid": _log_sigmoid,
    "tanh": _tanh,
    "softplus": _softplus,
    "softsign": _softsign,
    "erf": _erf,
    "normal_cdf": _normal_cdf,
    "sigmoid_softplus": _sigmoid_softplus,
    "square": _square,
    "cube": _cube,
    "polynomial": _polynomial,
}
_N_PARAMETERS = {"leaky_relu": 1, "elu": 1, "celu": 1, "softplus": 2}
CODES = {name: code for code, name in enumerate(FORMULAS)}
IDENTITY = Activation("identity")
# What was registered by users: the function as it stands in their models, and its name among FORMULAS.
REGISTERED: dict[str, Callable[[Tensor], Tensor]] = {}


def register_activation(
    name: str,
    function: Callable[[Tensor], Tensor],
    first: Callable[[Tensor], Tensor],
    second: Callable[[Tensor], Tensor],
) -> Activation:
    """Make an elementwise function known as an activation, so that networks that use it are recognised.

    A network uses it if it calls the same torch functions with the same numbers in the same order as ``function`` does.

    Args:
        name: A new name.
        function: g, a function of a tensor, by torch functions.
        first: g′.
        second: g″.

    Returns:
        The activation.

    Raises:
        ValueError: If the name is taken, g is not elementwise, or a derivative is not that of ``torch.autograd`` (in
            float64 at 401 points between −8 and 8, to 1e-8 of its size).
    """
    if name in FORMULAS:
        raise ValueError(f"name={name!r} is taken; choose another one.")
    z = torch.linspace(-8, 8, 401, dtype=torch.float64) + 1e-3  # beside the usual places of kinks
    _check_derivatives(z, function, first, second)

    def formula(z: Tensor, order: int) -> Derivatives:
        return tuple(f(z) for f in (function, first, second)[: order + 1])

    FORMULAS[name] = formula
    REGISTERED[name] = function
    return Activation(name)


def _check_derivatives(
    z: Tensor,
    function: Callable[[Tensor], Tensor],
    first: Callable[[Tensor], Tensor],
    second: Callable[[Tensor], Tensor],
) -> None:
    with torch.enable_grad():
        leaf = z.clone().requires_grad_(True)
        value = function(leaf)
        some = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))[: len(z) // 2]
        if value.shape != z.shape or not torch.equal(function(z[some]), value[some]):
            raise ValueError("function is not elementwise: it must give one number per element, from that element alone.")
        (slope,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
        bend = torch.autograd.grad(slope.sum(), leaf)[0] if slope.requires_grad else torch.zeros_like(z)
    for argument, given, wanted in (("first", first(z), slope.detach()), ("second", second(z), bend.detach())):
        off = float((given - wanted).abs().max())
        if given.shape != z.shape or not off <= 1e-8 * max(float(wanted.abs().max()), 1.0):
            where = float(z[int((given - wanted).abs().argmax())])
            raise ValueError(
                f"{argument} is not the {argument} derivative of function: it differs from that of torch.autograd by "
                f"{off:.1e} at z = {where:.4g}."
            )
