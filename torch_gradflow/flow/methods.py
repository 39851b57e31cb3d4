"""All integrators by name."""

from __future__ import annotations

from torch_gradflow.flow import explicit, scipy_methods
from torch_gradflow.flow.auto import Auto
from torch_gradflow.flow.bdf import Bdf
from torch_gradflow.flow.bdf_cg import BdfCg
from torch_gradflow.flow.bdf_secant import BdfSecant
from torch_gradflow.flow.exprb53 import Exprb53, Exprb53Lanczos
from torch_gradflow.flow.method import FlowMethod
from torch_gradflow.flow.rkc2 import Rkc2

# Those among which "auto" chooses.
RACING = ("dopri5", "bdf", "bdf-cg", "bdf-secant", "exprb53", "rkc2")
METHODS: dict[str, FlowMethod] = {
    **explicit.METHODS,
    **scipy_methods.METHODS,
    "bdf": Bdf(),
    "bdf-cg": BdfCg(),
    "bdf-secant": BdfSecant(),
    "exprb53": Exprb53(),
    "exprb53-lanczos": Exprb53Lanczos(),
    "rkc2": Rkc2(),
}
METHODS = {"auto": Auto({name: METHODS[name] for name in RACING if name in METHODS}), **METHODS}


def find_method(name: str) -> FlowMethod:
    """The method of that name.

    Raises:
        ValueError: For an unknown name.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, not {name!r}.")
    return METHODS[name]
