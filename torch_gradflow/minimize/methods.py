"""All minimisers by name."""

from __future__ import annotations

from torch_gradflow.minimize import external
from torch_gradflow.minimize.auto import Auto
from torch_gradflow.minimize.krylov import TrustRegionCG, TrustRegionLanczos
from torch_gradflow.minimize.least_squares import LevenbergMarquardt
from torch_gradflow.minimize.method import Minimiser
from torch_gradflow.minimize.newton import Newton, SaddleFreeNewton
from torch_gradflow.minimize.quasi_newton import Bfgs, Lbfgs
from torch_gradflow.minimize.trust_region import TrustRegionNewton

_ALL: tuple[Minimiser, ...] = (
    Auto(),
    TrustRegionNewton(),
    TrustRegionLanczos(),
    TrustRegionCG(),
    LevenbergMarquardt(),
    Newton(),
    SaddleFreeNewton(),
    Bfgs(),
    Lbfgs(),
)
METHODS: dict[str, Minimiser] = {**{method.name: method for method in _ALL}, **external.METHODS}


def find_method(name: str) -> Minimiser:
    """The method of that name.

    Raises:
        ValueError: For an unknown name.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, not {name!r}.")
    return METHODS[name]
